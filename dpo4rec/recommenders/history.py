"""What the logs alone say: item features from ids and attributes, and an ID-based encoder of the history (the control of the texts)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ItemEncoder(nn.Module):
    """Item features [N, 3E] = [id, mean of genres, era]."""

    def __init__(self, items: int, genres: int, eras: int, embedding_dim: int) -> None:
        super().__init__()
        self.ids = nn.Embedding(items + 1, embedding_dim, padding_idx=0)
        self.genres = nn.Parameter(torch.randn(genres, embedding_dim))
        self.eras = nn.Embedding(eras, embedding_dim, padding_idx=0)
        self.width = 3 * embedding_dim

    def forward(self, codes: Tensor, genres: Tensor, eras: Tensor) -> Tensor:
        """Item codes [N], their genre weights [N, genres] and era codes [N]."""
        return torch.cat([self.ids(codes), genres @ self.genres, self.eras(eras)], -1)


class HistoryEncoder(nn.Module):
    """Candidates attend to the rated history: features [B, K, 2E] = [h, h * e].

    Keys and values are history items; the rating adds its multiple of a second projection to the value. e is the projected candidate. An
    empty slot stands in every history, so that a candidate may find nothing like it, and a user without history is no special case.
    """

    def __init__(self, item_width: int, embedding_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(item_width, embedding_dim)
        self.memory = nn.Linear(item_width, 3 * embedding_dim)  # key, value, value for each standard deviation of the rating
        self.width = 2 * embedding_dim

    def forward(self, candidates: Tensor, items: Tensor, places: Tensor, ratings: Tensor, present: Tensor) -> Tensor:
        """Candidates [B, K, item_width], distinct history items [N, item_width], which of them each is, its rating and presence [B, H]."""
        keys, values, rated = F.embedding(places, self.memory(items)).chunk(3, -1)
        queries = self.query(candidates)
        scores = queries @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5
        scores = scores.masked_fill(~present[:, None], -torch.inf)
        weights = F.pad(scores, (1, 0)).softmax(-1)[..., 1:]  # the empty slot: key and value 0
        summary = weights @ (values + ratings[..., None] * rated)
        return torch.cat([summary, summary * queries], -1)
