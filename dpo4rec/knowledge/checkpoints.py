"""Which of a Trainer's checkpoints are whole: it has no mark of its own, and takes the newest, be it half written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpo4rec.errors import InputError
from dpo4rec.files import write_json

COMPLETE = "complete"
"""The file in a checkpoint that all processes have written; it holds their number."""


class Completing(TrainerCallback):
    """Marks a checkpoint once all processes have written their part: others are never resumed from."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            write_json(args.world_size, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / COMPLETE)


def newest_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that all processes finished writing."""
    return max((path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")), key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The steps that were done when it was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


@contextmanager
def weights_alone(checkpoint: Path | None) -> Iterator[None]:
    """What torch refuses to load from a checkpoint is the user's to look at.

    Raises:
        InputError: the checkpoint holds more than weights, or is damaged; nothing of it was run.
    """
    try:
        yield
    except UnpicklingError as error:
        cause = "it holds what no checkpoint of a training holds, or is damaged, and was not loaded"
        remedy = f"Find out who could write there, then remove {checkpoint and checkpoint.parent}: the training begins anew"
        raise InputError(str(checkpoint), cause, remedy) from error


def train(trainer: Trainer, checkpoint: Path | None) -> None:
    """Trains to the end, from the checkpoint's step on if there is one.

    Raises:
        InputError: see `weights_alone`.
    """
    with weights_alone(checkpoint):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
