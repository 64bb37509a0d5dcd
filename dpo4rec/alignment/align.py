"""One alignment run in the current process: pairs in, adapter or full model out."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments

import dpo4rec
from dpo4rec.alignment.checkpoints import LOG, prepare_folder, step_of
from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.alignment.pairs import read_preferences
from dpo4rec.alignment.policy import add_reference_adapter, check_written, load_policy, whole_weights, write_policy
from dpo4rec.alignment.reference import reference_key
from dpo4rec.alignment.schedule import training_steps
from dpo4rec.alignment.trainer import PreferenceTrainer
from dpo4rec.errors import InputError
from dpo4rec.files import atomic, content_hash, remove, stable_seed, write_json

logger = logging.getLogger(__name__)


def align(
    config: AlignmentConfig,
    model: str,
    pairs: Path,
    initial_adapter: Path | None,
    seed: int,
    out: Path,
    threads: int | None = None,
    round_0_adapter: Path | None = None,
) -> None:
    """Trains `model` on `pairs` and writes a PEFT adapter (or the full model) to `out`, with `training_log.jsonl` and `summary.json`.

    Runs as one of WORLD_SIZE processes (RANK, LOCAL_RANK: set by the DeepSpeed launcher, torchrun or Ray Train), or alone.
    Gloo on CPU, NCCL on GPU. An interrupted run goes on from its newest complete checkpoint, in the hidden folder beside `out`,
    if config and inputs are the same, whatever the number of processes; `out` appears only when all is done and was
    read back. The reference's log-probabilities are kept in the hidden folder `.reference` beside `out`.

    Args:
        config: settings; `workers` must be the number of processes.
        model: folder or hub name of a causal language model.
        pairs: Parquet file or folder, see `read_preferences`.
        initial_adapter: adapter to go on with.
        seed: order of the pairs and initial adapter.
        out: folder to write.
        threads: CPU threads of this process; unchanged if None.
        round_0_adapter: the adapter that round 0 started from, for `reference: round_0`; None: it had none.

    Raises:
        InputError: pairs, model or adapter cannot be used, or the number of processes is not the configured one.
        RuntimeError: training went wrong (see `PreferenceTrainer`) or `out` does not hold what was trained.
    """
    _check_processes(config)
    if config.weights == "full" and initial_adapter is not None:
        raise InputError(
            "alignment.weights", "full weights cannot go on with an adapter", "Use weights: lora, or give the last round's model folder"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    settings = model_settings(model)
    longest = min(config.max_tokens, getattr(settings, "max_position_embeddings", config.max_tokens))
    tokenizer = _tokenizer(model)
    preferences, dropped = read_preferences(pairs, tokenizer, settings.vocab_size, longest, config)
    steps = training_steps(preferences, config, seed)
    logger.info("%d comparisons, dropped %s, %d steps of %d passes", len(preferences.comparisons), dropped, len(steps), len(steps[0]))

    folder = out.with_name(f".{out.name}.checkpoints")
    # sets up the process group and ZeRO-3, so comes before the model
    arguments = _arguments(config, folder, len(steps), len(steps[0]) // config.workers, seed)
    reference_adapter = {"initial_adapter": initial_adapter, "base": None, "round_0": round_0_adapter}[config.reference]
    job: dict[str, Any] = {"config": _identity(config), "model": model, "seed": seed, "pairs": content_hash(pairs)}
    job |= {name: content_hash(path) if path else None for name, path in (("initial", initial_adapter), ("reference", reference_adapter))}
    checkpoint = prepare_folder(folder, job, arguments)
    torch.manual_seed(stable_seed(seed, "adapter"))
    policy = load_policy(config, model, initial_adapter, arguments.device)
    if reference_adapter and config.reference == "round_0":
        add_reference_adapter(policy, reference_adapter)
    reference = out.parent / ".reference" / f"{reference_key(config, model, reference_adapter, preferences)}.safetensors"
    alike = config.objective != "simpo" and job["initial"] == job["reference"]
    trainer = PreferenceTrainer(config, policy, arguments, preferences, steps, len(steps) // config.epochs, reference, alike)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    _finish(
        trainer,
        out,
        {
            "pairs": len(preferences.comparisons),
            "dropped": dropped,
            "pairs_hash": job["pairs"],
            "resumed_from": step_of(checkpoint) if checkpoint else 0,
        },
        tokenizer if config.weights == "full" else None,
    )


def _identity(config: AlignmentConfig) -> dict[str, Any]:
    """What a checkpoint depends on: everything but the number of processes."""
    return config.model_dump(mode="json", exclude={"workers"})


def _finish(trainer: PreferenceTrainer, out: Path, summary: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> None:
    weights = whole_weights(trainer.policy)
    if trainer.is_world_process_zero():
        with atomic(out) as partial:
            write_policy(trainer.policy, weights, partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(partial))
            tensors = check_written(trainer.policy, weights, partial)
            shutil.copy(trainer.folder / LOG, partial / LOG)
            steps = [json.loads(line) for line in (trainer.folder / LOG).read_text(encoding="utf-8").splitlines()]
            summary |= {
                "steps": len(steps),
                "tensors": tensors,
                "zero_stage": trainer.zero_stage(),
                "packed": trainer.scorer.packed,
                "speed": trainer.speed.summary(),
            }
            write_json({**summary, "first": steps[0], "last": steps[-1]}, partial / "summary.json")
        remove(trainer.folder)
    trainer.accelerator.wait_for_everyone()


def _check_processes(config: AlignmentConfig) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != config.workers:
        raise InputError(
            "alignment.workers", f"it says {config.workers}, but {processes} processes were started", "Start as many as configured"
        )
    if config.zero_stage and "RANK" not in os.environ:
        raise InputError(
            "alignment.zero_stage",
            "DeepSpeed needs processes that a launcher started",
            "Use launchers/align.sh or Ray, or zero_stage: 0 in this process",
        )


def model_settings(model: str) -> PreTrainedConfig:
    """The configuration of a folder or hub name. Raises `InputError` when it cannot be read."""
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {model}", f"it cannot be read ({error})", "Give a folder or a hub name of a causal language model"
        ) from error


def _tokenizer(model: str) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):  # a model without one can be trained on ids
        return None


def _arguments(config: AlignmentConfig, folder: Path, steps: int, passes: int, seed: int) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    if (
        config.zero_stage
    ):  # ZeRO-3 cuts the model while it is loaded: DeepSpeed must know the processes by then, which on CPU nobody else tells it
        deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False)
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,  # a bin
        gradient_accumulation_steps=passes,
        num_train_epochs=1,  # the data set is all epochs in their order
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=int(config.warmup_share * steps),
        weight_decay=0.0,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        bf16=config.precision == "bf16",
        use_cpu=not cuda,
        ddp_backend=("nccl" if cuda else "gloo") if config.workers > 1 else None,
        ddp_find_unused_parameters=False,
        deepspeed=str(deepspeed_file(config)) if config.zero_stage else None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=config.checkpoint_every_steps,
        save_total_limit=2,  # the older one is complete while the newer is being written
        seed=stable_seed(seed, "trainer") % 2**32,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
    )


def deepspeed_file(config: AlignmentConfig) -> Path:
    """The DeepSpeed configuration of a ZeRO stage, with or without offload."""
    return Path(dpo4rec.__file__).parents[1] / "ds_configs" / f"zero{config.zero_stage}{'_offload' if config.offload else ''}.json"
