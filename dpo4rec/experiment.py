"""The evaluation at the end of a run: every condition on the same frozen lists, with controls, seeds and significance.

Validation users choose the temperature of each policy; test users are read once, in `measure`.
Metrics are averaged over recommender seeds, texts and lists of a user, then over users.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dpo4rec import files
from dpo4rec.conditions import BEST_OF, COMPARISONS, CONDITIONS, JUDGES, POLICIES, Condition
from dpo4rec.driver import Run, left_out
from dpo4rec.evaluation.metrics import accuracy, per_user, ranked_labels
from dpo4rec.evaluation.significance import correct, paired_bootstrap
from dpo4rec.files import stable_seed
from dpo4rec.preference.best_of import best_by_other_half
from dpo4rec.ranking import Lists, write_judgements, write_ranking
from dpo4rec.recommenders.fitter import FitJob, user_vectors_of
from dpo4rec.recommenders.lists import RankingData
from dpo4rec.recommenders.model import Reranker
from dpo4rec.recommenders.scoring import logits_of
from dpo4rec.stages import Report
from dpo4rec.texts import of_splits

SELECTION_METRIC = "ndcg@5"
CUTOFFS = (1, 3, 5, 7, 10)


class Experiment:
    """Evaluates a run whose rounds are done. Every step is a stage of the run folder."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config
        self.folder = run.folder / "evaluation"

    def evaluate(self) -> Report:
        """Judges, texts, temperatures, metrics. Returns the content of `evaluation/results.json`."""
        self.fit_judges()
        if len(self.config.evaluation.temperatures) > 1:  # with one there is nothing to choose
            self.write_texts("validation")
        self.choose_temperatures()
        self.write_texts("test")
        return self.measure()

    def fit_judges(self) -> None:
        """Each kind of recommender, once a seed, fitted as the rounds' are but on all folds: the refresh on the new policy's texts.

        Those that know nothing of the last policy are a stage of their own, so that runs which differ in alignment alone can share them.
        """
        for group in ("untuned", "tuned"):
            jobs = [
                FitJob(
                    out=str(self.judge(name, seed)),
                    recommender=self.config.recommender.model_copy(update={"user_signal": judge.user_signal, "item_text": judge.item_text}),
                    seed=stable_seed(self.config.seed, "judge", seed),
                    texts=[str(self.run.folder / self.run.fitting_texts(self.round_of(policy)) / "vectors") for policy in judge.policies],
                )
                for name, judge in JUDGES.items()
                if judge.group == group
                for seed in range(self.config.evaluation.seeds)
            ]
            self.run.fit_all(f"evaluation/judges/{group}", jobs)

    def write_texts(self, split: str) -> None:
        """Texts of a split's users, by both policies: at every temperature for validation, at the chosen one for test."""
        evaluation = self.config.evaluation
        for policy in POLICIES:
            temperatures = evaluation.temperatures if split == "validation" else [self.temperatures[policy]]
            for temperature in temperatures:
                decoding = self.config.sampling.decoding.model_copy(update={"temperature": temperature})
                name = self.texts_of(policy, split, temperature)
                self.run.encoded_texts(name, self.run.policy(self.round_of(policy)), of_splits(split), decoding, evaluation.texts_per_user)
        if evaluation.best_of and split == "test":
            decoding = self.config.sampling.decoding.model_copy(update={"temperature": self.temperatures[BEST_OF]})
            self.run.encoded_texts(self.many_texts, self.run.policy(0), of_splits(split), decoding, evaluation.best_of)

    def choose_temperatures(self) -> Report:
        """The temperature at which each policy serves its own recommender best on the validation users; best-of-N has one of its own,
        chosen among the `evaluation.texts_per_user` texts that these users have."""
        out, temperatures = self.folder / "temperatures.json", self.config.evaluation.temperatures
        served = [*POLICIES, BEST_OF] if self.config.evaluation.best_of else POLICIES
        if len(temperatures) == 1:
            files.write_json({"chosen": dict.fromkeys(served, temperatures[0]), "validation_ndcg@5": {}}, out)
            return files.read_json(out)["chosen"]
        inputs = [self.run.folder / self.texts_of(policy, "validation", t) / "vectors" for policy in POLICIES for t in temperatures]

        def measured(label: str, temperature: float) -> float:
            if label == BEST_OF:
                values = self._best_of(self.texts_of("untuned", "validation", temperature), "validation", [5])[0]
            else:
                values = self._metrics(Condition(label, label, label), "validation", temperature, [5])
            return float(values[SELECTION_METRIC].nanmean())

        def work() -> Report:
            curves = {label: {temperature: measured(label, temperature) for temperature in temperatures} for label in served}
            chosen = {label: max(curve, key=lambda t: curve[t]) for label, curve in curves.items()}
            files.write_json({"chosen": chosen, "validation_ndcg@5": curves}, out)
            return chosen

        return self.run.stage("evaluation/temperatures", self.config.evaluation, [*inputs, self.folder / "judges"], [out], work)

    def measure(self) -> Report:
        """The one reading of the test users."""
        out, best, cutoffs = self.folder / "results.json", self.folder / "best_of.parquet", self.config.evaluation.cutoffs(CUTOFFS)
        inputs = [self.run.folder / self.texts_of(policy, "test", self.temperatures[policy]) / "vectors" for policy in POLICIES]
        inputs += [self.run.folder / self.many_texts / "vectors"] if self.config.evaluation.best_of else []

        def work() -> Report:
            values = {condition.label: self._metrics(condition, "test", None, cutoffs) for condition in CONDITIONS}
            texts = {policy: self.run.folder / self.texts_of(policy, "test", self.temperatures[policy]) / "samples" for policy in POLICIES}
            if self.config.evaluation.best_of:
                values[BEST_OF], chosen = self._best_of(self.many_texts, "test", cutoffs)
                files.write_parquet(chosen, best)
                texts[BEST_OF] = best
            self._write_per_user(values)
            results = {
                "lists_hash": files.read_json(self.run.folder / "data" / "summary.json")["lists_hash"],
                "test_users": int((~next(iter(values.values()))[SELECTION_METRIC].isnan()).sum()),
                "seeds": self.config.evaluation.seeds,
                "temperatures": files.read_json(self.folder / "temperatures.json"),
                "metrics": {label: {name: float(value.nanmean()) for name, value in of.items()} for label, of in values.items()},
                "comparisons": [row for metric in ("ndcg@5", "map@5") for row in self._comparisons(values, metric)],
                "texts": {policy: self.run.describe(samples) for policy, samples in texts.items()},
                "rewards": self._reward_reports(),
            }
            files.write_json(results, out)
            return {"file": "evaluation/results.json"}

        inputs += [self.folder / "judges", self.folder / "temperatures.json"]
        self.run.stage("evaluation/measure", self.config.evaluation, inputs, [out, best] if self.config.evaluation.best_of else [out], work)
        return files.read_json(out)

    def write_rankings(self, folder: Path) -> None:
        """Of an evaluated run: `qrels` of the test users' lists, and a TREC run of each condition by its first recommender and text."""
        lists = Lists(self.run.folder / "data", self._left_out)
        write_judgements(lists, folder)
        for condition in CONDITIONS:
            scores = next(self._logits(condition, "test", None, lists.lists, lists.owners))
            write_ranking(lists, condition.label, lists.ranked(scores), folder)

    @property
    def temperatures(self) -> dict[str, float]:
        return files.read_json(self.folder / "temperatures.json")["chosen"]

    def _metrics(self, condition: Condition, split: str, temperature: float | None, cutoffs: list[int]) -> dict[str, Tensor]:
        """Per-user values [U] of each metric at each cutoff, NaN for users of other splits."""
        lists, owners = self._lists(split)
        return self._values(self._logits(condition, split, temperature, lists, owners), lists, owners, cutoffs)

    def _lists(self, split: str) -> tuple[Tensor, Tensor]:
        """Numbers of the lists of a split's users, and of their users."""
        lists = self._data.lists_of(self._data.users_of(split))
        return lists, self._data.list_users[lists]

    def _values(self, scores: Iterable[Tensor], lists: Tensor, owners: Tensor, cutoffs: list[int]) -> dict[str, Tensor]:
        """Means over `scores` [lists, K] and over a user's lists of each metric at each cutoff, [U]."""
        labels = self._data.labels[lists]
        totals: dict[str, list[Tensor]] = {}
        for logits in scores:
            for name, value in accuracy(ranked_labels(logits, labels), labels.sum(1), cutoffs).items():
                totals.setdefault(name, []).append(value)
        return {name: per_user(torch.stack(of).mean(0), owners, len(self._data.user_ids)) for name, of in totals.items()}

    def _best_of(self, name: str, split: str, cutoffs: list[int]) -> tuple[dict[str, Tensor], pa.Table]:
        """Per-user values [U] of that text in `name` which a user's other lists choose, and the chosen texts."""
        data, (lists, owners) = self._data, self._lists(split)
        vectors = user_vectors_of([self.run.folder / name / "vectors"], data.user_ids)
        item_vectors = files.read_tensors(self.run.item_vectors)["item_vectors"]
        found = []
        for seed in range(self.config.evaluation.seeds):
            model = Reranker.load(self.judge("untuned", seed)).bind(data, item_vectors)
            found.append(torch.stack([logits_of(model, data, lists, of_user) for of_user in vectors[owners].unbind(1)]))
        logits = torch.stack(found)  # [seeds, texts, lists, K]
        chosen = best_by_other_half(self.config.reward, logits, data.labels[lists], owners)
        kept = {(data.user_ids[user], text) for user, text in zip(owners.tolist(), chosen.tolist(), strict=True)}
        samples = files.read_parquet(self.run.folder / name / "samples")
        rows = zip(samples["user_id"].to_pylist(), samples["sample"].to_pylist(), strict=True)
        texts = samples.filter(pa.array([row in kept for row in rows]))
        return self._values(logits[:, chosen, torch.arange(len(lists))], lists, owners, cutoffs), texts

    def _logits(self, condition: Condition, split: str, temperature: float | None, lists: Tensor, owners: Tensor) -> Iterator[Tensor]:
        """Scores [lists, K] of every seed and text."""
        data = self._data
        if condition.judge is None:
            for seed in range(self.config.evaluation.seeds):
                noise = torch.rand(data.candidates[lists].shape, generator=torch.Generator().manual_seed(seed))
                yield noise if condition.label == "random" else data.popularity[data.candidates[lists]].float()
            return
        vectors = None
        if condition.texts:
            chosen = self.temperatures[condition.texts] if temperature is None else temperature
            vectors = user_vectors_of([self.run.folder / self.texts_of(condition.texts, split, chosen) / "vectors"], data.user_ids)
            if condition.shuffled:
                members = data.users_of(split).nonzero().squeeze(1)
                vectors[members] = vectors[members.roll(1 + len(members) // 2)]
        judge = JUDGES[condition.judge]
        item_vectors = files.read_tensors(self.run.item_vectors)["item_vectors"] if judge.item_text else None
        for seed in range(self.config.evaluation.seeds):
            model = Reranker.load(self.judge(condition.judge, seed)).bind(data, item_vectors)
            for text in range(1 if vectors is None else vectors.shape[1]):
                yield logits_of(model, data, lists, None if vectors is None else vectors[owners, text])

    def _comparisons(self, values: dict[str, dict[str, Tensor]], metric: str) -> list[Report]:
        """`COMPARISONS` by one metric, p-values corrected over them (Holm)."""
        samples, seed = self.config.evaluation.bootstrap_samples, stable_seed(self.config.seed, "bootstrap")
        compared = {(a, b): paired_bootstrap(values[a][metric], values[b][metric], seed, samples) for a, b in COMPARISONS}
        rows = [{"a": a, "b": b, "metric": metric, **asdict(found)} for (a, b), found in compared.items()]
        correct(rows, "p_value")
        return rows

    def _write_per_user(self, values: dict[str, dict[str, Tensor]]) -> None:
        rows = []
        for label, of in values.items():
            table = pa.table(
                {"user_id": self._data.user_ids, "condition": [label] * len(self._data.user_ids), **{n: v.numpy() for n, v in of.items()}}
            )
            rows.append(table.filter(pa.array(~np.isnan(table[SELECTION_METRIC].to_numpy()))))
        files.write_parquet(pa.concat_tables(rows), self.folder / "per_user.parquet")

    def _reward_reports(self) -> list[Report]:
        stages = self.run.folder.manifest["stages"]
        return [stages[f"round-{r}/score"]["report"] | {"pairs": stages[f"round-{r}/pair"]["report"]} for r in range(self.config.rounds)]

    @property
    def _data(self) -> RankingData:
        """Without the users that a text of the evaluation could not be had for: conditions are compared on the same users."""
        if not hasattr(self, "_loaded"):
            self._loaded = RankingData.load(self.run.folder / "data")
        return self._loaded.without(self._left_out)

    @property
    def _left_out(self) -> set[str]:
        return left_out(list(self.folder.glob("texts/*/vectors")))

    def round_of(self, policy: str) -> int:
        """The round whose policy it is."""
        return 0 if policy == "untuned" else self.config.rounds

    def texts_of(self, policy: str, split: str, temperature: float) -> str:
        """Folder in the run folder of a policy's texts for the users of a split."""
        return f"evaluation/texts/{policy}-{split}-t{temperature:g}"

    @property
    def many_texts(self) -> str:
        """Folder in the run folder of the untuned texts among which the best is chosen."""
        return f"evaluation/texts/untuned-test-best-of-{self.config.evaluation.best_of}-t{self.temperatures[BEST_OF]:g}"

    def judge(self, name: str, seed: int) -> Path:
        """Folder of a fitted recommender of the evaluation."""
        return self.folder / "judges" / JUDGES[name].group / f"{name}-seed-{seed}"
