"""The hidden folder of a run's checkpoints: which of them is whole, whether they are of this job, and of how many processes."""

import json
import logging
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.ds_to_universal import main as convert
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from transformers import TrainerControl, TrainerState, TrainingArguments

from dpo4rec.files import atomic, read_json, remove, write_json
from dpo4rec.knowledge.checkpoints import COMPLETE, Completing, newest_checkpoint, step_of, weights_alone

logger = logging.getLogger(__name__)
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
            _load_weights_only()
            _fit_processes(checkpoint, arguments)
    return checkpoint


def _load_weights_only() -> None:
    """DeepSpeed would unpickle whatever its checkpoints hold; torch refuses all but tensors, plain values and these."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])


def _fit_processes(checkpoint: Path, arguments: TrainingArguments) -> None:
    """ZeRO writes one part a process: parts of another number are made universal (DeepSpeed) and read as such."""
    saved = read_json(checkpoint / COMPLETE)
    if saved == arguments.world_size:
        return
    logger.warning("%s is of %d processes and is converted for %d", checkpoint, saved, arguments.world_size)
    step = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    with arguments.main_process_first(local=False, desc="universal checkpoint"), weights_alone(checkpoint):
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


class Checkpointing(Completing):
    """Marks checkpoints that are whole, and mends what DeepSpeed makes of them."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Under ZeRO-3, DeepSpeed hands all parts of the optimizer one counter from a universal checkpoint: each would advance it."""
        for moments in optimizer.state.values():
            if isinstance(moments.get("step"), torch.Tensor):
                moments["step"] = moments["step"].clone()


def cut_log(folder: Path, checkpoint: Path | None) -> None:
    """Takes the lines after the checkpoint out of the log: these steps are done again."""
    path, last = folder / LOG, step_of(checkpoint) if checkpoint else 0
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("}\n")]  # a full disk cuts a line short
        with atomic(path) as partial:
            partial.write_text("".join(line for line in whole if json.loads(line)["step"] <= last), encoding="utf-8")
