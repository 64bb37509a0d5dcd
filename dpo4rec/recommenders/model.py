"""A knowledge-augmented re-ranker: features of candidates, histories and texts, then a backbone over the list.

B lists of K candidates; E = embedding_dim; D = width of text vectors; I items, item code 0 is padding.
"""

import hashlib
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from dpo4rec.errors import InputError
from dpo4rec.files import atomic, corrupted, read_json, read_tensors, write_json, write_tensors
from dpo4rec.recommenders.adaptor import HybridExpertAdaptor
from dpo4rec.recommenders.config import RecommenderConfig
from dpo4rec.recommenders.history import HistoryEncoder, ItemEncoder
from dpo4rec.recommenders.lists import RankingData
from dpo4rec.recommenders.rerankers import DLCM, MIR, SelfAttentive
from dpo4rec.settings import Settings


class Sizes(Settings):
    """What the shapes of the weights depend on besides the configuration; `items_hash` tells one catalogue from another."""

    items: int
    genres: int
    eras: int
    list_length: int
    text_dim: int
    items_hash: str
    ranked: bool = False  # absent from models saved before lists could be ranked

    @classmethod
    def of(cls, data: RankingData, text_dim: int) -> "Sizes":
        """`text_dim` is 0 when no text is read."""
        catalogue = "\x1f".join([*data.genre_names, "", *data.item_ids])
        return cls(
            items=len(data.item_ids),
            genres=len(data.genre_names),
            eras=int(data.eras.max()) + 1,
            list_length=data.candidates.shape[1],
            text_dim=text_dim,
            items_hash=hashlib.sha256(catalogue.encode()).hexdigest()[:16],
            ranked=data.ranked,
        )


class Reranker(nn.Module):
    """Scores candidates from [item | history | knowledge | first-stage rank] features; needs `bind` before the first use.

    Parts are as configured, the rank where lists are ranked. MIR has the history in its backbone and not among the features; where
    `user_signal` has none, it is shown an empty one.
    """

    ranks: Tensor | None
    genres: Tensor
    eras: Tensor
    histories: Tensor
    ratings: Tensor
    item_vectors: Tensor | None

    def __init__(self, config: RecommenderConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config, self.sizes = config, sizes
        self.items = ItemEncoder(sizes.items, sizes.genres, sizes.eras, config.embedding_dim)
        self.dropout = nn.Dropout(config.dropout)
        attends = config.reads_history and config.model != "mir"
        self.history = HistoryEncoder(self.items.width, config.embedding_dim) if attends else None
        self.adaptor = self._adaptor() if config.text_sides else None
        self.register_buffer("ranks", _rank_features(sizes.list_length) if sizes.ranked else None, persistent=False)
        parts = [self.items, self.history, self.adaptor]
        rank_width = 0 if self.ranks is None else self.ranks.shape[1]
        self.backbone = self._backbone(sum(part.width for part in parts if part is not None) + rank_width)

    def _adaptor(self) -> HybridExpertAdaptor:
        config = self.config
        experts = (config.expert_hidden_dim, config.shared_experts, config.dedicated_experts)
        return HybridExpertAdaptor(self.sizes.text_dim, config.embedding_dim, *experts, config.text_dropout, config.text_sides)

    def _backbone(self, feature_dim: int) -> nn.Module:
        config = self.config
        if config.model == "dlcm":
            return DLCM(feature_dim, config.hidden_dim, config.dropout)
        if config.model == "mir":
            fields = self.items.width // config.embedding_dim
            return MIR(feature_dim, fields, config.embedding_dim, config.hidden_dim, config.dropout, config.heads)
        positions = self.sizes.list_length if config.model == "prm" else 0
        return SelfAttentive(feature_dim, config.hidden_dim, config.dropout, config.heads, positions)

    def bind(self, data: RankingData, item_vectors: Tensor | None) -> Self:
        """Attaches the data the weights were made for: attributes, histories and item text vectors [I, D], in the order of `item_ids`.

        Raises:
            InputError: another catalogue, list length or vector width than the weights', ranked lists for a model of unranked ones or
                the other way round, or item vectors missing or not asked for.
        """
        if (item_vectors is not None) != self.config.item_text:
            raise InputError(
                "recommender.item_text", f"it is {self.config.item_text} but item vectors are {_given(item_vectors)}", "Make them agree"
            )
        expected = (self.sizes.items, self.sizes.text_dim)
        if item_vectors is not None and item_vectors.shape != expected:
            raise InputError("item vectors", f"their shape is {tuple(item_vectors.shape)}, not {expected}", "Encode the items of this run")
        if Sizes.of(data, self.sizes.text_dim) != self.sizes:
            raise InputError("recommender", "it was fitted on other items or lists than these", "Fit it again on this data")
        attached = {
            "genres": data.genres,
            "eras": data.eras,
            "histories": data.histories,
            "ratings": data.history_ratings,
            "item_vectors": None if item_vectors is None else torch.cat([item_vectors.new_zeros(1, expected[1]), item_vectors]),
        }
        for name, tensor in attached.items():
            self.register_buffer(name, tensor, persistent=False)
        return self

    def turn_to(self, data: RankingData) -> None:
        """Attaches histories of other users of the data that it is bound to."""
        self.histories, self.ratings = data.histories, data.history_ratings

    def forward(self, candidates: Tensor, users: Tensor, user_vectors: Tensor | None) -> Tensor:
        """Logits [B, K] that each candidate is a positive.

        Args:
            candidates: item codes [B, K].
            users: user numbers [B].
            user_vectors: text vectors [B, D]; None when `user_signal` has no text.
        """
        codes, places = candidates.unique(return_inverse=True)
        items = F.embedding(places, self.dropout(self._item_features(codes)))
        features = [items]
        if self.history is not None:
            features.append(self.history(items, *self._history_of(users)))
        if self.adaptor is not None:
            item_vectors = None if self.item_vectors is None else self.item_vectors[codes]
            features.append(self.adaptor(item_vectors, places, user_vectors))
        if self.ranks is not None:
            features.append(self.ranks.expand(len(candidates), -1, -1))
        if not isinstance(self.backbone, MIR):
            return self.backbone(torch.cat(features, -1))
        distinct, owners = users.unique(return_inverse=True)  # a GRU over each history once
        return self.backbone(torch.cat(features, -1), items, owners, self._history_of(distinct))

    def _item_features(self, codes: Tensor) -> Tensor:
        return self.items(codes, self.genres[codes], self.eras[codes])

    def _history_of(self, users: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features of the distinct history items [N, width], which of them each is, its rating and its presence [users, H]."""
        histories = self.histories[users]
        if not self.config.reads_history:  # MIR has a place for one all the same
            histories = torch.zeros_like(histories)
        codes, places = histories.unique(return_inverse=True)
        return self.dropout(self._item_features(codes)), places, self.ratings[users], histories > 0

    def save(self, folder: Path) -> None:
        """Writes `recommender.json` (configuration and sizes) and `model.safetensors`; bound data is not saved."""
        with atomic(folder) as partial:
            write_json({"config": self.config.model_dump(), "sizes": self.sizes.model_dump()}, partial / "recommender.json")
            write_tensors(dict(self.state_dict()), partial / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> "Reranker":
        """Reads what `save` wrote, ready to `bind`, in evaluation mode. Raises `InputError` when a file is missing or damaged."""
        file = folder / "recommender.json"
        stored, weights = read_json(file), read_tensors(folder / "model.safetensors")
        try:
            model = cls(RecommenderConfig(**stored["config"]), Sizes(**stored["sizes"]))
            unmarked = {"items.warm": model.items.warm}  # absent from models saved before items could be cold
            model.load_state_dict(unmarked | weights)
        except (ValidationError, KeyError, TypeError, RuntimeError) as error:
            raise corrupted(file, error) from error
        return model.eval()


def _rank_features(list_length: int) -> Tensor:
    """What the place in the first stage's order says, [K, 2]: the discount of NDCG, 1 / log2(1 + rank), and rank / K; ranks from 1."""
    ranks = torch.arange(1, list_length + 1)
    return torch.stack([1 / torch.log2(1 + ranks), ranks / list_length], 1)


def _given(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else "given"
