"""Trackers beside the log: the Trainer's own callbacks for TensorBoard, MLflow and W&B, kept from doing harm.

The tables of record are `training_log.jsonl` and `summary.json`; a tracker gets the same lines, and whatever befalls it befalls it alone.
"""

import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from dpo4rec.alignment.config import Tracking

logger = logging.getLogger(__name__)


def tracker_of(name: Tracking, folder: Path) -> TrainerCallback:
    """The callback that the Trainer's `report_to` stands for.

    Args:
        folder: where TensorBoard writes, unless TENSORBOARD_LOGGING_DIR says otherwise; the others read their own environment variables.
    """

    def make() -> TrainerCallback:
        callback = get_reporting_integration_callbacks([name])[0]()
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder)
        return callback

    return Harmless(name, make)


class Harmless(TrainerCallback):
    """Passes begin, lines and end of a run on to a tracker, up to its first exception: that is logged, and the run goes on without it.

    Args:
        make: makes the tracker, when the run begins.
    """

    def __init__(self, name: str, make: Callable[[], TrainerCallback]) -> None:
        self.name, self.make, self.failed = name, make, False

    @cached_property
    def tracker(self) -> TrainerCallback:
        return self.make()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self._tell("on_train_begin", args, state, control, **more)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        if logs and "step" in logs:  # a line of our log; TRL's trainers report lines of their own, too
            self._tell("on_log", args, state, control, logs=logs, **more)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self._tell("on_train_end", args, state, control, **more)

    def _tell(self, event: str, *arguments: Any, **more: Any) -> None:
        if self.failed:
            return
        try:
            getattr(self.tracker, event)(*arguments, **more)
        except Exception as error:  # a tracker may raise anything: it is not ours
            self.failed = True
            logger.warning("%s failed (%s: %s). The run goes on without it", self.name, type(error).__name__, error)
