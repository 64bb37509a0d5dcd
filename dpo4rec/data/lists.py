"""Frozen re-ranking lists: a user's later interactions among items that the user never touched."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec.data.config import DataConfig
from dpo4rec.data.splits import Log
from dpo4rec.errors import InputError
from dpo4rec.files import stable_seed

LISTS = pa.schema(
    [("list_id", pa.int64()), ("user_id", pa.string()), ("candidates", pa.list_(pa.string())), ("labels", pa.list_(pa.int8()))]
)


def build_lists(log: Log, config: DataConfig, popularity: np.ndarray, seed: int) -> pa.Table:
    """Lists of every user: blocks of consecutive interactions after the history, filled up with negatives and shuffled.

    A negative is drawn without replacement from the items that somebody touched (one that nobody ever touched would give itself
    away) and this user never did, neither before nor after. A user's random numbers depend on the seed and the user's id alone.

    Args:
        popularity: weight of each item, > 0 [I]; only ratios matter, and only for `negatives="popularity"`.

    Returns:
        A table of schema `LISTS`, by user and then time.

    Raises:
        InputError: a user touched so many items that too few are left.
    """
    touched = np.bincount(log.item_codes, minlength=len(log.items)) > 0
    weights = np.where(touched, popularity if config.negatives == "popularity" else 1.0, 0.0)
    owners, candidates, labels = [], [], []
    for user, history in enumerate(log.history_lengths(config.history_length)):
        rows = slice(log.starts[user], log.starts[user + 1])
        items, liked = log.item_codes[rows], log.ratings[rows] > config.like_threshold
        width = config.positives_per_list
        blocks = min((len(items) - history) // width, config.max_lists_per_user)
        later = slice(history, history + blocks * width)
        rng = np.random.default_rng(stable_seed(seed, "lists", log.users[user].as_py()))
        negatives = _draw(weights, items, blocks, config.list_length - width, rng)
        if negatives is None:
            cause = (
                f"it touched {len(items)} of the {touched.sum()} items, so fewer than {config.list_length - width} are left as negatives"
            )
            raise InputError(f"user {log.users[user].as_py()!r}", cause, "Lower data.list_length, leave this user out or give more items")
        whole = np.concatenate([items[later].reshape(blocks, width), negatives], axis=1)
        marks = np.concatenate([liked[later].reshape(blocks, width), np.zeros(negatives.shape, bool)], axis=1)
        order = rng.permuted(np.tile(np.arange(config.list_length), (blocks, 1)), axis=1)
        owners.append(np.full(blocks, user))
        candidates.append(np.take_along_axis(whole, order, axis=1))
        labels.append(np.take_along_axis(marks, order, axis=1))
    return _table(log, np.concatenate(owners), np.concatenate(candidates), np.concatenate(labels))


def lists_hash(lists: pa.Table) -> str:
    """SHA-256 (16 hex digits) of the lists' content, whatever the file's layout: equal hashes are the same lists."""
    digest = hashlib.sha256()
    for row in lists.to_pylist():
        digest.update(json.dumps([row[name] for name in LISTS.names], separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()[:16]


def count_cold(lists: pa.Table, histories: pa.Table, users: pa.Table) -> dict[str, int]:
    """How many candidates of the test users, and how many targets (label 1) among them, no list or history of a training user holds."""
    train, test = (users.filter(pc.equal(users["split"], split))["user_id"].combine_chunks() for split in ("train", "test"))
    learned, tested = (lists.filter(pc.is_in(lists["user_id"], of)) for of in (train, test))
    read = histories.filter(pc.is_in(histories["user_id"], train))
    known = [pc.unique(pc.list_flatten(column)) for column in (learned["candidates"], read["item_ids"])]
    cold = pc.invert(pc.is_in(pc.list_flatten(tested["candidates"]), pa.concat_arrays(known)))
    targets = pc.and_(cold, pc.equal(pc.list_flatten(tested["labels"]), 1))
    return {"cold_test_candidates": pc.sum(cold).as_py() or 0, "cold_test_targets": pc.sum(targets).as_py() or 0}


def _draw(weights: np.ndarray, touched: np.ndarray, rows: int, width: int, rng: np.random.Generator) -> np.ndarray | None:
    """Weighted draws without replacement [rows, width], None when fewer than `width` items are left.

    The `width` smallest of exponentials divided by weights (Efraimidis and Spirakis, 2006).
    """
    allowed = weights.copy()
    allowed[touched] = 0.0
    pool = np.flatnonzero(allowed)
    if len(pool) < width:
        return None
    keys = rng.standard_exponential((rows, len(pool)), dtype=np.float32) / allowed[pool].astype(np.float32)
    drawn = np.argpartition(keys, width - 1, axis=1)[:, :width]
    drawn = np.take_along_axis(drawn, np.argsort(np.take_along_axis(keys, drawn, axis=1), axis=1, kind="stable"), axis=1)
    return pool[drawn]


def _table(log: Log, owners: np.ndarray, candidates: np.ndarray, labels: np.ndarray) -> pa.Table:
    offsets = pa.array(np.arange(len(candidates) + 1) * candidates.shape[1], pa.int32())
    return pa.table(
        [
            pa.array(np.arange(len(candidates))),
            log.users.take(pa.array(owners)),
            pa.ListArray.from_arrays(offsets, log.items.take(pa.array(candidates.ravel()))),
            pa.ListArray.from_arrays(offsets, pa.array(labels.ravel().astype(np.int8))),
        ],
        schema=LISTS,
    )
