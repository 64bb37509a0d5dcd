"""Users whose interactions a finished run has not seen: from one file, as the histories that prompts show."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec.data.config import DataConfig, TableConfig
from dpo4rec.data.schema import INTERACTIONS, Tables, validate
from dpo4rec.data.splits import Log
from dpo4rec.data.table import TableFile
from dpo4rec.errors import InputError


def read_new_users(path: Path, config: DataConfig, items: pa.Table, profiles: dict[str, str]) -> tuple[pa.Table, dict[str, int]]:
    """Table user_id, profile, split ("new"), item_ids, ratings (lists, oldest first), and counts of what was left out.

    Unlike a run's histories, which end before the part that it is evaluated on, these are all that the file says. Interactions rated
    below `data.min_rating` are left out, as in the run; so are items that the run does not know, since prompts tell of items by its data.

    Args:
        path: Parquet or CSV, one interaction a row, with the columns that `data.table` names (of another source: user_id, item_id,
            rating, timestamp), and perhaps `profile`.
        items: of the run.
        profiles: of the users that the run knows; `profile` of the file is for the others.

    Raises:
        InputError: the file cannot be read, lacks a column, has an unusable row, or leaves nobody with a history.
    """
    columns = config.table or TableConfig()
    file = TableFile(path, columns.list_separator, numbers=(columns.rating_column, columns.timestamp_column), key="--users")
    user_ids, item_ids = file.ids(columns.user_column), file.ids(columns.item_column)
    values = [user_ids, item_ids, file.ratings(columns.rating_column), file.seconds(columns.timestamp_column)]
    log = Log.of(_checked(pa.table(values, schema=INTERACTIONS), file.place))
    known = np.asarray(pc.is_in(log.items, value_set=items["item_id"].combine_chunks()))[log.item_codes]
    rated = log.ratings >= (-np.inf if config.min_rating is None else config.min_rating)
    given = _profiles(user_ids, file) if "profile" in file.table.column_names else {}
    table = _histories(log, known & rated, given | profiles)
    if not table.num_rows:
        raise InputError(str(path), "nobody has an interaction with an item that the run knows", "Check the ids of its items")
    left_out = {"unknown_items": int((~known).sum()), "users_without_history": len(log.users) - table.num_rows}
    return table, left_out


def _checked(interactions: pa.Table, place: str) -> Tables:
    """The interactions with their own users and items, validated."""
    users, items = (pc.drop_null(pc.unique(interactions[name])) for name in ("user_id", "item_id"))
    empty = pa.array([[]] * len(items), pa.list_(pa.string()))
    catalogue = pa.table({"item_id": items, "title": items, "genres": empty, "year": pa.nulls(len(items), pa.int32()), "people": empty})
    people = pa.table({"user_id": users, "profile": pa.array([""] * len(users))})
    return validate(Tables(interactions, catalogue, people, places=(place, place, place)))


def _profiles(user_ids: pa.ChunkedArray, file: TableFile) -> dict[str, str]:
    pairs = zip(user_ids.to_pylist(), file.text("profile").to_pylist(), strict=True)
    return {user: profile for user, profile in pairs if profile}


def _histories(log: Log, rows: np.ndarray, profiles: dict[str, str]) -> pa.Table:
    """Of the users that have one of the rows in the mask."""
    lengths = np.bincount(log.owners()[rows], minlength=len(log.users))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    users = log.users.to_pylist()
    table = pa.table(
        {
            "user_id": log.users,
            "profile": pa.array([profiles.get(user, "") for user in users], pa.string()),
            "split": pa.array(["new"] * len(users), pa.string()),
            "item_ids": pa.ListArray.from_arrays(offsets, log.items.take(pa.array(log.item_codes[rows]))),
            "ratings": pa.ListArray.from_arrays(offsets, pa.array(log.ratings[rows])),
        }
    )
    return table.filter(pa.array(lengths > 0))
