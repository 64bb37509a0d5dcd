"""Units of work: named tables, each processed whole as one batch, read where the work is done.

A source of units knows how many there are and reads one by its number. It travels to the workers; its tables do not, so a driver
holds numbers only, however many users there are.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpo4rec import files

Units = list[tuple[str, pa.Table]]
"""Few and small units, held in memory: (name, table)."""


class Source(Protocol):
    """Units by number: 0 <= number < len(source)."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """Of the unit and of its result's file; no two are the same."""

    def read(self, number: int) -> pa.Table: ...


class Tables:
    """Units that are at hand."""

    def __init__(self, units: Units) -> None:
        self.units = units

    def __len__(self) -> int:
        return len(self.units)

    def name(self, number: int) -> str:
        return self.units[number][0]

    def read(self, number: int) -> pa.Table:
        return self.units[number][1]


class Rows:
    """Consecutive rows of a Parquet file, `rows` a unit (the last may be shorter), in the file's order.

    A unit reads the row groups that it lies in, so write the file with groups of some thousand rows.

    Args:
        path: the file.
        rows: rows of a unit.
        columns: those that the units have; None: all.
        where: column and its values: other rows are left out before units are cut.
    """

    def __init__(self, path: Path, rows: int, columns: list[str] | None = None, where: tuple[str, list[str]] | None = None) -> None:
        self.path, self.columns, self.where = path, columns, where
        with pq.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            kept = np.arange(file.metadata.num_rows)
            if where is not None:
                kept = np.flatnonzero(np.concatenate([self._wanted(part) for part in file.iter_batches(columns=[where[0]])] or [kept > 0]))
        self.group_ends = np.cumsum(sizes)
        self.first, self.last = kept[::rows].copy(), kept[np.minimum(np.arange(rows - 1, len(kept) + rows - 1, rows), len(kept) - 1)]

    def __len__(self) -> int:
        return len(self.first)

    def name(self, number: int) -> str:
        return unit_name(number)

    def read(self, number: int) -> pa.Table:
        first, last = int(self.first[number]), int(self.last[number])
        from_group, to_group = np.searchsorted(self.group_ends, [first, last], side="right").tolist()
        wanted = None if self.columns is None else [*self.columns, *([self.where[0]] if self.where else [])]
        with pq.ParquetFile(self.path) as file:
            table = file.read_row_groups(list(range(from_group, to_group + 1)), columns=wanted)
        skipped = int(self.group_ends[from_group - 1]) if from_group else 0
        table = table.slice(first - skipped, last - first + 1)
        if self.where is not None:
            table = table.filter(pa.array(self._wanted(table)))
        return (table if self.columns is None else table.select(self.columns)).combine_chunks()

    def _wanted(self, part: pa.Table | pa.RecordBatch) -> np.ndarray:
        column, values = self.where or ("", [])
        return pc.is_in(part[column], pa.array(values)).to_numpy(zero_copy_only=False)


class Files:
    """The Parquet files of a folder, by name: what another step has written; files without rows are left out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [path.stem for path in sorted(folder.glob("*.parquet")) if not files.is_empty(path)]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, number: int) -> str:
        return self.names[number]

    def read(self, number: int) -> pa.Table:
        return files.read_parquet(self.folder / f"{self.names[number]}.parquet")


def cut(table: pa.Table, rows: int) -> Units:
    """Consecutive units of `rows` rows (the last may be shorter), named by their number."""
    return [(unit_name(start // rows), table.slice(start, rows)) for start in range(0, len(table), rows)]


def unit_name(number: int) -> str:
    return f"unit-{number:05d}"


def by_user(table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """The smallest parts that a worker can be given, with their keys: all rows of a user; each row, where there are no users."""
    if "user_id" not in table.column_names:
        yield from ((f"row {row}", table.slice(row, 1)) for row in range(len(table)))
        return
    for user in table["user_id"].unique().to_pylist():
        yield user, table.filter(pc.equal(table["user_id"], user)).combine_chunks()


def readable(path: Path) -> bool:
    """True when the Parquet file is there and whole; a damaged one is deleted, so that its unit runs again."""
    if not path.exists():
        return False
    try:
        pq.read_metadata(path)
        return True
    except (pa.ArrowException, OSError):
        files.remove(path)
        return False
