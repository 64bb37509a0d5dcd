"""The page of a finished run: what is on it, and that nothing of the data is markup there."""

import json
import shutil
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from dpo4rec.cli import app
from dpo4rec.conditions import CONDITIONS
from dpo4rec.config import resolve
from dpo4rec.driver import Run
from dpo4rec.errors import InputError
from dpo4rec.experiment import Experiment
from dpo4rec.report.page import EXAMPLES, write_report

EVIL = "<script>alert('x')</script> & <b>"
VOID = {"meta"}


class Page(HTMLParser):
    """Its text, and its tags, each of which must be closed where it belongs."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not {name for name, _ in attributes} & {"src", "href", "onclick", "onload"}
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def folder(micro_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(micro_run, tmp_path / "run")
    return tmp_path / "run"


def test_the_page_holds_conditions_comparisons_texts_and_settings(folder: Path) -> None:
    done = CliRunner().invoke(app, ["evaluate", str(folder)])
    assert done.exit_code == 0, done.output
    page = Page(folder / "report.html")
    results = json.loads((folder / "evaluation" / "results.json").read_text())
    for condition in CONDITIONS:
        assert f"{results['metrics'][condition.label]['ndcg@5']:.4f}" in page.words[page.words.index(condition.label) :][:8]
    row = next(row for row in results["comparisons"] if (row["a"], row["b"], row["metric"]) == ("tuned text", "untuned text", "ndcg@5"))
    assert f"{row['difference']:+.4f}, p = {row['p_value']:.4f}, corrected {row['p_value_holm']:.4f}" in page.words
    assert sum(word.startswith("user ") for word in page.words) == EXAMPLES
    assert page.tags.count("circle") == sum(row["metric"] == "ndcg@5" for row in results["comparisons"])
    assert "script" not in page.tags
    assert any("pairs_per_step: 8" in word for word in page.words)


def test_what_comes_from_data_is_text(folder: Path) -> None:
    run = Run(resolve(None, folder / "config.yaml", []), folder)
    experiment = Experiment(run)
    for part in (folder / experiment.texts_of("tuned", "test", 1.0) / "samples").glob("*.parquet"):
        table = pq.read_table(part)
        pq.write_table(table.set_column(table.column_names.index("text"), "text", pa.array([EVIL] * len(table))), part)
    page = Page(write_report(experiment))
    run.folder.release()
    assert "script" not in page.tags
    assert page.words.count(EVIL) == EXAMPLES
    assert escape(EVIL) in (folder / "report.html").read_text()


def test_a_run_that_is_not_evaluated_has_no_page(folder: Path) -> None:
    (folder / "evaluation" / "results.json").unlink()
    run = Run(resolve(None, folder / "config.yaml", []), folder)
    with pytest.raises(InputError, match=r"results.json"):
        write_report(Experiment(run))
    run.folder.release()
