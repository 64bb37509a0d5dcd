"""Files that are either whole or absent: atomic writes, verified reads, locks, content hashes, seeds."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo4rec.errors import InputError

ROWS_A_GROUP = 4096
"""Rows of a Parquet file that are read at once where its users are read a part at a time."""


@contextlib.contextmanager
def atomic(path: Path, replace: bool = True) -> Iterator[Path]:
    """Yields a temporary name beside `path` (file or folder) and renames it to `path` when the block ends well.

    A crash, of the machine too, leaves `path` as it was, or for a folder what `mend` makes so. Without `replace`, a folder that another
    process has put there meanwhile stays. Raises `InputError` when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, before = path.with_name(f".{path.name}.partial-{os.getpid()}"), path.with_name(f".{path.name}{BEFORE}")
    remove(partial)
    try:
        yield partial
        _to_disk(partial)
        if path.is_dir() and not replace:
            return
        if path.is_dir():  # a folder cannot be renamed onto a full one
            remove(before)
            path.rename(before)
        partial.replace(path)
        remove(before)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise InputError(
                str(path), "no space is left on the disk", "Free some and run the same command again: finished stages are kept"
            ) from error
        raise
    finally:
        remove(partial)


BEFORE = ".before"
"""Ends the hidden name of a folder that is about to be replaced."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def mend(folder: Path) -> None:
    """Clears away what `atomic` left anywhere in the folder when it was killed."""
    for partial in list(folder.rglob(".*.partial-*")):
        remove(partial)
    for before in list(folder.rglob(f".*{BEFORE}")):
        path = before.with_name(before.name.removeprefix(".").removesuffix(BEFORE))
        remove(before) if path.exists() else before.rename(path)


def _to_disk(path: Path) -> None:
    """So that after a loss of power a new name does not stand for an empty file."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def lock(folder: Path) -> IO[str]:
    """Holds a run folder, which is made if absent, until the file that it returns is closed, or the process ends.

    Raises:
        InputError: another process holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = (folder / ".lock").open("w")
    except OSError as error:
        raise InputError(str(folder), f"the run folder cannot be made or written ({error.strerror})", "Give another --run-dir") from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        held.close()
        raise InputError(str(folder), "another process is running in this folder", "Wait for it, or give another --run-dir") from error
    except OSError as error:  # of network file systems, which may be mounted without
        held.close()
        cause = f"its file system has no locks ({error.strerror}), so two runs could spoil each other's files"
        raise InputError(str(folder), cause, "Mount it with locks (Lustre: the option flock), or give a --run-dir elsewhere") from error
    return held


def checkpoints_of(path: Path) -> Path:
    """The hidden folder beside `path` of the checkpoints from which its making goes on."""
    return path.with_name(f".{path.name}.checkpoints")


def remove(path: Path) -> None:
    """Removes a file or a folder with its content; absent is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(value: Any, path: Path) -> None:
    with atomic(path) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises `InputError` when the file is missing, cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise missing(path) from error
    except OSError as error:
        raise InputError(str(path), f"it cannot be read ({error.strerror})", "Give a JSON file") from error
    except ValueError as error:
        raise corrupted(path, error) from error


def write_parquet(table: pa.Table, path: Path, rows_a_group: int | None = None) -> None:
    """`rows_a_group`: `ROWS_A_GROUP` for a file that is read a part at a time."""
    with atomic(path) as partial:
        pq.write_table(table, partial, row_group_size=rows_a_group)


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Reads a Parquet file, or all `*.parquet` of a folder in the order of their names; those that are empty have no schema to join.

    Raises `InputError` when it is missing or cannot be read.
    """
    parts = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not parts or not parts[0].exists():
        raise missing(path)
    tables = []
    for part in parts:
        try:
            tables += [] if is_empty(part) else [pq.read_table(part, columns=columns)]
        except (pa.ArrowException, OSError) as error:
            raise corrupted(part, error) from error
    return pa.concat_tables(tables) if tables else pa.table({})


def batches(path: Path, columns: list[str] | None = None, rows: int = ROWS_A_GROUP) -> Iterator[pa.Table]:
    """The rows of a Parquet file, or of all of a folder as `read_parquet` has them, at most `rows` at a time.

    Raises `InputError` as `read_parquet`.
    """
    parts = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not parts or not parts[0].exists():
        raise missing(path)
    for part in parts:
        if is_empty(part):
            continue
        try:
            with pq.ParquetFile(part) as file:
                yield from (pa.Table.from_batches([batch]) for batch in file.iter_batches(rows, columns=columns))
        except (pa.ArrowException, OSError) as error:
            raise corrupted(part, error) from error


def is_empty(path: Path) -> bool:
    """True for a Parquet file without columns: the result of a unit of work of which nothing was left. Raises `InputError` when damaged."""
    try:
        return pq.read_metadata(path).num_columns == 0
    except (pa.ArrowException, OSError) as error:
        raise corrupted(path, error) from error


def failed(folder: Path) -> dict[str, str]:
    """Users that were left out of a folder of results, each with its error: what `sampling.skip_failed_rows` has skipped."""
    return {user: error for file in sorted(folder.glob("*.failed.json")) for user, error in read_json(file).items()}


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    with atomic(path) as partial:
        # a copy of each: safetensors refuses tensors that share memory, as the shared experts' do
        copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(copies, partial)
        except SafetensorError as error:  # what it says of a full disk is no OSError
            number = next((number for number in NO_SPACE if f"os error {number})" in str(error)), None)
            raise OSError(number, os.strerror(number)) if number else error from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Raises `InputError` when the safetensors file is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise missing(path) from error
    except SafetensorError as error:
        raise corrupted(path, error) from error


def matrix(column: pa.ChunkedArray) -> Tensor:
    """A column of equally long lists of float32 as a tensor [rows, width]."""
    flat = pc.list_flatten(column).to_numpy()
    return torch.from_numpy(flat.reshape(len(column), -1).copy())


def missing(path: Path) -> InputError:
    return InputError(str(path), "there is no such file", "Run the stage that makes it, put it back, or correct the path")


def corrupted(path: Path, error: Exception) -> InputError:
    kind = {".parquet": "Parquet", ".safetensors": "safetensors"}.get(path.suffix, "JSON")
    remedy = f"Delete it and run again if a run has made it: what made it runs once more. One of your own must be a {kind} file"
    return InputError(str(path), f"the file is damaged or of another kind ({error})", remedy)


def content_hash(*paths: Path) -> str:
    """SHA-256 (16 hex digits) of the bytes and relative names of files and folders, hidden files left out."""
    digest = hashlib.sha256()
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            name = str(file.relative_to(path)) if path.is_dir() else file.name
            if any(part.startswith(".") for part in Path(name).parts):
                continue
            digest.update(name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def stable_seed(*parts: str | int | float) -> int:
    """A seed in [0, 2**63) that depends on the parts alone, the same in every process and on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
