"""Models of the next item: SASRec and GRU4Rec, with the language model's knowledge where it is given.

B sequences of T items, vectors of width E, text vectors of width D, I items; item code 0 is padding.
"""

import hashlib
from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from dpo4rec.errors import InputError
from dpo4rec.files import atomic, corrupted, read_json, read_tensors, write_json, write_tensors
from dpo4rec.recommenders.adaptor import Standardiser
from dpo4rec.recommenders.sequences import SequenceData
from dpo4rec.settings import Settings

SEQUENTIAL = ("sasrec", "gru4rec")


class SequentialConfig(Settings):
    """A model of the next item and how it is fitted."""

    embedding_dim: int = Field(64, ge=1)
    layers: int = Field(2, ge=1)
    heads: int = Field(1, ge=1, description="attention heads of SASRec")
    dropout: float = Field(0.3, ge=0, lt=1)
    max_length: int = Field(200, ge=1, description="latest items of a user that the model reads")
    user_text: bool = Field(False, description="add the user's text, which may tell of the training part only")
    item_text: bool = Field(False, description="add the items' texts, which also ranks items that nobody touched in training")
    loss: Literal["cross-entropy", "sampled-softmax", "gbce"] = "cross-entropy"
    negatives: int | None = Field(None, ge=1, description="uniform negatives a batch, for sampled-softmax and gbce [1000]")
    calibration: float | None = Field(None, ge=0, le=1, description="t of gbce [0.75]")
    learning_rate: float = Field(2e-3, gt=0, description="highest; rises over the first epoch and falls linearly to nothing")
    weight_decay: float = Field(0.0, ge=0)
    tokens_per_step: int = Field(12_800, ge=1, description="places (items and padding) of one batch")
    epochs: int = Field(60, ge=1, description="the epoch best on the validation targets is kept")
    patience: int = Field(10, ge=1, description="epochs without a better one after which the fit ends")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the matrix products; weights stay fp32. bf16 is for processors that have it, as AVX-512 does"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.loss == "cross-entropy" and self.negatives is not None:
            raise ValueError("negatives would be ignored: loss=cross-entropy compares with the whole catalogue")
        if self.loss != "gbce" and self.calibration is not None:
            raise ValueError(f"calibration would be ignored: loss={self.loss} has none")
        if self.embedding_dim % self.heads:
            raise ValueError(f"embedding_dim={self.embedding_dim} is not a multiple of heads={self.heads}")
        return self


class Dropout(nn.Module):
    """Dropout whose mask costs a byte of a random number an element, where torch's own draws a whole number: two fifths of the time on a
    processor. The probability is rounded to 1/256 (what is above 0 stays so, and below 1), and what is kept is scaled by what was
    really dropped.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.dropped = min(255, max(1, round(256 * probability))) if probability else 0

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training or not self.dropped:
            return inputs
        words = torch.empty(-(-inputs.numel() // 8), dtype=torch.int64, device=inputs.device).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: inputs.numel()].view(inputs.shape) >= self.dropped
        return inputs * kept.to(inputs.dtype).mul_(256 / (256 - self.dropped))  # a Boolean factor would take ten times as long


class Block(nn.Module):
    """Causal self-attention and a feed-forward net, each on normalised input and added to it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, Dropout(dropout)
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.attended = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), Dropout(dropout), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        parts = self.queries_keys_values(self.attention_norm(hidden)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = parts  # [B, heads, T, E/heads] each
        context = F.scaled_dot_product_attention(queries, keys, values, is_causal=True).transpose(1, 2).flatten(2)
        hidden = hidden + self.dropout(self.attended(context))
        return hidden + self.dropout(self.feed(self.feed_norm(hidden)))


class SelfAttention(nn.Module):
    """SASRec (Kang and McAuley, ICDM 2018): [B, T, E] -> [B, T, E] with learned positions.

    Sequences start at position 0 and padding follows them, so that causality alone hides it.
    """

    def __init__(self, config: SequentialConfig) -> None:
        super().__init__()
        width = config.embedding_dim
        self.positions = nn.Parameter(0.02 * torch.randn(config.max_length + 1, width))
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.Sequential(*(Block(width, config.heads, config.dropout) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, inputs: Tensor) -> Tensor:
        scaled = inputs * inputs.shape[-1] ** 0.5
        return self.norm(self.blocks(self.dropout(scaled + self.positions[: inputs.shape[1]])))


class Recurrent(nn.Module):
    """GRU4Rec (Hidasi et al., ICLR 2016): [B, T, E] -> [B, T, E]."""

    def __init__(self, config: SequentialConfig) -> None:
        super().__init__()
        width = config.embedding_dim
        self.dropout = Dropout(config.dropout)
        between = config.dropout if config.layers > 1 else 0.0
        self.gru = nn.GRU(width, 2 * width, config.layers, batch_first=True, dropout=between)
        self.output = nn.Linear(2 * width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        scaled = inputs * inputs.shape[-1] ** 0.5
        return self.output(self.dropout(self.gru(self.dropout(scaled))[0]))


class SequentialRecommender(nn.Module):
    """Hidden states whose products with the item vectors are the scores of the next item.

    A learned start stands before every sequence: what it predicts is the ranking of a user without history. A user's text is added to
    every hidden state, an item's text to its id vector; id vectors of items that nobody touched in training are left out, so that such
    items are ranked by their text, or, without texts, not at all.
    """

    warm: Tensor
    item_vectors: Tensor | None

    def __init__(self, model: Literal["sasrec", "gru4rec"], config: SequentialConfig, items: int, items_hash: str, text_dim: int) -> None:
        super().__init__()
        self.model, self.config, self.items_hash, self.text_dim = model, config, items_hash, text_dim
        width = config.embedding_dim
        self.ids = nn.Embedding(items + 1, width, padding_idx=0)
        nn.init.normal_(self.ids.weight, std=width**-0.5 / 2)
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.encoder = SelfAttention(config) if model == "sasrec" else Recurrent(config)
        self.item_side = TextSide(text_dim, width) if config.item_text else None
        self.user_side = TextSide(text_dim, width) if config.user_text else None
        self.register_buffer("warm", torch.ones(items + 1))

    @classmethod
    def made_for(
        cls, model: Literal["sasrec", "gru4rec"], config: SequentialConfig, data: SequenceData, item_vectors: Tensor | None, text_dim: int
    ) -> Self:
        """A model with fresh weights for the catalogue of `data`, bound to it."""
        made = cls(model, config, len(data.item_ids), catalogue_hash(data), text_dim)
        made.warm.copy_((data.popularity > 0).float())
        return made.bind(data, item_vectors)

    def bind(self, data: SequenceData, item_vectors: Tensor | None) -> Self:
        """Attaches the items' text vectors [I, D] in the order of `item_ids`; None without `item_text`.

        Raises:
            InputError: another catalogue than the weights', or vectors missing, not asked for or of another shape.
        """
        if catalogue_hash(data) != self.items_hash:
            raise InputError("recommender", "it was fitted on other items than these", "Fit it again on this data")
        if (item_vectors is not None) != self.config.item_text:
            given = "absent" if item_vectors is None else "given"
            raise InputError("sequential.item_text", f"it is {self.config.item_text} but item vectors are {given}", "Make them agree")
        if item_vectors is not None and item_vectors.shape != (len(data.item_ids), self.text_dim):
            expected = (len(data.item_ids), self.text_dim)
            raise InputError("item vectors", f"their shape is {tuple(item_vectors.shape)}, not {expected}", "Encode the items of this run")
        padded = None if item_vectors is None else torch.cat([item_vectors.new_zeros(1, self.text_dim), item_vectors])
        self.register_buffer("item_vectors", padded, persistent=False)
        return self

    def item_matrix(self) -> Tensor:
        """The vector of every item code [I+1, E]; row 0 is zero."""
        matrix = self.ids.weight if self.item_side is None else self.ids.weight * self.warm[:, None]
        if self.item_side is None or self.item_vectors is None:
            return matrix
        return matrix + self.item_side(self.item_vectors) * (torch.arange(len(matrix)) > 0)[:, None]

    def forward(self, matrix: Tensor, sequences: Tensor, user_vectors: Tensor | None) -> Tensor:
        """Hidden states [B, T+1, E]; that at position t predicts the item at t.

        Args:
            matrix: what `item_matrix` gave [I+1, E].
            sequences: item codes [B, T], padding after the end.
            user_vectors: text vectors [B, D]; None without `user_text`.
        """
        start = self.start.expand(len(sequences), 1, -1)
        hidden = self.encoder(torch.cat([start, F.embedding(sequences, matrix)], 1))
        if self.user_side is not None and user_vectors is not None:
            hidden = hidden + self.user_side(user_vectors)[:, None]
        return hidden

    def save(self, folder: Path) -> None:
        """Writes `recommender.json` and `model.safetensors`; text vectors are not saved."""
        made_of = {"model": self.model, "items": self.ids.num_embeddings - 1, "items_hash": self.items_hash, "text_dim": self.text_dim}
        with atomic(folder) as partial:
            write_json({"sequential": self.config.model_dump(), **made_of}, partial / "recommender.json")
            write_tensors(dict(self.state_dict()), partial / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> "SequentialRecommender":
        """Reads what `save` wrote, ready to `bind`, in evaluation mode. Raises `InputError` when a file is missing or damaged."""
        file = folder / "recommender.json"
        stored, weights = read_json(file), read_tensors(folder / "model.safetensors")
        try:
            config = SequentialConfig(**stored["sequential"])
            model = cls(stored["model"], config, stored["items"], stored["items_hash"], stored["text_dim"])
            model.load_state_dict(weights)
        except (ValidationError, KeyError, TypeError, RuntimeError) as error:
            raise corrupted(file, error) from error
        return model.eval()


def catalogue_hash(data: SequenceData) -> str:
    return hashlib.sha256("\x1f".join(data.item_ids).encode()).hexdigest()[:16]


class TextSide(nn.Module):
    """Text vectors [N, D] into the space of the items [N, E]; dropout keeps it from learning texts by heart."""

    def __init__(self, text_dim: int, width: int) -> None:
        super().__init__()
        self.standardise, self.dropout, self.project = Standardiser(text_dim), nn.Dropout(0.3), nn.Linear(text_dim, width)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.project(self.dropout(self.standardise(vectors)))
