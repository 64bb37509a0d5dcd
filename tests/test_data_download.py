"""The download against a server on this machine."""

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpo4rec.cli import app
from dpo4rec.data import download as module
from dpo4rec.data.download import download
from dpo4rec.data.movielens import FILES
from dpo4rec.errors import InputError


class Server(ThreadingHTTPServer):
    """Serves one body for every path, knows byte ranges, and can break off after `breaks_after` bytes."""

    body = b""
    breaks_after: int | None = None
    knows_ranges = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.knows_ranges else 0
        if start and start >= len(self.server.body):
            self.send_error(416)
            return
        rest = self.server.body[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest if self.server.breaks_after is None else rest[: self.server.breaks_after])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of an archive with the layout of ml-100k, whose checksum counts as the official one."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in FILES["ml-100k"]:
            archive.writestr(f"ml-100k/{name}", f"content of {name}\n" * 500)
        archive.writestr("ml-100k/../../escaped", "out of the folder")
        archive.writestr("ml-100k/mku.sh", "unexpected")
    server = Server()
    server.body = buffer.getvalue()
    monkeypatch.setitem(module.MD5, "ml-100k", hashlib.md5(server.body, usedforsecurity=False).hexdigest())
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_expected_files_arrive_and_nothing_else(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "ml-100k"
    download("ml-100k", folder, server.url)
    assert names(folder) == sorted(FILES["ml-100k"])
    assert (folder / "u.item").read_text() == "content of u.item\n" * 500
    assert names(tmp_path) == ["new"]
    download("ml-100k", folder, server.url)
    assert len(server.asked) == 1  # complete: not fetched again


def test_a_broken_download_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.breaks_after = 100
    for _ in range(2):
        with pytest.raises(InputError, match="goes on where it stopped"):
            download("ml-100k", tmp_path, server.url)
    server.breaks_after = None
    download("ml-100k", tmp_path, server.url)
    assert server.asked == [None, "bytes=100-", "bytes=200-"]
    assert names(tmp_path) == sorted(FILES["ml-100k"])


def test_a_whole_part_file_is_used(server: Server, tmp_path: Path) -> None:
    (tmp_path / "ml-100k.zip.part").write_bytes(server.body)
    download("ml-100k", tmp_path, server.url)
    assert names(tmp_path) == sorted(FILES["ml-100k"])


def test_a_server_without_ranges_begins_anew(server: Server, tmp_path: Path) -> None:
    server.knows_ranges = False
    (tmp_path / "ml-100k.zip.part").write_bytes(server.body[:50])
    download("ml-100k", tmp_path, server.url)
    assert names(tmp_path) == sorted(FILES["ml-100k"])


def test_a_wrong_archive_is_refused_and_removed(server: Server, tmp_path: Path) -> None:
    server.body = b"something else"
    with pytest.raises(InputError, match="MD5"):
        download("ml-100k", tmp_path, server.url)
    assert names(tmp_path) == []


def test_what_is_no_data_set_is_refused_and_so_are_settings(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data/ml-1m.*ml-1m, ml-100k"):
        download("data/ml-1m", tmp_path)
    done = CliRunner().invoke(app, ["prepare", "ml-1m", "--download", "--data", str(tmp_path), "--preset", "ml-1m"])
    assert done.exit_code == 2
    assert "settings have no meaning" in done.output
    assert not list(tmp_path.iterdir())


def test_without_a_connection_the_files_and_their_place_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        download("ml-1m", tmp_path, "http://127.0.0.1:9")
    assert "ratings.dat, movies.dat, users.dat" in caught.value.remedy
    assert str(tmp_path) in caught.value.remedy
