"""Files with one record a line, JSON or a Python literal, plain or gzip: read line by line, so that any size will do."""

import ast
import gzip
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from dpo4rec.errors import InputError

Record = dict[str, Any]


def each_record(path: Path, take: Callable[[Record], None]) -> None:
    """Calls `take` with the record of every line; blank lines are passed over.

    Old public files are not JSON but what Python prints of a dictionary; such lines are read with `ast.literal_eval`.

    Raises:
        InputError: the file is missing, empty or damaged; or, naming the line, it does not parse, or `take` raised a `ValueError`,
            `TypeError` or `KeyError` (the name of a missing field).
    """
    number, records = 0, 0
    try:
        with _opened(path) as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    records += 1
                    _take(line, take, f"{path}, line {number}")
    except FileNotFoundError as error:
        raise InputError(str(path), "there is no such file", "Put it there or correct the path in the configuration") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}, after line {number}", f"the file cannot be read ({error})", "Fetch it again: it is damaged") from error
    if not records:
        raise InputError(str(path), "the file is empty", "Give a file with one record a line")


def _opened(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _take(line: bytes, take: Callable[[Record], None], place: str) -> None:
    record: Record = {}
    try:
        record = _parsed(line.decode())
        take(record)
    except KeyError as error:
        cause = f"the field {error} is missing; the record has {', '.join(map(str, record))}"
        raise InputError(place, cause, "Check that this is the file that the configuration names") from error
    except (ValueError, TypeError) as error:
        cause = f"the line {line[:120].decode(errors='replace')!r} cannot be used ({error})"
        raise InputError(place, cause, "Correct or remove the line, or fetch the file again") from error


def _parsed(text: str) -> Record:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as not_json:
        try:
            record = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError) as not_python:
            raise ValueError(f"it is neither JSON nor a Python literal: {not_json}") from not_python
    if not isinstance(record, dict):
        raise ValueError("a record in braces is expected")
    return record
