"""Recommenders fitted and measured for their own sake: the commands of docs/recommenders.md, protocols, texts, resuming."""

import collections
import math
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pyarrow as pa
import pytest
import yaml
from typer.testing import CliRunner

from dpo4rec.cli import app
from dpo4rec.data.retrieved import RetrievedConfig, prepare_retrieved, read_candidates
from dpo4rec.errors import InputError
from dpo4rec.evaluation.comparison import compare
from dpo4rec.files import read_json, read_parquet, write_parquet
from dpo4rec.recommenders.sequential import SequentialRecommender

PAGE = Path(__file__).parents[1] / "docs" / "recommenders.md"
SMALL = {
    "data": {
        "simulation": {"users": 150, "items": 200, "interactions_per_user": 30},
        "max_lists_per_user": 2,
        "validation_share": 0.2,
        "test_share": 0.2,
        "history_length": 10,
    },
    "sequential": {"epochs": 2, "embedding_dim": 8, "max_length": 20},
    "recommender": {"epochs": 1, "embedding_dim": 8, "hidden_dim": 16, "expert_hidden_dim": 16},
    "encoder": {"dimensions": 16},
    "evaluation": {"seeds": 2, "bootstrap_samples": 200, "more_cutoffs": [4]},
    "retrieved": {"length": 20},
}


def call(*words: str, status: int = 0) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == status, done.output
    return done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the page's commands were executed, twice with another seed: R and R2."""
    here = tmp_path_factory.mktemp("recommend")
    (here / "mine.yaml").write_text(yaml.safe_dump(SMALL))
    commands = re.findall(r"^\$ (dpo4rec .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 8
    call("fit", str(here / "R2"), "--config", str(here / "mine.yaml"), "--model", "sasrec", "--set", "sequential.layers=1")
    users = read_parquet(here / "R2" / "sequences" / "sequences.parquet")["user_id"].to_pylist()
    rows = "\n".join(f'{{"user_id": "{user}", "text": "likes comedy and drama {n % 5}"}}' for n, user in enumerate(users))
    (here / "profiles.jsonl").write_text(rows)
    call("evaluate", str(here / "R2"))
    for command in commands:
        words = [str(here / word) if word in ("R", "R2", "mine.yaml", "profiles.jsonl") else word for word in shlex.split(command)[1:]]
        call(*words)
    return here


def test_every_protocol_has_its_table_and_files(folder: Path) -> None:
    expected = {
        "catalogue": {"popularity", "sasrec", "gru4rec"},
        "retrieved": {"retriever's order", "popularity", "random", "mir"},
        "frozen": {"popularity", "random", "prm-history", "prm-text"},
    }
    for protocol, conditions in expected.items():
        out = folder / "R" / "evaluation" / protocol
        summary = read_json(out / "summary.json")
        assert set(summary["metrics"]) == conditions
        assert summary["candidates_hash"]
        assert set(summary["controls"]) == {"retriever's order", "popularity", "random"} & conditions
        values = read_parquet(out / "per_user.parquet").to_pandas()
        assert set(values["condition"]) == conditions
        for condition, of in summary["metrics"].items():
            assert 0 <= of["recall@4"] <= of["recall@5"]
            assert 0 < of["coverage@4"] <= of["coverage@10"]
            assert {"novelty@4", "popularity_lift@4", "long_tail@4", "diversity@4"} <= set(values)
            mean = values[values["condition"] == condition]["ndcg@10"].mean()
            assert mean == pytest.approx(of["ndcg@10"], abs=1e-6)
        assert {row["b"] for row in summary["comparisons"]} == {next(iter(summary["metrics"]))}
    assert read_json(folder / "R" / "retrieved" / "summary.json")["ranked"] is True


def test_fits_are_compared_and_controls_only_by_name(folder: Path) -> None:
    """R has sasrec and gru4rec on the whole catalogue and fits of other protocols, R2 has sasrec, R3 gru4rec."""
    r, r2, r3 = folder / "R", folder / "R2", folder / "R3"
    settings = ["--config", str(folder / "mine.yaml"), "--set", "evaluation.seeds=1", "--set", "sequential.epochs=1"]
    call("fit", str(r3), *settings, "--model", "gru4rec")
    call("evaluate", str(r3))
    for a, b, pair in ((r, r2, ("sasrec", "sasrec")), (r2, r3, ("sasrec", "gru4rec")), (r3, r, ("gru4rec", "gru4rec"))):
        assert [(row["a"], row["b"]) for row in compare(a, b, samples=10)] == [pair]
    for against in ("gru4rec", "popularity"):
        (row,) = compare(r, r, samples=10, condition="sasrec", against=against)
        metrics = read_json(r / "evaluation" / "catalogue" / "summary.json")["metrics"]
        assert row["difference"] == pytest.approx(metrics["sasrec"]["ndcg@10"] - metrics[against]["ndcg@10"], abs=1e-6)
        assert row["protocol"] == "catalogue"


def test_exported_rankings_give_the_same_metrics(folder: Path) -> None:
    """For every user and in the mean, users whose target was not retrieved included; a user's lists are topics of their own."""
    ir_measures = pytest.importorskip("ir_measures")
    measures = {"ndcg": ir_measures.nDCG, "ap": ir_measures.AP, "mrr": ir_measures.RR, "precision": ir_measures.P, "recall": ir_measures.R}
    names = {str(measure @ 10): f"{name}@10" for name, measure in measures.items()}
    for protocol, condition in (("catalogue", "popularity"), ("retrieved", "retriever's order"), ("frozen", "popularity")):
        out = folder / "R" / "evaluation" / protocol
        run = ir_measures.read_trec_run(str(out / f"{condition.replace(' ', '-').replace(chr(39), '')}.run"))
        found = ir_measures.iter_calc([of @ 10 for of in measures.values()], list(ir_measures.read_trec_qrels(str(out / "qrels"))), run)
        theirs = pd.DataFrame(
            [(of.query_id.split("#")[0], names[str(of.measure)], of.value) for of in found], columns=["user", "metric", "value"]
        )
        theirs = theirs.groupby(["user", "metric"])["value"].mean().unstack()
        ours = read_parquet(out / "per_user.parquet").to_pandas()
        ours = ours[ours["condition"] == condition].set_index("user_id")[list(theirs.columns)]
        pd.testing.assert_frame_equal(ours.sort_index(), theirs.sort_index(), check_names=False, atol=1e-6, rtol=0)
        means = read_json(out / "summary.json")["metrics"][condition]
        assert {name: means[name] for name in names.values()} == pytest.approx(theirs.mean().to_dict(), abs=1e-6)
    assert read_json(folder / "R" / "retrieved" / "summary.json")["share_with_target"] < 1


def test_a_finished_fit_is_skipped_and_another_name_is_not(folder: Path) -> None:
    before = read_json(folder / "R" / "manifest.json")["stages"]["recommenders/sasrec/fit"]
    call("fit", str(folder / "R"), "--model", "sasrec")
    assert read_json(folder / "R" / "manifest.json")["stages"]["recommenders/sasrec/fit"] == before


def test_what_is_read_of_the_user_follows_from_the_texts(folder: Path) -> None:
    stages = read_json(folder / "R" / "manifest.json")["stages"]
    read = {name: stages[f"recommenders/{name}/fit"]["report"].get("user_signal") for name in ("prm-history", "prm-text", "mir", "sasrec")}
    assert read == {"prm-history": "history", "prm-text": "text", "mir": "history", "sasrec": None}
    said = call("fit", str(folder / "R"), "--model", "mir", "--name", "mir-text", "--texts", str(folder / "profiles.jsonl"))
    assert "user_signal: history+text" in said


def test_the_retrieved_lists_are_the_retrievers(folder: Path) -> None:
    lists = read_parquet(folder / "R" / "retrieved" / "lists.parquet").to_pylist()
    sequences = {row["user_id"]: row for row in read_parquet(folder / "R" / "sequences" / "sequences.parquet").to_pylist()}
    for row in lists:
        items = sequences[row["user_id"]]["item_ids"]
        assert not set(row["candidates"]) & set(items[:-1])
        assert row["labels"] == [int(item == items[-1]) for item in row["candidates"]]


def test_real_interactions_of_a_table_are_learned_and_ranked(real_data, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Amazon's games, which have neither ratings nor times, from Parquet to a table of metrics and a re-ranker on frozen lists."""
    source = real_data("amazon-games-2018")
    values = {**SMALL, "data": {"source": "table", "folder": str(source), "k_core": 5, "like_threshold": 0, "short_users": "drop"}}
    values["data"] |= {"table": {"rating_column": None, "timestamp_column": "position"}, "max_users": 400, "max_lists_per_user": 2}
    (tmp_path / "games.yaml").write_text(yaml.safe_dump(values))
    call("fit", str(tmp_path / "R"), "--config", str(tmp_path / "games.yaml"), "--model", "sasrec")
    call("fit", str(tmp_path / "R"), "--model", "prm", "--set", "recommender.item_text=false")
    assert "cold" in call("evaluate", str(tmp_path / "R"))
    summary = read_json(tmp_path / "R" / "evaluation" / "catalogue" / "summary.json")
    assert summary["users"] == 400
    assert read_json(tmp_path / "R" / "sequences" / "summary.json")["items"] > 10_000
    assert 0 < summary["metrics"]["sasrec"]["hr@10"] < 1


def measured(tmp_path: Path, model: str, *settings: str) -> Path:
    """The run folder of a tiny model of the next item, fitted and evaluated."""
    values = {**SMALL, "data": {"simulation": {"users": 40, "items": 200, "interactions_per_user": 16}}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**values, "evaluation": {"seeds": 1, "bootstrap_samples": 200}}))
    words = [word for setting in settings for word in ("--set", setting)]
    if "sequential.user_text=true" in settings:
        rows = "\n".join(f'{{"user_id": "u{n:02}", "text": "likes comedy and drama {n % 5}"}}' for n in range(41))
        (tmp_path / "profiles.jsonl").write_text(rows)
        words += ["--texts", str(tmp_path / "profiles.jsonl")]
    call("fit", str(tmp_path / "R"), "--config", str(tmp_path / "tiny.yaml"), "--model", model, *words)
    call("evaluate", str(tmp_path / "R"))
    return tmp_path / "R"


@pytest.mark.parametrize(
    ("model", "loss", "of_chance"),
    [
        ("sasrec", "gbce", (20 + 1 - 0.75 * (1 - 20 / 199)) * math.log(2)),
        ("gru4rec", "sampled-softmax", math.log(21)),
        ("sasrec", "cross-entropy", math.log(200)),
    ],
)
def test_every_loss_begins_at_that_of_chance(tmp_path: Path, model: str, loss: str, of_chance: float) -> None:
    negatives = [] if loss == "cross-entropy" else ["sequential.negatives=20"]
    folder = measured(tmp_path, model, f"sequential.loss={loss}", *negatives)
    history = read_json(folder / "recommenders" / model / "models" / "seed-0" / "history.json")["history"]
    assert history[0]["loss"] == pytest.approx(of_chance, rel=0.1)
    assert read_json(folder / "evaluation" / "catalogue" / "summary.json")["metrics"][model]["recall@50"] > 0


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["sequential.user_text=true"],
        ["sequential.item_text=true"],
        ["sequences.split=global-time", "sequential.item_text=true", "sequential.user_text=true"],
        ["sequences.split=global-time"],
    ],
)
def test_texts_and_the_cut_in_time_reach_what_is_ranked(tmp_path: Path, settings: list[str]) -> None:
    folder = measured(tmp_path, "sasrec", *settings)
    out = folder / "evaluation" / "catalogue"
    touched = {
        item
        for row in read_parquet(folder / "sequences" / "sequences.parquet").to_pylist()
        for item in row["item_ids"][: row["train_length"]]
    }
    ranked = {line.split()[2] for line in (out / "sasrec.run").read_text().splitlines()}
    assert bool(ranked - touched) == ("sequential.item_text=true" in settings)  # items without training have nothing but their text
    targets = collections.Counter(line.split()[0] for line in (out / "qrels").read_text().splitlines())
    assert (max(targets.values()) > 1) == ("sequences.split=global-time" in settings)
    fitted = SequentialRecommender.load(folder / "recommenders" / "sasrec" / "models" / "seed-0")
    assert (fitted.user_side is not None) == ("sequential.user_text=true" in settings)
    assert 0 < read_json(out / "summary.json")["metrics"]["sasrec"]["recall@50"] <= 1


def test_ids_with_blanks_reach_other_tools_and_come_back(tmp_path: Path) -> None:
    """As Steam's user names have them."""
    ir_measures = pytest.importorskip("ir_measures")
    users = [f"{name} {n}" for name in ("Chaos Syren", "50% 20%20", "Zoë\u00a0愛") for n in range(6)]
    items = [f"Half Life\t{n}" for n in range(12)]
    log = [{"user_id": user, "item_id": items[(3 * n + step) % 12], "timestamp": step} for n, user in enumerate(users) for step in range(6)]
    write_parquet(pa.Table.from_pylist(log), tmp_path / "interactions.parquet")
    write_parquet(pa.table({"item_id": items, "title": items}), tmp_path / "items.parquet")
    data = {"source": "table", "folder": str(tmp_path), "k_core": 1, "like_threshold": 0, "table": {"rating_column": None}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**SMALL, "data": data}))
    call("fit", str(tmp_path / "R"), "--config", str(tmp_path / "mine.yaml"), "--model", "sasrec", "--set", "evaluation.seeds=1")
    call("evaluate", str(tmp_path / "R"))
    out = tmp_path / "R" / "evaluation" / "catalogue"
    run, qrels = list(ir_measures.read_trec_run(str(out / "sasrec.run"))), list(ir_measures.read_trec_qrels(str(out / "qrels")))
    assert {unquote(line.query_id) for line in run} == {unquote(line.query_id) for line in qrels} == set(users)
    assert {unquote(line.doc_id) for line in run + qrels} == set(items)
    (theirs,) = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, run).values()
    assert theirs == pytest.approx(read_json(out / "summary.json")["metrics"]["sasrec"]["ndcg@10"], abs=1e-6)


def test_a_file_of_candidates(folder: Path, tmp_path: Path) -> None:
    from dpo4rec.data.config import DataConfig, SimulationConfig

    sequences = folder / "R" / "sequences"
    items = read_parquet(sequences / "items.parquet")["item_id"].to_pylist()
    users = read_parquet(sequences / "sequences.parquet").to_pylist()
    held = {row["user_id"]: row["item_ids"][-1] for row in users}
    given = [{"user_id": user, "candidates": [item for item in items if item != target][:12]} for user, target in held.items()]
    data = DataConfig(simulation=SimulationConfig(users=150, items=200, interactions_per_user=30))
    file = tmp_path / "given.parquet"

    def prepared(rows: list[dict[str, object]], data: DataConfig = data, **settings: object) -> dict[str, object]:
        """From a file with a row of another retriever before each."""
        both = [{**row, "retriever": name} for row in rows for name in ("other", "mine")]
        write_parquet(pa.Table.from_pylist(both), file)
        config = RetrievedConfig.model_validate({"file": str(file), "rows": {"retriever": "mine"}, "length": 12, **settings})
        return prepare_retrieved(sequences, read_candidates(config), config, data, 0, tmp_path / "out")

    summary = prepared(given, add_held_out=True)
    assert (summary["share_with_target"], summary["ranked"]) == (1, False)
    assert prepared(given)["share_with_target"] == 0
    for change, cause in [
        ({"user_id": "nobody"}, "user 'nobody': the user is not in the data"),
        ({"user_id": given[0]["user_id"]}, "the user has another row"),
        ({"user_id": None}, "there is no value in 'user_id'"),
        ({"candidates": None}, "there is no value in 'candidates'"),
        ({"candidates": items[:5]}, "it has 5 different candidates"),
        ({"candidates": [*items[:11], "nothing"]}, "'nothing' is not an item"),
        ({"candidates": [*items[:11], None]}, "None is not an item"),
    ]:
        with pytest.raises(InputError, match=f"^{re.escape(str(file))}, row 4.*{cause}"):
            prepared([given[0], {**given[1], **change}, *given[2:]])
    with pytest.raises(InputError, match=f"^{re.escape(str(file))}, column 'candidates': values of list.* are expected, not string"):
        prepared([{**row, "candidates": "a b"} for row in given])
    more = [*given, {**given[0], "user_id": "of another sample"}]
    assert prepared(more, data.model_copy(update={"max_users": len(users)}))["lists"] == len(users)


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--model", "sasrec", "--lists", "frozen"], "whole catalogue"),
        (["--model", "bert"], "model"),
        (["--model", "sasrec", "--set", "recommender.epochs=2"], "does not read it"),
        (["--model", "prm", "--set", "recommender.epoch=2"], "epochs"),
        (["--model", "prm", "--set", "recommender.user_signal=text"], "user texts are read but not given"),
        (["--texts", "profiles.jsonl"], "--model"),
        (["--model", "prm", "--round", "1"], "--round"),
        (["--model", "gru4rec", "--set", "sequential.heads=2"], "no attention"),
        (["--model", "dlcm", "--set", "recommender.heads=4"], "no attention"),
        (["--model", "sasrec", "--name", "../up"], "no file name"),
        (["--model", "sasrec", "--name", "popularity"], "that of a control"),
        (["--model", "sasrec", "--set", "sequences.split=global-time"], "another value"),
    ],
)
def test_what_cannot_work_is_refused(folder: Path, words: list[str], cause: str) -> None:
    assert cause in call("fit", str(folder / "R"), *words, status=2)


def test_a_user_without_text_is_named(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "profiles.jsonl").read_text().splitlines()
    (tmp_path / "some.jsonl").write_text("\n".join(lines[:-5]))
    for words in (["prm", "--name", "short"], ["sasrec", "--name", "short-sequential", "--set", "sequential.user_text=true"]):
        said = call("fit", str(folder / "R"), "--model", *words, "--texts", str(tmp_path / "some.jsonl"), status=2)
        assert re.search(r"user u\d+: has no text vector", said)
    (tmp_path / "others.jsonl").write_text('{"user_id": "nobody", "text": "x"}')
    said = call("fit", str(folder / "R"), "--model", "prm", "--name", "others", "--texts", str(tmp_path / "others.jsonl"), status=2)
    assert "none of the users of these texts is in the run" in said
    (tmp_path / "texts.csv").write_text("user_id,text\nu1,x\n")
    said = call("fit", str(folder / "R"), "--model", "prm", "--name", "csv", "--texts", str(tmp_path / "texts.csv"), status=2)
    assert "cannot be read from CSV" in said
    assert "--model" in call("fit", str(folder / "R"), "--model", "prm", "--set", "recommender.model=dlcm", status=2)
    (tmp_path / "wrong.jsonl").write_text('{"user_id": "u1", "text": 3}')
    said = call("fit", str(folder / "R"), "--model", "prm", "--name", "wrong", "--texts", str(tmp_path / "wrong.jsonl"), status=2)
    assert "line 1" in said
    write_parquet(pa.table({"user": ["a"]}), tmp_path / "wrong.parquet")
    said = call("fit", str(folder / "R"), "--model", "prm", "--name", "wrong", "--texts", str(tmp_path / "wrong.parquet"), status=2)
    assert "no column 'user_id'" in said
    write_parquet(pa.table({"user_id": ["a", "b"], "text": ["likes drama", None]}), tmp_path / "wrong.parquet")
    said = call("fit", str(folder / "R"), "--model", "prm", "--name", "wrong", "--texts", str(tmp_path / "wrong.parquet"), status=2)
    assert "wrong.parquet, row 2: user_id 'b' or text 'None' is not a text" in said


def test_recbole_reads_what_is_written(folder: Path, tmp_path: Path) -> None:
    call("atomic", str(folder / "R"), str(tmp_path / "recbole"), "--name", "mine")
    lines = (tmp_path / "recbole" / "mine" / "mine.inter").read_text(encoding="utf-8").splitlines()
    assert lines[0].split("\t") == ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]
    assert len(lines) == 1 + len(read_parquet(folder / "R" / "data" / "interactions.parquet"))
