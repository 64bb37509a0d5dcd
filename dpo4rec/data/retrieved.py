"""Re-ranking lists of what a first-stage retriever found: the real re-ranking task, in the layout of the frozen lists."""

from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from dpo4rec.data.config import DataConfig
from dpo4rec.data.lists import LISTS, count_cold, lists_hash
from dpo4rec.data.schema import codes_of
from dpo4rec.data.splits import SPLITS, split_users
from dpo4rec.errors import InputError
from dpo4rec.files import read_parquet, stable_seed, write_json, write_parquet
from dpo4rec.settings import Settings

CANDIDATES = pa.schema([("user_id", pa.string()), ("candidates", pa.list_(pa.string())), ("row", pa.int64())])
"""`row`, from 1, is the one of the file: errors name it."""


class RetrievedConfig(Settings):
    """Where the candidates of the retrieved protocol come from."""

    retriever: str | None = Field(None, description="name of a fitted model of the next item; its first seed retrieves [sasrec]")
    file: str | None = Field(None, description="or a Parquet file with the columns user_id and candidates (list), best first")
    rows: dict[str, str] = Field({}, description="only the file's rows with these values, such as {retriever: sasrec}")
    length: int = Field(100, ge=10, le=100, description="candidates a user")
    add_held_out: bool = Field(
        False, description="replace the last candidate by the held-out item where that was not found, and shuffle: its place would tell"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.file is not None and self.retriever is not None:
            raise ValueError("file and retriever both give candidates: keep one")
        if self.rows and self.file is None:
            raise ValueError("rows choose from a file: set file")
        return self


def read_candidates(config: RetrievedConfig) -> pa.Table:
    """Those of the configured file, schema `CANDIDATES`. Raises `InputError` naming file and column, or a row without a value."""
    path = Path(str(config.file)).expanduser()
    table = read_parquet(path)
    for column in ("user_id", "candidates", *config.rows):
        if column not in table.column_names:
            raise InputError(str(path), f"there is no column {column!r}", f"It has {', '.join(table.column_names)}")
    numbered = table.select(["user_id", "candidates"]).append_column("row", pa.array(range(1, len(table) + 1)))
    wanted = np.ones(len(table), bool)
    for column, value in config.rows.items():
        wanted &= pc.fill_null(pc.equal(_cast(table, column, pa.string(), path), value), False).to_numpy()
    numbered = numbered.filter(pa.array(wanted))
    if not len(numbered):
        raise InputError(str(path), f"no row has {config.rows}" if config.rows else "there is not a single row", "Correct retrieved.rows")
    for column in ("user_id", "candidates"):
        empty = numbered["row"].filter(pc.is_null(numbered[column]))
        if len(empty):
            raise InputError(f"{path}, row {empty[0]}", f"there is no value in {column!r}", "Fill it in, or leave the row out")
    return pa.table([_cast(numbered, field.name, field.type, path) for field in CANDIDATES], schema=CANDIDATES)


def _cast(table: pa.Table, column: str, kind: pa.DataType, path: Path) -> pa.ChunkedArray:
    try:
        return table[column].cast(kind)
    except pa.ArrowException as error:
        cause = f"values of {kind} are expected, not {table[column].type}"
        raise InputError(f"{path}, column {column!r}", cause, "Convert the column") from error


def prepare_retrieved(
    sequences: Path, candidates: pa.Table, config: RetrievedConfig, data: DataConfig, seed: int, out: Path
) -> dict[str, Any]:
    """Writes a data folder whose lists are the candidates of each user with one test target; returns its summary.

    The history of a user is everything before the target, at most `data.history_length` interactions. The label is 1 for the target. With
    `ranked` in the summary the lists stand in the retriever's order; a list without the target stays: its user was not served. So
    `targets.parquet` (user_id, item_id) has every user's target, retrieved or not.

    Args:
        sequences: folder that `prepare_sequences` wrote (leave-one-out).
        candidates: schema `CANDIDATES`.

    Raises:
        InputError: naming file and row, a user or item is unknown (users may be where `data.max_users` takes a sample), a user has several
            rows or fewer than `length` candidates; or no user is known, or targets are not one a user.
    """
    table = read_parquet(sequences / "sequences.parquet")
    items, users = read_parquet(sequences / "items.parquet"), table["user_id"].combine_chunks()
    if data.max_users is not None:  # the candidates may be of all users, the data are of some
        candidates = candidates.filter(pc.is_in(candidates["user_id"], users))
    rows = _rows(candidates, users, config)
    held, before = _targets(table)
    lists = _lists(candidates, rows, held, items["item_id"], users, config, seed)
    kept = np.sort(np.flatnonzero(rows >= 0))
    if not len(kept):
        raise InputError(_source(config), "none of the users is in the data", "Give candidates for this data's users")
    splits = split_users(len(kept), data.validation_share, data.test_share, seed)
    known = pa.table({"user_id": users.take(pa.array(kept)), "profile": [""] * len(kept), "split": np.array(SPLITS)[splits].tolist()})
    histories = _histories(table, kept, before, data.history_length)
    write_parquet(items, out / "items.parquet")
    write_parquet(known, out / "users.parquet")
    write_parquet(histories, out / "histories.parquet")
    write_parquet(lists, out / "lists.parquet")
    write_parquet(pa.table({"user_id": known["user_id"], "item_id": [held[user] for user in kept]}), out / "targets.parquet")
    found = float(np.mean([any(labels) for labels in lists["labels"].to_pylist()]))
    summary = {
        "lists": len(lists),
        "share_with_target": found,
        **count_cold(lists, histories, known),
        "ranked": not config.add_held_out,
        "lists_hash": lists_hash(lists),
    }
    write_json(summary, out / "summary.json")
    return summary


def _source(config: RetrievedConfig) -> str:
    return config.file or "retrieved candidates"


def _refusal(config: RetrievedConfig, candidates: pa.Table, row: int, cause: str, remedy: str) -> InputError:
    user = candidates["user_id"][row].as_py()
    return InputError(f"{_source(config)}, row {candidates['row'][row]}, user {user!r}", cause, remedy)


def _rows(candidates: pa.Table, users: pa.Array, config: RetrievedConfig) -> np.ndarray:
    """The row of `candidates` of each user, -1 without [U]."""
    unknown = np.flatnonzero(codes_of(candidates["user_id"], users) < 0)
    if len(unknown):
        raise _refusal(config, candidates, int(unknown[0]), "the user is not in the data", "Give candidates for this data's users")
    rows = codes_of(users, candidates["user_id"].combine_chunks())
    again = np.setdiff1d(np.arange(len(candidates)), rows)
    if len(again):
        raise _refusal(config, candidates, int(again[0]), "the user has another row", "Keep one row a user (retrieved.rows chooses)")
    return rows


def _targets(table: pa.Table) -> tuple[list[str], np.ndarray]:
    """Each user's held-out item ("" without one) and the number of interactions before it."""
    lengths = pc.list_value_length(table["item_ids"]).to_numpy()
    before = table["train_length"].to_numpy() + table["validation_length"].to_numpy()
    many = np.flatnonzero(lengths - before > 1)
    if len(many):
        user = table["user_id"][int(many[0])].as_py()
        raise InputError(f"user {user!r}", f"it has {lengths[many[0]] - before[many[0]]} test items", "Use sequences.split=leave-one-out")
    return [ids[-1] if n > b else "" for ids, n, b in zip(table["item_ids"].to_pylist(), lengths, before, strict=True)], before


def _lists(
    candidates: pa.Table, rows: np.ndarray, held: list[str], items: pa.ChunkedArray, users: pa.Array, config: RetrievedConfig, seed: int
) -> pa.Table:
    known, found = set(items.to_pylist()), candidates["candidates"].to_pylist()
    out: list[dict[str, Any]] = []
    for user in np.flatnonzero(rows >= 0):
        name, target, row = users[int(user)].as_py(), held[user], int(rows[user])
        given = found[row]
        if not target:
            raise _refusal(config, candidates, row, "the user has no held-out item", "Leave it out of the candidates")
        chosen = given[: config.length]
        if len(chosen) < config.length or len(set(chosen)) < len(chosen):
            cause = f"it has {len(set(chosen))} different candidates, not {config.length}"
            raise _refusal(config, candidates, row, cause, "Lower retrieved.length")
        unknown = [item for item in chosen if item not in known]
        if unknown:
            cause = f"its candidate {unknown[0]!r} is not an item of the data"
            raise _refusal(config, candidates, row, cause, "Lower data.k_core or filter them")
        if config.add_held_out:
            chosen = chosen if target in chosen else [*chosen[:-1], target]
            order = np.random.default_rng(stable_seed(seed, "retrieved", name)).permutation(config.length)
            chosen = [chosen[place] for place in order]
        out.append({"list_id": len(out), "user_id": name, "candidates": chosen, "labels": [int(item == target) for item in chosen]})
    return pa.Table.from_pylist(out, schema=LISTS)


def _histories(table: pa.Table, users: np.ndarray, before: np.ndarray, longest: int) -> pa.Table:
    rows = table.take(pa.array(users)).select(["user_id", "item_ids", "ratings"]).to_pylist()
    cut = [(row, slice(max(0, end - longest), end)) for row, end in zip(rows, before[users], strict=True)]
    columns = {
        "user_id": [row["user_id"] for row, _ in cut],
        "item_ids": pa.array([row["item_ids"][part] for row, part in cut], pa.list_(pa.string())),
        "ratings": pa.array([row["ratings"][part] for row, part in cut], pa.list_(pa.float32())),
    }
    return pa.table(columns)
