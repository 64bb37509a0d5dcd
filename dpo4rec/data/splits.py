"""Users in time order, their histories and their split."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec.data.schema import Tables, codes_of
from dpo4rec.files import stable_seed

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Log:
    """Interactions by user, then time; user u owns rows starts[u] to starts[u + 1].

    Args:
        users: ids, sorted [U].
        items: ids, in the order of the source [I].
        item_codes, ratings, timestamps: one a row [N]; codes are positions in `items`.
        starts: first row of each user, and N at the end [U + 1].
    """

    users: pa.Array
    items: pa.Array
    item_codes: np.ndarray
    ratings: np.ndarray
    timestamps: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, tables: Tables) -> Self:
        """Orders validated tables; interactions of the same second keep the order of the source."""
        ids = tables.users["user_id"].combine_chunks()
        users = ids.take(pc.sort_indices(ids))
        items = tables.items["item_id"].combine_chunks()
        log = tables.interactions
        owner, item = codes_of(log["user_id"], users), codes_of(log["item_id"], items)
        times = log["timestamp"].to_numpy()
        order = np.lexsort((times, owner))  # stable
        starts = np.searchsorted(owner[order], np.arange(len(users) + 1))
        return cls(users, items, item[order], log["rating"].to_numpy()[order], times[order], starts)

    @property
    def counts(self) -> np.ndarray:
        """Interactions of each user [U]."""
        return np.diff(self.starts)

    def owners(self) -> np.ndarray:
        """The user code of each row [N]."""
        return np.repeat(np.arange(len(self.users)), self.counts)

    def keep(self, users: np.ndarray) -> Self:
        """The log of the users whose codes (ascending) are given."""
        rows = np.isin(self.owners(), users)
        starts = np.concatenate([[0], np.cumsum(self.counts[users])])
        return type(self)(
            self.users.take(pa.array(users)), self.items, self.item_codes[rows], self.ratings[rows], self.timestamps[rows], starts
        )

    def history_lengths(self, longest: int) -> np.ndarray:
        """min(floor((n + 1) / 2), longest) of each user [U]: the part that a text may see (KAR, arXiv 2306.10933)."""
        return np.minimum((self.counts + 1) // 2, longest)

    def history_rows(self, longest: int) -> np.ndarray:
        """Mask of the rows that belong to a history [N]."""
        position = np.arange(len(self.item_codes)) - np.repeat(self.starts[:-1], self.counts)
        return position < np.repeat(self.history_lengths(longest), self.counts)


def sample_users(users: np.ndarray, most: int | None, seed: int) -> np.ndarray:
    """At most `most` of the user codes, in ascending order."""
    if most is None or most >= len(users):
        return users
    return np.sort(np.random.default_rng(stable_seed(seed, "users")).permutation(users)[:most])


def split_users(count: int, validation_share: float, test_share: float, seed: int) -> np.ndarray:
    """The position in `SPLITS` of each of `count` users [U]; shares are rounded, but never to nobody."""
    validation, test = (max(1, round(count * share)) for share in (validation_share, test_share))
    splits = np.zeros(count, dtype=np.int64)
    order = np.random.default_rng(stable_seed(seed, "splits")).permutation(count)
    splits[order[:validation]] = SPLITS.index("validation")
    splits[order[validation : validation + test]] = SPLITS.index("test")
    return splits
