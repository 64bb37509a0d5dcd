"""Rating threshold, k-core, and texts from a file of their own."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo4rec.data.config import DataConfig, ItemTextsConfig, SimulationConfig, TableConfig
from dpo4rec.data.filters import core_rows
from dpo4rec.data.prepare import prepare
from dpo4rec.data.sources import read_source, source_files
from dpo4rec.errors import InputError

SMALL = SimulationConfig(users=120, items=150, interactions_per_user=24)


def naive_core(pairs: list[tuple[int, int]], k: int) -> list[tuple[int, int]]:
    while True:
        users, items = zip(*pairs, strict=True) if pairs else ((), ())
        kept = [(user, item) for user, item in pairs if users.count(user) >= k and items.count(item) >= k]
        if len(kept) == len(pairs):
            return kept
        pairs = kept


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
def test_the_core_is_what_a_naive_loop_leaves(k: int) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        pairs = sorted({(int(u), int(i)) for u, i in zip(rng.zipf(1.7, 400) % 60, rng.integers(0, 40, 400), strict=True)})
        users, items = np.array(pairs).T
        kept = core_rows(users, items, k)
        assert [tuple(pair) for pair in np.array(pairs)[kept].tolist()] == naive_core(pairs, k)


def test_movielens_as_bert4rec_has_it(real_data) -> None:  # type: ignore[no-untyped-def]
    tables = read_source(DataConfig(source="ml-1m", folder=str(real_data("ml-1m")), k_core=5), seed=0)
    assert (tables.users.num_rows, tables.items.num_rows) == (6040, 3416)
    assert tables.report["filtered"] == {
        "interactions_below_min_rating": 0,
        "interactions_outside_core": 1_000_209 - tables.interactions.num_rows,
        "users_outside_core": 0,
        "items_outside_core": 3883 - 3416,
    }


def test_the_threshold_comes_before_the_core(tmp_path: Path) -> None:
    config = DataConfig(simulation=SMALL, min_rating=3, short_users="drop")
    rated = read_source(config, seed=0)
    assert min(rated.interactions["rating"].to_pylist()) == 3
    assert rated.items.num_rows == 150  # what nobody touched stays
    tables = read_source(config.model_copy(update={"k_core": 8}), seed=0)
    pairs = list(zip(rated.interactions["user_id"].to_pylist(), rated.interactions["item_id"].to_pylist(), strict=True))
    left = naive_core(pairs, 8)  # type: ignore[arg-type]
    assert list(zip(tables.interactions["user_id"].to_pylist(), tables.interactions["item_id"].to_pylist(), strict=True)) == left
    assert 0 < len(left) < len(pairs)
    assert set(tables.items["item_id"].to_pylist()) == {item for _, item in left}
    assert set(tables.users["user_id"].to_pylist()) == {user for user, _ in left}
    summary = prepare(config.model_copy(update={"k_core": 8}), seed=0, out=tmp_path)
    assert summary["filtered"]["interactions_outside_core"] == len(pairs) - len(left)
    assert summary["items"] == tables.items.num_rows


def test_filters_that_leave_nothing_are_refused() -> None:
    for filters in ({"k_core": 1000}, {"min_rating": 5.5}):
        with pytest.raises(InputError, match=r"leave none of \d+ interactions"):
            read_source(DataConfig.model_validate({"simulation": SMALL.model_dump(), **filters}), seed=0)


def test_without_filters_the_summary_is_as_before(tmp_path: Path) -> None:
    assert not {"filtered", "reading", "item_texts"} & prepare(DataConfig(simulation=SMALL), seed=0, out=tmp_path).keys()


def test_real_games_through_the_table_source(real_data, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    columns = TableConfig(rating_column=None, timestamp_column="position")
    folder = str(real_data("amazon-games-2018"))
    config = DataConfig(source="table", folder=folder, table=columns, like_threshold=0, short_users="drop", k_core=5, max_users=3000)
    summary = prepare(config, seed=0, out=tmp_path)
    assert sum(summary["users"].values()) == 3000
    assert summary["lists"] == summary["lists_with_a_positive"] >= 3000
    first = pq.read_table(tmp_path / "histories.parquet").to_pylist()[0]
    whole = pq.read_table(Path(folder) / "interactions.parquet", filters=[("user_id", "=", int(first["user_id"]))]).sort_by("position")
    inside = set(pq.read_table(tmp_path / "items.parquet")["item_id"].to_pylist())
    own = [str(item) for item in whole["item_id"].to_pylist() if str(item) in inside]
    assert own[: len(first["item_ids"])] == first["item_ids"]


def told(folder: Path, name: str, records: list[dict]) -> ItemTextsConfig:
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(records), folder / name)
    else:
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return ItemTextsConfig(file=str(folder / name), id_field="id", text_field="plot")


PLOTS = [
    {"id": "i001", "plot": " A boy\nand his horse. "},
    {"id": "i002", "plot": ""},
    {"id": "i003", "plot": None},
    {"id": "no item", "plot": "x"},
]


@pytest.mark.parametrize("name", ["plots.jsonl", "plots.jsonl.gz", "plots.json", "plots.parquet"])
def test_texts_of_items_come_after_their_attributes(tmp_path: Path, name: str) -> None:
    plain = DataConfig(simulation=SMALL)
    config = plain.model_copy(update={"item_texts": told(tmp_path, name, PLOTS)})
    before = {row["item_id"]: row["text"] for row in read_source(plain, seed=0).items.to_pylist()}
    (tmp_path / "out").mkdir()
    summary = prepare(config, seed=0, out=tmp_path / "out")
    after = {row["item_id"]: row["text"] for row in pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()}
    assert after.pop("i001") == before.pop("i001") + " A boy\nand his horse."
    assert after == before
    assert summary["item_texts"] == {"items_with": 1, "items_without": 149, "unknown_items": 1}
    assert source_files(config) == [tmp_path / name]


def test_real_profiles_of_items(real_data) -> None:  # type: ignore[no-untyped-def]
    texts = {"file": "llm_item_profiles.jsonl", "id_field": "movie_id"}
    config = DataConfig.model_validate({"source": "ml-1m", "folder": str(real_data("ml-1m")), "item_texts": texts})
    tables = read_source(config, seed=0)
    assert tables.report["item_texts"] == {"items_with": 844, "items_without": 3883 - 844, "unknown_items": 0}
    scout = next(row for row in tables.items.to_pylist() if row["item_id"] == "528")
    assert (
        scout["text"]
        == "The Scout. Genres: Drama. From the 1990s. <Favourite genre: sports, comedy. Favourite kind of plot: sports, comedy.>"
    )


@pytest.mark.parametrize(
    ("name", "records", "place", "cause"),
    [
        ("t.jsonl", [{"id": "i001", "text": "x"}], "t.jsonl, line 1", "field 'plot' is missing"),
        ("t.jsonl", [{"id": "i001", "plot": "x"}] * 2, "t.jsonl, line 2", "was there before"),
        ("t.jsonl", [{"id": "i001", "plot": ["x"]}], "t.jsonl, line 1", "['x']"),
        ("t.jsonl", [{"id": None, "plot": "x"}], "t.jsonl, line 1", "no item id"),
        ("t.jsonl", [{"id": "other", "plot": "x"}], "t.jsonl", "not one item"),
        ("t.parquet", [{"id": "i001", "text": "x"}], "t.parquet", "no column 'plot'"),
        ("t.parquet", [{"id": "i001", "plot": "x"}] * 2, "t.parquet, row 2", "was there before"),
        ("t.parquet", [{"id": "i001", "plot": 7}], "column 'plot'", "a text is expected"),
        ("t.txt", [{"id": "i001", "plot": "x"}], "t.txt", "neither"),
    ],
)
def test_broken_item_texts_are_refused(tmp_path: Path, name: str, records: list[dict], place: str, cause: str) -> None:
    config = DataConfig(simulation=SMALL, item_texts=told(tmp_path, name, records))
    with pytest.raises(InputError) as caught:
        read_source(config, seed=0)
    assert place in caught.value.where
    assert cause in caught.value.cause


def test_a_file_name_alone_is_enough() -> None:
    config = DataConfig.model_validate({"source": "ml-1m", "folder": "x", "item_texts": "plots.jsonl"})
    assert config.item_texts == ItemTextsConfig(file="plots.jsonl")
    assert config.path("plots.jsonl") == Path("x/plots.jsonl")
    assert config.path("/abs/plots.jsonl") == Path("/abs/plots.jsonl")
