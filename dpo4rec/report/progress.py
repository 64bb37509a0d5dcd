"""One progress display, in the driver: a bar on a terminal, plain lines elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

HEARTBEAT_SECONDS = 30


class ProgressDisplay:
    """Called with (stage, finished units, all units); `of` 0 announces a stage of unknown length."""

    def __init__(self) -> None:
        self.started, self.stage, self.last = time.monotonic(), "", 0.0
        columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(file=sys.stderr), transient=True) if sys.stderr.isatty() else None
        self.task = self.bar.add_task("") if self.bar else None
        if self.bar:
            self.bar.start()

    def __call__(self, stage: str, done: int, of: int) -> None:
        if self.bar is not None and self.task is not None:
            if stage != self.stage:
                self.bar.reset(self.task, description=stage)
            self.bar.update(self.task, completed=done, total=of or None)
        elif stage != self.stage or done == of or time.monotonic() - self.last > HEARTBEAT_SECONDS:
            units = f" {done}/{of}" if of else ""
            print(f"[{time.monotonic() - self.started:7.1f} s] {stage}{units}", file=sys.stderr, flush=True)
            self.last = time.monotonic()
        self.stage = stage

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
