"""Rows of some users of a Parquet file, in memory that does not grow with the file."""

from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpo4rec import files

WHOLE = ("", "\U0010ffff" * 8)
"""Range of user ids of a row group that does not tell its own."""


class UserRows:
    """A Parquet file with a column user_id.

    Row groups tell between which two their users lie, so that those without any of the users are not read. Hence write such a file by user
    and in groups of `files.ROWS_A_GROUP` rows; from any other the same rows are read, slowly.

    Raises:
        InputError: the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.footer = pq.read_metadata(path)
        except FileNotFoundError as error:
            raise files.missing(path) from error
        except (pa.ArrowException, OSError) as error:
            raise files.corrupted(path, error) from error
        self.ranges = [_range(self.footer.row_group(group)) for group in range(self.footer.num_row_groups)]

    def read(self, users: Iterable[str], columns: list[str] | None = None) -> pa.Table:
        """Rows of these users in the order of the file; `columns` other than all of them must have user_id."""
        wanted = sorted(set(users))
        groups = [number for number, (least, most) in enumerate(self.ranges) if _any_between(wanted, least, most)]
        try:
            with pq.ParquetFile(self.path, metadata=self.footer) as file:
                table = file.read_row_groups(groups, columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise files.corrupted(self.path, error) from error
        return table.filter(pc.is_in(table["user_id"], pa.array(wanted, table.schema.field("user_id").type)))


def of_split(table: pa.Table, users: UserRows, split: str) -> pa.Table:
    """The rows of a table whose user_id belongs to a split, as `users` (user_id, split) have it."""
    splits = users.read(table["user_id"].to_pylist(), ["user_id", "split"])
    members = splits.filter(pc.equal(splits["split"], split))["user_id"].combine_chunks()
    return table.filter(pc.is_in(table["user_id"], members))


def _range(group: pq.RowGroupMetaData) -> tuple[str, str]:
    found = next(column for at in range(group.num_columns) if (column := group.column(at)).path_in_schema == "user_id")
    known = found.statistics is not None and found.statistics.has_min_max
    return (found.statistics.min, found.statistics.max) if known else WHOLE


def _any_between(ascending: list[str], least: str, most: str) -> bool:
    at = bisect_left(ascending, least)
    return at < len(ascending) and ascending[at] <= most
