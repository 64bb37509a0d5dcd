"""Users' sequences for models of the next item: what they may learn from, and what they must predict."""

import hashlib
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from dpo4rec.data.config import DataConfig
from dpo4rec.data.schema import Tables
from dpo4rec.data.sources import read_source
from dpo4rec.data.splits import Log, sample_users
from dpo4rec.errors import InputError
from dpo4rec.files import write_json, write_parquet
from dpo4rec.settings import Settings

SEQUENCES = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_ids", pa.list_(pa.string())),
        ("ratings", pa.list_(pa.float32())),
        ("train_length", pa.int32()),
        ("validation_length", pa.int32()),
    ]
)


class SequenceConfig(Settings):
    """How each user's interactions are cut, in time order, into training, validation and test."""

    split: Literal["leave-one-out", "global-time"] = Field(
        "leave-one-out", description="last interaction for test and the one before for validation; or everything after a point of time"
    )
    validation_users: int | None = Field(
        None, ge=1, description="leave-one-out: a seeded sample holds out a validation interaction, all others learn from theirs [all]"
    )
    validation_share: float | None = Field(None, gt=0, lt=0.5, description="global-time: share of all interactions, by time [0.1]")
    test_share: float | None = Field(None, gt=0, lt=0.5, description="global-time: share of all interactions, the latest ones [0.1]")

    @model_validator(mode="after")
    def _shares_are_read(self) -> Self:
        if self.split == "leave-one-out" and (self.validation_share, self.test_share) != (None, None):
            raise ValueError("validation_share and test_share belong to split=global-time: leave-one-out holds out one interaction each")
        if self.split == "global-time" and self.validation_users is not None:
            raise ValueError("validation_users belongs to split=leave-one-out: global-time holds out by time, whoever it is")
        return self


def prepare_sequences(data: DataConfig, config: SequenceConfig, seed: int, out: Path) -> dict[str, Any]:
    """Writes `sequences.parquet` (schema `SEQUENCES`), `items.parquet` and `summary.json` into the folder `out`; returns the summary.

    The first `train_length` of a user's items may be learned from, the next `validation_length` choose, the rest is the test.
    With `validation_users`, leave-one-out lets the other users learn from the interaction before their last, as in published
    comparisons (gSASRec: Petrov and Macdonald, RecSys 2023); every test target stays what it was.
    Leave-one-out gives a user of fewer than three interactions no target: it is learned from, and counted as `users_without_target`.
    Cold users (targets, but nothing to learn from) and cold targets (items that nobody touched in training) are counted.

    Raises:
        InputError: the source cannot be used, or no user has a validation and no user a test target.
    """
    tables = read_source(data, seed)
    log = Log.of(tables)
    log = log.keep(sample_users(np.flatnonzero(log.counts), data.max_users, seed))
    train, validation = _cuts(log, config, seed)
    test = log.counts - train - validation
    if not validation.any() or not test.any():
        raise InputError("data", "nobody has a validation and a test interaction", "Give longer histories, or another sequences.split")
    sequences = _table(log, train, validation)
    write_parquet(sequences, out / "sequences.parquet")
    write_parquet(tables.items, out / "items.parquet")
    summary = {
        "source": data.source,
        "split": config.split,
        "users": len(log.users),
        "items": len(log.items),
        "interactions": len(log.item_codes),
        **tables.report,
        "validation_users": int((validation > 0).sum()),
        **_cold(log, train, validation),
        "candidates_hash": _hash(tables, sequences),
    }
    write_json(summary, out / "summary.json")
    return summary


def _cuts(log: Log, config: SequenceConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Length of the training and of the validation part of each user [U]."""
    if config.split == "leave-one-out":
        test = (log.counts >= 3).astype(np.int64)
        validation = np.zeros_like(test)
        validation[sample_users(np.flatnonzero(test), config.validation_users, seed)] = 1
        return log.counts - validation - test, validation
    test_share, validation_share = config.test_share or 0.1, config.validation_share or 0.1
    first_validation, first_test = np.quantile(log.timestamps, [1 - test_share - validation_share, 1 - test_share])
    owners, users = log.owners(), len(log.users)
    train = np.bincount(owners[log.timestamps < first_validation], minlength=users)
    return train, np.bincount(owners[log.timestamps < first_test], minlength=users) - train


def _table(log: Log, train: np.ndarray, validation: np.ndarray) -> pa.Table:
    offsets = pa.array(log.starts, pa.int32())
    return pa.table(
        [
            log.users,
            pa.ListArray.from_arrays(offsets, log.items.take(pa.array(log.item_codes))),
            pa.ListArray.from_arrays(offsets, pa.array(log.ratings, pa.float32())),
            pa.array(train, pa.int32()),
            pa.array(validation, pa.int32()),
        ],
        schema=SEQUENCES,
    )


def _cold(log: Log, train: np.ndarray, validation: np.ndarray) -> dict[str, int]:
    position = np.arange(len(log.item_codes)) - np.repeat(log.starts[:-1], log.counts)
    seen = np.bincount(log.item_codes[position < np.repeat(train, log.counts)], minlength=len(log.items)) > 0
    of_test = position >= np.repeat(train + validation, log.counts)
    test = log.counts - train - validation
    return {
        "test_users": int((test > 0).sum()),
        "cold_test_users": int(((test > 0) & (train + validation == 0)).sum()),
        "users_without_target": int((test + validation == 0).sum()),
        "test_interactions": int(of_test.sum()),
        "cold_test_interactions": int((~seen[log.item_codes[of_test]]).sum()),
    }


def _hash(tables: Tables, sequences: pa.Table) -> str:
    """SHA-256 (16 hex digits) of the catalogue and of every user's cut sequence."""
    digest = hashlib.sha256()
    for column in (tables.items["item_id"], *sequences.drop_columns("ratings").columns):
        for value in column.to_pylist():
            digest.update(f"{value}\n".encode())
    return digest.hexdigest()[:16]
