"""Workers of two small steps, for Ray's processes to import: nothing heavy stands beside them."""

import os
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec.settings import Settings


class WriterConfig(Settings):
    """What a worker does beside its work: `dies` is a folder that notes deaths; without `always` there is one. The last user's unit
    waits for the file `waits_for`."""

    fails_on: list[str] = []
    dies_on: str | None = None
    dies: str = ""
    always: bool = False
    waits_for: str | None = None


class Writer:
    """Two texts a user."""

    def __init__(self, config: WriterConfig) -> None:
        self.config = config

    def __call__(self, unit: pa.Table) -> pa.Table:
        if self.config.waits_for is not None and "u19" in unit["user_id"].to_pylist():
            wait_for(Path(self.config.waits_for))
        rows = []
        for user in unit["user_id"].to_pylist():
            if user in self.config.fails_on:
                raise ArithmeticError(f"cannot write for {user}")
            if user == self.config.dies_on:
                self._die()
            rows += [{"user_id": user, "sample": sample, "text": f"{user} likes {sample}"} for sample in range(2)]
        return pa.Table.from_pylist(rows)

    def _die(self) -> None:
        noted = Path(self.config.dies) / "died"
        if self.config.always or not noted.exists():
            noted.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(file)
        time.sleep(0.1)


class Counter:
    """The length of each text."""

    warning = "lengths are counted in characters"

    def __init__(self, config: WriterConfig) -> None:
        self.config = config

    def __call__(self, unit: pa.Table) -> pa.Table:
        return unit.append_column("length", pc.utf8_length(unit["text"]))
