"""`users.parquet` of an export on disk: rows of one origin, replaced user by user, in memory that does not grow with their number."""

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo4rec import files
from dpo4rec.errors import InputError

ROWS_A_GROUP = 8192


class UserTable:
    """Columns user_id, text, vector (list of D float32) and prompt_hash (of the prompt that the text answers), one row a user.

    Args:
        file: the table, or where it will be.
        origin: what texts and vectors are made from; it is written into the file.

    Raises:
        InputError: the file is damaged or of another origin.
    """

    def __init__(self, file: Path, origin: dict[str, Any]) -> None:
        self.file, self.origin = file, origin
        self.hashes = self._read() if file.exists() else {}

    def _read(self) -> dict[str, str]:
        table = files.read_parquet(self.file, ["user_id", "prompt_hash"])
        found = json.loads((table.schema.metadata or {}).get(b"dpo4rec", b"{}"))
        differing = sorted(key for key in found.keys() | self.origin.keys() if found.get(key) != self.origin.get(key))
        if differing:
            raise InputError(
                str(self.file),
                f"its rows were made with another {', '.join(differing)}, and such texts and vectors must not be mixed",
                "Export into another folder, or delete the file",
            )
        return dict(zip(table["user_id"].to_pylist(), table["prompt_hash"].to_pylist(), strict=True))

    def replace(self, hashes: dict[str, str], tables: Iterable[pa.Table]) -> None:
        """Writes the rows of all other users as they are, in their order, and behind them those of `tables`.

        Args:
            hashes: of the prompts of the users who get another row, or their first.
            tables: their user_id, text and vector; of a user's rows the first counts.

        Raises:
            RuntimeError: `tables` lack one of the users.
        """
        written = 0
        with files.atomic(self.file) as partial, _Writer(partial, self.origin) as writer:
            for table in _grouped(chain(self._kept(hashes), _first_rows(tables, hashes))):
                writer.write(table)
                written += table.num_rows
            if written != len(self.hashes.keys() | hashes.keys()):
                raise RuntimeError(f"{self.file}: {written} rows for {len(self.hashes.keys() | hashes.keys())} users")
        self.hashes |= hashes

    def _kept(self, replaced: dict[str, str]) -> Iterator[pa.Table]:
        if self.hashes:
            with pq.ParquetFile(self.file) as parquet:
                for batch in parquet.iter_batches(ROWS_A_GROUP):
                    table = pa.Table.from_batches([batch])
                    yield table.filter(pa.array([user not in replaced for user in table["user_id"].to_pylist()], pa.bool_()))


class _Writer:
    """A Parquet writer that takes the schema of its first table."""

    def __init__(self, path: Path, origin: dict[str, Any]) -> None:
        self.path, self.metadata = path, {"dpo4rec": json.dumps(origin)}
        self.writer: pq.ParquetWriter | None = None

    def __enter__(self) -> "_Writer":
        return self

    def write(self, table: pa.Table) -> None:
        if self.writer is None:
            self.writer = pq.ParquetWriter(self.path, table.schema.with_metadata(self.metadata))
        self.writer.write_table(table.replace_schema_metadata(self.metadata))

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.close()


def _first_rows(tables: Iterable[pa.Table], hashes: dict[str, str]) -> Iterator[pa.Table]:
    seen: set[str] = set()
    for table in tables:
        users = table["user_id"].to_pylist()
        new = table.filter(pa.array([user not in seen for user in users], pa.bool_()))
        seen.update(users)
        yield new.append_column("prompt_hash", pa.array([hashes[user] for user in new["user_id"].to_pylist()], pa.string()))


def _grouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The rows of the tables in groups of `ROWS_A_GROUP`, or more where one table has more."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table.replace_schema_metadata(None))
        if sum(part.num_rows for part in waiting) >= ROWS_A_GROUP:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()
