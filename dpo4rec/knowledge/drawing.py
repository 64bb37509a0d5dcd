"""Drawing tokens by inverting the cumulative distribution: one uniform number a row decides, whatever else is in the batch."""

import torch
from torch import Tensor

from dpo4rec.knowledge.config import Decoding


def draw(logits: Tensor, uniforms: Tensor, decoding: Decoding) -> Tensor:
    """Tokens [R] from logits [R, V] at `uniforms` [R] (float64, in [0, 1)).

    Temperature first, then top-k, then top-p of what is left, as in transformers' `generate`.
    """
    scores = logits.float() if decoding.temperature == 1 else logits.float() / decoding.temperature
    if not decoding.top_k and decoding.top_p == 1:
        return _invert(scores.softmax(-1), uniforms)
    kept, tokens = scores.topk(min(decoding.top_k or scores.shape[-1], scores.shape[-1]))  # descending
    probabilities = kept.softmax(-1)
    if decoding.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= decoding.top_p, 0.0)
    return tokens.gather(1, _invert(probabilities, uniforms)[:, None]).squeeze(1)


BLOCK = 128


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first index [R] at which the running sum of `weights` [R, V] exceeds the row's uniform number times their total.

    Blocks first, then one block a row: only that is summed up in float64, in which no rare token is rounded away.
    """
    size = weights.shape[1]
    whole = size // BLOCK * BLOCK
    sums = torch.cat([weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1), weights[:, whole:].sum(-1, keepdim=True)], 1).double()
    block, share = _find(sums, uniforms[:, None])
    inside = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    own = weights.gather(1, inside.clamp(max=size - 1)).double().masked_fill(inside >= size, 0.0)
    return (block * BLOCK + _find(own, share)[0]).squeeze(1).clamp(max=size - 1)


def _find(weights: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """The index [R, 1] at which the share [R, 1] of the weights' sum is reached, and which share of that weight it takes."""
    running = weights.cumsum(1)
    target = shares * running[:, -1:]
    at = torch.searchsorted(running, target, right=True).clamp(max=weights.shape[1] - 1)
    own = weights.gather(1, at)
    return at, (target - running.gather(1, at) + own) / own
