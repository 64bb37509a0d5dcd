"""One alignment run in the current process: a table in, adapter or full model out."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dpo4rec.alignment.checkpoints import LOG
from dpo4rec.alignment.config import AlignmentConfig, Tracking, check_tracking
from dpo4rec.alignment.methods import Start, build
from dpo4rec.alignment.online import Online
from dpo4rec.alignment.policy import check_written, whole_weights, write_policy
from dpo4rec.alignment.policy_trainer import PolicyTrainer
from dpo4rec.alignment.tracking import tracker_of
from dpo4rec.errors import InputError
from dpo4rec.files import atomic, content_hash, remove, write_json
from dpo4rec.knowledge.checkpoints import step_of, train


def align(
    config: AlignmentConfig,
    model: str,
    pairs: Path,
    initial_adapter: Path | None,
    seed: int,
    out: Path,
    threads: int | None = None,
    round_0_adapter: Path | None = None,
    online: Online | None = None,
    tracking: Tracking = "none",
) -> None:
    """Trains `model` on `pairs` and writes a PEFT adapter (or the full model) to `out`, with `training_log.jsonl` and `summary.json`.

    Runs as one of WORLD_SIZE processes (RANK, LOCAL_RANK: set by the DeepSpeed launcher, torchrun or Ray Train), or alone.
    Gloo on CPU, NCCL on GPU. An interrupted run goes on from its newest complete checkpoint, in the hidden folder beside `out`,
    if config and inputs are the same, whatever the number of processes (GRPO's counts); `out` appears only when all is done and was read
    back. The reference's log-probabilities are kept in the hidden folder `.reference` beside `out`.

    Args:
        config: settings; `workers` must be the number of processes.
        model: folder or hub name of a causal language model.
        pairs: Parquet file or folder, see `read_preferences`; for the other methods a table of answers, see `read_answers` and
            `read_prompts`.
        initial_adapter: adapter to go on with.
        seed: order of the pairs and initial adapter.
        out: folder to write.
        threads: CPU threads of this process; unchanged if None.
        round_0_adapter: the adapter that round 0 started from, for `reference: round_0`; None: it had none.
        online: for `method: grpo`: how it samples, and its reward.
        tracking: a tracker that is told every line of the log; TensorBoard's files go to the folder `tracking` beside `out`.

    Raises:
        InputError: pairs, model, adapter or checkpoint cannot be used, `online` is not what the method needs, the tracker is not
            installed, or the number of processes is not the configured one.
        RuntimeError: training went wrong (see `check_step`) or `out` does not hold what was trained.
    """
    _check_processes(config)
    check_tracking(tracking)
    if config.weights == "full" and initial_adapter is not None:
        raise InputError(
            "alignment.weights", "full weights cannot go on with an adapter", "Use weights: lora, or give the last round's model folder"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    start = Start(config, model, pairs, initial_adapter, seed, out)
    trainer, checkpoint, summary = build(start, round_0_adapter, online)
    if tracking != "none":
        trainer.args.run_name = f"{out.absolute().parent.parent.name}/{out.absolute().parent.name}"  # run folder and round
        trainer.add_callback(tracker_of(tracking, out.parent / "tracking"))
    train(trainer, checkpoint)
    summary |= {"pairs_hash": content_hash(pairs), "resumed_from": step_of(checkpoint) if checkpoint else 0}
    _finish(trainer, out, summary, start.tokenizer if config.weights == "full" else None)


def _finish(trainer: PolicyTrainer, out: Path, summary: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> None:
    weights = whole_weights(trainer.policy)
    if trainer.is_world_process_zero():
        with atomic(out) as partial:
            write_policy(trainer.policy, weights, partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(partial))
            tensors = check_written(trainer.policy, weights, partial)
            shutil.copy(trainer.folder / LOG, partial / LOG)
            steps = [json.loads(line) for line in (trainer.folder / LOG).read_text(encoding="utf-8").splitlines()]
            summary |= {"steps": len(steps), "tensors": tensors, "zero_stage": trainer.zero_stage(), **trainer.facts()}
            write_json({**summary, "first": steps[0], "last": steps[-1]}, partial / "summary.json")
        remove(trainer.folder)
    trainer.accelerator.wait_for_everyone()


def _check_processes(config: AlignmentConfig) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != config.workers:
        raise InputError(
            "alignment.workers",
            f"it says {config.workers}, but {processes} processes were started",
            "Start as many as configured: with cluster.kind=ray, or launchers/align.sh ROUND_FOLDER --num-processes N, and then go on",
        )
    if config.zero_stage and "RANK" not in os.environ:
        raise InputError(
            "alignment.zero_stage",
            "DeepSpeed needs processes that a launcher started",
            "Use cluster.kind=ray, or launchers/align.sh ROUND_FOLDER --zero STAGE and then go on, or zero_stage: 0 in this process",
        )
