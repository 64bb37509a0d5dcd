"""The hidden folder of a run's checkpoints: which of them is whole, and whether they are of this job."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpo4rec.files import read_json, remove, write_json

logger = logging.getLogger(__name__)
COMPLETE = "complete"
LOG = "training_log.jsonl"


def prepare_folder(folder: Path, job: dict[str, Any], arguments: TrainingArguments) -> Path | None:
    """The checkpoint to resume from; what another job left behind is removed."""
    with arguments.main_process_first(local=False, desc="checkpoints"):
        if arguments.process_index == 0:
            if folder.exists() and (not (folder / "job.json").exists() or read_json(folder / "job.json") != job):
                logger.warning("%s is of another job (or too young to tell) and is removed", folder)
                remove(folder)
            write_json(job, folder / "job.json")
            cut_log(folder, newest_checkpoint(folder))
    checkpoint = newest_checkpoint(folder)
    if checkpoint:
        logger.warning("resuming from %s", checkpoint)
    return checkpoint


class MarkComplete(TrainerCallback):
    """Marks a checkpoint once all processes have written their part: others are never resumed from."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def newest_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that all processes finished writing."""
    return max((path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")), key=_step_of, default=None)


def cut_log(folder: Path, checkpoint: Path | None) -> None:
    """Takes the lines after the checkpoint out of the log: these steps are done again."""
    path, last = folder / LOG, _step_of(checkpoint) if checkpoint else 0
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= last), encoding="utf-8")


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))
