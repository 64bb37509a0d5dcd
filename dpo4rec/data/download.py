"""The official MovieLens archives: fetched, resumed, verified, unpacked."""

import hashlib
import shutil
import sys
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from dpo4rec.data.movielens import FILES
from dpo4rec.errors import InputError
from dpo4rec.files import atomic

BASE_URL = "https://files.grouplens.org/datasets/movielens"
MD5 = {"ml-1m": "c4d9eecfca2ab87c1945afe126590906", "ml-100k": "0e33842e24a9c977be4e0107933c0723"}
BLOCK = 1 << 18  # bytes
TIMEOUT_SECONDS = 30


@dataclass
class _Meter:
    """Tells how far the download is: a bar on a terminal, a line every tenth elsewhere."""

    name: str
    total: int
    bar: Progress | None = None
    told: int = -1

    def __enter__(self) -> "_Meter":
        if sys.stderr.isatty():
            self.bar = Progress(TextColumn(self.name), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self.bar.add_task(self.name, total=self.total)
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def show(self, done: int) -> None:
        """`done` bytes of the file are there."""
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=done)
        elif self.total and done * 10 // self.total > self.told:
            self.told = done * 10 // self.total
            print(f"{self.name}: {done / 1e6:.1f} of {self.total / 1e6:.1f} MB", file=sys.stderr, flush=True)


def download(dataset: str, folder: Path, base_url: str = BASE_URL) -> None:
    """Puts the official files of "ml-1m" or "ml-100k" into `folder`; does nothing when they are there.

    An interrupted download goes on where it stopped (`<folder>/<dataset>.zip.part`).

    Raises:
        InputError: no such data set, no connection, a broken one, or an archive whose MD5 is not the published one.
    """
    if dataset not in FILES:
        raise InputError(dataset, "is no data set to download", f"Known: {', '.join(FILES)}; the folder is --data")
    if all((folder / name).is_file() for name in FILES[dataset]):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(str(folder), f"the folder cannot be made ({error.strerror})", "Give another --data") from error
    url, part = f"{base_url}/{dataset}.zip", folder / f"{dataset}.zip.part"
    try:
        _fetch(url, part)
    except (urllib.error.URLError, HTTPException, OSError) as error:
        by_hand = (
            f"Put {', '.join(FILES[dataset])} of {BASE_URL}/{dataset}.zip into {folder} by hand, or run again: it goes on where it stopped"
        )
        raise InputError(url, f"the download failed ({error})", by_hand) from error
    with part.open("rb") as stream:
        found = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != MD5[dataset]:
        part.unlink()
        raise InputError(url, f"the archive's MD5 is {found}, not {MD5[dataset]}", "Run again: it was removed and is fetched anew")
    _unpack(part, dataset, folder)
    part.unlink()


def _fetch(url: str, part: Path) -> None:
    """Appends what is missing to `part`; OSError when the connection ends early."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to fetch
            return
        raise
    with response:
        if response.status != 206:  # the server begins anew
            have = 0
        total = have + int(response.headers.get("Content-Length") or 0)
        with part.open("ab" if have else "wb") as stream, _Meter(part.stem, total) as meter:
            while block := response.read(BLOCK):
                stream.write(block)
                have += len(block)
                meter.show(have)
    if have < total:
        raise OSError(f"the connection ended after {have} of {total} bytes")


def _unpack(archive: Path, dataset: str, folder: Path) -> None:
    """Only the expected files, under names of ours: nothing in the archive decides where something is written."""
    try:
        with zipfile.ZipFile(archive) as members:
            for name in FILES[dataset]:
                with members.open(f"{dataset}/{name}") as source, atomic(folder / name) as partial, partial.open("wb") as target:
                    shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(str(archive), f"the archive does not hold the expected files ({error})", "Delete it and run again") from error
