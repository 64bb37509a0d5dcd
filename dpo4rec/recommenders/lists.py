"""The ranking data of a run as integer-coded tensors.

U users, I items, L lists of K candidates, histories of at most H items, at most G genres an item. Item code 0 is padding: item number i of
`item_ids` has code i + 1.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from dpo4rec.data.schema import codes_of
from dpo4rec.data.splits import SPLITS
from dpo4rec.errors import InputError
from dpo4rec.files import read_json, read_parquet


@dataclass(frozen=True)
class RankingData:
    """Frozen lists and everything about users and items that a re-ranker reads, texts aside."""

    user_ids: list[str]
    item_ids: list[str]
    genre_names: list[str]
    user_splits: Tensor  # [U] index into SPLITS
    genres: Tensor  # [I+1, genre names] weights that sum to 1 over an item's genres, 0 for an item without
    eras: Tensor  # [I+1] 0 = unknown, otherwise 1 + decades since the oldest item's
    popularity: Tensor  # [I+1] occurrences in the histories of training users
    histories: Tensor  # [U, H] item codes, oldest first, padded with 0 at the end
    history_ratings: Tensor  # [U, H] ratings in standard deviations from the mean rating of training users' histories, padding 0
    list_users: Tensor  # [L] user number
    candidates: Tensor  # [L, K] item codes
    labels: Tensor  # [L, K] float 0 or 1
    ranked: bool  # candidates stand in the order of a first-stage retriever, best first; otherwise their order says nothing

    @classmethod
    def load(cls, data_folder: Path) -> "RankingData":
        """Reads items, users, histories and lists of a run's data folder, and `ranked` of its `summary.json` (absent: false).

        Raises:
            InputError: a file is missing or damaged, is empty, or names an unknown user, item or split, lists differ in length, or `ranked`
                is not a boolean.
        """
        items, users = read_parquet(data_folder / "items.parquet"), read_parquet(data_folder / "users.parquet")
        user_ids, item_ids = users["user_id"].to_pylist(), items["item_id"].to_pylist()
        splits = _codes(users["split"], SPLITS, data_folder / "users.parquet", "split")
        genre_names, genres = _genres(items["genres"].to_pylist())
        histories, ratings = _histories(data_folder / "histories.parquet", user_ids, item_ids)
        in_training = histories[splits == SPLITS.index("train")]
        list_users, candidates, labels = _lists(data_folder / "lists.parquet", user_ids, item_ids)
        return cls(
            user_ids=user_ids,
            item_ids=item_ids,
            genre_names=genre_names,
            user_splits=splits,
            genres=genres,
            eras=_eras(items["year"].to_pylist()),
            popularity=torch.bincount(in_training[in_training > 0], minlength=len(item_ids) + 1),
            histories=histories,
            history_ratings=_standardised(ratings, histories > 0, splits == SPLITS.index("train")),
            list_users=list_users,
            candidates=candidates,
            labels=labels,
            ranked=_ranked(data_folder / "summary.json"),
        )

    def users_of(self, split: str) -> Tensor:
        """Mask [U] of the users of "train", "validation" or "test"."""
        return self.user_splits == SPLITS.index(split)

    def without(self, users: set[str]) -> "RankingData":
        """The same data where these users belong to no split."""
        kept = torch.tensor([user not in users for user in self.user_ids])
        return replace(self, user_splits=self.user_splits.where(kept, -1))

    def lists_of(self, users: Tensor) -> Tensor:
        """Numbers of the lists of the users in the mask [U], ascending."""
        return users[self.list_users].nonzero().squeeze(1)


def _codes(values: pa.ChunkedArray, known: list[str] | tuple[str, ...], file: Path, what: str) -> Tensor:
    """Position of each value in `known`, [values]."""
    codes = torch.from_numpy(codes_of(values, pa.array(known, pa.string())))
    if len(codes) and codes.min() < 0:
        row = int(codes.argmin())
        raise InputError(
            str(file), f"value {row + 1} of its {what}s is {values[row].as_py()!r}, which is unknown", "Prepare the data again"
        )
    return codes


def _genres(lists: list[list[str]]) -> tuple[list[str], Tensor]:
    names = sorted({name for genres in lists for name in genres})
    number = {name: position for position, name in enumerate(names)}
    weights = torch.zeros(len(lists) + 1, len(names))
    for row, genres in enumerate(lists, start=1):
        for name in genres:
            weights[row, number[name]] = 1 / len(genres)
    return names, weights


def _eras(years: list[int | None]) -> Tensor:
    oldest = min((year for year in years if year is not None), default=0) // 10
    return torch.tensor([0] + [0 if year is None else year // 10 - oldest + 1 for year in years])


def _histories(file: Path, user_ids: list[str], item_ids: list[str]) -> tuple[Tensor, Tensor]:
    """Item codes and raw ratings, both [U, H]."""
    table = read_parquet(file)
    users = _codes(table["user_id"], user_ids, file, "user_id")
    lengths = torch.tensor(pc.list_value_length(table["item_ids"]).to_numpy(), dtype=torch.long)
    present = torch.arange(max(lengths.tolist(), default=1)) < lengths[:, None]  # [rows, H]
    codes, ratings = torch.zeros(present.shape, dtype=torch.long), torch.zeros(present.shape)
    codes[present] = _codes(pc.list_flatten(table["item_ids"]), item_ids, file, "item_id") + 1
    ratings[present] = torch.tensor(pc.list_flatten(table["ratings"]).to_numpy(), dtype=torch.float32)
    shape = len(user_ids), present.shape[1]
    return codes.new_zeros(shape).index_copy(0, users, codes), ratings.new_zeros(shape).index_copy(0, users, ratings)


def rating_scale(known: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of ratings [N]; the latter infinite for implicit feedback, where one value says nothing."""
    if not len(known) or known.min() == known.max():
        return torch.zeros(()), torch.tensor(torch.inf)
    return known.mean(), known.std()


def _standardised(ratings: Tensor, present: Tensor, training: Tensor) -> Tensor:
    mean, deviation = rating_scale(ratings[training][present[training]])
    return ((ratings - mean) / deviation).masked_fill(~present, 0)


def _ranked(file: Path) -> bool:
    ranked = read_json(file).get("ranked", False) if file.exists() else False
    if not isinstance(ranked, bool):
        raise InputError(str(file), f"ranked is {ranked!r}", "Write true (candidates in the first stage's order) or false")
    return ranked


def _lists(file: Path, user_ids: list[str], item_ids: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    table = read_parquet(file).sort_by("list_id")
    lengths = pc.unique(
        pa.chunked_array([*pc.list_value_length(table["candidates"]).chunks, *pc.list_value_length(table["labels"]).chunks])
    )
    if len(lengths) != 1:
        raise InputError(str(file), f"lists and labels have lengths {lengths.to_pylist()}; one length is needed", "Prepare the data again")
    codes = _codes(pc.list_flatten(table["candidates"]), item_ids, file, "candidate") + 1
    labels = torch.tensor(pc.list_flatten(table["labels"]).to_numpy(), dtype=torch.float32)
    users, length = _codes(table["user_id"], user_ids, file, "user_id"), lengths[0].as_py()
    return users, codes.view(-1, length), labels.view(-1, length)
