"""Parquet and CSV files with named columns."""

import difflib
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from dpo4rec.data.config import NO_RATING, TableConfig
from dpo4rec.data.schema import INTERACTIONS, ITEMS, USERS, Tables
from dpo4rec.errors import InputError


def read_table(config: TableConfig, folder: Path) -> Tables:
    """Reads the files of `config` in `folder`; ids become strings.

    Raises `InputError` when a file is missing or damaged, a column is missing (naming the nearest) or has an unusable type.
    """
    interactions = TableFile(folder / config.interactions, config.list_separator, numbers=(config.rating_column, config.timestamp_column))
    items = TableFile(folder / config.items, config.list_separator, numbers=(config.year_column,))
    log = pa.table(
        [
            interactions.ids(config.user_column),
            interactions.ids(config.item_column),
            interactions.ratings(config.rating_column),
            interactions.seconds(config.timestamp_column),
        ],
        schema=INTERACTIONS,
    )
    catalogue = pa.table(
        [
            items.ids(config.item_column),
            items.text(config.title_column),
            items.lists(config.genres_column),
            items.years(config.year_column),
            items.lists(config.people_column),
        ],
        schema=ITEMS,
    )
    if config.users is None or config.profile_column is None:
        known = pc.unique(log["user_id"])
        users = pa.table([known, pa.array([""] * len(known))], schema=USERS)
        users_place = interactions.place
    else:
        file = TableFile(folder / config.users, config.list_separator)
        users = pa.table([file.ids(config.user_column), pc.fill_null(file.text(config.profile_column), "")], schema=USERS)
        users_place = file.place
    return Tables(log, catalogue, users, places=(interactions.place, items.place, users_place))


class TableFile:
    """One Parquet or CSV file; a method for each kind of column.

    Args:
        list_separator: between the members of a list in one CSV cell.
        numbers: the columns of a CSV that hold numbers; all others are strings.
        key: the part of the configuration that names the file and its columns, for errors.
    """

    def __init__(self, path: Path, list_separator: str = "|", numbers: tuple[str | None, ...] = (), key: str = "data.table") -> None:
        self.path, self.place, self.list_separator, self.key = path, f"{path}, row", list_separator, key
        self.table = _read(path, numbers, key)

    def _column(self, name: str) -> pa.ChunkedArray:
        if name not in self.table.column_names:
            nearest = difflib.get_close_matches(name, self.table.column_names, n=1, cutoff=0)
            hint = f"the nearest of the file is {nearest[0]!r}" if nearest else "the file has none"
            raise InputError(str(self.path), f"there is no column {name!r}", f"Correct the column names in {self.key}: {hint}")
        if self.table.column_names.count(name) > 1:
            raise self._refuse(name, "several columns have this name", "Rename all but one")
        column = self.table[name]
        return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column

    def _refuse(self, name: str, cause: str, remedy: str) -> InputError:
        return InputError(f"{self.path}, column {name!r}", cause, remedy)

    def ids(self, name: str) -> pa.ChunkedArray:
        column = self._column(name)
        if not (pa.types.is_integer(column.type) or _is_text(column.type)):
            raise self._refuse(name, f"ids must be integers or strings, not {column.type}", "Convert the column")
        return column.cast(pa.string())

    def text(self, name: str) -> pa.ChunkedArray:
        column = self._column(name)
        if not _is_text(column.type):
            raise self._refuse(name, f"a text is expected, not {column.type}", "Name a column of strings")
        return column.cast(pa.string())

    def ratings(self, name: str | None) -> pa.Array | pa.ChunkedArray:
        return pa.repeat(pa.scalar(NO_RATING, pa.float32()), self.table.num_rows) if name is None else self._numbers(name, pa.float32())

    def seconds(self, name: str | None) -> pa.Array | pa.ChunkedArray:
        """Without a column all are 0: a stable sort then keeps the order of the file."""
        if name is None:
            return pa.repeat(pa.scalar(0, pa.int64()), self.table.num_rows)
        if pa.types.is_timestamp(self._column(name).type):
            return self._column(name).cast(pa.timestamp("s"), safe=False).cast(pa.int64())
        return self._numbers(name, pa.int64())

    def years(self, name: str | None) -> pa.Array | pa.ChunkedArray:
        return pa.nulls(self.table.num_rows, pa.int32()) if name is None else self._numbers(name, pa.int32())

    def lists(self, name: str | None) -> pa.Array:
        if name is None:
            return pa.array([[]] * self.table.num_rows, pa.list_(pa.string()))
        column = self._column(name)
        if self.path.suffix == ".csv":
            values = [[part.strip() for part in (cell or "").split(self.list_separator) if part.strip()] for cell in column.to_pylist()]
            return pa.array(values, pa.list_(pa.string()))
        listed = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        if not listed or not (_is_text(column.type.value_type) or pa.types.is_null(column.type.value_type)):
            raise self._refuse(name, f"a list of strings is expected in every row, not {column.type}", "Convert the column to lists")
        return pa.array([[part for part in row or [] if part] for row in column.to_pylist()], pa.list_(pa.string()))

    def _numbers(self, name: str, kind: pa.DataType) -> pa.ChunkedArray:
        column = self._column(name)
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type)):
            raise self._refuse(name, f"numbers are expected, not {column.type}", "Convert the column or name another one")
        try:
            return column.cast(kind, safe=pa.types.is_integer(kind))
        except pa.ArrowInvalid as error:  # a fraction where a whole number belongs, or too large
            raise self._refuse(name, f"not every value is a whole number ({error})", "Round the column or name another one") from error


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _read(path: Path, numbers: tuple[str | None, ...], key: str) -> pa.Table:
    """Parquet by its types; of a CSV all but `numbers` are strings, so that an id such as "007" stays what it is."""
    if path.suffix not in (".parquet", ".csv"):
        raise InputError(str(path), "the file is neither .parquet nor .csv", "Convert it to one of them")
    if not path.is_file():
        raise InputError(str(path), "there is no such file", f"Put it there or correct data.folder and {key}")
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path)
        parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
        with pyarrow.csv.open_csv(path, parse_options=parse) as reader:
            names = reader.schema.names
        kinds = {name: pa.float64() if name in numbers else pa.string() for name in names}
        return pyarrow.csv.read_csv(path, parse_options=parse, convert_options=pyarrow.csv.ConvertOptions(column_types=kinds))
    except (pa.ArrowException, OSError) as error:
        remedy = "Ratings and timestamps (seconds since 1970) must be numbers; if that is not it, export the file again"
        raise InputError(str(path), f"the file cannot be read ({error})", remedy) from error
