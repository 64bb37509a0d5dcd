"""From the log-probabilities of a batch to its losses: the configured objective, its noise model and the likelihood term."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dpo4rec.alignment import objectives
from dpo4rec.alignment.batches import Batch
from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.alignment.pairs import Preferences


@dataclass(frozen=True)
class Losses:
    """Of each comparison, [B]. `gap` is beta * (log-ratio of the chosen text - mean log-ratio of the rejected ones)."""

    loss: Tensor
    preference_loss: Tensor
    nll: Tensor
    gap: Tensor
    accuracy: Tensor
    """1 where the chosen text's log-ratio is above all rejected ones', else 0."""
    chosen_change: Tensor
    """Log-ratio of the chosen text (simpo, which has no reference: its log-probability)."""
    rejected_change: Tensor
    """The same of the rejected texts, their mean."""


class Objective:
    """The objective of a run. Log-probabilities, epsilons and margins stay float32 whatever the model's precision is."""

    def __init__(self, config: AlignmentConfig, preferences: Preferences, device: torch.device) -> None:
        self.config = config
        self.epsilon = torch.tensor([one.epsilon for one in preferences.comparisons], device=device)
        self.margin = torch.tensor([one.margin for one in preferences.comparisons], device=device)

    def __call__(self, policy: Tensor, reference: Tensor, batch: Batch) -> Losses:
        """The losses of a batch.

        Args:
            policy: [A] log-probabilities of the batch's answers; `reference` likewise (zeros for simpo).
            batch: of a `Collator`.
        """
        change, lengths = policy - reference, batch["lengths"]
        chosen, present = batch["chosen"], batch["rejected"] >= 0
        rejected = batch["rejected"].clamp(min=0)
        gaps = self.config.beta * (change[chosen][:, None] - change[rejected])
        preference = self._preference(gaps, present, change[chosen] / lengths[chosen], (change / lengths)[rejected[:, 0]], batch["index"])
        likelihood = objectives.nll(policy[chosen], lengths[chosen])
        return Losses(
            loss=preference + self.config.nll_weight * likelihood if self.config.nll_weight else preference,
            preference_loss=preference,
            nll=likelihood,
            gap=objectives.mean_gap(gaps, present),
            accuracy=((gaps > 0) | ~present).all(1).float(),
            chosen_change=change[chosen],
            rejected_change=objectives.mean_gap(change[rejected], present),
        )

    def _preference(self, gaps: Tensor, present: Tensor, chosen_per_token: Tensor, rejected_per_token: Tensor, index: Tensor) -> Tensor:
        name, beta, gap = self.config.objective, self.config.beta, gaps[:, 0]
        if name in ("softmax", "dmpo"):
            return {"softmax": objectives.softmax, "dmpo": objectives.dmpo}[name](gaps, present)
        if name in ("smoothed", "robust"):
            return {"smoothed": objectives.smoothed, "robust": objectives.robust}[name](gap, self.epsilon[index])
        if name in ("margin", "hinge"):
            return {"margin": objectives.margin, "hinge": objectives.hinge}[name](gap, self.margin[index])
        if name == "ipo":
            return objectives.ipo(chosen_per_token, rejected_per_token, beta)
        if name == "simpo":
            return objectives.simpo(chosen_per_token, rejected_per_token, beta, self.margin[index])
        return objectives.sigmoid(gap)
