"""Backbones that score the candidates of a list in each other's context: [B, K, F] features -> [B, K] logits.

Where the candidates stand in a first stage's order, PRM's positions and DLCM's order carry it too; else the order is random.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo4rec.recommenders.history import HistoryList


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


class SetEncoder(nn.Module):
    """Features of the candidates [B, K, F] in each other's context [B, K, hidden]: one block of self-attention."""

    def __init__(self, feature_dim: int, hidden_dim: int, dropout: float, heads: int, positions: int) -> None:
        """`positions` is the length of a list, or 0 for none."""
        super().__init__()
        self.heads = heads
        self.inputs = nn.Sequential(nn.Linear(feature_dim, hidden_dim), nn.ReLU(), nn.Dropout(dropout))
        self.positions = nn.Parameter(0.02 * torch.randn(positions, hidden_dim)) if positions else None
        self.queries_keys_values = nn.Linear(hidden_dim, 3 * hidden_dim)
        self.attended = nn.Linear(hidden_dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.inputs(features)
        if self.positions is not None:
            hidden = hidden + self.positions[: hidden.shape[1]]
        parts = self.queries_keys_values(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, heads, K, hidden/heads]
        context = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        return self.norm(hidden + self.attended(context))


class SelfAttentive(SetEncoder):
    """PRM (Pei et al., RecSys 2019) with positions, SetRank (Pang et al., SIGIR 2020) without: one self-attention block and an MLP."""

    def __init__(self, feature_dim: int, hidden_dim: int, dropout: float, heads: int, positions: int) -> None:
        super().__init__(feature_dim, hidden_dim, dropout, heads, positions)
        self.head = _head(hidden_dim, hidden_dim, dropout)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(super().forward(features)).squeeze(-1)


class SetToListAttention(nn.Module):
    """Attention between the set of candidates and the history list, both ways (SLAttention of MIR, simplified).

    The affinity of candidate k and history item h is item-level, v_k W q_h, plus feature-level, the weighted sum over pairs of fields f, g
    (id, genres, era) of x_kf W y_hg. Candidate k reads the list with weights that fade with age, a_k = softmax_h(affinity + log decay);
    each history item reads the set, and the candidate reads that, sum_h a_kh sum_l softmax_l(affinity_lh) v_l. MIR squashes the affinity
    by tanh and multiplies it with the decay; the decay of softmax weights needs no squashing and can tell one item from all others. An
    empty slot stands in every list, so that a candidate may find nothing like it, and a user without history is no special case.
    """

    def __init__(self, fields: int, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(hidden_dim, hidden_dim)
        self.field_query = nn.Linear(embedding_dim, embedding_dim, bias=False)
        self.field_pairs = nn.Parameter(torch.eye(fields))

    def forward(self, candidates: Tensor, memory: Tensor, items: Tensor, history_items: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        """What each candidate reads of the list, and of the set through the list, both [B, K, hidden].

        Args:
            candidates: encoded candidates [B, K, hidden]; `items` their features [B, K, fields * E].
            memory: encoded history [B, H, hidden]; `history_items` their features [B, H, fields * E].
            decay: log of the history items' decay [B, H].
        """
        fields = self.field_query(items.unflatten(-1, (len(self.field_pairs), -1)))
        fields = (self.field_pairs.T @ fields).flatten(2)  # so that one product serves all pairs
        affinity = self.query(candidates) @ memory.transpose(1, 2) / memory.shape[-1] ** 0.5
        affinity = affinity + fields @ history_items.transpose(1, 2) / items.shape[-1] ** 0.5  # [B, K, H]
        reading = F.pad(affinity + decay[:, None], (1, 0)).softmax(-1)[..., 1:]  # the empty slot: affinity and content 0
        from_set = affinity.softmax(1).transpose(1, 2) @ candidates  # [B, H, hidden]
        return reading @ memory, reading @ from_set


class MIR(nn.Module):
    """Multi-level interaction re-ranking (Xi et al., SIGIR 2022): the candidates as a set, the history as a list, attention between them.

    Self-attention within the set, a GRU within the list, set-to-list attention on item and feature level, and an MLP;
    where the paper joins raw and encoded vectors this adds them. Any order of the candidates gives each the same score.
    """

    def __init__(self, feature_dim: int, fields: int, embedding_dim: int, hidden_dim: int, dropout: float, heads: int) -> None:
        """An item has `fields` features of width `embedding_dim` each."""
        super().__init__()
        self.set = SetEncoder(feature_dim, hidden_dim, dropout, heads, positions=0)
        self.list = HistoryList(fields * embedding_dim, hidden_dim)
        self.interaction = SetToListAttention(fields, embedding_dim, hidden_dim)
        self.head = _head(4 * hidden_dim, hidden_dim, dropout)

    def forward(self, features: Tensor, items: Tensor, owners: Tensor, history: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """Logits [B, K].

        Args:
            features: all features of the candidates [B, K, F]; `items` those of the items alone [B, K, fields * E].
            owners: which of the U users each list belongs to, [B].
            history: arguments of `HistoryList`, of the U users.
        """
        candidates = self.set(features)
        memory, decay = self.list(*history)
        history_items, places = history[:2]
        history_items = F.embedding(places, history_items)[owners]
        from_list, from_set = self.interaction(candidates, memory[owners], items, history_items, decay[owners])
        return self.head(torch.cat([candidates, from_list, from_list * candidates, from_set], -1)).squeeze(-1)


def _head(in_dim: int, hidden_dim: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden_dim, 1))
