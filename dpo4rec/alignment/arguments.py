"""What a run tells the Trainer: one place for the optimizer, the processes, the checkpoints and the log, whatever the method."""

from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
from transformers import TrainingArguments

import dpo4rec
from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.files import stable_seed

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def training_arguments(
    kind: type[Arguments], config: AlignmentConfig, folder: Path, steps: int, passes: int, seed: int, **more: Any
) -> Arguments:
    """The arguments of a run; also sets up the process group and ZeRO-3, so it comes before the model.

    Args:
        kind: TrainingArguments, or TRL's class of them.
        folder: for checkpoints and the log.
        steps: optimizer steps of the whole run.
        passes: forward passes of a process in a step.
        more: arguments of `kind` beyond these, or instead of these.
    """
    cuda = torch.cuda.is_available()
    if config.zero_stage:
        if not cuda:
            # an all-reduce through shared memory, which DeepSpeed would compile for a minute at first and which leaves 66 MiB a run there
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # ZeRO-3 cuts the model while it is loaded: DeepSpeed must know the processes by then, which on CPU nobody else tells it
        deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False)
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,  # a bin
        "gradient_accumulation_steps": passes,
        "num_train_epochs": 1,  # the data set is all epochs in their order
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": int(config.warmup_share * steps),
        "weight_decay": 0.0,
        "max_grad_norm": config.max_grad_norm,
        "optim": "adamw_torch",
        "bf16": config.precision == "bf16",
        "use_cpu": not cuda,
        "ddp_backend": ("nccl" if cuda else "gloo") if config.workers > 1 else None,
        "ddp_find_unused_parameters": False,
        "deepspeed": str(deepspeed_file(config)) if config.zero_stage else None,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_steps": config.checkpoint_every_steps,
        "save_total_limit": 2,  # the older one is complete while the newer is being written
        "seed": stable_seed(seed, "trainer") % 2**32,
        "dataloader_pin_memory": cuda,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "report_to": [],
    }
    arguments = kind(**(values | more))
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several that one process sees each would get a part of a bin
    return arguments


def deepspeed_file(config: AlignmentConfig) -> Path:
    """The DeepSpeed configuration of a ZeRO stage, with or without offload."""
    return Path(dpo4rec.__file__).parents[1] / "ds_configs" / f"zero{config.zero_stage}{'_offload' if config.offload else ''}.json"
