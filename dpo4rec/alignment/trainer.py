"""Preference training as a `transformers.Trainer`: our batches and objective, its loop, optimizer, DeepSpeed and checkpoints."""

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from dpo4rec.alignment.attention import BLOCK
from dpo4rec.alignment.batches import Batch, Collator, ScheduledBins
from dpo4rec.alignment.checkpoints import Checkpointing
from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.alignment.objective import Losses, Objective
from dpo4rec.alignment.pairs import Preferences
from dpo4rec.alignment.policy import Policy
from dpo4rec.alignment.policy_trainer import PolicyTrainer
from dpo4rec.alignment.reference import as_reference, compute_reference, read_or_compute
from dpo4rec.alignment.schedule import Bin, longest_text
from dpo4rec.alignment.scoring import Scorer
from dpo4rec.alignment.speed import Speed

logger = logging.getLogger(__name__)
SUMS = ("comparisons", *(field.name for field in fields(Losses)), "tokens", "computed")
TOLERANCE_NATS = {"fp32": 1e-4, "bf16": 0.1}
"""How far a token's log-probability may be off in a packed row; in bf16 the order of sums alone makes so much."""


class PreferenceTrainer(PolicyTrainer):
    """Trains a policy on comparisons with the configured objective.

    Every step writes a line to `training_log.jsonl` in the checkpoints' folder: averages over the comparisons of the step, over all
    processes, of what `Losses` names (`margin` is its gap), tokens computed without padding, gradient norm and learning rate.

    Args:
        config: the settings.
        model: from `load_policy`.
        arguments: of the Trainer; `output_dir` holds the checkpoints.
        preferences: the data.
        steps: of each step, its bins, see `cut`.
        steps_per_epoch: the bins of so many steps hold all answers.
        reference: file of the reference's log-probabilities, read or made.
        starts_at_reference: whether the untrained policy is the reference.
        as_it_starts: whether the reference has weights that are trained, so that it is the policy before its first step and never again.

    Raises:
        RuntimeError: training went wrong, see `check_step`.
    """

    def __init__(
        self,
        config: AlignmentConfig,
        model: Policy,
        arguments: TrainingArguments,
        preferences: Preferences,
        steps: list[list[Bin]],
        steps_per_epoch: int,
        reference: Path,
        starts_at_reference: bool,
        as_it_starts: bool,
    ) -> None:
        bins = [bin_ for step in steps for bin_ in step]
        self.collator = Collator(preferences, config.packing != "none", BLOCK if arguments.device.type == "cuda" else 1)
        super().__init__(
            model=model, args=arguments, train_dataset=ScheduledBins(bins), data_collator=self._collate, callbacks=[Checkpointing()]
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # our loss is a mean: the Trainer divides it by the accumulation
        self.settings, self.policy, self.steps_per_epoch = config, model, steps_per_epoch
        self.folder = Path(str(arguments.output_dir))
        self.first_epoch = [bin_ for step in steps[:steps_per_epoch] for bin_ in step]
        self.bins_per_step = len(steps[0])
        self.reference_file, self.starts_at_reference, self.as_it_starts = reference, starts_at_reference, as_it_starts
        base = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
        self.scorer = Scorer(base)
        self.losses_of = Objective(config, preferences, arguments.device)
        self.reference: Tensor | None = None
        self.speed = Speed(_parameters(base), config.weights == "full", config.workers)
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=arguments.device)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The batch's share of the mean loss over the step's comparisons, times the number of bins over which it will be averaged."""
        if self.reference is None:
            self.reference = self._start(model)
        if "spans" in inputs and not self.scorer.packed:
            inputs = self._again_padded(inputs)
        losses = self.losses_of(self.scorer(model, inputs), self.reference[inputs["answers"]], inputs)
        self._add(inputs, losses)
        return losses.loss.sum() * (self.bins_per_step / self.settings.pairs_per_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Writes the step's line and stops a run that has gone wrong; the Trainer's closing summary is not a step."""
        if "grad_norm" not in logs:
            return
        self.write_step(self._step_record(logs), self.starts_at_reference)

    def facts(self) -> dict[str, Any]:
        """Whether rows were packed, and the speed."""
        return {"packed": self.scorer.packed, "speed": self.speed.summary()}

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(cast(ScheduledBins, self.train_dataset))  # the bins already lie in the order of training

    def _collate(self, bins: list[Bin]) -> Batch:
        return self.collator(bins)

    def _again_padded(self, inputs: Batch) -> Batch:
        """The same comparisons in padded rows: the collator learns only from the model whether it may pack."""
        batch = Collator(self.collator.preferences, packed=False)([inputs["index"].tolist()])
        return cast(Batch, self._prepare_inputs(batch))

    def _start(self, model: nn.Module) -> Tensor:
        """What needs the wrapped model, before its first step: may it pack, and what does the reference say."""
        if self.settings.packing != "none":
            longest = longest_text(self.collator.preferences)
            reason = self.scorer.allow_packing(model, self.args.device, longest, TOLERANCE_NATS[self.settings.precision])
            if reason:
                logger.warning("%s: %s. Batches are padded, prompts not shared", type(self.scorer.base).__name__, reason)
            self.collator = Collator(self.collator.preferences, reason is None, self.collator.multiple)
        answers = len(self.collator.preferences.answers)
        if self.settings.objective == "simpo":
            return torch.zeros(answers, device=self.args.device)
        table = read_or_compute(self.reference_file, answers, lambda: self._compute_reference(model), self.accelerator)
        return table.to(self.args.device)

    def _compute_reference(self, model: nn.Module) -> Tensor:
        if self.state.global_step and self.as_it_starts:
            raise RuntimeError(
                f"{self.reference_file} is missing, and the policy it came from is gone: delete {self.folder} and align again"
            )
        # The model stays in training mode (there is no dropout): in eval mode, 4-bit layers on CPU are repacked for good into a form
        # that passes no gradient, and only a warning says so.
        with as_reference(self.policy, self.as_it_starts):
            return compute_reference(lambda batch: self.scorer(model, batch), self.first_epoch, self.collator, self.accelerator)

    def _add(self, inputs: Batch, losses: Losses) -> None:
        """Adds a batch to the step's sums without waiting for the device."""
        counts = [torch.as_tensor(number) for number in (len(inputs["index"]), inputs["tokens"], inputs["input_ids"].numel())]
        sums = [counts[0], *(values.detach().sum() for values in vars(losses).values()), *counts[1:]]
        self.sums += torch.stack([value.to(self.sums) for value in sums])

    def _step_record(self, logs: dict[str, float]) -> dict[str, float]:
        total = dict(zip(SUMS, self.accelerator.reduce(self.sums, "sum").tolist(), strict=True))
        self.sums = torch.zeros_like(self.sums)
        self.speed.step(total["comparisons"], total["tokens"], total["computed"])
        step = self.state.global_step
        means = {name: total[name] / total["comparisons"] for name in SUMS[1:-2]}
        means["margin"] = means.pop("gap")
        rates = {"grad_norm": float(logs["grad_norm"]), "learning_rate": logs["learning_rate"], "tokens": int(total["tokens"])}
        return {"step": step, "epoch": round(step / self.steps_per_epoch, 4), **means, **rates}


def _parameters(model: PreTrainedModel) -> int:
    """Those that take part in matrix products: not the input embedding, unless it is the output layer, too."""
    sizes = {id(parameter): getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters()}
    embedding, head = model.get_input_embeddings().weight, getattr(model.get_output_embeddings(), "weight", None)
    return sum(sizes.values()) - (0 if embedding is head else sizes[id(embedding)])
