"""The fitter of models of the next item: a worker that fits one a unit."""

from pathlib import Path
from typing import Literal

import pyarrow as pa
from torch import Tensor

from dpo4rec import files
from dpo4rec.recommenders.fit_sequential import SELECTION_METRIC, SequentialFit
from dpo4rec.recommenders.fitter import user_vectors_of
from dpo4rec.recommenders.sequences import SequenceData
from dpo4rec.recommenders.sequential import SequentialConfig
from dpo4rec.settings import Settings


class SequentialJob(Settings):
    """One model to fit; it is written to `out`, its state while it is fitted to `<out>.state`."""

    out: str
    model: Literal["sasrec", "gru4rec"]
    config: SequentialConfig
    seed: int


class SequentialFitterConfig(Settings):
    """What all jobs share: the folders of sequences and text vectors (None: no texts)."""

    sequences: str
    texts: str | None = None


class SequentialFitter:
    """Worker: table with a `job` column (JSON of `SequentialJob`) in; out, chosen_epoch, validation_ndcg, epochs and seconds out."""

    def __init__(self, config: SequentialFitterConfig) -> None:
        self.data = SequenceData.load(Path(config.sequences))
        self.texts = None if config.texts is None else Path(config.texts)

    def __call__(self, unit: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._fit(SequentialJob.model_validate_json(job)) for job in unit["job"].to_pylist()])

    def _fit(self, job: SequentialJob) -> dict[str, str | int | float]:
        state = Path(f"{job.out}.state")
        fit = SequentialFit(job.model, job.config, self.data, *text_vectors(self.texts, job.config, self.data.user_ids), job.seed, state)
        model, report = fit.run()
        with files.atomic(Path(job.out)) as partial:
            model.save(partial)
            files.write_json(report, partial / "history.json")
        files.remove(state)
        chosen = report["chosen_epoch"]
        return {
            "out": Path(job.out).name,
            "chosen_epoch": chosen,
            "validation_ndcg": report["history"][chosen - 1][SELECTION_METRIC],
            "epochs": len(report["history"]),
            "seconds": report["seconds"],
        }


def text_vectors(folder: Path | None, config: SequentialConfig, user_ids: list[str]) -> tuple[Tensor | None, Tensor | None]:
    """Item vectors [I, D] and user vectors [U, S, D], each None where the configuration reads none."""
    items = files.read_tensors(folder / "item_vectors.safetensors")["item_vectors"] if folder and config.item_text else None
    users = user_vectors_of([folder / "users"], user_ids) if folder and config.user_text else None
    return items, users
