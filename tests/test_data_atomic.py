"""RecBole's atomic files, as RecBole ships them and as we write them."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo4rec.data.atomic import write_atomic
from dpo4rec.data.config import AtomicConfig, DataConfig
from dpo4rec.data.prepare import prepare
from dpo4rec.data.sources import read_source, source_files
from dpo4rec.errors import InputError

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t10\t4\t978300760\n1\t11\t3.5\t9.78300761e+08\n2\t10\t1\t5\n"
ITEM = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n10\tToy Story\t1995\tAnimation Children's Sci-Fi\n"


def atomic(folder: Path, **changes: str | None) -> DataConfig:
    folder = folder / "tiny"
    folder.mkdir(exist_ok=True)
    for kind, content in ({"inter": INTER, "item": ITEM} | changes).items():
        if content is not None:
            (folder / f"tiny.{kind}").write_text(content, encoding="utf-8")
    return DataConfig(source="atomic", folder=str(folder))


def test_recboles_own_files(tmp_path: Path) -> None:
    config = atomic(tmp_path, user="user_id:token\tage:token\tgender:token\n1\t24\tM\n")
    tables = read_source(config, seed=0)
    assert [tuple(row.values()) for row in tables.interactions.to_pylist()] == [
        ("1", "10", 4, 978300760), ("1", "11", 3.5, 978300761), ("2", "10", 1, 5)
    ]  # fmt: skip
    assert [tuple(row.values())[:5] for row in tables.items.to_pylist()] == [
        ("10", "Toy Story", ["Animation", "Children's", "Sci-Fi"], 1995, []),
        ("11", "11", [], None, []),
    ]
    assert tables.users.to_pylist() == [{"user_id": "1", "profile": ""}, {"user_id": "2", "profile": ""}]
    assert tables.report["reading"]["items_without_description"] == 1
    assert [file.name for file in source_files(config)] == ["tiny.inter", "tiny.item", "tiny.user"]


def test_amazon_as_recbole_converts_it(tmp_path: Path) -> None:
    item = (
        "item_id:token\ttitle:token\tsales_rank:float\tcategories:token_seq\tbrand:token\n"
        "10\tA \"5 inch\" thing\t\t'Beauty', \"Women's Care\", 'Hair Oils'\tL'Oreal Paris\n11\t\t3\t\t\n"
    )
    tables = read_source(atomic(tmp_path, item=item), seed=0)
    assert [tuple(row.values())[1:5] for row in tables.items.to_pylist()] == [
        ('A "5 inch" thing', ["Beauty", "Women's Care", "Hair Oils"], None, ["L'Oreal Paris"]),
        ("11", [], None, []),
    ]
    assert tables.report["reading"] == {"repeated_interactions": 0, "items_without_description": 0, "items_without_title": 1}


def test_other_names_and_fewer_fields(tmp_path: Path) -> None:
    inter = "session:token\tproduct_id:token\n a\t1\n a\t2\n a\t1\n"
    atomic(tmp_path, inter=inter, item="product_id:token\tlabel:token\ttags:token_seq\tout:token\n1\tOne\tx|y z\t2001-02-03\n")
    fields = AtomicConfig(
        name="tiny", user_field="session", item_field="product_id", rating_field=None, timestamp_field=None, title_field="label",
        genres_field="tags", year_field="out", list_separator="|",
    )  # fmt: skip
    tables = read_source(DataConfig(source="atomic", folder=str(tmp_path / "tiny"), atomic=fields, like_threshold=0), seed=0)
    assert [(row["item_id"], row["rating"]) for row in tables.interactions.to_pylist()] == [("2", 1.0), ("1", 1.0)]  # the later ones
    assert tuple(tables.items.to_pylist()[0].values())[:4] == ("1", "One", ["x", "y z"], 2001)


@pytest.mark.parametrize("dataset", ["strange", "ml-100k"])
def test_a_round_trip_gives_the_same_interactions_and_items(tmp_path: Path, dataset: str, request: pytest.FixtureRequest) -> None:
    config = strange(tmp_path) if dataset == "strange" else DataConfig(
        source="ml-100k", folder=str(request.getfixturevalue("real_data")("ml-100k"))
    )  # fmt: skip
    (tmp_path / "out").mkdir()
    prepare(config, seed=0, out=tmp_path / "out")
    folder = write_atomic(tmp_path / "out", tmp_path / "recbole", "mine")
    assert folder == tmp_path / "recbole" / "mine"
    back = read_source(DataConfig(source="atomic", folder=str(folder)), seed=0)
    before = pq.read_table(tmp_path / "out" / "interactions.parquet")
    assert back.interactions.equals(before.cast(back.interactions.schema))
    for row, again in zip(pq.read_table(tmp_path / "out" / "items.parquet").to_pylist(), back.items.to_pylist(), strict=True):
        assert again | {"text": ""} == row | {"title": row["title"].replace("\n", " ").replace("\t", " "), "text": ""}
    assert back.users.equals(pq.read_table(tmp_path / "out" / "users.parquet").select(["user_id", "profile"]))

    for kind in ("inter", "item", "user"):  # as RecBole reads them
        file = folder / f"mine.{kind}"
        header = file.read_text(encoding="utf-8").splitlines()[0].split("\t")
        frame = pd.read_csv(
            file, delimiter="\t", usecols=header, dtype={name: float if name.endswith(":float") else str for name in header}
        )
        assert len(frame) == {"inter": before.num_rows, "item": back.items.num_rows, "user": back.users.num_rows}[kind]
    genres = pd.read_csv(folder / "mine.item", delimiter="\t")["genre:token_seq"].fillna("")
    assert [len([part for part in cell.split(" ") if part]) for cell in genres] == [len(row) for row in back.items["genres"].to_pylist()]


def strange(folder: Path) -> DataConfig:
    titles = ['"Quoted" at the start', 'an unbalanced " inside', '"', "a\ttab", "two\nlines", "فيلم", "NA", "plain"]
    pairs = [(user, (user + n) % 30) for user in range(12) for n in range(10)]
    log = {
        "user_id": [f"u{user}" for user, _ in pairs],
        "item_id": [f"i{item}" for _, item in pairs],
        "rating": [0.1 + item for _, item in pairs],
        "timestamp": list(range(len(pairs))),
    }
    items = {
        "item_id": [f"i{n}" for n in range(30)],
        "title": [titles[n % len(titles)] for n in range(30)],
        "genres": [["Science Fiction", "Sci-Fi"] if n % 3 else [] for n in range(30)],
        "year": [1990 if n % 2 else None for n in range(30)],
        "people": [["'Weird Al' Yankovic", "Prince", "Guns 'n'"] if n % 2 else [] for n in range(30)],
    }
    for name, columns in (("interactions", log), ("items", items)):
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    columns_ = {"genres_column": "genres", "year_column": "year", "people_column": "people"}
    return DataConfig.model_validate({"source": "table", "folder": str(folder), "table": columns_})


@pytest.mark.parametrize(
    ("changes", "place", "cause"),
    [
        ({"inter": ""}, "tiny.inter", "no header"),
        ({"inter": INTER.replace(":token", "")}, "tiny.inter, line 1", "no header"),
        ({"inter": INTER.replace("timestamp", "rating")}, "tiny.inter, line 1", "different fields"),
        ({"inter": INTER.replace("rating", "stars")}, "tiny.inter, line 1", "no field 'rating'"),
        ({"inter": INTER + "2\t11\n"}, "tiny.inter", "Row #5"),
        ({"inter": INTER + "2\t11\tfive\t7\n"}, "tiny.inter", "Row #5"),
        ({"inter": INTER + "2\t11\tinf\t7\n"}, "tiny.inter, line 5", "no finite number"),
        ({"inter": INTER + "2\t11\t\t7\n"}, "tiny.inter, line 5", "no finite number"),
        ({"inter": INTER + "2\t11\t1\t1e300\n"}, "tiny.inter, field 'timestamp'", "out of range"),
        ({"inter": INTER + "\t11\t1\t7\n"}, "tiny.inter, line 5", "missing"),
        ({"inter": INTER[: INTER.index("\n") + 1]}, "tiny.inter", "not a single row"),
        ({"item": ITEM + "10\tAgain\t1995\t\n"}, "tiny.item, line 3", "was there before"),
        ({"item": ITEM + "\tNo id\t1995\t\n"}, "tiny.item, line 3", "missing"),
        ({"item": ITEM.replace("item_id", "movie_id")}, "tiny.item, line 1", "no field 'item_id'"),
    ],
)
def test_broken_atomic_files_are_refused(tmp_path: Path, changes: dict[str, str], place: str, cause: str) -> None:
    with pytest.raises(InputError) as caught:
        read_source(atomic(tmp_path, **changes), seed=0)
    assert place in caught.value.where
    assert cause in caught.value.cause


def test_a_missing_inter_file_and_an_absent_item_file(tmp_path: Path) -> None:
    assert read_source(atomic(tmp_path, item=None), seed=0).items["title"].to_pylist() == ["10", "11"]
    with pytest.raises(InputError, match=r"other.inter: there is no such file"):
        read_source(DataConfig(source="atomic", folder=str(tmp_path / "tiny"), atomic=AtomicConfig(name="other")), seed=0)
