"""What the logs alone say: item features from ids and attributes, and ID-based encoders of the history (the control of the texts)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ItemEncoder(nn.Module):
    """Item features [N, 3E] = [id, mean of genres, era].

    `warm` [items+1] is 1 where the fit has seen the item. Another's id vector is still what it was drawn as: it counts as 0, so that such
    an item is known by its attributes and its text.
    """

    warm: Tensor

    def __init__(self, items: int, genres: int, eras: int, embedding_dim: int) -> None:
        super().__init__()
        self.ids = nn.Embedding(items + 1, embedding_dim, padding_idx=0)
        self.genres = nn.Parameter(torch.randn(genres, embedding_dim))
        self.eras = nn.Embedding(eras, embedding_dim, padding_idx=0)
        self.register_buffer("warm", torch.ones(items + 1))
        self.width = 3 * embedding_dim

    def forward(self, codes: Tensor, genres: Tensor, eras: Tensor) -> Tensor:
        """Item codes [N], their genre weights [N, genres] and era codes [N]."""
        return torch.cat([self.ids(codes) * self.warm[codes, None], genres @ self.genres, self.eras(eras)], -1)


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


class HistoryList(nn.Module):
    """The history as a list, for MIR: a GRU over rated items, and how far each has faded, exp(-theta_u * age), theta_u > 0 from its end.

    The age is a share of the user's own history, 0 for the newest item, so that short and long histories fade alike.
    """

    def __init__(self, item_width: int, hidden_dim: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(item_width, 2 * hidden_dim)  # an item, and its multiple for each standard deviation of the rating
        self.states = nn.GRU(hidden_dim, hidden_dim, batch_first=True)
        self.rate = nn.Linear(hidden_dim, 1)

    def forward(self, items: Tensor, places: Tensor, ratings: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Memory [U, H, hidden_dim] and log of the decay [U, H], -inf where no item is.

        Args:
            items: features [N, item_width] of the distinct history items.
            places: which of them each is, [U, H], oldest first, padded at the end; so are `ratings` and `present`.
        """
        plain, rated = F.embedding(places, self.inputs(items)).chunk(2, -1)
        inputs = plain + ratings[..., None] * rated
        states, _ = self.states(inputs)
        lengths = present.sum(1, keepdim=True)  # [U, 1]
        newest = states.gather(1, (lengths - 1).clamp(min=0)[..., None].expand(-1, -1, states.shape[-1])).squeeze(1)
        ages = (lengths - 1 - torch.arange(present.shape[1])) / lengths.clamp(min=1)
        decay = -F.softplus(self.rate(newest)) * ages
        return inputs + states, decay.masked_fill(~present, -torch.inf)
