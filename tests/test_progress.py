"""The progress display: plain lines, a bar on a terminal, counts from finished files, a sign of life."""

import io
import re
import time
from pathlib import Path

import pyarrow as pa

from dpo4rec.files import write_parquet
from dpo4rec.report.progress import ProgressDisplay
from dpo4rec.report.work_done import WorkDone


def write_unit(folder: Path, number: int) -> None:
    """Two users with three texts of four tokens each."""
    users = [f"u{number}-{user}" for user in range(2) for _ in range(3)]
    tokens = pa.array([[1, 2, 3, 4]] * 6, pa.list_(pa.int32()))
    write_parquet(pa.table({"user_id": users, "sample": [0, 1, 2] * 2, "token_ids": tokens}), folder / f"unit-{number:05d}.parquet")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_users_texts_and_tokens_are_counted_as_files_appear(tmp_path: Path) -> None:
    work = WorkDone(tmp_path)
    assert work.count() == {}
    write_unit(tmp_path, 0)
    assert work.count() == {"users": 2, "texts": 6, "tokens": 24}
    write_unit(tmp_path, 1)
    (tmp_path / ".unit-00002.parquet.partial-1").write_bytes(b"not yet")
    assert work.count() == {"users": 4, "texts": 12, "tokens": 48}
    write_parquet(pa.table({"out": ["seed-0"]}), tmp_path / "fits.parquet")
    assert work.count() == {"users": 4, "texts": 12, "tokens": 48}


def test_plain_lines_say_how_fast_and_how_long(tmp_path: Path) -> None:
    stream = io.StringIO()
    display = ProgressDisplay(stream)
    write_unit(tmp_path, 0)  # of an earlier run: done, but no part of the speed
    display("round-0/sample", 0, 0, None)
    display("round-0/sample", 1, 3, tmp_path)
    display.heartbeat = 0
    write_unit(tmp_path, 1)
    time.sleep(0.05)
    display("round-0/sample", 2, 3, tmp_path)
    display.close()
    last = stream.getvalue().splitlines()[-1]
    found = re.search(r"round-0/sample 2/3, 4 users, ([\d,]+) texts/s, ([\d,]+) tokens/s, 0:00:00 left", last)
    assert found, last
    texts, tokens = (int(rate.replace(",", "")) for rate in found.groups())
    assert 0 < texts <= 6 / 0.05
    assert 3 * texts < tokens <= 24 / 0.05


def test_a_long_silence_is_broken(tmp_path: Path) -> None:
    stream = io.StringIO()
    display = ProgressDisplay(stream, heartbeat_seconds=0.05)
    display("round-0/align", 0, 0, None)
    deadline = time.monotonic() + 5
    while stream.getvalue().count("round-0/align") < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    display.close()
    assert stream.getvalue().count("round-0/align") >= 3


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    stream = Terminal()
    display = ProgressDisplay(stream)
    write_unit(tmp_path, 0)
    display("round-0/sample", 0, 2, tmp_path)
    display("round-0/sample", 1, 2, tmp_path)
    display.close()
    assert "round-0/sample" in stream.getvalue()
    assert "1/2" in stream.getvalue()
