"""Batches of pairs, and the log-probabilities of their completions.

Shapes: B pairs, 2B rows (chosen first, then rejected), L positions, V vocabulary.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dpo4rec.alignment.pairs import Pair

Batch = dict[str, Tensor]


class ScheduledPairs(Dataset[tuple[int, Pair]]):
    """The pairs in the order of training, all epochs one after the other."""

    def __init__(self, pairs: list[Pair], order: list[int]) -> None:
        self.pairs, self.order = pairs, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> tuple[int, Pair]:
        """Row number and pair at a place of the order."""
        return self.order[place], self.pairs[self.order[place]]


def collate(rows: list[tuple[int, Pair]]) -> Batch:
    """Makes one batch, padded on the right to its longest row.

    Returns `index` [B] (row numbers), and [2B, L]: `input_ids`, `attention_mask`, `completion_mask` (1 on the tokens of completions).
    All are integers: a DeepSpeed bf16 configuration would round every float input (the log-probabilities of the reference, for one).

    Example: prompt (5 6), chosen (7 2), rejected (8 9 2) gives input_ids [[5 6 7 2 0], [5 6 8 9 2]] and
    completion_mask [[0 0 1 1 0], [0 0 1 1 1]].
    """
    texts = [(pair.prompt, pair.chosen) for _, pair in rows] + [(pair.prompt, pair.rejected) for _, pair in rows]
    shape = len(texts), max(len(prompt) + len(completion) for prompt, completion in texts)
    names = ("input_ids", "attention_mask", "completion_mask")
    batch = {name: torch.zeros(shape, dtype=torch.long) for name in names}
    for row, (prompt, completion) in enumerate(texts):
        end = len(prompt) + len(completion)
        batch["input_ids"][row, :end] = torch.tensor(prompt + completion)
        batch["attention_mask"][row, :end] = 1
        batch["completion_mask"][row, len(prompt) : end] = 1
    return {"index": torch.tensor([index for index, _ in rows]), **batch}


def can_trim_logits(model: nn.Module) -> bool:
    """Whether the model computes logits only for the last positions when told (most do; for the others it is done afterwards)."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def completion_log_probs(model: nn.Module, batch: Batch, trim_logits: bool) -> Tensor:
    """Sum of the log-probabilities of every row's completion tokens, [2B] float32, log-softmax in float32.

    Logits are computed from the position before the batch's first completion token on, never for the common prompt part.

    Args:
        model: the causal language model, as wrapped for training.
        batch: made by `collate`.
        trim_logits: what `can_trim_logits` says of the model.
    """
    mask = batch["completion_mask"].bool()
    keep = mask.shape[1] - int(mask.any(0).int().argmax()) + 1
    options: dict[str, Any] = {"logits_to_keep": keep} if trim_logits else {}
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **options).logits
    mask = mask[:, 1 - keep :]
    at_tokens = logits[:, -keep:-1][mask].float()  # [completion tokens, V]: padding costs no softmax
    targets = batch["input_ids"][:, 1 - keep :][mask]
    log_probs = at_tokens.gather(1, targets[:, None]).squeeze(1) - at_tokens.logsumexp(1)
    per_position = torch.zeros(mask.shape, dtype=torch.float32, device=logits.device).masked_scatter(mask, log_probs)
    return per_position.sum(1)
