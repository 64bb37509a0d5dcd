"""RecBole's atomic files, read and written (recbole.io/docs, "Atomic Files").

Tab-separated; the header names each field and its type, `float`, `token` or `token_seq`:

    user_id:token	item_id:token	rating:float	timestamp:float           NAME.inter
    item_id:token	movie_title:token_seq	release_year:token	class:token_seq    NAME.item
    user_id:token	profile:token_seq                                       NAME.user

Quotes mean what they mean in CSV, because RecBole reads the files with `pandas.read_csv`.
"""

import difflib
import re
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from dpo4rec.data.config import NO_RATING, AtomicConfig
from dpo4rec.data.reviews import Description, latest, with_titles
from dpo4rec.data.schema import INTERACTIONS, USERS, Tables
from dpo4rec.errors import InputError
from dpo4rec.files import atomic, read_parquet

TITLES = ("title", "movie_title", "movie_name")
GENRES = ("genre", "genres", "class", "categories")
YEARS = ("release_year", "year")
PEOPLE = ("people", "brand")
PROFILES = ("profile",)
YEAR = re.compile(r"\d{4}")
PRINTED = re.compile(r"""'[^']*'|.*, ['"].*""")  # a Python set, as in RecBole's Amazon categories: 'Beauty', "Women's Fragrance"
INSIDE = "\u00a0"  # a no-break space stands for the space inside a member of a list, where a space ends the member


def read_atomic(config: AtomicConfig, folder: Path) -> Tables:
    """Reads `NAME.inter` and, where there are such files, `NAME.item` and `NAME.user`.

    Of several interactions of a user and an item the latest counts. The catalogue is the items of `.item` and then those that only
    `.inter` has; an item without title has its id. Users are those of `.inter`.

    Raises:
        InputError: a file is missing or damaged, a field is missing (naming the nearest) or a value is not what its type says.
    """
    inter_file, item_file, user_file = atomic_files(config, folder)
    inter = _AtomicFile(inter_file, (config.rating_field, config.timestamp_field))
    log = pa.table(
        [
            inter.ids(config.user_field),
            inter.ids(config.item_field),
            pa.repeat(NO_RATING, inter.rows) if config.rating_field is None else inter.numbers(config.rating_field).cast(pa.float32()),
            pa.repeat(0, inter.rows) if config.timestamp_field is None else inter.seconds(config.timestamp_field),
        ],
        schema=INTERACTIONS,
    )
    kept = latest(log)
    described = _descriptions(_AtomicFile(item_file), config) if item_file.exists() else {}
    profiles = _profiles(_AtomicFile(user_file), config) if user_file.exists() else {}
    ids = list(dict.fromkeys([*described, *pc.unique(log["item_id"]).to_pylist()]))
    items, gaps = with_titles(described, ids)
    users = pc.unique(log["user_id"]).to_pylist()
    known = pa.table([pa.array(users, pa.string()), pa.array([profiles.get(user, "") for user in users], pa.string())], schema=USERS)
    report = {"reading": {"repeated_interactions": log.num_rows - kept.num_rows, **gaps}}
    places = (f"{inter.path}, kept line", f"{item_file}, item", f"{inter.path}, user")
    return Tables(kept, items, known, places, report=report)


def atomic_files(config: AtomicConfig, folder: Path) -> tuple[Path, Path, Path]:
    """Where `.inter`, `.item` and `.user` are; the last two need not exist."""
    name = config.name or folder.resolve().name
    inter, item, user = (folder / f"{name}.{kind}" for kind in ("inter", "item", "user"))
    return inter, item, user


def write_atomic(data_folder: Path, out: Path, name: str) -> Path:
    """Writes a prepared data folder as `OUT/NAME/NAME.inter`, `.item` and `.user`; returns `OUT/NAME`.

    RecBole reads them with `data_path: OUT`, `dataset: NAME`; `read_atomic` gives back the same interactions and items. Line breaks
    and tabs of texts become spaces, and spaces inside a genre or a name no-break spaces.

    Raises:
        InputError: the data folder lacks a file, or the disk is full.
    """
    interactions, items, users = (read_parquet(data_folder / f"{part}.parquet") for part in ("interactions", "items", "users"))
    folder = out / name
    names = ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]
    _write(interactions.select(INTERACTIONS.names).rename_columns(names), folder / f"{name}.inter")
    catalogue = {
        "item_id:token": items["item_id"],
        "title:token_seq": _flat(items["title"]),
        "genre:token_seq": _joined(items["genres"]),
        "release_year:token": items["year"].cast(pa.string()),
        "people:token_seq": _joined(items["people"]),
    }
    _write(pa.table(catalogue), folder / f"{name}.item")
    _write(pa.table({"user_id:token": users["user_id"], "profile:token_seq": _flat(users["profile"])}), folder / f"{name}.user")
    return folder


class _AtomicFile:
    """One file; its fields are named without their types."""

    def __init__(self, path: Path, numbers: tuple[str | None, ...] = ()) -> None:
        self.path = path
        if not path.is_file():
            raise InputError(str(path), "there is no such file", "Put it there or correct data.folder and data.atomic.name")
        with path.open(encoding="utf-8-sig", errors="replace") as stream:
            header = stream.readline().rstrip("\r\n").split("\t")
        self.kinds = dict(name.split(":") for name in header if name.count(":") == 1)
        if len(self.kinds) < len(header):
            cause = f"the first line is no header of different fields such as item_id:token, but {header[:5]}"
            raise InputError(f"{path}, line 1", cause, "Give an atomic file of RecBole")
        types = {full: pa.float64() if name in numbers else pa.string() for full, name in zip(header, self.kinds, strict=True)}
        try:
            self._table = pyarrow.csv.read_csv(
                path,
                pyarrow.csv.ReadOptions(use_threads=False),  # only then do errors name the row
                pyarrow.csv.ParseOptions(delimiter="\t", newlines_in_values=True),
                pyarrow.csv.ConvertOptions(column_types=types, quoted_strings_can_be_null=False),
            ).rename_columns(list(self.kinds))
        except (pa.ArrowException, OSError) as error:
            raise InputError(str(path), f"the file cannot be read ({error})", "Correct that row or write the file again") from error
        self.rows = self._table.num_rows

    def column(self, name: str) -> pa.ChunkedArray:
        if name not in self.kinds:
            nearest = difflib.get_close_matches(name, list(self.kinds), n=1, cutoff=0)
            raise InputError(
                f"{self.path}, line 1", f"there is no field {name!r}", f"Correct data.atomic: the nearest of the file is {nearest[0]!r}"
            )
        return self._table[name]

    def ids(self, name: str) -> pa.ChunkedArray:
        return self._refuse(name, pc.equal(self.column(name), ""), "an id is missing")

    def numbers(self, name: str) -> pa.ChunkedArray:
        finite = pc.fill_null(pc.is_finite(self.column(name)), False)
        return self._refuse(name, pc.invert(finite), f"the {name} is no finite number")

    def seconds(self, name: str) -> pa.ChunkedArray:
        try:
            return pc.floor(self.numbers(name)).cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise InputError(f"{self.path}, field {name!r}", f"a timestamp is out of range ({error})", "Give seconds") from error

    def _refuse(self, name: str, bad: pa.ChunkedArray, cause: str) -> pa.ChunkedArray:
        row = pc.index(bad, True).as_py()
        if row >= 0:
            raise InputError(f"{self.path}, line {row + 2}", cause, "Fill it in or remove the line")
        return self.column(name)

    def texts(self, name: str | None, usual: tuple[str, ...]) -> list[str]:
        """The field `name` or, if it is None, the first of the `usual` ones that the file has, else only ""."""
        found = self._named(name, usual)
        return [""] * self.rows if found is None else self.column(found).to_pylist()

    def lists(self, name: str | None, usual: tuple[str, ...], separator: str) -> list[list[str]]:
        """Like `texts`; a token is a list of one member, spaces and all, a token_seq is cut at `separator`."""
        cells = self.texts(name, usual)
        if self.kinds.get(self._named(name, usual) or "") == "token_seq":
            return [_members(cell, separator) for cell in cells]
        return [[cell] if cell else [] for cell in cells]

    def _named(self, name: str | None, usual: tuple[str, ...]) -> str | None:
        return name or next((known for known in usual if known in self.kinds), None)


def _descriptions(file: _AtomicFile, config: AtomicConfig) -> dict[str, Description]:
    columns = (
        file.ids(config.item_field).to_pylist(),
        file.texts(config.title_field, TITLES),
        file.lists(config.genres_field, GENRES, config.list_separator),
        file.texts(config.year_field, YEARS),
        file.lists(config.people_field, PEOPLE, config.list_separator),
    )
    described: dict[str, Description] = {}
    for line, (item, title, genres, year, people) in enumerate(zip(*columns, strict=True), start=2):
        if item in described:
            raise InputError(f"{file.path}, line {line}", f"item {item!r} was there before", "Keep one line for each item")
        found = YEAR.search(year)
        described[item] = Description(title, genres, int(found[0]) if found else None, people)
    return described


def _profiles(file: _AtomicFile, config: AtomicConfig) -> dict[str, str]:
    return dict(zip(file.column(config.user_field).to_pylist(), file.texts(config.profile_field, PROFILES), strict=True))


def _members(cell: str, separator: str) -> list[str]:
    """The members of a token_seq: of `Sci-Fi Drama` they are Sci-Fi and Drama, of `'Hair Care', 'Oils'` Hair Care and Oils."""
    if PRINTED.fullmatch(cell):
        return [part for raw in re.split(r"""['"]?, ['"]""", cell) if (part := raw.strip("'\""))]
    return [part.replace(INSIDE, " ") for raw in cell.split(separator) if (part := raw.strip(" "))]


def _flat(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.replace_substring_regex(texts, pattern=r"[\t\r\n]+", replacement=" ")


def _joined(lists: pa.ChunkedArray) -> pa.Array:
    cells = [" ".join(INSIDE.join(member.split()) for member in row) for row in lists.to_pylist()]
    return pa.array(cells, pa.string())


def _write(table: pa.Table, path: Path) -> None:
    with atomic(path) as partial:
        frame: pd.DataFrame = table.to_pandas()
        frame.to_csv(partial, sep="\t", index=False, lineterminator="\n")
