"""The best items of the whole catalogue for each user, in chunks that bound the memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dpo4rec.recommenders.sequences import SequenceData
from dpo4rec.recommenders.sequential import SequentialRecommender

SCORES_AT_ONCE = 1 << 26
"""Scores of users against all items that are held at once (256 MiB in fp32)."""
MOST_USERS = 32


@dataclass(frozen=True)
class Retrieved:
    """Ranked items of M users: item codes and scores [M, K], 0 and -inf where the catalogue holds fewer."""

    items: Tensor
    scores: Tensor


@torch.no_grad()
def retrieve(
    model: SequentialRecommender, data: SequenceData, users: Tensor, ends: Tensor, k: int, user_vectors: Tensor | None
) -> Retrieved:
    """The k best items for each of the users [M] after what row `ends[m]` and the later ones do not tell.

    Args:
        user_vectors: text vectors of those users [M, D]; None without `user_text`.

    What a user touched before is left out, as nobody touches an item twice; so are items that nobody touched in training, unless their
    texts are read.
    """
    mode = model.training
    model.eval()
    matrix = model.item_matrix()
    k = min(k, len(matrix) - 1)
    by_length = torch.argsort(ends - data.starts[users])  # so that little of a batch is padding
    found = []
    for rows in by_length.split(max(1, min(MOST_USERS, SCORES_AT_ONCE // len(matrix)))):
        vectors = None if user_vectors is None else user_vectors[rows]
        scores = last_states(model, matrix, data, users[rows], ends[rows], vectors) @ matrix.T
        scores[:, 0] = -torch.inf
        if model.item_side is None:
            scores.masked_fill_(model.warm == 0, -torch.inf)
        places, codes = _touched(data, users[rows], ends[rows])
        scores[places, codes] = -torch.inf
        found.append(scores.topk(k))
    model.train(mode)
    place = torch.argsort(by_length)
    scores = torch.cat([of.values for of in found])[place]
    return Retrieved(torch.cat([of.indices for of in found])[place].masked_fill(scores == -torch.inf, 0), scores)


def last_states(
    model: SequentialRecommender, matrix: Tensor, data: SequenceData, users: Tensor, ends: Tensor, user_vectors: Tensor | None
) -> Tensor:
    """The state after each user's latest items before row `ends`, [M, E]."""
    sequences = data.windows(users, ends, model.config.max_length)
    states = model(matrix, sequences, user_vectors)
    return states[torch.arange(len(users)), (sequences > 0).sum(1)]


def hits_of(items: Tensor, data: SequenceData, users: Tensor, split: str) -> tuple[Tensor, Tensor]:
    """Which of the ranked items [M, K] are targets of the users [M], bool [M, K], and how many targets each has, [M]."""
    first, last = (bound[users] for bound in data.target_range(split))
    hits = torch.zeros(items.shape, dtype=torch.bool)
    for offset in range(int((last - first).max()) if len(users) else 0):
        rows = (first + offset).clamp(max=len(data.codes) - 1)
        wanted = torch.where(first + offset < last, data.codes[rows].long(), -1)
        hits |= items == wanted[:, None]
    return hits, last - first


def _touched(data: SequenceData, users: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Row (position in `users`) and item code of everything that the users touched before row `ends`."""
    sizes = ends - data.starts[users]
    places = torch.repeat_interleave(torch.arange(len(users)), sizes)
    first = sizes.cumsum(0) - sizes
    rows = torch.arange(len(places)) - first[places] + data.starts[users][places]
    return places, data.codes[rows].long()
