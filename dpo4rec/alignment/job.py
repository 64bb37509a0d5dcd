"""The file by which a driver tells other processes what to align: `alignment.json` in a round's folder."""

import logging
import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dpo4rec.alignment.config import AlignmentConfig, Tracking
from dpo4rec.alignment.online import Online, read_reward
from dpo4rec.errors import InputError
from dpo4rec.files import read_json, write_json
from dpo4rec.knowledge.config import Decoding
from dpo4rec.settings import Settings

logger = logging.getLogger(__name__)
NAME = "alignment.json"
KEYS = {"config", "model", "initial_adapter", "round_0_adapter", "pairs", "seed", "threads", "online"}


class OnlineSettings(Settings):
    """What `alignment.json` says of a method that samples as it trains."""

    decoding: Decoding
    worker: str
    """The reward's class, see `read_reward`."""
    settings: str
    """The JSON file that it is made of."""


@dataclass(frozen=True)
class Job:
    """What `align` is told; `folder` is the round's."""

    folder: Path
    config: AlignmentConfig
    model: str
    initial_adapter: Path | None
    pairs: Path
    seed: int
    threads: int | None
    round_0_adapter: Path | None
    online: OnlineSettings | None

    def run(self, out: Path, tracking: Tracking = "none") -> None:
        """Aligns as one of the processes, whose log is `logs/align-<rank>.log` in the run folder."""
        with _logged(self.folder.resolve().parent / "logs"):
            from dpo4rec.alignment.align import align  # takes seconds to import, which a driver that aligns nothing need not spend

            named = self.online
            online = Online(named.decoding, read_reward(named.worker, self.folder / named.settings)) if named else None
            start = (self.config, self.model, self.pairs, self.initial_adapter, self.seed, out, self.threads, self.round_0_adapter)
            align(*start, online, tracking)


@contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """What this package logs meanwhile stands in the process's own file, too, and so does the error that ends it."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"align-{os.environ.get('RANK', '0')}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    package = logging.getLogger("dpo4rec")
    package.addHandler(handler)
    level = package.level
    package.setLevel(logging.INFO)
    logger.info("pid %d on %s", os.getpid(), socket.gethostname())
    try:
        yield
    except BaseException:
        traceback.print_exc(file=handler.stream)  # in the file alone: who called says on the screen what is to be said
        raise
    finally:
        package.setLevel(level)
        package.removeHandler(handler)
        handler.close()


def write_job(
    folder: Path,
    config: AlignmentConfig,
    model: str,
    pairs: Path,
    initial_adapter: Path | None,
    seed: int,
    threads: int | None = None,
    round_0_adapter: Path | None = None,
    online: OnlineSettings | None = None,
) -> Path:
    """Writes `alignment.json` and returns its path. Paths in it are relative to the folder: a run folder can be moved as a whole."""
    values = {
        "config": config.model_dump(mode="json"),
        "model": _relative(Path(model), folder) if Path(model).is_dir() else model,
        "initial_adapter": _relative(initial_adapter, folder) if initial_adapter else None,
        "round_0_adapter": _relative(round_0_adapter, folder) if round_0_adapter else None,
        "pairs": _relative(pairs, folder),
        "seed": seed,
        "threads": threads,
        "online": online.model_copy(update={"settings": _relative(Path(online.settings), folder)}).model_dump() if online else None,
    }
    write_json(values, folder / NAME)
    return folder / NAME


def read_job(folder: Path, **changes: Any) -> Job:
    """Reads a round's `alignment.json`.

    Args:
        folder: the round's folder.
        changes: settings that replace those of the file (`workers=2, zero_stage=2`), checked together with them.

    Raises:
        InputError: the file is missing or damaged, lacks a key, or its settings cannot work together.
    """
    path = folder / NAME
    values = read_json(path)
    if not isinstance(values, dict) or values.keys() != KEYS:
        raise InputError(str(path), f"it must have the keys {', '.join(sorted(KEYS))}", "Run the stage that writes it again")
    try:
        config = AlignmentConfig.model_validate(values["config"] | changes)
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, item['loc']))} {item['msg']}".strip() for item in error.errors())
        raise InputError(f"{path}, config", reasons, "Change the setting, or what the command line replaced") from error
    model = folder / values["model"]
    return Job(
        folder,
        config,
        str(model.resolve()) if model.is_dir() else values["model"],
        folder / values["initial_adapter"] if values["initial_adapter"] else None,
        folder / values["pairs"],
        values["seed"],
        values["threads"],
        folder / values["round_0_adapter"] if values["round_0_adapter"] else None,
        OnlineSettings(**values["online"]) if values["online"] else None,
    )


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(path.resolve(), folder.resolve())
