"""The recommender's feedback on texts: how well does it rank the user's lists when it is given this text?"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dpo4rec.evaluation.metrics import average_precision, log_likelihood, ndcg
from dpo4rec.files import matrix, read_tensors
from dpo4rec.preference.config import RewardConfig
from dpo4rec.recommenders.lists import RankingData
from dpo4rec.recommenders.model import Reranker
from dpo4rec.recommenders.scoring import logits_of
from dpo4rec.settings import Settings


class ScorerConfig(Settings):
    """What a scorer reads: the data folder, the item vectors, and for each fold the recommenders that have not seen its users."""

    reward: RewardConfig
    data: str
    item_vectors: str
    recommenders: list[list[str]]
    """`recommenders[fold]`: folders, one a seed."""
    user_folds: dict[str, int]


class Scorer:
    """Worker: table with user_id, sample, vector in (all samples of a user in one unit); SCORES columns out.

    `reward` is the mean of the raw reward over the seeds; `standardised` the mean of the per-user z-scores, one z-score a seed.
    """

    def __init__(self, config: ScorerConfig) -> None:
        self.config = config
        self.data = RankingData.load(Path(config.data))
        item_vectors = read_tensors(Path(config.item_vectors))["item_vectors"]
        self.models = [[Reranker.load(Path(folder)).bind(self.data, item_vectors) for folder in fold] for fold in config.recommenders]
        self.codes = {user: index for index, user in enumerate(self.data.user_ids)}
        owners = self.data.list_users.numpy()
        self.by_owner = np.argsort(owners, kind="stable")  # the numbers of the lists, those of a user one after the other
        self.starts = np.searchsorted(owners[self.by_owner], np.arange(len(self.codes) + 1))

    def __call__(self, unit: pa.Table) -> pa.Table:
        users, vectors = unit["user_id"].to_pylist(), matrix(unit["vector"])
        folds = np.array([self.config.user_folds[user] for user in users])
        raw = torch.empty(len(users), self.config.reward.seeds)
        for fold, models in enumerate(self.models):
            rows = np.flatnonzero(folds == fold)
            if len(rows):
                raw[rows] = torch.stack([self._rewards(model, [users[r] for r in rows], vectors[rows]) for model in models], 1)
        _, groups = np.unique(np.array(users), return_inverse=True)
        table = unit.select(["user_id", "sample"])
        table = table.append_column("reward", pa.array(raw.mean(1).numpy()))
        return table.append_column("standardised", pa.array(standardise(raw, torch.from_numpy(groups)).mean(1).numpy()))

    def _rewards(self, model: Reranker, users: list[str], vectors: Tensor) -> Tensor:
        """Mean over each row's user's lists, [rows]."""
        codes = [self.codes[user] for user in users]
        lists = [self.by_owner[self.starts[code] : self.starts[code + 1]] for code in codes]
        row = torch.from_numpy(np.repeat(np.arange(len(users)), [len(of) for of in lists]))
        index = torch.from_numpy(np.concatenate(lists))
        logits = logits_of(model, self.data, index, vectors[row])
        values = reward_of(self.config.reward, logits, self.data.labels[index])
        good = ~values.isnan()  # a list without positives has no NDCG
        total = torch.zeros(len(users)).index_add_(0, row[good], values[good])
        return total / torch.bincount(row[good], minlength=len(users)).clamp(min=1)


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


def fold_users(users: list[str], folds: int, seed: int) -> dict[str, int]:
    """Assigns users to folds at random, sizes equal within one."""
    order = np.random.default_rng(seed).permutation(len(users))
    return {users[user]: position % folds for position, user in enumerate(order)}
