"""Every command of README and docs is executed: here as a dry run, or by the test or CI step named in ELSEWHERE."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from benchmarks import table
from dpo4rec.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {
    "make": ".ci/run",
    "launchers/align.sh": "test_alignment_processes.py",
    "launchers/ray_head.sh": "test_ray_jobs.py",
    "python ray_jobs/submit.py": "test_ray_jobs.py",
    "launchers/slurm.sh": "test_launchers.py, with stand-ins for srun and scontrol",
    "python benchmarks": "by hand: their results are committed",
    "dpo4rec prepare ml-1m --download": "test_data_download.py, from a local server",
    "dpo4rec prepare |": "test_run.py",
    "dpo4rec run --start-from": "test_run.py, on a folder that is there",
    "dpo4rec export": "test_export.py",
    "dpo4rec evaluate RUN_DIR --trec": "test_run.py",
    "dpo4rec reproduce": "test_study.py, on a study of simulated users",
}
COMMAND = re.compile(r"(?:dpo4rec|make|launchers/|python) ?[a-z0-9./_-]*[^`\n#]*")


def commands() -> list[str]:
    """Lines of code blocks, and code in a sentence, that start like a command."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = [block for language, block in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL) if not language]
        pieces = [line.strip() for block in blocks for line in block.splitlines()]
        pieces += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        found += [match[0].strip().rstrip("&").strip() for piece in pieces if (match := COMMAND.fullmatch(piece.split("   ")[0]))]
    return sorted({command for command in found if " " in command})


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_docs_work(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if any(command.startswith(start) for start in ELSEWHERE):
        return
    if command.startswith("launchers/debug.sh"):
        words = [str(ROOT / "launchers" / "debug.sh"), *shlex.split(command)[1:], "--dry-run"]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        launched = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PATH": path})
        assert launched.returncode == 0, launched.stderr
        return
    monkeypatch.chdir(tmp_path)
    shop = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8"), re.DOTALL)
    assert shop is not None
    (tmp_path / "shop.yaml").write_text(shop[1])
    words = shlex.split(command)
    assert words[:2] in (["dpo4rec", "run"], ["dpo4rec", "plan"], ["dpo4rec", "doctor"]), command
    done = CliRunner().invoke(app, [*words[1:], *([] if "--dry-run" in words or words[1] != "run" else ["--dry-run"])])
    assert done.exit_code == 0, done.output


def test_there_are_commands_to_check() -> None:
    assert "make quickstart" in {command.split("  ")[0] for command in commands()}
    assert len(commands()) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_options_after_set_are_known() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    settings = re.findall(r"--set ([a-z_.]+=[^\s`]+)", text)
    arguments = [word for setting in settings if "alignment.precision" not in setting for word in ("--set", setting)]
    done = CliRunner().invoke(app, ["run", "--preset", "quickstart", "--dry-run", *arguments])
    assert done.exit_code == 0, done.output
    assert yaml.safe_load(done.output.split("stages:")[0])["alignment"]["beta"] == 0.05


def test_tables_are_made_from_the_committed_results() -> None:
    assert (ROOT / "docs" / "benchmarks.md").read_text() == table.benchmarks_page()
    for page, made in table.MARKED.items():
        assert f"<!-- results -->\n{made().rstrip()}\n<!-- /results -->" in (ROOT / page).read_text(), page
