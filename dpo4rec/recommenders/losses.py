"""Losses of a model of the next item, for hidden states [N, E] against all item vectors [I, E].

Each returns a mean over the N predictions in nats. No tensor [N, I] ever exists: work goes in chunks of rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

CHUNK_ELEMENTS = 1 << 21
"""Scores held at once (8 MiB in fp32: what a processor's cache holds), unless that were fewer than `FEWEST_ROWS` rows of them."""
FEWEST_ROWS = 64


class _CrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, chunk by chunk, so that scores are made once and never kept."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, items: Tensor, targets: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        of_hidden, of_items = torch.empty_like(hidden), torch.zeros_like(items, dtype=torch.float32)
        for rows in torch.arange(len(hidden)).split(max(FEWEST_ROWS, CHUNK_ELEMENTS // len(items))):
            part, wanted = hidden[rows], targets[rows, None]
            scores = (part @ items.T).float()
            scores -= scores.amax(1, keepdim=True)
            total -= scores.gather(1, wanted).sum()
            sums = scores.exp_().sum(1, keepdim=True)
            total += sums.log().sum()
            error = scores.div_(sums).scatter_add_(1, wanted, scores.new_full(wanted.shape, -1.0)).to(hidden.dtype)
            of_hidden[rows] = error @ items
            of_items += error.T @ part
        ctx.save_for_backward(of_hidden / len(hidden), (of_items / len(hidden)).to(items.dtype))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        of_hidden, of_items = ctx.saved_tensors  # type: ignore[attr-defined]
        return of_hidden * upstream, of_items * upstream, None


def cross_entropy(hidden: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """Full softmax over the catalogue: -log softmax(h E^T)[target] (Klenitskiy and Vasilev, RecSys 2023, equation 4).

    Args:
        targets: row of `items` that came next, [N] int64.
    """
    return _CrossEntropy.apply(hidden, items, targets)


def sampled_softmax(hidden: Tensor, items: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """Softmax over the target and uniform negatives [S] that the whole batch shares (same paper, equation 5).

    A negative that is a row's target is left out of that row. Uniform draws need no correction: it would be one constant.
    """
    positive = (hidden * items[targets]).sum(1, keepdim=True)
    scores = (hidden @ items[negatives].T).masked_fill(negatives == targets[:, None], -torch.inf)
    return F.cross_entropy(torch.cat([positive, scores], 1).float(), targets.new_zeros(len(targets)))


def generalised_bce(hidden: Tensor, items: Tensor, targets: Tensor, negatives: Tensor, catalogue: int, calibration: float) -> Tensor:
    """gBCE (Petrov and Macdonald, RecSys 2023, equations 11 and 14): BCE whose positive is raised to beta, which undoes the over-confidence
    that sampled negatives cause. beta = a (t (1 - 1/a) + 1/a), a = S / (I - 1); t = 0 is plain BCE, t = 1 gives calibrated probabilities.

    Args:
        negatives: uniform draws [S] that the whole batch shares.
        catalogue: the number of items I that they are drawn from; `items` need only hold those that take part.
        calibration: t in [0, 1].
    """
    beta = 1 - calibration * (1 - len(negatives) / (catalogue - 1))
    positive = (hidden * items[targets]).sum(1).float()
    scores = (hidden @ items[negatives].T).float().masked_fill(negatives == targets[:, None], -torch.inf)
    return -(beta * F.logsigmoid(positive) + F.logsigmoid(-scores).sum(1)).mean()
