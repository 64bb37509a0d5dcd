"""The recommender's feedback on texts: how well does it rank the user's lists when it is given this text?"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dpo4rec.data.schema import codes_of
from dpo4rec.data.user_rows import UserRows
from dpo4rec.evaluation.metrics import average_precision, log_likelihood, ndcg
from dpo4rec.files import matrix, read_tensors
from dpo4rec.preference.config import RewardConfig
from dpo4rec.recommenders.lists import RankingData, RankingFiles
from dpo4rec.recommenders.model import Reranker
from dpo4rec.recommenders.scoring import logits_of
from dpo4rec.settings import Settings


class ScorerConfig(Settings):
    """What a scorer reads: the data folder, the item vectors, and for each fold the recommenders that have not seen its users.

    `folds` is a table user_id, fold; a user without one (-1) is not scored.
    """

    reward: RewardConfig
    data: str
    item_vectors: str
    recommenders: list[list[str]]
    """`recommenders[fold]`: folders, one a seed."""
    folds: str


class Scorer:
    """Worker: table with user_id, sample, vector in (all samples of a user in one unit); user_id, sample, reward, standardised out.

    `reward` is the mean of the raw reward over the seeds; `standardised` the mean of the per-user z-scores, one z-score a seed. Of the
    users' data those of the unit are read.
    """

    def __init__(self, config: ScorerConfig) -> None:
        self.config = config
        models = [[Reranker.load(Path(folder)) for folder in fold] for fold in config.recommenders]
        self.files = RankingFiles(Path(config.data), histories=any(model.config.reads_history for fold in models for model in fold))
        self.folds = UserRows(Path(config.folds))
        nobody, item_vectors = self.files.read([]), read_tensors(Path(config.item_vectors))["item_vectors"]
        self.models = [[model.bind(nobody, item_vectors) for model in fold] for fold in models]

    def __call__(self, unit: pa.Table) -> pa.Table:
        folds = self.folds.read(unit["user_id"].to_pylist(), ["user_id", "fold"])
        fold_of = folds["fold"].to_numpy()[_known(unit["user_id"], folds["user_id"])]
        unit, fold_of = unit.filter(pa.array(fold_of >= 0)), fold_of[fold_of >= 0]
        if not len(unit):  # all of its users choose the epoch
            nothing = pa.array([], pa.float32())
            return unit.select(["user_id", "sample"]).append_column("reward", nothing).append_column("standardised", nothing)
        users, vectors = UserLists(self.files.read(unit["user_id"].to_pylist()), unit["user_id"]), matrix(unit["vector"])
        raw = torch.empty(len(unit), self.config.reward.seeds)
        for fold, models in enumerate(self.models):
            rows = np.flatnonzero(fold_of == fold)
            if len(rows):
                raw[rows] = torch.stack([self._rewards(model, users, rows, vectors[rows]) for model in models], 1)
        table = unit.select(["user_id", "sample"])
        table = table.append_column("reward", pa.array(raw.mean(1).numpy()))
        return table.append_column("standardised", pa.array(standardise(raw, torch.from_numpy(users.codes)).mean(1).numpy()))

    def _rewards(self, model: Reranker, users: "UserLists", rows: np.ndarray, vectors: Tensor) -> Tensor:
        """Mean over each row's user's lists, [rows]."""
        row, index = users.lists_of(rows)
        model.turn_to(users.data)
        logits = logits_of(model, users.data, index, vectors[row])
        values = reward_of(self.config.reward, logits, users.data.labels[index])
        good = ~values.isnan()  # a list without positives has no NDCG
        total = torch.zeros(len(rows)).index_add_(0, row[good], values[good])
        return total / torch.bincount(row[good], minlength=len(rows)).clamp(min=1)


class UserLists:
    """The lists of the users that rows are of.

    Args:
        data: of the users of all rows.
        row_users: user_id of each row.
    """

    def __init__(self, data: RankingData, row_users: pa.ChunkedArray) -> None:
        self.data, self.codes = data, _known(row_users, pa.array(data.user_ids, pa.string()))
        owners = data.list_users.numpy()
        self.by_owner = np.argsort(owners, kind="stable")  # the numbers of the lists, those of a user one after the other
        self.starts = np.searchsorted(owners[self.by_owner], np.arange(len(data.user_ids) + 1))

    def lists_of(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """All pairs of one of the rows and a list of its user: positions in `rows`, and numbers of lists."""
        lists = [self.by_owner[self.starts[code] : self.starts[code + 1]] for code in self.codes[rows]]
        return torch.from_numpy(np.repeat(np.arange(len(rows)), [len(of) for of in lists])), torch.from_numpy(np.concatenate(lists))


def _known(users: pa.ChunkedArray, known: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The position of each user in `known`. Raises `ValueError` when one is not there."""
    codes = codes_of(users, known)
    if len(codes) and codes.min() < 0:
        raise ValueError(f"user {users[int(codes.argmin())].as_py()!r} is not in the run's data")
    return codes


def reward_of(config: RewardConfig, logits: Tensor, labels: Tensor) -> Tensor:
    """The reward of each list [M] from logits and labels [M, K]."""
    if config.kind == "log_likelihood":
        return log_likelihood(logits, labels)
    return (ndcg if config.kind == "ndcg" else average_precision)(logits, labels, config.k)


def standardise(raw: Tensor, groups: Tensor) -> Tensor:
    """z-scores of `raw` [rows, seeds] within each group (user); 0 where a user's rewards are all the same."""
    count = torch.bincount(groups).clamp(min=1)[:, None].float()
    mean = torch.zeros(len(count), raw.shape[1]).index_add_(0, groups, raw) / count
    centred = raw - mean[groups]
    deviation = (torch.zeros_like(mean).index_add_(0, groups, centred**2) / count).sqrt()
    return torch.where(deviation[groups] > 1e-9, centred / deviation[groups].clamp(min=1e-9), 0.0)
