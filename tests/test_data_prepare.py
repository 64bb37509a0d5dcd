"""The data folder: histories, splits, lists, and the truth behind the simulation."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo4rec.data.config import DataConfig, SimulationConfig, TableConfig
from dpo4rec.data.prepare import prepare
from dpo4rec.data.schema import era
from dpo4rec.data.simulation import simulate
from dpo4rec.errors import InputError

FILES = ("interactions", "items", "users", "histories", "lists")
SMALL = SimulationConfig(users=120, items=150, interactions_per_user=24)


def made(tmp_path: Path, config: DataConfig, seed: int = 0) -> Path:
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    out.mkdir()
    prepare(config, seed, out)
    return out


def rows(folder: Path, name: str) -> list[dict]:
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


@pytest.fixture(scope="module", params=["simulated", "ml-100k"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "simulated":
        return request.getfixturevalue("simulated")
    source = request.getfixturevalue("real_data")("ml-100k")
    return made(tmp_path_factory.mktemp("real"), DataConfig(source="ml-100k", folder=str(source)))


def test_a_history_is_the_first_half_and_lists_come_from_the_rest(folder: Path) -> None:
    log = defaultdict(list)
    for row in rows(folder, "interactions"):
        log[row["user_id"]].append(row)
    lists = defaultdict(list)
    for row in rows(folder, "lists"):
        lists[row["user_id"]].append(row)
    histories = rows(folder, "histories")
    assert [row["user_id"] for row in histories] == list(log) == [row["user_id"] for row in rows(folder, "users")] == list(lists)
    for history in histories:
        own = log[history["user_id"]]
        assert [row["timestamp"] for row in own] == sorted(row["timestamp"] for row in own)
        length = min((len(own) + 1) // 2, 30)
        assert history["item_ids"] == [row["item_id"] for row in own[:length]]
        assert history["ratings"] == [row["rating"] for row in own[:length]]

        touched = {row["item_id"]: row["rating"] for row in own}
        assert len(lists[history["user_id"]]) == min((len(own) - length) // 4, 16)
        for number, row in enumerate(lists[history["user_id"]]):
            block = [later["item_id"] for later in own[length + 4 * number : length + 4 * number + 4]]
            assert {item for item in row["candidates"] if item in touched} == set(block)
            assert len(set(row["candidates"])) == len(row["candidates"]) == 10
            assert row["labels"] == [int(touched.get(item, 0) > 3) for item in row["candidates"]]


def test_the_order_of_candidates_says_nothing_of_the_label(folder: Path) -> None:
    labels = np.array([row["labels"] for row in rows(folder, "lists")])
    share = labels.mean(0)
    assert np.abs(share - labels.mean()).max() < 5 * np.sqrt(0.25 / len(labels))


def test_the_summary_counts_what_is_there(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    splits = [row["split"] for row in rows(folder, "users")]
    assert summary["users"] == {name: splits.count(name) for name in ("train", "validation", "test")}
    assert summary["users"]["validation"] == summary["users"]["test"] == round(len(splits) / 10)
    assert summary["lists"] == len(rows(folder, "lists"))
    assert summary["lists_with_a_positive"] == sum(1 in row["labels"] for row in rows(folder, "lists"))


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    config = DataConfig(simulation=SMALL)
    first, again, other = (made(tmp_path, config, seed) for seed in (0, 0, 1))
    for name in (*FILES, "true_preferences"):
        assert (first / f"{name}.parquet").read_bytes() == (again / f"{name}.parquet").read_bytes()
        assert (first / f"{name}.parquet").read_bytes() != (other / f"{name}.parquet").read_bytes()


def written(folder: Path, interactions: list[dict], items: int = 30) -> DataConfig:
    pq.write_table(pa.Table.from_pylist(interactions), folder / "interactions.parquet")
    pq.write_table(pa.table({"item_id": [f"i{n}" for n in range(items)], "title": ["Film"] * items}), folder / "items.parquet")
    return DataConfig(source="table", folder=str(folder), table=TableConfig())


def ten_each(users: int, count: int = 10, timestamp: int | None = None) -> list[dict]:
    return [
        {"user_id": f"u{user}", "item_id": f"i{(user + n) % 30}", "rating": 4.0, "timestamp": n if timestamp is None else timestamp}
        for user in range(users)
        for n in range(count)
    ]


def test_the_order_of_the_rows_does_not_matter_when_times_differ(tmp_path: Path) -> None:
    log = ten_each(12)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    straight = made(tmp_path, written(tmp_path / "a", log))
    reversed_ = made(tmp_path, written(tmp_path / "b", log[::-1]))
    for name in FILES:
        assert (straight / f"{name}.parquet").read_bytes() == (reversed_ / f"{name}.parquet").read_bytes()


def test_interactions_of_one_second_keep_the_order_of_the_file(tmp_path: Path) -> None:
    log = ten_each(12, timestamp=7)[::-1]
    out = made(tmp_path, written(tmp_path, log))
    for history in rows(out, "histories"):
        assert history["item_ids"] == [row["item_id"] for row in log if row["user_id"] == history["user_id"]][:5]


def test_short_users_are_refused_by_name_or_dropped_and_counted(tmp_path: Path) -> None:
    log = ten_each(12) + [row | {"user_id": "shorty"} for row in ten_each(1, count=7)]
    config = written(tmp_path, log)
    with pytest.raises(InputError, match=r"user 'shorty': 7 interactions .*data.short_users=drop"):
        made(tmp_path, config)
    out = made(tmp_path, config.model_copy(update={"short_users": "drop"}))
    assert json.loads((out / "summary.json").read_text())["dropped_users"] == {"too_few_interactions": 1, "beyond_max_users": 0}
    assert "shorty" not in {row["user_id"] for name in ("users", "interactions", "histories", "lists") for row in rows(out, name)}


def test_ratings_of_which_none_is_liked_are_refused(tmp_path: Path) -> None:
    config = written(tmp_path, [row | {"rating": number % 2} for number, row in enumerate(ten_each(12))])
    with pytest.raises(InputError, match=r"data.like_threshold.*train users.*above 3"):
        made(tmp_path, config)
    out = made(tmp_path, config.model_copy(update={"like_threshold": 0.5}))
    assert json.loads((out / "summary.json").read_text())["lists_with_a_positive"] > 0


def test_a_user_who_touched_nearly_all_items_is_refused(tmp_path: Path) -> None:
    config = written(tmp_path, ten_each(12) + [row | {"user_id": "glutton"} for row in ten_each(1, count=18)])
    with pytest.raises(InputError, match="'glutton'"):
        made(tmp_path, config)


def test_a_sample_of_users_is_seeded_and_of_the_right_size(tmp_path: Path) -> None:
    config = DataConfig(simulation=SMALL, max_users=40)
    users = [{row["user_id"] for row in rows(made(tmp_path, config, seed), "users")} for seed in (0, 0, 1)]
    assert users[0] == users[1] != users[2]
    assert len(users[0]) == len(users[2]) == 40


def test_popularity_weighted_negatives_are_popular_among_training_users(tmp_path: Path, real_data) -> None:  # type: ignore[no-untyped-def]
    config = DataConfig(source="ml-100k", folder=str(real_data("ml-100k")))
    popularity: dict[str, int] = defaultdict(int)
    mean = {}
    for negatives in ("uniform", "popularity"):
        out = made(tmp_path, config.model_copy(update={"negatives": negatives}))
        split = {row["user_id"]: row["split"] for row in rows(out, "users")}
        popularity.clear()
        for row in rows(out, "histories"):
            for item in row["item_ids"] if split[row["user_id"]] == "train" else ():
                popularity[item] += 1
        touched = {(row["user_id"], row["item_id"]) for row in rows(out, "interactions")}
        drawn = [item for row in rows(out, "lists") for item in row["candidates"] if (row["user_id"], item) not in touched]
        mean[negatives] = np.mean([popularity[item] for item in drawn])
    assert mean["popularity"] > 2 * mean["uniform"]


def test_what_test_users_did_changes_no_other_list(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    log = ten_each(30)
    before = made(tmp_path, written(tmp_path / "a", log))
    hidden = {row["user_id"] for row in rows(before, "users") if row["split"] != "train"}
    assert len(hidden) == 6
    changed = [row | {"item_id": f"i{(int(row['item_id'][1:]) + 13) % 30}"} if row["user_id"] in hidden else row for row in log]
    after = made(tmp_path, written(tmp_path / "b", changed))
    others = [[row for row in rows(out, "lists") if row["user_id"] not in hidden] for out in (before, after)]
    assert others[0] == others[1] != []


def ndcg_at_5(scores: np.ndarray, labels: np.ndarray) -> float:
    kept = labels[labels.any(1)]
    order = np.argsort(-scores[labels.any(1)], axis=1, kind="stable")
    discount = 1 / np.log2(np.arange(5) + 2)
    gained = (np.take_along_axis(kept, order, 1)[:, :5] * discount).sum(1)
    return float((gained / (-np.sort(-kept, axis=1)[:, :5] * discount).sum(1)).mean())


@pytest.mark.parametrize("negatives", ["uniform", "popularity"])
def test_true_preferences_predict_the_lists_and_popularity_does_not(tmp_path: Path, negatives: str) -> None:
    simulation = SimulationConfig(users=400)
    out = made(tmp_path, DataConfig.model_validate({"simulation": simulation.model_dump(), "negatives": negatives}))
    weights = {(row["user_id"], row["name"]): row["weight"] for row in rows(out, "true_preferences")}
    items = {row["item_id"]: row for row in rows(out, "items")}
    counts: dict[str, int] = defaultdict(int)
    for history in rows(out, "histories"):
        for item in history["item_ids"]:
            counts[item] += 1

    def told(user: str, item: str) -> float:
        genres, people = (items[item][name] for name in ("genres", "people"))
        taste = 2 * float(np.mean([weights.get((user, genre), 0) for genre in genres]))
        return taste + weights.get((user, era(items[item]["year"])), 0) + sum(weights.get((user, name), 0) for name in people)

    lists = rows(out, "lists")
    labels = np.array([row["labels"] for row in lists])
    oracle = np.array([[told(row["user_id"], item) for item in row["candidates"]] for row in lists])
    popularity = np.array([[counts[item] for item in row["candidates"]] for row in lists])
    assert ndcg_at_5(oracle, labels) > 0.9
    assert ndcg_at_5(popularity, labels) < 0.65
    liked = np.mean([row["rating"] > 3 for row in rows(out, "interactions")])
    assert 0.5 < liked < 0.6


def test_the_largest_simulated_catalogue_has_unique_names() -> None:
    tables = simulate(SimulationConfig(users=10, items=9000, genres=16, people=900, interactions_per_user=16), seed=3)
    titles = tables.items["title"].to_pylist()
    assert len(set(titles)) == len(titles) == 9000
    assert all(1 <= len(row) <= 3 for name in ("genres", "people") for row in tables.items[name].to_pylist())
    assert len({name for row in tables.items["people"].to_pylist() for name in row}) == 900


def test_tastes_have_both_signs_and_are_sparse(simulated: Path) -> None:
    preferences = rows(simulated, "true_preferences")
    by_user = defaultdict(list)
    for row in preferences:
        if row["kind"] == "genre":
            by_user[row["user_id"]].append(row["weight"])
    assert len(by_user) == 120
    for weights in by_user.values():
        assert min(weights) < 0 < max(weights)
        assert len(weights) <= 6
    assert {row["kind"] for row in preferences} == {"genre", "era", "person"}
