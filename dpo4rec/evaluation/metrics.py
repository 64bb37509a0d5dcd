"""Ranking metrics of re-ranked lists. M lists of K candidates; labels are 1 for a positive and 0 otherwise.

Ties of equal scores are ranked by candidate position (stable sort), which is random because lists are shuffled.
A list without positives has no ranking to judge: it is NaN and is left out of every mean (KAR's code counts it as 0).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def ranked_labels(scores: Tensor, labels: Tensor) -> Tensor:
    """Labels [M, K] as float, reordered by descending score [M, K]."""
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    return labels.float().gather(1, order)


def ndcg(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """NDCG@k of each list, [M]: DCG@k = sum over ranks i <= k of (2^rel - 1) / log2(i + 1), divided by the DCG@k of the best order.

    >>> ndcg(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[0, 1, 0]]), k=3)
    tensor([0.6309])
    """
    gains = 2 ** ranked_labels(scores, labels)[:, :k] - 1
    ideal = 2 ** labels.float().sort(dim=1, descending=True).values[:, :k] - 1
    discounts = 1 / torch.log2(torch.arange(2, gains.shape[1] + 2, device=gains.device))
    return (gains * discounts).sum(1) / (ideal * discounts).sum(1)  # 0 / 0 is NaN where nothing is positive


def average_precision(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """AP@k of each list, [M]: mean precision at the ranks of the hits inside the top k, 0 without hits.

    Divided by the hits inside the top k, as KAR's code does, not by min(k, positives).
    """
    hits = ranked_labels(scores, labels)[:, :k]
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1, device=hits.device)
    value = (precision * hits).sum(1) / hits.sum(1).clamp(min=1)
    return value.masked_fill(labels.sum(1) == 0, torch.nan)


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over a list's candidates of the log-probability of their labels, [M] in nats: a dense reward almost free of ties.

    log sigmoid(logit) for a positive, log sigmoid(-logit) otherwise; defined for lists without positives too.
    """
    return F.logsigmoid(torch.where(labels > 0, logits, -logits)).mean(1)


CUTOFFS = (1, 3, 5, 7, 10)
METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{f"ndcg@{k}": partial(ndcg, k=k) for k in CUTOFFS},
    **{f"map@{k}": partial(average_precision, k=k) for k in CUTOFFS},
}


def per_user(values: Tensor, users: Tensor, user_count: int) -> Tensor:
    """Mean of the values [M] of each user's lists, [user_count]; NaN values are left out, NaN for a user with none.

    Args:
        users: user code in [0, user_count) of each value, [M].
    """
    known = ~values.isnan()
    totals = torch.zeros(user_count, dtype=torch.float64).index_add(0, users[known], values[known].double())
    return totals / torch.bincount(users[known], minlength=user_count)
