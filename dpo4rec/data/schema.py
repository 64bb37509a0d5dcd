"""The one form that every source is brought into, and its checks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec.errors import InputError

INTERACTIONS = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("rating", pa.float32()), ("timestamp", pa.int64())])
ITEMS = pa.schema(
    [
        ("item_id", pa.string()),
        ("title", pa.string()),
        ("genres", pa.list_(pa.string())),
        ("year", pa.int32()),
        ("people", pa.list_(pa.string())),
    ]
)
USERS = pa.schema([("user_id", pa.string()), ("profile", pa.string())])
PREFERENCES = pa.schema([("user_id", pa.string()), ("kind", pa.string()), ("name", pa.string()), ("weight", pa.float32())])


@dataclass(frozen=True)
class Tables:
    """What a source says, in the order of its files.

    Args:
        interactions: columns of `INTERACTIONS`; timestamps in seconds.
        items: columns of `ITEMS`; year may be null, genres and people may be empty.
        users: columns of `USERS`; profile may be "".
        places: what to put before a row's number (from 1) in an error, of interactions, items and users: "ratings.dat, line".
        preferences: columns of `PREFERENCES`; the truth, which only a simulation knows.
        report: what was mended, dropped and added: counts by step, as `summary.json` has them.
    """

    interactions: pa.Table
    items: pa.Table
    users: pa.Table
    places: tuple[str, str, str]
    preferences: pa.Table | None = None
    report: dict[str, dict[str, int]] = field(default_factory=dict)


def era(year: int) -> str:
    """The decade, as texts say it: 1994 -> "1990s"."""
    return f"{year // 10 * 10}s"


def item_text(title: str, genres: Sequence[str], year: int | None, people: Sequence[str]) -> str:
    """What an encoder reads of an item: "Heat. Genres: Action, Crime. From the 1990s. With Al Pacino."; parts without data are left out."""
    parts = [title if title.endswith((".", "!", "?")) else f"{title}."]
    if genres:
        parts.append(f"Genres: {', '.join(genres)}.")
    if year is not None:
        parts.append(f"From the {era(year)}.")
    if people:
        parts.append(f"With {', '.join(people)}.")
    return " ".join(parts)


def validate(tables: Tables) -> Tables:
    """Returns the tables when ids are present, unique and known and every value is usable; raises `InputError` naming the row otherwise."""
    interactions, items, users = tables.interactions, tables.items, tables.users
    of_interactions, of_items, of_users = tables.places
    for table, place, columns in (
        (interactions, of_interactions, ("user_id", "item_id")),  # first: users without a file are made of them
        (items, of_items, ("item_id", "title")),
        (users, of_users, ("user_id",)),
    ):
        if not table.num_rows:
            raise InputError(place.split(",")[0], "there is not a single row", "Give a file with data")
        for column in columns:
            _refuse_empty(table[column], place)
    _refuse_repeated(items, "item_id", of_items)
    _refuse_repeated(users, "user_id", of_users)
    _refuse_unknown(interactions["item_id"], items["item_id"], of_interactions, "item", of_items)
    _refuse_unknown(interactions["user_id"], users["user_id"], of_interactions, "user", of_users)
    _refuse_unusable(interactions, of_interactions)
    _refuse_repeated_pairs(interactions, of_interactions)
    return tables


def codes_of(values: pa.ChunkedArray, known: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The position of each value in `known` (int64), -1 where it is not there."""
    found = pc.index_in(values, value_set=known)
    return pc.fill_null(found, -1).to_numpy().astype(np.int64)


def pair_codes(interactions: pa.Table) -> np.ndarray:
    """A number (int64) for the user and item of each row, equal where both are equal."""
    users, items = (interactions[name].combine_chunks().dictionary_encode() for name in ("user_id", "item_id"))
    return users.indices.to_numpy().astype(np.int64) * len(items.dictionary) + items.indices.to_numpy()


def _first(bad: pa.ChunkedArray) -> int | None:
    position = pc.index(bad, True).as_py()
    return None if position < 0 else position


def _refuse_empty(column: pa.ChunkedArray, place: str) -> None:
    row = _first(pc.fill_null(pc.equal(column, ""), True))
    if row is not None:
        raise InputError(
            f"{place} {row + 1}", "an id or a title is missing", "Fill it in or remove the row (an item's id will do as its title)"
        )


def _refuse_repeated(table: pa.Table, column: str, place: str) -> None:
    codes = codes_of(table[column], pc.unique(table[column]))
    row = _second_occurrence(codes)
    if row is not None:
        raise InputError(f"{place} {row + 1}", f"{column} {table[column][row].as_py()!r} was there before", "Keep one row for each id")


def _refuse_unknown(values: pa.ChunkedArray, known: pa.ChunkedArray, place: str, what: str, where: str) -> None:
    row = _first(pc.invert(pc.is_in(values, value_set=known.combine_chunks())))
    if row is not None:
        cause = f"{what} {values[row].as_py()!r} is not in {where.split(',')[0]}"
        raise InputError(f"{place} {row + 1}", cause, f"Add the {what} there or remove the row")


def _refuse_unusable(interactions: pa.Table, place: str) -> None:
    for column in ("rating", "timestamp"):
        row = _first(pc.invert(pc.fill_null(pc.is_finite(interactions[column]), False)))
        if row is not None:
            value = interactions[column][row].as_py()
            raise InputError(f"{place} {row + 1}", f"the {column} is {value}", "Give a finite number or remove the row")


def _refuse_repeated_pairs(interactions: pa.Table, place: str) -> None:
    row = _second_occurrence(pair_codes(interactions))
    if row is not None:
        user, item = interactions["user_id"][row].as_py(), interactions["item_id"][row].as_py()
        cause = f"user {user!r} has item {item!r} a second time"
        raise InputError(f"{place} {row + 1}", cause, "Keep one row for each user and item, the latest for instance")


def _second_occurrence(codes: np.ndarray) -> int | None:
    """The first row whose code occurred in an earlier row."""
    order = np.argsort(codes, kind="stable")
    repeated = order[1:][codes[order][1:] == codes[order][:-1]]
    return int(repeated.min()) if repeated.size else None
