"""Scores of any pairs of a list and a user text."""

import torch
from torch import Tensor

from dpo4rec.recommenders.lists import RankingData
from dpo4rec.recommenders.model import Reranker


@torch.no_grad()
def logits_of(model: Reranker, data: RankingData, lists: Tensor, user_vectors: Tensor | None, batch_candidates: int = 40_960) -> Tensor:
    """Logits [M, K] of list number `lists[m]` when its user's text has vector `user_vectors[m]` ([M, D], or None without text).

    The model is used in evaluation mode and left in the mode it had. Rows do not influence each other; about `batch_candidates` are scored
    at a time, so that memory does not grow with K.
    """
    mode = model.training
    model.eval()
    logits = []
    for rows in torch.arange(len(lists)).split(max(1, batch_candidates // data.candidates.shape[1])):
        part = lists[rows]
        vectors = None if user_vectors is None else user_vectors[rows]
        logits.append(model(data.candidates[part], data.list_users[part], vectors))
    model.train(mode)
    return torch.cat(logits) if logits else data.labels.new_zeros(0, data.labels.shape[1])
