"""Which of a Trainer's checkpoints are whole: it has no mark of its own, and takes the newest, be it half written."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
