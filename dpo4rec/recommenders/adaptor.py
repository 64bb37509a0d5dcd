"""Knowledge features: how the texts of a user and of the candidates enter the re-ranker.

B lists of K candidates; text vectors of width D; knowledge vectors of width E; N distinct items in the batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Standardiser(nn.Module):
    """Centres text vectors and brings their mean square to 1, as measured on the training texts: what all texts share says nothing."""

    center: Tensor
    scale: Tensor

    def __init__(self, text_dim: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(text_dim))
        self.register_buffer("scale", torch.ones(()))

    def measure(self, vectors: Tensor) -> None:
        """Takes centre and scale from vectors [N, D]."""
        self.center.copy_(vectors.mean(0))
        self.scale.copy_((vectors - self.center).square().mean().sqrt().clamp(min=1e-6))

    def forward(self, vectors: Tensor) -> Tensor:
        return (vectors - self.center) / self.scale


class Experts(nn.Module):
    """n experts D -> hidden -> E side by side: [N, D] -> [N, n, E]."""

    def __init__(self, experts: int, text_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.experts = experts
        self.first = nn.Linear(text_dim, experts * hidden_dim)  # all first layers as one product
        self.second = nn.Parameter(torch.randn(experts, hidden_dim, out_dim) / hidden_dim**0.5)

    def forward(self, vectors: Tensor) -> Tensor:
        hidden = self.first(vectors).relu().unflatten(1, (self.experts, -1))
        return torch.einsum("neh,eho->neo", hidden, self.second)


class Tower(nn.Module):
    """One side's mixture of its own experts and those both sides share: a = sum_k g_k E_k(r), g = softmax(W r) (KAR, section 3.4).

    The experts' last layer has no ReLU, unlike KAR's, so that the product of a user's and an item's vector can be negative: dislike.
    """

    def __init__(self, text_dim: int, out_dim: int, hidden_dim: int, shared: Experts, dedicated: int, dropout: float) -> None:
        super().__init__()
        self.standardise = Standardiser(text_dim)
        self.dropout = nn.Dropout(dropout)  # of the input: otherwise a tower learns whole texts by heart
        self.experts = nn.ModuleList([shared, Experts(dedicated, text_dim, hidden_dim, out_dim)])
        self.gate = nn.Linear(text_dim, shared.experts + dedicated)

    def forward(self, vectors: Tensor) -> Tensor:
        """[N, D] standardised text vectors -> [N, E]."""
        vectors = self.dropout(vectors)
        outputs = torch.cat([experts(vectors) for experts in self.experts], 1)
        return torch.einsum("ne,neo->no", self.gate(vectors).softmax(1), outputs)


class HybridExpertAdaptor(nn.Module):
    """The hybrid-expert adaptor of KAR (arXiv 2306.10933), joined to every candidate.

    With both texts the features are [a_item, a_user, a_item * a_user, W (v * u)]: the last compares the texts themselves, dimension by
    dimension in the encoder's space, which is what carries most of the signal of a user's text. With one text: a_item or a_user alone.
    """

    def __init__(self, text_dim: int, out_dim: int, hidden_dim: int, shared: int, dedicated: int, dropout: float, sides: list[str]) -> None:
        """`sides` are the texts that are read: "user", "item" or both."""
        super().__init__()
        shared_experts = Experts(shared, text_dim, hidden_dim, out_dim)
        sizes = (text_dim, out_dim, hidden_dim, shared_experts, dedicated, dropout)
        self.item = Tower(*sizes) if "item" in sides else None
        self.user = Tower(*sizes) if "user" in sides else None
        self.match = nn.Linear(text_dim, out_dim, bias=False) if len(sides) == 2 else None
        self.width = out_dim * (4 if len(sides) == 2 else 1)

    def forward(self, item_vectors: Tensor | None, places: Tensor, user_vectors: Tensor | None) -> Tensor:
        """Knowledge features [B, K, width].

        Args:
            item_vectors: text vectors [N, D] of the batch's distinct items.
            places: which of them each candidate is, [B, K].
            user_vectors: text vectors [B, D].
        """
        features = []
        if self.item is not None and item_vectors is not None:
            items = self.item.standardise(item_vectors)
            features.append(F.embedding(places, self.item(items)))
        if self.user is not None and user_vectors is not None:
            users = self.user.standardise(user_vectors)
            features.append(self.user(users)[:, None].expand(-1, places.shape[1], -1))
        if self.match is not None:
            features += [features[0] * features[1], self.match(F.embedding(places, items) * users[:, None])]
        return torch.cat(features, -1)
