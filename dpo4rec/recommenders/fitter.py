"""The fitter: a worker that fits one recommender a unit, so that seeds and folds are fitted side by side."""

from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from dpo4rec import files
from dpo4rec.data.schema import codes_of
from dpo4rec.recommenders.config import RecommenderConfig
from dpo4rec.recommenders.fit import fit
from dpo4rec.recommenders.lists import RankingFiles
from dpo4rec.settings import Settings


class FitJob(Settings):
    """One recommender to fit.

    `held_out` is the fold whose users it must not see (None: it sees all training users); `texts` are folders of user text vectors,
    whose samples are joined. The recommender is written to `out`.
    """

    out: str
    recommender: RecommenderConfig
    seed: int
    held_out: int | None = None
    texts: list[str] = []


class FitterConfig(Settings):
    """What all jobs share: the data folder, the item vectors (None: no job reads item text), and the table of folds.

    Of that table (user_id, fold, fits) come the folds that jobs hold out, and whose data are read at all; None: no job holds out any, and
    all data are read. Users in `left_out` have no texts, since sampling or encoding failed on them: they take no part.
    """

    data: str
    item_vectors: str | None
    folds: str | None = None
    left_out: list[str] = []


def job_unit(name: str, job: FitJob) -> tuple[str, pa.Table]:
    return name, pa.table({"job": [job.model_dump_json()]})


class Fitter:
    """Worker: table with a `job` column (JSON of `FitJob`) in; out, chosen_epoch, validation_ndcg and seconds of each out."""

    def __init__(self, config: FitterConfig) -> None:
        self.config = config
        table = files.read_parquet(Path(config.folds)) if config.folds else pa.table({})
        users = table.filter(table["fits"])["user_id"].to_pylist() if config.folds else None
        self.data = RankingFiles(Path(config.data)).read(users).without(set(config.left_out))
        self.folds = torch.full((len(self.data.user_ids),), -1)
        if config.folds:
            self.folds = torch.from_numpy(table["fold"].to_numpy()[codes_of(pa.array(self.data.user_ids), table["user_id"])])
        self.item_vectors = files.read_tensors(Path(config.item_vectors))["item_vectors"] if config.item_vectors else None

    def __call__(self, unit: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._fit(FitJob.model_validate_json(job)) for job in unit["job"].to_pylist()])

    def _fit(self, job: FitJob) -> dict[str, str | int | float]:
        recommender = job.recommender
        user_vectors = user_vectors_of([Path(folder) for folder in job.texts], self.data.user_ids) if recommender.reads_user_text else None
        train = self.data.users_of("train")
        if job.held_out is not None:
            train = train & (self.folds != job.held_out)
        item_vectors = self.item_vectors if recommender.item_text else None
        model, report = fit(recommender, self.data, item_vectors, user_vectors, train, self.data.users_of("validation"), job.seed)
        with files.atomic(Path(job.out)) as partial:
            model.save(partial)
        return {
            "out": Path(job.out).name,
            "chosen_epoch": report.chosen_epoch,
            "validation_ndcg": max(report.validation_ndcg),
            "seconds": report.seconds,
        }


def user_vectors_of(folders: list[Path], user_ids: list[str]) -> Tensor:
    """Text vectors [U, S, D] of all samples in the folders (tables user_id, sample, vector); NaN for users without texts."""
    parts = []
    number = {user: index for index, user in enumerate(user_ids)}
    for folder in folders:
        table = files.read_parquet(folder, ["user_id", "sample", "vector"])
        rows = files.matrix(table["vector"])
        samples = table["sample"].to_numpy()
        users = torch.tensor([number[user] for user in table["user_id"].to_pylist()])
        vectors = torch.full((len(user_ids), int(samples.max()) + 1, rows.shape[1]), float("nan"))
        vectors[users, torch.from_numpy(samples.copy()).long()] = rows
        parts.append(vectors)
    return torch.cat(parts, 1)
