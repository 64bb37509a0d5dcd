"""The ranking data of a run as integer-coded tensors.

U users, I items, L lists of K candidates, histories of at most H items, at most G genres an item. Item code 0 is padding: item number i of
`item_ids` has code i + 1.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from dpo4rec.data.schema import codes_of
from dpo4rec.data.splits import SPLITS
from dpo4rec.data.user_rows import UserRows, of_split
from dpo4rec.errors import InputError
from dpo4rec.files import batches, read_json, read_parquet


@dataclass(frozen=True)
class RankingData:
    """Frozen lists and everything about users and items that a re-ranker reads, texts aside."""

    user_ids: list[str]
    item_ids: list[str]
    genre_names: list[str]
    user_splits: Tensor  # [U] index into SPLITS
    genres: Tensor  # [I+1, genre names] weights that sum to 1 over an item's genres, 0 for an item without
    eras: Tensor  # [I+1] 0 = unknown, otherwise 1 + decades since the oldest item's
    popularity: Tensor  # [I+1] occurrences in these histories of training users
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
        return RankingFiles(data_folder).read()

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


class RankingFiles:
    """A run's data folder: what is said of items is read once, users and their lists as they are asked for.

    Args:
        data_folder: see `RankingData.load`.
        histories: whether histories are read; without them those of every user are empty.

    Raises:
        InputError: see `RankingData.load`.
    """

    def __init__(self, data_folder: Path, histories: bool = True) -> None:
        items = read_parquet(data_folder / "items.parquet")
        self.folder, self.item_ids = data_folder, items["item_id"].to_pylist()
        self.items = pa.array(self.item_ids, pa.string())
        self.genre_names, self.genres = _genres(items["genres"].to_pylist())
        self.eras, self.ranked = _eras(items["year"].to_pylist()), _ranked(data_folder / "summary.json")
        self.list_length = _list_length(data_folder / "lists.parquet")
        self.files = {name: UserRows(data_folder / f"{name}.parquet") for name in ("users", "histories", "lists")}
        ratings, self.longest_history = self._scan() if histories else (torch.zeros(0), 0)
        self.rating_scale = rating_scale(ratings)
        """Mean and standard deviation, of the histories of all training users."""

    def _scan(self) -> tuple[Tensor, int]:
        """Ratings of the training users' histories, in the order of the file, and the length of the longest of all histories."""
        ratings, longest = [torch.zeros(0)], 1
        for part in batches(self.folder / "histories.parquet", ["user_id", "ratings"]):
            of_training = pc.list_flatten(of_split(part, self.files["users"], "train")["ratings"])
            ratings.append(torch.tensor(of_training.to_numpy(), dtype=torch.float32))
            longest = max(longest, pc.max(pc.list_value_length(part["ratings"])).as_py() or 0)
        return torch.cat(ratings), longest

    def read(self, user_ids: Collection[str] | None = None) -> RankingData:
        """The data of all users or of these, in the order of the file; ratings are scaled by those of all training users.

        Raises:
            InputError: see `RankingData.load`.
        """
        users = self._rows("users", user_ids)
        known = users["user_id"].combine_chunks()
        splits = known_codes(users["split"], pa.array(SPLITS), self.folder / "users.parquet", "split")
        histories, ratings = self._histories(known, user_ids)
        in_training = histories[splits == SPLITS.index("train")]
        list_users, candidates, labels = self._lists(known, user_ids)
        mean, deviation = self.rating_scale
        return RankingData(
            user_ids=known.to_pylist(),
            item_ids=self.item_ids,
            genre_names=self.genre_names,
            user_splits=splits,
            genres=self.genres,
            eras=self.eras,
            popularity=torch.bincount(in_training[in_training > 0], minlength=len(self.item_ids) + 1),
            histories=histories,
            history_ratings=((ratings - mean) / deviation).masked_fill(histories == 0, 0),
            list_users=list_users,
            candidates=candidates,
            labels=labels,
            ranked=self.ranked,
        )

    def _rows(self, name: str, user_ids: Collection[str] | None) -> pa.Table:
        return read_parquet(self.folder / f"{name}.parquet") if user_ids is None else self.files[name].read(user_ids)

    def _histories(self, users: pa.Array, user_ids: Collection[str] | None) -> tuple[Tensor, Tensor]:
        """Item codes and raw ratings, both [U, H]."""
        shape, file = (len(users), self.longest_history), self.folder / "histories.parquet"
        if not self.longest_history:
            return torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        table = self._rows("histories", user_ids)
        rows = known_codes(table["user_id"], users, file, "user_id")
        lengths = torch.tensor(pc.list_value_length(table["item_ids"]).to_numpy(), dtype=torch.long)
        present = torch.arange(self.longest_history) < lengths[:, None]  # [rows, H]
        codes, ratings = torch.zeros(present.shape, dtype=torch.long), torch.zeros(present.shape)
        codes[present] = known_codes(pc.list_flatten(table["item_ids"]), self.items, file, "item_id") + 1
        ratings[present] = torch.tensor(pc.list_flatten(table["ratings"]).to_numpy(), dtype=torch.float32)
        return codes.new_zeros(shape).index_copy(0, rows, codes), ratings.new_zeros(shape).index_copy(0, rows, ratings)

    def _lists(self, users: pa.Array, user_ids: Collection[str] | None) -> tuple[Tensor, Tensor, Tensor]:
        table, file, length = self._rows("lists", user_ids).sort_by("list_id"), self.folder / "lists.parquet", self.list_length
        lengths = {length, *(of for name in ("candidates", "labels") for of in pc.unique(pc.list_value_length(table[name])).to_pylist())}
        if lengths != {length}:
            raise _unequal(file, lengths)
        codes = known_codes(pc.list_flatten(table["candidates"]), self.items, file, "candidate") + 1
        labels = torch.tensor(pc.list_flatten(table["labels"]).to_numpy(), dtype=torch.float32)
        return known_codes(table["user_id"], users, file, "user_id"), codes.view(-1, length), labels.view(-1, length)


def known_codes(values: pa.ChunkedArray, known: pa.Array | pa.ChunkedArray, file: Path, what: str) -> Tensor:
    """Position of each value in `known`, [values]. Raises `InputError` for one that is not there; `what` names the column of the file."""
    codes = torch.from_numpy(codes_of(values, known))
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


def rating_scale(known: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of ratings [N]; the latter infinite for implicit feedback, where one value says nothing."""
    if not len(known) or known.min() == known.max():
        return torch.zeros(()), torch.tensor(torch.inf)
    return known.mean(), known.std()


def _ranked(file: Path) -> bool:
    ranked = read_json(file).get("ranked", False) if file.exists() else False
    if not isinstance(ranked, bool):
        raise InputError(str(file), f"ranked is {ranked!r}", "Write true (candidates in the first stage's order) or false")
    return ranked


def _list_length(file: Path) -> int:
    """Of the first list, as all have to be."""
    first = next(batches(file, ["candidates"], 1), None)
    if first is None:
        raise _unequal(file, set())
    return len(first["candidates"][0])


def _unequal(file: Path, lengths: set[int]) -> InputError:
    return InputError(str(file), f"lists and labels have lengths {sorted(lengths)}; one length is needed", "Prepare the data again")
