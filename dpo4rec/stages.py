"""The stages of a run and the pools that work in them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dpo4rec import files
from dpo4rec.cluster.pool import Source, Step, Units, stream_units
from dpo4rec.config import FREE, Config, config_of, plain
from dpo4rec.run_folder import RunFolder
from dpo4rec.settings import Settings

Report = dict[str, Any]
Announce = Callable[[str, int, int, Path | None], None]


class Stages:
    """A run folder with its configuration, in which stages are run.

    Args:
        config: the resolved configuration.
        path: the run folder.
        announce: called with (stage, finished units, all units, folder of their files) for a progress display.

    Raises:
        InputError: the folder is in use or belongs to another configuration.
    """

    def __init__(self, config: Config, path: Path, announce: Announce = lambda *_: None) -> None:
        self.config, self.announce = config, announce
        self.folder = RunFolder(path.resolve(), plain(config), FREE, lambda own: plain(config_of(own)))
        torch.set_num_threads(config.cluster.training_threads)

    def stage(
        self, name: str, settings: Any, inputs: list[Path], outputs: list[Path], work: Callable[[], Report], one_piece: bool = False
    ) -> Report:
        """Runs a stage of the run folder; `settings` (see `RunFolder.stage`) and the seed are what it is made with."""
        self.announce(name, 0, 0, None)
        return self.folder.stage(name, self._seeded(settings), inputs, outputs, work, one_piece)

    def is_done(self, name: str, settings: Any, inputs: list[Path], outputs: list[Path]) -> bool:
        """Whether `stage` would skip its work."""
        return self.folder.is_done(name, self._seeded(settings), inputs, outputs)

    def _seeded(self, settings: Any) -> Report:
        return {"seed": self.config.seed, "settings": settings}

    def step(self, worker: type, config: Settings, out: Path, **more: Any) -> Step:
        """A pool as the configuration has it, without GPUs: those are for language models; `more` are fields of `Step`."""
        usual: dict[str, Any] = {"workers": self.config.cluster.workers, "name": worker.__name__.lower()}
        return Step(worker, config, out, **usual | more)

    def stream(self, label: str, steps: list[Step], units: Source | Units) -> None:
        """Takes units through the steps, see `stream_units`: the display counts the first step's units, the log gets their warnings."""

        def announce(done: int, of: int) -> None:
            self.announce(label, done, of, steps[0].out)

        for warning in stream_units(steps, units, self.config.cluster, announce, self.folder / "logs"):
            self.folder.log("warning", stage=label, message=warning)

    def pool_settings(self) -> Report:
        """The part of a stage's settings that says how workers compute."""
        return {"threads": self.config.cluster.threads_per_worker}

    def failures(self, *outs: Path) -> Report:
        """How many users pools have left out of their results, for a stage's report."""
        return {"failed_users": len({user for out in outs for user in files.failed(out)})} if self.config.sampling.skip_failed_rows else {}
