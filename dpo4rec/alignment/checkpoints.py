"""The hidden folder of a run's checkpoints: which of them is whole, whether they are of this job, and of how many processes."""

import json
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.ds_to_universal import main as convert
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
        if arguments.deepspeed:
            _fit_processes(checkpoint, arguments)
    return checkpoint


def _fit_processes(checkpoint: Path, arguments: TrainingArguments) -> None:
    """ZeRO writes one part a process: parts of another number are made universal (DeepSpeed) and read as such."""
    saved = read_json(checkpoint / COMPLETE)
    if saved == arguments.world_size:
        return
    logger.warning("%s is of %d processes and is converted for %d", checkpoint, saved, arguments.world_size)
    step = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    with arguments.main_process_first(local=False, desc="universal checkpoint"):
        if arguments.process_index == 0 and not (checkpoint / "latest_universal").exists():
            remove(checkpoint / f"{step}_universal")
            convert(
                Namespace(
                    input_folder=str(checkpoint / step),
                    output_folder=str(checkpoint / f"{step}_universal"),
                    num_extract_workers=1,
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=True,  # what Megatron would say of its tensor parallelism: there is none
                )
            )
    arguments.hf_deepspeed_config.config["checkpoint"] = {"load_universal": True}


class Checkpointing(TrainerCallback):
    """Marks a checkpoint once all processes have written their part: others are never resumed from."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Under ZeRO-3, DeepSpeed hands all parts of the optimizer one counter from a universal checkpoint: each would advance it."""
        for moments in optimizer.state.values():
            if isinstance(moments.get("step"), torch.Tensor):
                moments["step"] = moments["step"].clone()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            write_json(args.world_size, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / COMPLETE)


def newest_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that all processes finished writing."""
    return max((path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")), key=step_of, default=None)


def cut_log(folder: Path, checkpoint: Path | None) -> None:
    """Takes the lines after the checkpoint out of the log: these steps are done again."""
    path, last = folder / LOG, step_of(checkpoint) if checkpoint else 0
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= last), encoding="utf-8")


def step_of(checkpoint: Path) -> int:
    """The steps that were done when it was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
