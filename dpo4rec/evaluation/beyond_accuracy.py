"""What lists of recommendations are like, whether or not they hit: popular, novel, alike, and spread over the catalogue.

M lists of K item codes, best first; the catalogue has I items with codes 1 to I, and code 0 is an empty place, which counts nowhere.
Popularity is the number of training interactions of an item (of its users, where users repeat items). Lists are read a few users at
a time, so memory beyond the inputs and the results is about `users_at_once` x (K x D + H) floats and one count an item and cutoff.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_SHARE = 0.8  # of the training interactions


def beyond_accuracy(
    top: Tensor,
    popularity: Tensor,
    histories: Tensor,
    item_vectors: Tensor | None,
    cutoffs: Sequence[int],
    user_count: int,
    users_at_once: int = 256,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Metrics of each list, {"novelty@10": [M], ...}, and of all lists together, {"coverage@10": share, "gini@10": index}.

    Of each list, NaN where it is empty:

    - `popularity`: mean popularity of its items, in training interactions.
    - `popularity_lift`: (popularity of the list - mean popularity of the history) / the latter; NaN for a history that is empty or of
      unseen items. Abdollahpouri et al. (RecSys 2020) divide the means of a group of users; here each user is a group.
    - `long_tail`: share of its items that are outside the head, see `is_long_tail`.
    - `novelty`: mean self-information of its items in bits, see `self_information`.
    - `diversity` (with `item_vectors`): 1 - mean cosine over its pairs of items; items whose vector is 0 are left out, NaN below two.

    Of all lists:

    - `coverage`: share of the catalogue that stands in at least one list.
    - `gini`: see `gini`.

    Args:
        top: [M, K] item codes, best first.
        popularity: [I+1] training interactions by item code; row 0 is ignored.
        histories: [M, H] item codes of what the list's user had, padded with 0.
        item_vectors: [I+1, D] vector of each item's text, or None without texts.
        cutoffs: the values of k.
        user_count: number of training users.
        users_at_once: lists held in memory as vectors at once; changes no result.
    """
    of_items = {
        "popularity": popularity.float(),
        "long_tail": is_long_tail(popularity),
        "novelty": self_information(popularity, user_count),
    }
    exposure = {k: torch.zeros(len(popularity), dtype=torch.long) for k in cutoffs}
    parts = []
    for rows, past in zip(top.split(users_at_once), histories.split(users_at_once), strict=True):
        parts.append(_of_lists(rows, past, of_items, item_vectors, cutoffs))
        for k in cutoffs:
            shown = rows[:, :k].flatten()
            exposure[k].index_add_(0, shown, torch.ones_like(shown))
    of_lists = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    together = {f"{name}@{k}": metric(exposure[k][1:]) for k in cutoffs for name, metric in (("coverage", coverage), ("gini", gini))}
    return of_lists, together


def coverage(exposure: Tensor) -> float:
    """Share of items that were shown at least once, from how often each was shown [I]."""
    return float((exposure > 0).double().mean())


def gini(exposure: Tensor) -> float:
    """Gini index of how often each item of the catalogue was shown [I], items never shown included.

    sum_i (2 i - I - 1) c_i / (I sum_i c_i) with the counts c ascending, i = 1..I: 0 if all are shown alike, 1 - 1/I if only one is; NaN if
    none is. RecBole's GiniIndex is the same.
    """
    counts = exposure.double().sort().values
    ranks = torch.arange(1, len(counts) + 1, dtype=torch.float64)
    return float(((2 * ranks - len(counts) - 1) * counts).sum() / (len(counts) * counts.sum()))


def is_long_tail(popularity: Tensor) -> Tensor:
    """1.0 for items outside the head, [I+1], from popularity [I+1].

    The head is the fewest most popular items that together have 80 % of the training interactions; of equally popular items those with
    the lower codes come first. Row 0 is the empty place and means nothing.
    """
    counts, order = popularity[1:].double().sort(descending=True, stable=True)
    before = counts.cumsum(0) - counts
    tail = torch.ones(len(popularity))
    tail[order[before < HEAD_SHARE * counts.sum()] + 1] = 0
    return tail


def self_information(popularity: Tensor, user_count: int) -> Tensor:
    """-log2 p of each item in bits, [I+1], p = its share of the training users (Zhou et al., PNAS 2010): 0 for an item that all have.

    An item that nobody has counts as if one user had it; more interactions than users count as all users.
    """
    return torch.log2(user_count / popularity.float().clamp(1, user_count))


def _of_lists(
    rows: Tensor, past: Tensor, of_items: dict[str, Tensor], item_vectors: Tensor | None, cutoffs: Sequence[int]
) -> dict[str, Tensor]:
    """The metrics of a few lists [m, K] with histories [m, H], [m] each."""
    usual = _mean(of_items["popularity"], past)
    found: dict[str, Tensor] = {}
    for k in cutoffs:
        found |= {f"{name}@{k}": _mean(values, rows[:, :k]) for name, values in of_items.items()}
        found[f"popularity_lift@{k}"] = (found[f"popularity@{k}"] / usual - 1).masked_fill(usual == 0, torch.nan)
    if item_vectors is not None:
        shown = rows[:, : max(cutoffs)]
        vectors = F.normalize(item_vectors[shown].float(), dim=2).masked_fill((shown == 0)[:, :, None], 0)  # [m, k, D]
        found |= {f"diversity@{k}": _diversity(vectors[:, :k]) for k in cutoffs}
    return found


def _mean(values: Tensor, codes: Tensor) -> Tensor:
    """Mean of the items' values [I+1] over the filled places of codes [m, k], [m]; NaN (0 / 0) where there are none."""
    filled = codes > 0
    return (values[codes] * filled).sum(1) / filled.sum(1)


def _diversity(vectors: Tensor) -> Tensor:
    """1 - mean cosine of the pairs of unit vectors [m, k, D], [m]; zero vectors are no items.

    The squared length of a sum of n unit vectors is n plus twice the cosines of its pairs, so that no pair is ever formed.
    """
    count = vectors.any(2).sum(1)
    twice = vectors.sum(1).square().sum(1) - count
    return (1 - twice / (count * (count - 1))).masked_fill(count < 2, torch.nan)
