"""DPO as a `transformers.Trainer`: our batches and objective, its loop, optimizer, DeepSpeed and checkpoints."""

import json
import math
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from dpo4rec.alignment.batches import Batch, ScheduledPairs, can_trim_logits, collate, completion_log_probs
from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.alignment.objectives import dpo_loss, dpo_margin, nll
from dpo4rec.alignment.policy import Policy, whole_weights, write_policy
from dpo4rec.alignment.reference import compute_reference, read_reference

SUMS = ("pairs", "loss", "dpo_loss", "nll", "margin", "accuracy", "chosen_change", "rejected_change", "tokens")
COMPLETE = "complete"
LOG = "training_log.jsonl"


class PreferenceTrainer(Trainer):
    """Trains a policy on preference pairs with DPO (arXiv 2305.18290, eq. 7) and, if wanted, NLL on the chosen texts.

    Every step writes a line to `training_log.jsonl` in the checkpoints' folder: averages over the pairs of the step, over all processes.

    Args:
        config: the settings.
        model: from `load_policy`.
        arguments: of the Trainer; `output_dir` holds the checkpoints.
        rows: the pairs in the order of training, all epochs.
        rows_per_epoch: how many of `rows` are one epoch.

    Raises:
        RuntimeError: the first loss is not log 2, a loss is not finite, or nothing has a gradient.
    """

    def __init__(
        self, config: AlignmentConfig, model: Policy, arguments: TrainingArguments, rows: ScheduledPairs, rows_per_epoch: int
    ) -> None:
        super().__init__(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[_MarkComplete()])
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # our loss is a mean over pairs: the Trainer divides it by the accumulation
        self.settings, self.policy, self.rows, self.rows_per_epoch = config, model, rows, rows_per_epoch
        self.folder = Path(str(arguments.output_dir))
        self.first_epoch = ScheduledPairs(rows.pairs, rows.order[:rows_per_epoch])
        self.trim_logits = can_trim_logits(model.get_base_model() if isinstance(model, PeftModel) else model)
        self.reference = read_reference(self.folder)
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=arguments.device)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Mean over the batch's pairs of the DPO loss + nll_weight x NLL of the chosen text."""
        if self.reference is None:
            self.reference = self._compute_reference(model)
        self.reference = self.reference.to(inputs["index"].device)
        reference_chosen, reference_rejected = self.reference[inputs["index"]].T
        chosen, rejected = completion_log_probs(model, inputs, self.trim_logits).chunk(2)
        four = chosen, rejected, reference_chosen, reference_rejected
        preference = dpo_loss(*four, self.settings.beta)
        likelihood = nll(chosen, inputs["completion_mask"].sum(1)[: len(chosen)])
        losses = preference + self.settings.nll_weight * likelihood if self.settings.nll_weight else preference
        margin = dpo_margin(*four, self.settings.beta)
        changes = chosen - reference_chosen, rejected - reference_rejected
        self._add(inputs, losses, preference, likelihood, margin, margin > 0, *changes)
        return losses.mean()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Writes the step's line and stops a run that has gone wrong; the Trainer's closing summary is not a step."""
        if "grad_norm" not in logs:
            return
        record = self._step_record(logs)
        self.state.log_history = [record]  # the last step: all of them are in the file
        if self.is_world_process_zero():
            with (self.folder / LOG).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
        self._check(record)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Weights of a checkpoint. DeepSpeed's own checkpoint already has them."""
        if not self.is_deepspeed_enabled:
            weights = whole_weights(self.policy)
            if self.is_world_process_zero():
                write_policy(self.policy, weights, Path(str(output_dir)))

    def zero_stage(self) -> int:
        """The ZeRO stage of the DeepSpeed engine that really trains; 0 without one."""
        return int(cast(Any, self.model_wrapped).zero_optimization_stage()) if self.is_deepspeed_enabled else 0

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: it walks through all parameters at every batch."""
        return 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.rows)  # the rows already lie in the order of training

    def _compute_reference(self, model: nn.Module) -> Tensor:
        if self.state.global_step:
            raise RuntimeError(f"{self.folder}: a checkpoint without its reference log-probabilities; delete the folder and align again")
        # The model stays in training mode (there is no dropout): in eval mode, 4-bit layers on CPU are repacked for good into a form
        # that passes no gradient, and only a warning says so.
        return compute_reference(
            lambda batch: completion_log_probs(model, batch, self.trim_logits),
            self.first_epoch,
            self.settings.pairs_per_device,
            self.accelerator,
            self.folder,
        )

    def _add(self, inputs: Batch, *per_pair: Tensor) -> None:
        """Adds a batch to the step's sums without waiting for the device."""
        sums = [torch.as_tensor(len(inputs["index"])), *(values.detach().sum() for values in per_pair), inputs["attention_mask"].sum()]
        self.sums += torch.stack([value.to(self.sums) for value in sums])

    def _step_record(self, logs: dict[str, float]) -> dict[str, float]:
        total = dict(zip(SUMS, self.accelerator.reduce(self.sums, "sum").tolist(), strict=True))
        self.sums = torch.zeros_like(self.sums)
        step = self.state.global_step
        means = {name: total[name] / total["pairs"] for name in SUMS[1:-1]}
        epoch = step * self.settings.pairs_per_step / self.rows_per_epoch
        rates = {"grad_norm": float(logs["grad_norm"]), "learning_rate": logs["learning_rate"], "tokens": int(total["tokens"])}
        return {"step": step, "epoch": round(epoch, 4), **means, **rates}

    def _check(self, record: dict[str, float]) -> None:
        if self.zero_stage() != self.settings.zero_stage:
            raise RuntimeError(f"the model is trained under ZeRO-{self.zero_stage()} instead of ZeRO-{self.settings.zero_stage}")
        step, loss, norm = record["step"], record["loss"], record["grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RuntimeError(f"step {step}: loss {loss}, gradient norm {norm}: not finite. Lower the learning rate")
        if step == 1 and abs(record["dpo_loss"] - math.log(2)) > 1e-3:
            raise RuntimeError(
                f"the first DPO loss is {record['dpo_loss']:.5f} instead of log 2 = {math.log(2):.5f}: the policy is not its own reference "
                "(dropout, rounded inputs or mixed-up rows)"
            )
        if step <= 2 and norm == 0:
            raise RuntimeError(f"step {step}: the gradient is zero: no trained weight takes part in the loss")


class _MarkComplete(TrainerCallback):
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
