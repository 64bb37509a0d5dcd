"""One progress display, in the driver: a bar on a terminal, plain lines elsewhere, never silent for long."""

import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dpo4rec.report.work_done import WorkDone

COUNTED_EVERY_SECONDS = 2.0


class ProgressDisplay:
    """Called with (stage, finished units, all units, folder of their files); `of` 0 announces a stage of unknown length.

    Says users, texts/s, tokens/s (where the files hold such) and the time left, by what was done since the stage was begun this time.

    Args:
        stream: where to write [default: standard error].
        heartbeat_seconds: plain lines say at least so often that the run is alive.
    """

    def __init__(self, stream: TextIO | None = None, heartbeat_seconds: float = 30.0) -> None:
        self.stream, self.heartbeat = stream or sys.stderr, heartbeat_seconds
        self.started, self.stage, self.last = time.monotonic(), _Stage("", 0, None), 0.0
        self.lock, self.closed = threading.Lock(), threading.Event()
        columns = (
            TextColumn("{task.description:32}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[rates]}"),
        )
        self.bar = Progress(*columns, console=Console(file=self.stream), transient=True) if self.stream.isatty() else None
        self.task = self.bar.add_task("", rates="") if self.bar else None
        if self.bar:
            self.bar.start()
        else:
            threading.Thread(target=self._beat, daemon=True).start()

    def __call__(self, stage: str, done: int, of: int, files: Path | None = None) -> None:
        with self.lock:
            new = stage != self.stage.name
            if new or files != self.stage.files:
                self.stage = _Stage(stage, done, files)
            self.stage.done, self.stage.of = done, of
            if self.bar is not None and self.task is not None:
                if new:
                    self.bar.reset(self.task, description=stage)
                self.bar.update(self.task, completed=done, total=of or None, rates=self.stage.rates())
            elif new or done == of or time.monotonic() - self.last > self.heartbeat:
                self._print()

    def close(self) -> None:
        """Ends the display; the last line stays."""
        self.closed.set()
        if self.bar is not None:
            self.bar.stop()

    def _beat(self) -> None:
        while not self.closed.wait(self.heartbeat / 10):
            with self.lock:
                if self.stage.name and time.monotonic() - self.last > self.heartbeat:
                    self._print()

    def _print(self) -> None:
        units = f" {self.stage.done}/{self.stage.of}" if self.stage.of else ""
        rates = self.stage.rates(fresh=True)
        print(
            f"[{time.monotonic() - self.started:7.1f} s] {self.stage.name}{units}{', ' if rates else ''}{rates}",
            file=self.stream,
            flush=True,
        )
        self.last = time.monotonic()


class _Stage:
    """A stage, and what was done of it when it was begun this time."""

    def __init__(self, name: str, done: int, files: Path | None) -> None:
        self.name, self.files = name, files
        self.done = self.first = done
        self.of = 0
        self.begun = self.counted = time.monotonic()
        self.work = WorkDone(files) if files else None
        self.before = self.now = self.work.count() if self.work else Counter()

    def rates(self, fresh: bool = False) -> str:
        """For instance "320 users, 51 texts/s, 630 tokens/s, 0:02:10 left"."""
        seconds = time.monotonic() - self.begun
        if self.work and (fresh or time.monotonic() - self.counted > COUNTED_EVERY_SECONDS):
            self.now, self.counted = self.work.count(), time.monotonic()
        parts = [f"{self.now['users']:,} users"] if self.now["users"] else []
        parts += [f"{rate:,.0f} {what}/s" for what in ("texts", "tokens") if (rate := (self.now - self.before)[what] / max(seconds, 1e-3))]
        if self.first < self.done < self.of:
            left = seconds * (self.of - self.done) / (self.done - self.first)
            parts.append(f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02} left")
        return ", ".join(parts)
