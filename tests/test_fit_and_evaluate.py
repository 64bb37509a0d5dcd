"""`dpo4rec fit` and `dpo4rec evaluate` on tiny data of every kind."""

from pathlib import Path

import yaml
from typer.testing import CliRunner

from dpo4rec.cli import app
from dpo4rec.files import read_json, read_parquet

SMALL = {
    "data": {"max_lists_per_user": 2, "positives_per_list": 2, "list_length": 6, "validation_share": 0.2, "test_share": 0.2},
    "sequential": {"epochs": 1, "embedding_dim": 8, "max_length": 20},
    "recommender": {"epochs": 1, "embedding_dim": 8, "hidden_dim": 16, "expert_hidden_dim": 16},
    "encoder": {"dimensions": 8},
    "evaluation": {"seeds": 1, "bootstrap_samples": 100},
    "retrieved": {"length": 10},
}
LOG = [(f"u{user}", f"i{(3 * user + n) % 30}", 1 + (user + n) % 5, 2 * n) for user in range(20) for n in range(14)]
LOG += [(f"u{user}", f"own{user}", 5, 17) for user in range(20)]
"""User, item, rating and time; one of every user's later items is nobody else's."""


def call(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.output


def settings(file: Path, **data: object) -> str:
    file.write_text(yaml.safe_dump({**SMALL, "data": {**SMALL["data"], **data}}))
    return str(file)


def atomic(folder: Path) -> dict[str, object]:
    rows = "".join(f"{user}\t{item}\t{rating}\t{time}\n" for user, item, rating, time in LOG)
    (folder / "tiny.inter").write_text(f"user_id:token\titem_id:token\trating:float\ttimestamp:float\n{rows}")
    items = "".join(f"{item}\tThe {item}\tDrama Comedy\n" for item in dict.fromkeys(item for _, item, _, _ in LOG))
    (folder / "tiny.item").write_text(f"item_id:token\tmovie_title:token_seq\tclass:token_seq\n{items}")
    return {"source": "atomic", "folder": str(folder), "atomic": {"name": "tiny"}}


def test_cold_candidates_and_targets_of_lists_are_counted_and_said(tmp_path: Path) -> None:
    run = tmp_path / "R"
    call("fit", str(run), "--config", settings(tmp_path / "mine.yaml", **atomic(tmp_path)), "--model", "prm")
    said = call("evaluate", str(run))
    users, histories, lists = (read_parquet(run / "data" / f"{name}.parquet").to_pylist() for name in ("users", "histories", "lists"))
    split = {row["user_id"]: row["split"] for row in users}
    known = {item for row in histories if split[row["user_id"]] == "train" for item in row["item_ids"]}
    known |= {item for row in lists if split[row["user_id"]] == "train" for item in row["candidates"]}
    tested = [row for row in lists if split[row["user_id"]] == "test"]
    cold = [label for row in tested for item, label in zip(row["candidates"], row["labels"], strict=True) if item not in known]
    summary = read_json(run / "evaluation" / "frozen" / "summary.json")
    assert (summary["cold_test_candidates"], summary["cold_test_targets"]) == (len(cold), sum(cold))
    assert len(cold) > sum(cold) > 0
    assert f"{len(cold)} cold test candidates" in said
    assert f"{sum(cold)} cold test targets" in said
