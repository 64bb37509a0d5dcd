"""The sequences of a run as integer-coded tensors.

U users, I items, N interactions. Item code 0 is padding: item number i of `item_ids` has code i + 1.
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import torch
from torch import Tensor

from dpo4rec.files import corrupted, read_json, read_parquet
from dpo4rec.recommenders.lists import known_codes


@dataclass(frozen=True)
class SequenceData:
    """Every user's items in time order, cut into training, validation and test."""

    user_ids: list[str]
    item_ids: list[str]
    codes: Tensor  # [N] int32, user by user
    starts: Tensor  # [U+1] first row of each user
    train_ends: Tensor  # [U] row after the training part
    validation_ends: Tensor  # [U] row after the validation part
    candidates_hash: str

    @classmethod
    def load(cls, folder: Path) -> "SequenceData":
        """Reads what `prepare_sequences` wrote. Raises `InputError` when a file is missing or damaged or names an unknown item."""
        table = read_parquet(folder / "sequences.parquet")
        items = read_parquet(folder / "items.parquet", ["item_id"])["item_id"]
        lengths = torch.tensor(pc.list_value_length(table["item_ids"]).to_numpy(), dtype=torch.long)
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        train = torch.tensor(table["train_length"].to_numpy(), dtype=torch.long)
        validation = torch.tensor(table["validation_length"].to_numpy(), dtype=torch.long)
        codes = known_codes(pc.list_flatten(table["item_ids"]), items, folder / "sequences.parquet", "item_id").int() + 1
        ends = starts[:-1] + train
        summary = read_json(folder / "summary.json")
        if "candidates_hash" not in summary:
            raise corrupted(folder / "summary.json", KeyError("candidates_hash"))
        return cls(table["user_id"].to_pylist(), items.to_pylist(), codes, starts, ends, ends + validation, summary["candidates_hash"])

    def windows(self, users: Tensor, ends: Tensor, length: int) -> Tensor:
        """The last `length` item codes before row `ends` [B] of each of the users [B], [B, T], 0 after the end; T as short as it may be.

        >>> SequenceData(["a", "b"], list("xyz"), torch.tensor([1, 2, 3, 3]), torch.tensor([0, 3, 4]), None, None, "").windows(
        ...     torch.tensor([0, 1]), torch.tensor([3, 4]), 2
        ... )
        tensor([[2, 3],
                [3, 0]])
        """
        first = torch.maximum(self.starts[users], ends - length)
        sizes = ends - first
        steps = torch.arange(int(sizes.max()) if len(sizes) else 0)
        rows = (first[:, None] + steps).clamp(max=len(self.codes) - 1)
        return torch.where(steps < sizes[:, None], self.codes[rows].long(), 0)

    def target_range(self, split: str) -> tuple[Tensor, Tensor]:
        """First row of each user's targets and the row after the last, both [U], of "validation" or "test"."""
        return (self.train_ends, self.validation_ends) if split == "validation" else (self.validation_ends, self.starts[1:])

    @property
    def popularity(self) -> Tensor:
        """Occurrences of each item code in the training parts [I+1]."""
        rows = torch.arange(len(self.codes))
        owners = torch.repeat_interleave(torch.arange(len(self.user_ids)), self.starts.diff())
        return torch.bincount(self.codes[rows < self.train_ends[owners]], minlength=len(self.item_ids) + 1)
