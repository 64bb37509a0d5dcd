"""The rounds: sample, score, pair, align, refresh, evaluate. Each stage is a function from files to files of the run folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec import files
from dpo4rec.alignment.config import check_tracking
from dpo4rec.alignment.job import OnlineSettings, read_job, write_job
from dpo4rec.cluster.connect import start_ray
from dpo4rec.cluster.units import Files
from dpo4rec.cluster.worker import Step
from dpo4rec.config import Config
from dpo4rec.data.user_rows import UserRows
from dpo4rec.errors import InputError
from dpo4rec.files import batches, content_hash, read_parquet, stable_seed
from dpo4rec.knowledge.description import with_form
from dpo4rec.preference.agreement import rank_correlation
from dpo4rec.preference.answers import make_answers
from dpo4rec.preference.online import OnlineRewardConfig, write_settings
from dpo4rec.preference.pairs import make_pairs
from dpo4rec.preference.reward import Scorer, ScorerConfig
from dpo4rec.recommenders.fitter import FitJob, Fitter, FitterConfig, job_unit
from dpo4rec.settings import agrees
from dpo4rec.stages import Announce, Report
from dpo4rec.texts import Texts, Users, of_splits

TABLES = {"preference": "pairs.parquet"} | dict.fromkeys(("rejection_sampling", "reward_weighted", "grpo"), "answers.parquet")
"""The file of a round's `pairs` folder that each method trains on."""


class Run(Texts):
    """A run of the whole method in one folder.

    Args:
        config: the resolved configuration.
        path: the run folder.
        announce: called with (stage, finished units, all units, folder of their files) for a progress display.

    Raises:
        InputError: the folder is in use or belongs to another configuration, or the tracker is not installed.
    """

    def __init__(self, config: Config, path: Path, announce: Announce = lambda *_: None) -> None:
        check_tracking(config.tracking)
        super().__init__(config, path, announce)

    def rounds(self) -> None:
        """The method: every round asks the recommender what it thinks of the language model's texts, and aligns the model to it."""
        self.prepare()
        for round_ in range(self.config.rounds):
            self.sample(round_)
            self.fit(round_)
            self.score(round_)
            self.pair(round_)
            self.align(round_)
        self.sample(self.config.rounds)  # the last policy's texts, on which the final recommenders are fitted

    # -- before the rounds ------------------------------------------------------------------------------------------------------

    def prepare(self) -> Report:
        """Data and lists, the language model, every user's prompt."""
        summary = self.prepare_data()
        _ = self.folds  # here, so that a wrong reward.fit_users is said before anything that takes long
        if self.config.llm.built_in:
            self.warm_up()
        if not isinstance(self.config.alignment.lora_targets, str):
            from dpo4rec.alignment.methods import model_settings
            from dpo4rec.alignment.policy import check_targets  # takes seconds to import

            check_targets(self.config.alignment, model_settings(self.policy(0).source))
        self.write_prompts()
        if self.config.prompt.item_request is not None:
            self.write_item_texts()
        return summary

    # -- one round --------------------------------------------------------------------------------------------------------------

    def sample(self, round_: int) -> Report:
        """Texts by the policy of this round, and their vectors, of all users whom recommenders are fitted on.

        Those are all training and validation users; or with `reward.fit_users` some of the training users and all validation users, and
        the other texts of the round are drawn as they are scored.
        """
        name, sampling = self.fitting_texts(round_), self.config.sampling
        users: Users = ("fits", [True]) if self.draws_fitting_users else of_splits("train", "validation")
        report = self.texts(name, self.policy(round_), users, sampling.decoding, sampling.samples)
        if self.config.pairs.format_gate and report["well_formed"] == 0:
            cause = f"none of {report['texts']} texts is well-formed, so no pair could be made of them"
            remedy = (
                f"Look at some in {self.folder / name / 'samples'}. Texts that do not end within sampling.decoding.max_new_tokens="
                f"{sampling.decoding.max_new_tokens} need more; a model that thinks first must not (prompt.chat_template_arguments)"
            )
            raise InputError(f"{name}/sample", cause, remedy)
        if round_ == 0:
            self.fit_encoder(name)
        self.encode(name)
        return report

    def fitting_texts(self, round_: int) -> str:
        """Folder in the run folder of the texts by this round's policy that recommenders are fitted on."""
        return f"round-{round_}/fit" if self.draws_fitting_users else f"round-{round_}"

    def fit(self, round_: int) -> Report:
        """Recommenders that know this round's texts: for every fold and seed one that has not seen the fold's users."""
        config, here = self.config, self.folder / f"round-{round_}"
        jobs = [
            FitJob(
                out=str(here / "recommender" / f"fold-{fold}-seed-{seed}"),
                recommender=config.recommender,
                seed=stable_seed(config.seed, "reward", round_, fold, seed),
                held_out=fold,
                texts=[str(self.folder / self.fitting_texts(round_) / "vectors")],
            )
            for fold in range(config.reward.folds)
            for seed in range(config.reward.seeds)
        ]
        return self.fit_all(f"round-{round_}/recommender", jobs)

    def score(self, round_: int) -> Report:
        """The recommender's feedback on every text of the training users; with `reward.fit_users` the texts are drawn here, too."""
        return self._draw_and_score(round_) if self.draws_fitting_users else self._score_texts(round_)

    def _score_texts(self, round_: int) -> Report:
        here, scorer = self.folder / f"round-{round_}", self._scoring_step(round_)

        def work() -> Report:
            self.stream(f"round-{round_}/score", [scorer], Files(here / "vectors"))
            return {**self._judgement(here), **self.failures(here / "scores"), **self._agreement(here)}

        inputs = [here / "vectors", here / "recommender", self.item_vectors]
        return self.stage(f"round-{round_}/score", self.config.reward, inputs, [here / "scores"], work)

    def _draw_and_score(self, round_: int) -> Report:
        """Sampling, encoding and scoring at the same time: a unit of users is scored while later ones are being sampled."""
        name, config, policy = f"round-{round_}", self.config, self.policy(round_)
        here, sampler = self.folder / name, self.sampler(name, policy, config.sampling.decoding, config.sampling.samples)
        outs = [here / part for part in ("samples", "vectors", "scores")]
        gpus = config.cluster.gpus_per_worker  # of a worker's, shared where the encoder is a model, too
        encoding = 0 if config.encoder.kind == "tfidf" else gpus / 2

        def work() -> Report:
            texts = [self.sampling_step(sampler, here, gpus=gpus - encoding), self.encoding_step(here, gpus=encoding)]
            self.stream(f"{name}/score", [*texts, self._scoring_step(round_)], self.prompt_units(of_splits("train")))
            report = {**self.describe(here / "samples"), **self.cut_texts(name), **self._judgement(here)}
            return {**report, **self.failures(*outs), **self._agreement(here)}

        inputs = [self.prompts.parent, *policy.files, self.encoder_folder, here / "recommender", self.folds]
        parts = {"sampler": self.sampler_settings(sampler), "encoder": config.encoder, "reward": config.reward}
        return self.stage(f"{name}/score", {**parts, **self.pool_settings()}, inputs, outs, work)

    def _judgement(self, here: Path) -> Report:
        """How many texts of the round are scored, and their mean reward."""
        texts, total = 0, 0.0
        for part in batches(here / "scores", ["reward"], rows=2**20):  # whole files: sums of parts would round otherwise
            texts, total = texts + len(part), total + (pc.sum(part["reward"]).as_py() or 0.0)
        return {"texts": texts, "mean_reward": total / max(1, texts)}

    def _agreement(self, here: Path) -> Report:
        """For simulated users, how rewards follow what is known of them."""
        truth = self.folder / "data" / "true_preferences.parquet"
        return {"rank_correlation_with_truth": rank_correlation(_judged_texts(here, UserRows(truth)))} if truth.exists() else {}

    def scorer(self, round_: int) -> ScorerConfig:
        reward, fits = self.config.reward, self.folder / f"round-{round_}" / "recommender"
        return ScorerConfig(
            reward=reward,
            data=str(self.folder / "data"),
            item_vectors=str(self.item_vectors),
            recommenders=[[str(fits / f"fold-{fold}-seed-{seed}") for seed in range(reward.seeds)] for fold in range(reward.folds)],
            folds=str(self.folds),
        )

    def _scoring_step(self, round_: int, **more: Any) -> Step:
        out, skip = self.folder / f"round-{round_}" / "scores", self.config.sampling.skip_failed_rows
        return self.step(Scorer, self.scorer(round_), out, skip_failed=skip, **more)

    def pair(self, round_: int) -> Report:
        """Best and worst text of each training user, and the table of all scored texts, on which the controls train."""
        config, here = self.config, self.folder / f"round-{round_}"
        pairs = here / "pairs" / "pairs.parquet"

        def work() -> Report:
            samples = with_form(read_parquet(here / "samples"), self.form)
            prompts = read_parquet(self.prompts)
            prompts = prompts.filter(pc.equal(prompts["split"], "train"))
            lacking = left_out([here / "vectors"]) | files.failed(here / "scores").keys()
            prompts = prompts.filter(pc.invert(pc.is_in(prompts["user_id"], pa.array(sorted(lacking), pa.string()))))
            scores = read_parquet(here / "scores")
            table, report = make_pairs(config.pairs, prompts, samples, scores, stable_seed(config.seed, "pairs", round_))
            files.write_parquet(table, pairs)
            files.write_parquet(make_answers(config.pairs, prompts, samples, scores), pairs.with_name("answers.parquet"))
            self._write_job(round_)  # by which launchers/align.sh can align, too
            return report

        outputs = [pairs.parent, here / "alignment.json", *self._reward_files(round_)]
        return self.stage(f"round-{round_}/pair", config.pairs, [here / "samples", here / "scores"], outputs, work)

    def align(self, round_: int) -> Report:
        """The next policy: DPO on the pairs, the reference being the policy that wrote them, or one of the controls."""
        config, here, policy = self.config, self.folder / f"round-{round_}", self.policy(round_)

        def work() -> Report:
            job = files.read_json(here / "alignment.json") if (here / "alignment.json").exists() else {}
            if aligned_with(here) == content_hash(self._table(round_)) and agrees(job.get("config"), config.alignment):
                return {"by": "launcher"}  # launchers/align.sh has done it, with these pairs and settings
            files.remove(here / "adapter")
            file = self._write_job(round_)
            if config.cluster.kind == "ray":
                from dpo4rec.alignment.ray_train import align_on_ray

                start_ray(config.cluster, config.alignment.workers)
                wait = config.cluster.wait_timeout_seconds
                align_on_ray(file, config.alignment.workers, tracking=config.tracking, wait_seconds=wait)
            else:
                read_job(here).run(here / "adapter", config.tracking)
            return {"by": "driver"}

        settings = {"alignment": config.alignment, "threads": config.cluster.training_threads}
        inputs = [here / "pairs", *policy.files, *self._reward_files(round_)]
        return self.stage(f"round-{round_}/align", settings, inputs, [here / "adapter"], work, one_piece=True)

    def _table(self, round_: int) -> Path:
        """What the configured method trains on."""
        return self.folder / f"round-{round_}" / "pairs" / TABLES[self.config.alignment.method]

    def _reward_files(self, round_: int) -> list[Path]:
        """The settings of the reward, for the method that samples as it trains."""
        return [self.folder / f"round-{round_}" / "reward.json"] if self.config.alignment.method == "grpo" else []

    def _write_job(self, round_: int) -> Path:
        config, here, policy = self.config, self.folder / f"round-{round_}", self.policy(round_)
        seed, threads = stable_seed(config.seed, "align", round_), config.cluster.training_threads
        online = None
        for file in self._reward_files(round_):
            write_settings(self._online_reward(round_), file)
            online = OnlineSettings(decoding=config.sampling.decoding, worker="dpo4rec.preference.online.OnlineReward", settings=str(file))
        return write_job(here, config.alignment, policy.source, self._table(round_), policy.adapter, seed, threads, online=online)

    def _online_reward(self, round_: int) -> OnlineRewardConfig:
        names = self.claim_names
        return OnlineRewardConfig(
            scorer=self.scorer(round_),
            encoder=self.encoder,
            format_gate=self.config.pairs.format_gate,
            names={kind: sorted(of) for kind, of in names.items()} if names is not None else None,
        )

    # -- what the rounds and the evaluation share -------------------------------------------------------------------------------

    def fit_all(self, name: str, jobs: list[FitJob]) -> Report:
        """Fits recommenders into the folder `name` of the run; its `fits` folder holds what each fit reported."""
        out = self.folder / name
        texts = sorted({Path(folder) for job in jobs for folder in job.texts})

        def work() -> Report:
            fitter = FitterConfig(
                data=str(self.folder / "data"),
                item_vectors=str(self.item_vectors),
                folds=str(self.folds),
                left_out=sorted(left_out(texts)),
            )
            self.stream(f"{name} (fit)", [self.step(Fitter, fitter, out / "fits")], [job_unit(Path(job.out).name, job) for job in jobs])
            return {"fits": read_parquet(out / "fits").to_pylist()}

        settings = {"jobs": [job.model_copy(update={"out": "", "texts": []}) for job in jobs], **self.pool_settings()}
        drawn = [self.folds] if self.draws_fitting_users else []  # else all that the table says follows from the jobs and the data
        return self.stage(f"{name}/fit", settings, [*texts, self.folder / "data", self.item_vectors, *drawn], [out], work, one_piece=True)


def _judged_texts(here: Path, truth: UserRows) -> Iterator[tuple[pa.Table, pa.Table, pa.Table]]:
    """Samples, scores and true preferences, unit by unit."""
    for path in sorted((here / "scores").glob("*.parquet")):
        if not files.is_empty(path):
            scores = read_parquet(path)
            yield read_parquet(here / "samples" / path.name), scores, truth.read(scores["user_id"].to_pylist())


def left_out(vectors: list[Path]) -> set[str]:
    """Users whose texts could not be had: those that sampling or encoding into these folders of vectors has failed on."""
    return {user for folder in vectors for part in (folder.parent / "samples", folder) for user in files.failed(part)}


def aligned_with(round_folder: Path) -> str | None:
    """Hash of the pairs that the round's adapter was aligned on; None without an adapter."""
    summary = round_folder / "adapter" / "summary.json"
    return files.read_json(summary)["pairs_hash"] if summary.exists() else None
