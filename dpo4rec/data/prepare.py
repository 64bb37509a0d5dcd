"""From a source to the data folder that every later stage reads."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec.data.config import DataConfig
from dpo4rec.data.lists import build_lists, count_cold, lists_hash
from dpo4rec.data.schema import Tables, codes_of
from dpo4rec.data.sources import read_source
from dpo4rec.data.splits import SPLITS, Log, sample_users, split_users
from dpo4rec.errors import InputError
from dpo4rec.files import ROWS_A_GROUP, write_json, write_parquet


def prepare(config: DataConfig, seed: int, out: Path) -> dict[str, Any]:
    """Writes interactions, items, users, histories and lists (Parquet) and `summary.json` into the folder `out`; returns the summary.

    The first min(floor((n+1)/2), history_length) of a user's n interactions are the history; lists come from the later ones.

    Raises:
        InputError: the source cannot be used, a user is too short for a history and one list and `short_users` is "error", or in all lists
            of a split nothing is liked.
    """
    tables = read_source(config, seed)
    log, short = _usable_users(Log.of(tables), config, seed)
    splits = split_users(len(log.users), config.validation_share, config.test_share, seed)
    history = log.history_rows(config.history_length)
    training_history = history & (splits[log.owners()] == SPLITS.index("train"))
    popularity = np.bincount(log.item_codes[training_history], minlength=len(log.items)) + 1.0
    lists = build_lists(log, config, popularity, seed)
    users, histories = _users(tables, log, splits), _histories(log, history)

    liked = _with_a_positive(lists)
    _check_likes(liked, users, config)

    write_parquet(_interactions(log), out / "interactions.parquet")
    write_parquet(tables.items, out / "items.parquet")
    write_parquet(users, out / "users.parquet", ROWS_A_GROUP)
    write_parquet(histories, out / "histories.parquet", ROWS_A_GROUP)
    write_parquet(lists, out / "lists.parquet", ROWS_A_GROUP)
    if tables.preferences is not None:
        kept = codes_of(tables.preferences["user_id"], log.users) >= 0
        write_parquet(tables.preferences.filter(pa.array(kept)), out / "true_preferences.parquet", ROWS_A_GROUP)
    summary = {
        "source": config.source,
        "users": {name: int((splits == code).sum()) for code, name in enumerate(SPLITS)},
        "items": len(log.items),
        "interactions": len(log.item_codes),
        "lists": lists.num_rows,
        "lists_with_a_positive": len(liked),
        **count_cold(lists, histories, users),
        "dropped_users": {"too_few_interactions": short, "beyond_max_users": tables.users.num_rows - short - len(log.users)},
        "lists_hash": lists_hash(lists),
        **tables.report,
    }
    write_json(summary, out / "summary.json")
    return summary


def _usable_users(log: Log, config: DataConfig, seed: int) -> tuple[Log, int]:
    """The log of the users that give a history and a list, sampled, and how many were too short."""
    later = log.counts - log.history_lengths(config.history_length)
    enough = later >= config.positives_per_list
    if not enough.all() and config.short_users == "error":
        user = int(np.argmin(enough))
        cause = f"{log.counts[user]} interactions do not give a history and one list ({(~enough).sum()} such users)"
        raise InputError(f"user {log.users[user].as_py()!r}", cause, "Set data.short_users=drop to leave such users out")
    usable = np.flatnonzero(enough)
    if len(usable) < 3:
        cause = f"{len(usable)} users have enough interactions, and training, validation and test need one each"
        raise InputError("data", cause, "Give more interactions, or lower data.positives_per_list")
    return log.keep(sample_users(usable, config.max_users, seed)), int((~enough).sum())


def _with_a_positive(lists: pa.Table) -> pa.ChunkedArray:
    """The user of each list in which something is liked."""
    places = pc.list_parent_indices(lists["labels"]).filter(pc.greater(pc.list_flatten(lists["labels"]), 0))
    return lists["user_id"].take(pc.unique(places))


def _check_likes(liked: pa.ChunkedArray, users: pa.Table, config: DataConfig) -> None:
    splits = users.filter(pc.is_in(users["user_id"], liked.combine_chunks()))["split"].unique().to_pylist()
    if lacking := [name for name in SPLITS if name not in splits]:
        cause = f"in no list of the {lacking[0]} users is an item liked, that is, rated above {config.like_threshold:g}"
        raise InputError("data.like_threshold", cause, "Set it below the ratings of what was liked, or give more users")


def _interactions(log: Log) -> pa.Table:
    return pa.table(
        {
            "user_id": log.users.take(pa.array(log.owners())),
            "item_id": log.items.take(pa.array(log.item_codes)),
            "rating": log.ratings,
            "timestamp": log.timestamps,
        }
    )


def _users(tables: Tables, log: Log, splits: np.ndarray) -> pa.Table:
    rows = codes_of(log.users, tables.users["user_id"].combine_chunks())
    return pa.table(
        {
            "user_id": log.users,
            "profile": tables.users["profile"].take(pa.array(rows)),
            "split": pa.array(np.array(SPLITS)[splits].tolist()),
        }
    )


def _histories(log: Log, history: np.ndarray) -> pa.Table:
    lengths = np.bincount(log.owners()[history], minlength=len(log.users))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.table(
        {
            "user_id": log.users,
            "item_ids": pa.ListArray.from_arrays(offsets, log.items.take(pa.array(log.item_codes[history]))),
            "ratings": pa.ListArray.from_arrays(offsets, pa.array(log.ratings[history])),
        }
    )
