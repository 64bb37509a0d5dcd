"""`dpo4rec fit` and `dpo4rec evaluate` on tiny data of every kind."""

import gzip
import json
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dpo4rec.cli import app
from dpo4rec.files import read_json, read_parquet, remove
from dpo4rec.recommenders.fitter import FitJob, Fitter

SMALL = {
    "data": {"max_lists_per_user": 2, "positives_per_list": 2, "list_length": 6, "validation_share": 0.2, "test_share": 0.2},
    "sequential": {"epochs": 1, "embedding_dim": 8, "max_length": 20},
    "recommender": {"epochs": 1, "embedding_dim": 8, "hidden_dim": 16, "expert_hidden_dim": 16},
    "encoder": {"dimensions": 8},
    "evaluation": {"seeds": 1, "bootstrap_samples": 100, "more_cutoffs": [20]},
    "retrieved": {"length": 20},
}
LOG = [(f"u{user}", f"i{(3 * user + n) % 30}", 1 + (user + n) % 5, 2 * n) for user in range(20) for n in range(14)]
LOG += [(f"u{user}", f"own{user}", 5, 17) for user in range(20)]
"""User, item, rating and time; one of every user's later items is nobody else's."""
ITEMS = list(dict.fromkeys(item for _, item, _, _ in LOG))


def call(*words: str, status: int = 0) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == status, done.output
    return done.output


def settings(file: Path, **data: object) -> str:
    file.write_text(yaml.safe_dump({**SMALL, "data": {**SMALL["data"], **data}}))
    return str(file)


def atomic(folder: Path) -> dict[str, object]:
    rows = "".join(f"{user}\t{item}\t{rating}\t{time}\n" for user, item, rating, time in LOG)
    (folder / "tiny.inter").write_text(f"user_id:token\titem_id:token\trating:float\ttimestamp:float\n{rows}")
    items = "".join(f"{item}\tThe {item}\tDrama Comedy\n" for item in ITEMS)
    (folder / "tiny.item").write_text(f"item_id:token\tmovie_title:token_seq\tclass:token_seq\n{items}")
    return {"source": "atomic", "folder": str(folder), "atomic": {"name": "tiny"}}


def amazon(folder: Path) -> dict[str, object]:
    """As of 2018."""
    names = "reviewerID", "asin", "overall", "unixReviewTime"
    write_lines(folder / "Games_5.json.gz", [json.dumps(dict(zip(names, row, strict=True))) for row in LOG])
    games = [{"asin": item, "title": f"The {item}", "brand": "Sony", "category": ["Games", "PC"]} for item in ITEMS]
    write_lines(folder / "meta_Games.json.gz", [json.dumps(game) for game in games])
    return {"source": "amazon", "folder": str(folder), "amazon": {"reviews": "Games_5.json.gz", "metadata": "meta_Games.json.gz"}}


def steam(folder: Path) -> dict[str, object]:
    reviews = [{"username": user, "product_id": item, "date": str(date(2017, 1, 1 + time))} for user, item, _, time in LOG]
    write_lines(folder / "steam_reviews.json.gz", [repr(review) for review in reviews])
    games = [{"id": item, "app_name": f"The {item}", "genres": ["Casual"], "release_date": "2016-11-03"} for item in ITEMS]
    write_lines(folder / "steam_games.json.gz", [repr(game) for game in games])
    return {"source": "steam", "folder": str(folder), "like_threshold": 0}


def write_lines(file: Path, lines: list[str]) -> None:
    file.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a retriever, and a re-ranker of what it retrieves and one of frozen lists; two seeds each."""
    folder = tmp_path_factory.mktemp("fitted")
    config = settings(folder / "mine.yaml", **atomic(folder))
    call("fit", str(folder / "R"), "--config", config, "--set", "evaluation.seeds=2", "--model", "sasrec")
    call("fit", str(folder / "R"), "--model", "setrank", "--lists", "retrieved")
    call("fit", str(folder / "R"), "--model", "prm")
    call("evaluate", str(folder / "R"))
    return folder / "R"


@pytest.fixture
def run(fitted: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(fitted, tmp_path / "R")
    return tmp_path / "R"


def measured(run: Path, protocol: str) -> list[str]:
    return sorted(read_json(run / "evaluation" / protocol / "summary.json")["seeds"])


def test_an_interrupted_fit_is_not_measured_until_it_is_finished(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Fitter._fit

    def one_seed(self: Fitter, job: FitJob) -> dict[str, str | int | float]:
        if job.out.endswith("seed-1"):
            raise KeyboardInterrupt
        return whole(self, job)

    with monkeypatch.context() as patch:
        patch.setattr(Fitter, "_fit", one_seed)
        assert CliRunner().invoke(app, ["fit", str(run), "--model", "dlcm"]).exit_code
    assert (run / "recommenders" / "dlcm" / "models" / "seed-0").exists()
    said = call("evaluate", str(run), status=2)
    assert "recommenders/dlcm: not measured" in said
    assert measured(run, "frozen") == ["prm"]
    call("fit", str(run), "--model", "dlcm")
    call("evaluate", str(run))
    assert measured(run, "frozen") == ["dlcm", "prm"]


def test_a_fit_whose_next_texts_are_refused_is_not_measured(run: Path) -> None:
    (run / "bad.jsonl").write_text('{"user_id": "u1", "text": 3}')
    call("fit", str(run), "--model", "prm", "--texts", str(run / "bad.jsonl"), status=2)
    assert "recommenders/prm: not measured" in call("evaluate", str(run), status=2)
    call("fit", str(run), "--model", "prm")
    call("evaluate", str(run))


def test_a_re_ranker_of_other_lists_than_the_present_ones_is_not_measured(run: Path) -> None:
    call("fit", str(run), "--model", "sasrec", "--set", "sequential.epochs=2")
    said = call("evaluate", str(run), status=2)
    assert "recommenders/setrank: not measured" in said
    assert "recommenders/prm: not measured" not in said
    call("fit", str(run), "--model", "setrank", "--lists", "retrieved")
    call("evaluate", str(run))
    assert measured(run, "retrieved") == ["setrank"]


def test_an_unfinished_retriever_retrieves_nothing(run: Path) -> None:
    remove(run / "recommenders" / "sasrec" / "models" / "seed-1")
    assert "no finished fit" in call("fit", str(run), "--model", "mir", "--lists", "retrieved", status=2)
    said = call("evaluate", str(run), status=2)
    assert "recommenders/setrank: not measured" in said
    assert measured(run, "frozen") == ["prm"]


def test_every_re_ranker_is_fitted_and_measured_on_both_kinds_of_lists(run: Path) -> None:
    for protocol in ("frozen", "retrieved"):
        for model in ("dlcm", "setrank", "prm", "mir"):
            call("fit", str(run), "--model", model, "--lists", protocol, "--name", f"{model}-{protocol}")
    call("evaluate", str(run))
    for protocol in ("frozen", "retrieved"):
        summary = read_json(run / "evaluation" / protocol / "summary.json")
        for model in ("dlcm", "setrank", "prm", "mir"):
            assert summary["seeds"][f"{model}-{protocol}"] == 2
            assert 0 < summary["metrics"][f"{model}-{protocol}"]["ndcg@20"] <= 1


@pytest.mark.parametrize("source", [steam, amazon, atomic])
def test_every_public_format_is_fitted_and_measured(source: Callable[[Path], dict[str, object]], tmp_path: Path) -> None:
    config, run = settings(tmp_path / "mine.yaml", **source(tmp_path)), tmp_path / "R"
    call("fit", str(run), "--config", config, "--model", "sasrec")
    call("fit", str(run), "--model", "prm")
    call("evaluate", str(run))
    for protocol, name, users in (("catalogue", "sasrec", 20), ("frozen", "prm", 4)):
        summary = read_json(run / "evaluation" / protocol / "summary.json")
        assert summary["users"] == users
        assert 0 <= summary["metrics"][name]["ndcg@10"] < 1
    assert read_json(run / "data" / "summary.json")["interactions"] == len(LOG)


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
