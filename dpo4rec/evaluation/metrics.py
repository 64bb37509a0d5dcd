"""Accuracy of ranked lists, whether re-ranked candidates or the top of a whole catalogue.

M lists of K places. `hits` [M, K] is 1 where the item at a place is relevant and 0 elsewhere, in the order of the ranks; `relevant` [M]
is the number of a list's relevant items, of which some may not have been retrieved. A list shorter than a cutoff is as if filled up with
misses. A list without relevant items has no ranking to judge: it is NaN in every metric and left out of every mean (KAR's code counts it
as 0). Ties of equal scores are ranked by candidate position (stable sort), which is random because lists are shuffled.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def accuracy(hits: Tensor, relevant: Tensor, cutoffs: Sequence[int]) -> dict[str, Tensor]:
    """Every metric of `DEFINITIONS` at every cutoff: {"ndcg@10": [M], ...}, NaN where nothing is relevant.

    >>> accuracy(torch.tensor([[0, 1, 0, 1]]), torch.tensor([4]), [4])["recall@4"]
    tensor([0.5000])

    Args:
        hits: [M, K] 0 or 1 (any type) by rank.
        relevant: [M] number of relevant items of each list, at least its hits.
        cutoffs: the values of k, each at least 1.

    Raises:
        ValueError: a list has more hits than relevant items (an item stands in it twice), or a cutoff is below 1.
    """
    if (hits.sum(1) > relevant).any():
        raise ValueError("a list has more hits than there are relevant items: does an item stand in it twice?")
    if min(cutoffs) < 1:
        raise ValueError(f"cutoffs must be at least 1, not {list(cutoffs)}")
    return {f"{name}@{k}": at(metric, hits, relevant, k) for k in cutoffs for name, metric in DEFINITIONS.items()}


def at(metric: Callable[[Tensor, Tensor], Tensor], hits: Tensor, relevant: Tensor, k: int) -> Tensor:
    """One metric of `DEFINITIONS` at cutoff k, [M], from hits [M, K] and relevant [M]."""
    top = F.pad(hits[:, :k].float(), (0, max(0, k - hits.shape[1])))
    return metric(top, relevant).masked_fill(relevant == 0, torch.nan)


def _ranks(top: Tensor) -> Tensor:
    return torch.arange(1, top.shape[1] + 1, device=top.device)


def _ndcg(top: Tensor, relevant: Tensor) -> Tensor:
    """DCG@k = sum over ranks i <= k of rel_i / log2(i + 1), divided by the DCG@k of the best order (Järvelin and Kekäläinen 2002).

    The best order has all relevant items in front, retrieved or not. On binary relevance the gain rel equals the gain 2^rel - 1 that
    KAR and many others write.
    """
    discounts = 1 / torch.log2(_ranks(top) + 1)
    ideal = (_ranks(top) <= relevant[:, None]).float()
    return (top * discounts).sum(1) / (ideal * discounts).sum(1)


def _precision_sum(top: Tensor) -> Tensor:
    return (top.cumsum(1) / _ranks(top) * top).sum(1)


def _map(top: Tensor, relevant: Tensor) -> Tensor:
    """KAR's MAP@k: the mean, over the hits inside the top k, of the precision at their ranks; 0 without hits."""
    return _precision_sum(top) / top.sum(1).clamp(min=1)


def _ap(top: Tensor, relevant: Tensor) -> Tensor:
    """Average precision as trec_eval's `map_cut`: the same sum divided by the number of all relevant items, retrieved or not."""
    return _precision_sum(top) / relevant


def _hr(top: Tensor, relevant: Tensor) -> Tensor:
    """Hit rate, also called success: 1 if a relevant item is in the top k, else 0."""
    return top.amax(1)


def _mrr(top: Tensor, relevant: Tensor) -> Tensor:
    """Reciprocal rank of the first hit inside the top k, 0 without one; its mean over lists is MRR@k."""
    return (top / _ranks(top)).amax(1)


def _recall(top: Tensor, relevant: Tensor) -> Tensor:
    """Hits inside the top k divided by the number of all relevant items (not by min(k, relevant))."""
    return top.sum(1) / relevant


def _precision(top: Tensor, relevant: Tensor) -> Tensor:
    """Hits inside the top k divided by k, also when the list is shorter than k."""
    return top.mean(1)


DEFINITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ndcg": _ndcg,
    "map": _map,
    "ap": _ap,
    "hr": _hr,
    "mrr": _mrr,
    "recall": _recall,
    "precision": _precision,
}
"""Each metric by its name, on the hits of the top k [M, k] and the number of relevant items [M]."""


def ranked_labels(scores: Tensor, labels: Tensor) -> Tensor:
    """Labels [M, K] as float, reordered by descending score [M, K]: the hits of re-ranked lists."""
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    return labels.float().gather(1, order)


def ndcg(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """NDCG@k of each re-ranked list, [M], from scores and labels [M, K].

    >>> ndcg(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[0, 1, 0]]), k=3)
    tensor([0.6309])
    """
    return at(_ndcg, ranked_labels(scores, labels), labels.sum(1), k)


def average_precision(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """KAR's MAP@k ("map") of each re-ranked list, [M], from scores and labels [M, K]: divided by the hits inside the top k."""
    return at(_map, ranked_labels(scores, labels), labels.sum(1), k)


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over a list's candidates of the log-probability of their labels, [M] in nats: a dense reward almost free of ties.

    log sigmoid(logit) for a positive, log sigmoid(-logit) otherwise; defined for lists without positives too.
    """
    return F.logsigmoid(torch.where(labels > 0, logits, -logits)).mean(1)


def per_user(values: Tensor, users: Tensor, user_count: int) -> Tensor:
    """Mean of the values [M] of each user's lists, [user_count]; NaN values are left out, NaN for a user with none.

    Args:
        users: user code in [0, user_count) of each value, [M].
    """
    known = ~values.isnan()
    totals = torch.zeros(user_count, dtype=torch.float64).index_add(0, users[known], values[known].double())
    return totals / torch.bincount(users[known], minlength=user_count)
