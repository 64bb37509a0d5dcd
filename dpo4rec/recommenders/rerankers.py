"""Backbones that score the candidates of a list in each other's context: [B, K, F] features -> [B, K] logits.

The order of candidates in a list is random, so PRM's positions and DLCM's order carry no label.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DLCM(nn.Module):
    """Deep listwise context model (Ai et al., SIGIR 2018): a GRU over the list; its last state is the context of every candidate."""

    def __init__(self, feature_dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.inputs = nn.Sequential(nn.Linear(feature_dim, hidden_dim), nn.ReLU(), nn.Dropout(dropout))
        self.context = nn.GRU(hidden_dim, hidden_dim, batch_first=True)
        self.head = _head(3 * hidden_dim, hidden_dim, dropout)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.inputs(features)
        states, last = self.context(hidden)
        return self.head(torch.cat([hidden, states, last[0][:, None].expand_as(states)], -1)).squeeze(-1)


class SelfAttentive(nn.Module):
    """PRM (Pei et al., RecSys 2019) with positions, SetRank (Pang et al., SIGIR 2020) without: one self-attention block and an MLP."""

    def __init__(self, feature_dim: int, hidden_dim: int, dropout: float, heads: int, positions: int) -> None:
        """`positions` is the length of a list, or 0 for none."""
        super().__init__()
        self.heads = heads
        self.inputs = nn.Sequential(nn.Linear(feature_dim, hidden_dim), nn.ReLU(), nn.Dropout(dropout))
        self.positions = nn.Parameter(0.02 * torch.randn(positions, hidden_dim)) if positions else None
        self.queries_keys_values = nn.Linear(hidden_dim, 3 * hidden_dim)
        self.attended = nn.Linear(hidden_dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim)
        self.head = _head(hidden_dim, hidden_dim, dropout)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.inputs(features)
        if self.positions is not None:
            hidden = hidden + self.positions
        parts = self.queries_keys_values(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, heads, K, hidden/heads]
        context = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        return self.head(self.norm(hidden + self.attended(context))).squeeze(-1)


def _head(in_dim: int, hidden_dim: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden_dim, 1))
