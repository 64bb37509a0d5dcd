"""Measures every fit of a run folder under its protocol, beside the protocol's controls, and exports the rankings.

Values are averaged over seeds and texts, then over a user's lists, then over users.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from dpo4rec import files
from dpo4rec.evaluation.beyond_accuracy import beyond_accuracy
from dpo4rec.evaluation.metrics import accuracy, per_user
from dpo4rec.evaluation.significance import correct, paired_bootstrap, wilcoxon
from dpo4rec.files import stable_seed
from dpo4rec.fits import PROTOCOLS, FitFolder, Protocol
from dpo4rec.knowledge.encoders import EncoderWorkerConfig
from dpo4rec.knowledge.user_texts import encode_texts
from dpo4rec.ranking import DEPTH, Catalogue, Lists, Ranking, write_judgements, write_ranking
from dpo4rec.recommend import Recommenders
from dpo4rec.stages import Report

BEYOND_CUTOFFS = (10,)
COMPARED = "ndcg@10"


class Measurement:
    """Of the finished fits of a run folder; `unfinished` are those that must be fitted (again) before they can be measured."""

    def __init__(self, recommenders: Recommenders) -> None:
        self.recommenders, self.run = recommenders, recommenders.run
        self.folder = self.run.folder / "evaluation"
        self.fits, self.unfinished = recommenders.fits()

    def protocols(self) -> dict[Protocol, list[FitFolder]]:
        """The finished fits by protocol, in the order of `PROTOCOLS`."""
        found = {protocol: [fit for fit in self.fits if fit.options.protocol == protocol] for protocol in PROTOCOLS}
        return {protocol: of for protocol, of in found.items() if of}

    def measure(self, protocol: Protocol, fits: list[FitFolder]) -> Report:
        """One protocol: `evaluation/<protocol>/` with `summary.json`, `per_user.parquet`, `qrels` and a TREC run of each condition's first
        seed. Returns the content of `summary.json`: metrics by condition, and each fit against the first control.
        """
        data, out = self.recommenders.data_of(protocol), self.folder / protocol
        vectors = self._item_vectors(protocol)

        def work() -> Report:
            more = self.run.config.evaluation.more_cutoffs
            source = Catalogue(data, max([DEPTH, *more])) if protocol == "catalogue" else Lists(data)
            cutoffs, beyond = (self.run.config.evaluation.cutoffs(usual) for usual in (source.cutoffs, BEYOND_CUTOFFS))
            item_vectors = files.read_tensors(vectors / "item_vectors.safetensors")["item_vectors"]
            padded = torch.cat([item_vectors.new_zeros(1, item_vectors.shape[1]), item_vectors])
            conditions: list[tuple[str, Iterable[Ranking]]] = [(name, [ranking]) for name, ranking in source.controls()]
            controls = [name for name, _ in conditions]
            conditions += [(fit.options.name, source.rankings(fit)) for fit in fits]
            values, means, deviations = {}, {}, {}
            for name, rankings in conditions:
                exported = self._exported(name, source, rankings, protocol)
                values[name], means[name], deviations[name] = _values(source, exported, padded, cutoffs, beyond)
            write_judgements(source, out)
            self._write_per_user(values, source, protocol)
            report = {
                "candidates_hash": source.hash,
                "controls": controls,
                "users": len(set(source.users.tolist())),
                "seeds": {fit.options.name: len(fit.seeds()) for fit in fits},
                "metrics": means,
                "deviations": deviations,
                "comparisons": self._comparisons(values),
                **_cold(files.read_json(data / "summary.json")),
            }
            files.write_json(report, out / "summary.json")
            return {"file": f"evaluation/{protocol}/summary.json"}

        settings = {"fits": [fit.options for fit in fits], "evaluation": self.run.config.evaluation}
        inputs = [data, vectors, *(fit.path / "models" for fit in fits)]
        self.run.stage(f"evaluation/{protocol}", settings, inputs, [out], work)
        return files.read_json(out / "summary.json")

    def _item_vectors(self, protocol: Protocol) -> Any:
        """Folder of the vectors of the items' texts, for diversity; the same for all fits."""
        items, out = self.recommenders.data_of(protocol) / "items.parquet", self.folder / f"{protocol}-items"
        encoder = EncoderWorkerConfig(
            encoder=self.run.config.encoder, folder=str(out), language_model=self.run.config.llm, source=self.run.policy(0).source
        )
        self.run.stage(
            f"evaluation/{protocol}-items",
            self.run.config.encoder,
            [items],
            [out],
            lambda: encode_texts(encoder, files.read_parquet(items), None, []),
        )
        return out

    def _exported(self, name: str, source: Catalogue | Lists, rankings: Iterable[Ranking], protocol: Protocol) -> Iterator[Ranking]:
        """Passes the rankings on; the first also goes to a TREC run."""
        for number, ranking in enumerate(rankings):
            if number == 0:
                write_ranking(source, name, ranking, self.folder / protocol)
            yield ranking

    def _comparisons(self, values: dict[str, dict[str, Tensor]]) -> list[Report]:
        """Every fit against the first control, NDCG@10, p-values corrected over the table (Holm)."""
        (control, base), *others = values.items()
        seed, samples = stable_seed(self.run.config.seed, "bootstrap"), self.run.config.evaluation.bootstrap_samples
        rows: list[Report] = []
        for name, of in others:
            pair = of[COMPARED], base[COMPARED]
            found = {**vars(paired_bootstrap(*pair, seed, samples)), "wilcoxon_p_value": wilcoxon(*pair)}
            rows.append({"a": name, "b": control, "metric": COMPARED, **found})
        correct(rows, "p_value", "wilcoxon_p_value")
        return rows

    def _write_per_user(self, values: dict[str, dict[str, Tensor]], source: Catalogue | Lists, protocol: Protocol) -> None:
        ids = source.data.user_ids
        tables = []
        for name, of in values.items():
            known = ~of[COMPARED].isnan()
            users = [user for user, there in zip(ids, known.tolist(), strict=True) if there]
            columns = {metric: value[known].numpy() for metric, value in of.items()}
            tables.append(pa.table({"user_id": users, "condition": [name] * len(users), **columns}))
        files.write_parquet(pa.concat_tables(tables), self.folder / protocol / "per_user.parquet")


def _values(
    source: Catalogue | Lists, rankings: Iterable[Ranking], item_vectors: Tensor, cutoffs: list[int], beyond: list[int]
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, float]]:
    """Per-user values [U] of every metric, accuracy at `cutoffs` and the others at `beyond`; their means over users, with the metrics of
    all lists at once; and the standard deviations over seeds (and texts) of those means, of a single seed none.
    """
    totals: dict[str, list[Tensor]] = {}
    together: dict[str, list[float]] = {}
    for ranking in rankings:
        found = accuracy(ranking.hits, source.relevant, cutoffs)
        lists, whole = beyond_accuracy(ranking.items, source.popularity, source.histories, item_vectors, beyond, source.learners)
        for name, value in (found | lists).items():
            totals.setdefault(name, []).append(value)
        for name, of_all in whole.items():
            together.setdefault(name, []).append(of_all)
    users = len(source.data.user_ids)
    values = {name: per_user(torch.stack(of).mean(0), source.users, users) for name, of in totals.items()}
    means = {name: float(value.nanmean()) for name, value in values.items()}
    deviations = {name: _deviation(of, source.users, users) for name, of in totals.items() if len(of) > 1}
    return values, means | {name: sum(of) / len(of) for name, of in together.items()}, deviations


def _deviation(of_seeds: Sequence[Tensor], users: Tensor, count: int) -> float:
    """Standard deviation, over seeds and texts, of the mean over users."""
    return float(torch.stack([per_user(values, users, count).nanmean() for values in of_seeds]).std())


def _cold(summary: dict[str, Any]) -> dict[str, Any]:
    """What the data's summary counts of them: of the catalogue's users and targets, or of the lists' candidates and targets."""
    of_catalogue = ["cold_test_users", "cold_test_interactions", "test_interactions", "users_without_target"]
    of_lists = ["cold_test_candidates", "cold_test_targets", "share_with_target"]
    return {name: summary[name] for name in [*of_catalogue, *of_lists] if name in summary}
