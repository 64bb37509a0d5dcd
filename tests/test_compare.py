"""Comparisons of two run folders: what is joined, tested, corrected and refused, and the command."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from typer.testing import CliRunner

from dpo4rec import files
from dpo4rec.cli import app
from dpo4rec.errors import InputError
from dpo4rec.evaluation.comparison import compare
from dpo4rec.evaluation.significance import holm, paired_bootstrap, wilcoxon

USERS = 40
DOCS = Path(__file__).parents[1] / "docs" / "evaluation.md"
Values = dict[str, dict[str, np.ndarray]]  # condition -> metric -> [users]


def values(seed: int, *conditions: str, metrics: tuple[str, ...] = ("ndcg@5", "map@5"), users: int = USERS) -> Values:
    generator = np.random.default_rng(seed)
    return {condition: {metric: generator.random(users) for metric in metrics} for condition in conditions}


def called(*words: str | Path) -> str:
    done = CliRunner().invoke(app, ["compare", *map(str, words)])
    assert done.exit_code == 0, done.output
    return done.output


def write(
    folder: Path, of: Values, protocol: str | None = "catalogue", candidates: str = "abc", first: int = 0, reverse: bool = False
) -> Path:
    """A run folder with the values of users first, first + 1, ...; without a protocol that of a whole run. Popularity is a control."""
    tables = []
    for condition, metrics in of.items():
        count = len(next(iter(metrics.values())))
        tables.append(pa.table({"user_id": [f"u{first + n}" for n in range(count)], "condition": [condition] * count, **metrics}))
    table = pa.concat_tables(tables)
    out = folder / "evaluation" / (protocol or "")
    files.write_parquet(table.take(list(range(len(table)))[::-1]) if reverse else table, out / "per_user.parquet")
    if protocol:
        files.write_json({"candidates_hash": candidates, "controls": ["popularity"]}, out / "summary.json")
    else:
        files.write_json({"lists_hash": candidates}, out / "results.json")
    return folder


def test_rows_hold_both_tests_of_each_shared_condition(tmp_path: Path) -> None:
    left, right = values(0, "history", "text", "only here"), values(1, "text", "history")
    a, b = write(tmp_path / "a", left, None), write(tmp_path / "b", right, None, reverse=True)
    rows = compare(a, b, ["ndcg@5", "map@5"], seed=3, samples=500)
    assert [(row["protocol"], row["a"], row["b"], row["metric"]) for row in rows] == [
        ("lists", name, name, metric) for metric in ("ndcg@5", "map@5") for name in ("history", "text")
    ]
    for row in rows:
        x, y = left[row["a"]][row["metric"]], right[row["b"]][row["metric"]]
        assert (row["users"], row["only_a"], row["only_b"], row["candidates_hash"]) == (USERS, 0, 0, "abc")
        assert row["difference"] == pytest.approx(x.mean() - y.mean())
        assert (row["mean_a"], row["mean_b"]) == (pytest.approx(x.mean()), pytest.approx(y.mean()))
        assert row["wilcoxon_p_value"] == pytest.approx(wilcoxon(torch.tensor(x), torch.tensor(y)))
        assert row["p_value"] == pytest.approx(paired_bootstrap(torch.tensor(x), torch.tensor(y), 0, 500).p_value, abs=0.1)
    for name in ("p_value", "wilcoxon_p_value"):
        assert [row[f"{name}_holm"] for row in rows] == holm([row[name] for row in rows])
    assert rows == compare(a, b, ["ndcg@5", "map@5"], seed=3, samples=500)


def test_users_are_joined_and_those_in_one_folder_counted(tmp_path: Path) -> None:
    left, right = values(0, "sasrec"), values(1, "sasrec")
    left["sasrec"]["ndcg@5"][7] = np.nan  # u7 has no value in a
    a, b = write(tmp_path / "a", left), write(tmp_path / "b", right, first=5)  # u0..u39 and u5..u44
    (row,) = compare(a, b, samples=100)
    expected = np.nanmean(left["sasrec"]["ndcg@5"][5:] - right["sasrec"]["ndcg@5"][:-5])
    assert row["difference"] == pytest.approx(expected)
    assert (row["users"], row["only_a"], row["only_b"]) == (34, 5, 6)


def test_single_fits_are_paired_whatever_their_names(tmp_path: Path) -> None:
    a = write(write(tmp_path / "a", values(0, "popularity", "sasrec")), values(2, "popularity", "prm"), "retrieved")
    b = write(write(tmp_path / "b", values(1, "popularity", "gru4rec")), values(3, "popularity", "dlcm"), "retrieved")
    assert [(row["protocol"], row["a"], row["b"]) for row in compare(a, b, samples=100)] == [
        ("catalogue", "sasrec", "gru4rec"),
        ("retrieved", "prm", "dlcm"),
    ]
    c = write(tmp_path / "c", values(1, "gru4rec", "bpr", "popularity"))
    with pytest.raises(InputError, match=r"controls left out \(catalogue: popularity, sasrec against bpr, gru4rec, popularity\)"):
        compare(a, c)
    with pytest.raises(
        InputError, match=r"no 'sasrec' against 'prm' \(catalogue: .*; retrieved: popularity, prm against dlcm, popularity\)"
    ):
        compare(a, b, condition="sasrec", against="prm")
    with pytest.raises(InputError, match="--against: it belongs to --condition"):
        compare(a, c, against="bpr")


def test_named_conditions_are_compared_and_within_one_folder_too(tmp_path: Path) -> None:
    of = values(0, "sasrec", "gru4rec", "popularity")
    a = write(write(tmp_path / "a", of), values(1, "prm", "popularity"), "retrieved")
    (row,) = compare(a, a, samples=100, condition="sasrec", against="gru4rec")
    assert (row["protocol"], row["a"], row["b"]) == ("catalogue", "sasrec", "gru4rec")
    assert row["difference"] == pytest.approx((of["sasrec"]["ndcg@5"] - of["gru4rec"]["ndcg@5"]).mean())
    assert [row["protocol"] for row in compare(a, a, samples=100, condition="popularity")] == ["catalogue", "retrieved"]
    assert "sasrec against" in called(a, a, "--condition", "sasrec", "--against", "popularity")


def test_other_candidates_of_one_protocol_leave_the_others(tmp_path: Path) -> None:
    a = write(write(tmp_path / "a", values(0, "sasrec")), values(2, "prm"), "retrieved")
    b = write(write(tmp_path / "b", values(1, "sasrec")), values(3, "prm"), "retrieved", candidates="other")
    with pytest.raises(InputError, match=r"the candidates are others \(abc and other\)\. .* choose another --protocol"):
        compare(a, b)
    assert "ndcg@5, catalogue, candidates abc" in called(a, b, "--protocol", "catalogue")
    with pytest.raises(InputError, match="one has catalogue, retrieved, the other catalogue, retrieved"):
        compare(a, b, protocol="frozen")


def test_the_default_metric_is_ndcg_at_10_or_else_5(tmp_path: Path) -> None:
    a = write(tmp_path / "a", values(0, "x", metrics=("ndcg@5", "ndcg@10")))
    b, c = write(tmp_path / "b", values(1, "x", metrics=("ndcg@10", "hr@10"))), write(tmp_path / "c", values(1, "x"))
    d = write(tmp_path / "d", values(1, "x", metrics=("hr@1",)))
    assert [row["metric"] for row in compare(a, b, samples=10)] == ["ndcg@10"]
    assert [row["metric"] for row in compare(a, c, samples=10)] == ["ndcg@5"]
    with pytest.raises(InputError, match=r"not both have ndcg@10 or ndcg@5\. Give --metric one of: nothing"):
        compare(a, d)
    with pytest.raises(InputError, match=r"not both have hr@10\. Give --metric one of: ndcg@10"):
        compare(a, b, ["hr@10"])


def test_a_run_against_itself_is_no_difference(tmp_path: Path) -> None:
    a = write(tmp_path / "a", values(0, "x"))
    (row,) = compare(a, a, samples=100)
    assert (row["difference"], row["low"], row["high"]) == (0, 0, 0)
    assert row["p_value"] == row["wilcoxon_p_value"] == row["p_value_holm"] == 1


def repeated(folder: Path) -> None:
    file = folder / "evaluation" / "catalogue" / "per_user.parquet"
    table = files.read_parquet(file)
    files.write_parquet(pa.concat_tables([table, table.slice(3, 1)]), file)


def without_column(folder: Path) -> None:
    file = folder / "evaluation" / "catalogue" / "per_user.parquet"
    files.write_parquet(files.read_parquet(file).drop_columns("condition"), file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: write(folder, values(1, "x"), candidates="other"), r"the candidates are others \(abc and other\)"),
        (lambda folder: files.remove(folder / "evaluation"), "there is no such file"),
        (lambda folder: files.remove(folder / "evaluation" / "catalogue" / "summary.json"), "summary.json: there is no such file"),
        (lambda folder: files.write_json({}, folder / "evaluation" / "catalogue" / "summary.json"), "candidates_hash.*controls"),
        (
            lambda folder: (folder / "evaluation" / "catalogue").rename(folder / "evaluation" / "retrieved"),
            "has catalogue, the other retrieved",
        ),
        (repeated, "user 'u3' has a second row under 'x'"),
        (without_column, "damaged.*condition"),
        (lambda folder: write(folder, values(1, "x"), first=1000), "no user has a value under both"),
    ],
)
def test_what_cannot_be_compared_is_refused(spoil: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", values(0, "x")), write(tmp_path / "b", values(1, "x"))
    spoil(b)
    with pytest.raises(InputError, match=message):
        compare(a, b)


def test_the_command_of_the_docs_prints_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "40")  # no number is cut even on a narrow terminal
    write(Path("R1"), values(0, "text [1]"))
    write(Path("R2"), values(1, "text [1]"), first=2)
    commands = re.findall(r"^\$ dpo4rec (.*)$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert commands
    for command in commands:
        done = CliRunner().invoke(app, shlex.split(command))
        assert done.exit_code == 0, done.output
        for row in compare(Path("R1"), Path("R2"), ["ndcg@5", "map@5"]):
            assert f"{row['metric']}, catalogue, candidates abc" in done.output
            numbers = f"{row['difference']:+.4f}", f"[{row['low']:+.4f}, {row['high']:+.4f}]", f"{row['wilcoxon_p_value_holm']:.4f}"
            assert all(number in done.output for number in numbers)
        for part in ("text [1]", "Left out: 2 users", "over the 2 rows"):
            assert part in done.output


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", values(0, "x")), write(tmp_path / "b", values(1, "x"), candidates="other")
    done = CliRunner().invoke(app, ["compare", str(a), str(b)])
    assert done.exit_code == 2
    assert "the candidates are others" in done.output


def test_a_finished_run_is_compared(micro_run: Path) -> None:
    rows = compare(micro_run, micro_run, samples=10)
    assert {"tuned text", "random"} <= {row["a"] for row in rows}
    assert {row["metric"] for row in rows} == {"ndcg@10"}
