"""The rounds: sample, score, pair, align, refresh, evaluate. Each stage is a function from files to files of the run folder."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from dpo4rec import files
from dpo4rec.alignment.job import OnlineSettings, read_job, write_job
from dpo4rec.alignment.tracking import check_tracking
from dpo4rec.cluster.connect import start_ray
from dpo4rec.cluster.pool import Units, cut, map_units
from dpo4rec.config import FREE, Config, config_of
from dpo4rec.data.prepare import prepare
from dpo4rec.data.sources import source_files
from dpo4rec.files import content_hash, read_parquet, stable_seed
from dpo4rec.knowledge.config import Decoding
from dpo4rec.knowledge.encoders import Encoder, EncoderWorkerConfig, TfidfEncoder
from dpo4rec.knowledge.facts import Catalogue, facts
from dpo4rec.knowledge.form import Form, grounded_share
from dpo4rec.knowledge.language_model import load_tokenizer
from dpo4rec.knowledge.prompts import item_prompt_table, prompt_table
from dpo4rec.knowledge.sampling import Sampler, SamplerConfig
from dpo4rec.knowledge.tiny import warm_up
from dpo4rec.preference.agreement import rank_correlation
from dpo4rec.preference.answers import make_answers
from dpo4rec.preference.online import OnlineRewardConfig, write_settings
from dpo4rec.preference.pairs import make_pairs
from dpo4rec.preference.reward import Scorer, ScorerConfig, fold_users
from dpo4rec.recommenders.fitter import FitJob, Fitter, FitterConfig, job_unit
from dpo4rec.run_folder import RunFolder

Report = dict[str, Any]
Announce = Callable[[str, int, int, Path | None], None]
TABLES = {"preference": "pairs.parquet"} | dict.fromkeys(("rejection_sampling", "reward_weighted", "grpo"), "answers.parquet")
"""The file of a round's `pairs` folder that each method trains on."""


@dataclass(frozen=True)
class Policy:
    """A language model as files: base model (folder or hub name) and adapter folder."""

    source: str
    adapter: Path | None

    @property
    def files(self) -> list[Path]:
        return [path for path in (Path(self.source), self.adapter) if path is not None and path.is_dir()]


class Run:
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
        self.config, self.announce = config, announce
        self.folder = RunFolder(path.resolve(), config.model_dump(mode="json"), FREE, lambda own: config_of(own).model_dump(mode="json"))
        torch.set_num_threads(config.cluster.training_threads)

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
        config, data = self.config, self.folder / "data"
        summary = self.prepare_data()
        if config.llm.built_in:
            tiny, out = config.llm.tiny, self.folder / "language_model"
            settings = {"tiny": tiny.model_dump(), "prompt": config.prompt.model_dump(), "threads": config.cluster.training_threads}
            self.stage("warm-up", settings, [data], [out], lambda: self._warm_up(out))
        prompts = self.folder / "prompts" / "prompts.parquet"
        self.stage(
            "prompts",
            {"prompt": config.prompt.model_dump(), "llm": config.llm.name},
            [data, *self.policy(0).files],
            [prompts.parent],
            lambda: self._prompts(prompts),
        )
        if config.prompt.item_request is not None:
            self._write_item_texts(config.prompt.item_request)
        return summary

    def _write_item_texts(self, request: str) -> Report:
        """One text for each item by the untuned model: KAR's item-factual knowledge."""
        config, out = self.config, self.folder / "item_texts"
        sampler = self.sampler("item_texts", self.policy(0), config.sampling.decoding, 1)

        def work() -> Report:
            tokenizer = load_tokenizer(config.llm, self.policy(0).source)
            prompts = item_prompt_table(request, read_parquet(self.folder / "data" / "items.parquet"), tokenizer)
            self.map("item-texts", Sampler, sampler, cut(prompts, config.sampling.users_per_unit), out)
            texts = read_parquet(out)
            return {"texts": len(texts), "unfinished": len(texts) - pc.sum(texts["finished"].cast(pa.int64())).as_py()}

        settings = {"request": request, **sampler.model_dump(exclude={"source", "adapter"}), **self.pool_settings()}
        return self.stage("item-texts", settings, [self.folder / "data", *self.policy(0).files], [out], work)

    def prepare_data(self) -> Report:
        """The source's files, brought into one schema, split and cut into lists."""
        config, data = self.config.data, self.folder / "data"
        work = partial(prepare, config, self.config.seed)
        return self.stage("prepare", config, source_files(config), [data], lambda: into(data, work))

    def _warm_up(self, out: Path) -> Report:
        config = self.config
        return warm_up(
            config.llm.tiny,
            config.prompt,
            self.catalogue,
            self._histories("train"),
            self.profiles,
            config.data.like_threshold,
            config.seed,
            out,
        )

    def _prompts(self, out: Path) -> Report:
        tokenizer = load_tokenizer(self.config.llm, self.policy(0).source)
        table = prompt_table(
            self.config.prompt, self.catalogue, self._users, read_parquet(self.folder / "data" / "histories.parquet"), tokenizer
        )
        files.write_parquet(table, out)
        return {"prompts": len(table), "mean_prompt_tokens": round(pc.mean(pc.list_value_length(table["prompt_ids"])).as_py(), 1)}

    # -- one round --------------------------------------------------------------------------------------------------------------

    def sample(self, round_: int) -> Report:
        """N texts for every training and validation user by the policy of this round, and their vectors."""
        sampling = self.config.sampling
        report = self.texts(f"round-{round_}", self.policy(round_), ["train", "validation"], sampling.decoding, sampling.samples)
        self._encode(f"round-{round_}")
        return report

    def fit(self, round_: int) -> Report:
        """Recommenders that know this round's texts: for every fold and seed one that has not seen the fold's users."""
        config, here = self.config, self.folder / f"round-{round_}"
        jobs = [
            FitJob(
                out=str(here / "recommender" / f"fold-{fold}-seed-{seed}"),
                recommender=config.recommender,
                seed=stable_seed(config.seed, "reward", round_, fold, seed),
                held_out=fold,
                texts=[str(here / "vectors")],
            )
            for fold in range(config.reward.folds)
            for seed in range(config.reward.seeds)
        ]
        return self.fit_all(f"round-{round_}/recommender", jobs)

    def score(self, round_: int) -> Report:
        """The recommender's feedback on every text."""
        here, scorer = self.folder / f"round-{round_}", self._scorer(round_)
        vectors = read_parquet_units(here / "vectors")
        units = [(name, table.filter(pc.is_in(table["user_id"], pa.array(list(self._user_folds))))) for name, table in vectors]

        def work() -> Report:
            filled = [(name, table) for name, table in units if len(table)]
            self.map(f"round-{round_}/score", Scorer, scorer, filled, here / "scores", self.config.sampling.skip_failed_rows)
            scores = read_parquet(here / "scores")
            report = {"texts": len(scores), "mean_reward": pc.mean(scores["reward"]).as_py(), **self._failures(here / "scores")}
            truth = self.folder / "data" / "true_preferences.parquet"
            if truth.exists():
                report["rank_correlation_with_truth"] = rank_correlation(read_parquet(here / "samples"), scores, read_parquet(truth))
            return report

        inputs = [here / "vectors", here / "recommender", self.item_vectors]
        settings = {**self.config.reward.model_dump(mode="json"), **self._skipping}
        return self.stage(f"round-{round_}/score", settings, inputs, [here / "scores"], work)

    def _scorer(self, round_: int) -> ScorerConfig:
        reward, fits = self.config.reward, self.folder / f"round-{round_}" / "recommender"
        return ScorerConfig(
            reward=reward,
            data=str(self.folder / "data"),
            item_vectors=str(self.item_vectors),
            recommenders=[[str(fits / f"fold-{fold}-seed-{seed}") for seed in range(reward.seeds)] for fold in range(reward.folds)],
            user_folds=self._user_folds,
        )

    def pair(self, round_: int) -> Report:
        """Best and worst text of each training user, and the table of all scored texts, on which the controls train."""
        config, here = self.config, self.folder / f"round-{round_}"
        pairs = here / "pairs" / "pairs.parquet"

        def work() -> Report:
            samples = self.with_form(read_parquet(here / "samples"))
            prompts = self._prompts_of(["train"])
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
            if aligned_with(here) == content_hash(self._table(round_)):
                return {"by": "launcher"}  # launchers/align.sh has done it, with these pairs
            files.remove(here / "adapter")
            job = self._write_job(round_)
            if config.cluster.kind == "ray":
                from dpo4rec.alignment.ray_train import align_on_ray

                start_ray(config.cluster, config.alignment.workers)
                align_on_ray(job, config.alignment.workers, tracking=config.tracking)
            else:
                read_job(here).run(here / "adapter", config.tracking)
            return {"by": "driver"}

        settings = {"alignment": config.alignment.model_dump(mode="json"), "threads": config.cluster.training_threads}
        inputs = [here / "pairs", *policy.files, *self._reward_files(round_)]
        return self.stage(f"round-{round_}/align", settings, inputs, [here / "adapter"], work)

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
        names = self._claim_names
        return OnlineRewardConfig(
            scorer=self._scorer(round_),
            encoder=self.encoder,
            format_gate=self.config.pairs.format_gate,
            names={kind: sorted(of) for kind, of in names.items()} if names is not None else None,
        )

    # -- what the rounds and the evaluation share -------------------------------------------------------------------------------

    def policy(self, round_: int) -> Policy:
        """The policy that round `round_` samples from: the base model in round 0, then what the round before has aligned."""
        base = str(self.folder / "language_model") if self.config.llm.built_in else self.config.llm.name
        if round_ == 0:
            return Policy(base, None)
        aligned = self.folder / f"round-{round_ - 1}" / "adapter"
        return Policy(base, aligned) if self.config.alignment.weights == "lora" else Policy(str(aligned), None)

    def texts(self, name: str, policy: Policy, splits: list[str], decoding: Decoding, samples: int) -> Report:
        """Samples texts for the users of `splits` into `<name>/samples`."""
        config, out = self.config, self.folder / name / "samples"
        sampler, prompts = self.sampler(name, policy, decoding, samples), self._prompts_of(splits)

        def work() -> Report:
            units = cut(prompts.select(["user_id", "prompt_ids"]), config.sampling.users_per_unit)
            self.map(f"{name}/sample", Sampler, sampler, units, out, config.sampling.skip_failed_rows)
            return {**self.describe(read_parquet(out)), **self._failures(out)}

        settings = {**sampler.model_dump(exclude={"source", "adapter"}), "splits": splits, **self.pool_settings(), **self._skipping}
        return self.stage(f"{name}/sample", settings, [self.folder / "prompts", *policy.files], [out], work)

    def sampler(self, purpose: str, policy: Policy, decoding: Decoding, samples: int) -> SamplerConfig:
        return SamplerConfig(
            language_model=self.config.llm,
            source=policy.source,
            adapter=str(policy.adapter) if policy.adapter else None,
            decoding=decoding,
            samples=samples,
            engine=self.config.sampling.engine,
            rows_at_once=self.config.sampling.rows_at_once,
            seed=self.config.seed,
            purpose=purpose,
        )

    def _encode(self, name: str) -> None:
        """Vectors of the texts in `<name>/samples` into `<name>/vectors`. The first texts of a run also fit the encoder."""
        config, out, folder = self.config, self.folder / name / "vectors", self.folder / "encoder"
        if name == "round-0":
            inputs = [self.folder / "data", self.folder / name / "samples", *self._item_texts]
            self.stage("encoder", config.encoder, inputs, [folder], self._fit_encoder)

        def work() -> Report:
            units = [
                (unit, table.select(["user_id", "sample", "text"])) for unit, table in read_parquet_units(self.folder / name / "samples")
            ]
            self.map(f"{name}/encode", Encoder, self.encoder, units, out, config.sampling.skip_failed_rows)
            return {"cut_texts": pc.sum(read_parquet(out, ["cut"])["cut"]).as_py(), **self._failures(out)}

        report = self.stage(
            f"{name}/encode",
            {**config.encoder.model_dump(), **self.pool_settings(), **self._skipping},
            [self.folder / name / "samples", folder],
            [out],
            work,
        )
        if report["cut_texts"]:
            self.folder.log("warning", stage=name, message=f"{report['cut_texts']} texts are longer than the encoder reads and were cut")

    def encoded_texts(self, name: str, policy: Policy, splits: list[str], decoding: Decoding, samples: int) -> Report:
        report = self.texts(name, policy, splits, decoding, samples)
        self._encode(name)
        return report

    def _fit_encoder(self) -> Report:
        """TF-IDF sees the items' texts and the training users' first texts; item vectors are written for every kind of encoder."""
        folder = self.folder / "encoder"
        items = read_parquet(self.folder / "data" / "items.parquet", ["item_id", "text"])
        for texts in self._item_texts:
            written = read_parquet(texts)["text"]  # in the order of the items
            items = items.set_column(1, "text", pc.binary_join_element_wise(items["text"], written, " "))
        if self.config.encoder.kind == "tfidf":
            samples = read_parquet(self.folder / "round-0" / "samples")
            of_training = samples.filter(pc.is_in(samples["user_id"], pa.array(list(self._user_folds))))
            TfidfEncoder.fit(items["text"].to_pylist() + of_training["text"].to_pylist(), self.config.encoder.dimensions, folder)
        encoded = Encoder(self.encoder)(items)
        files.write_tensors({"item_vectors": files.matrix(encoded["vector"])}, self.item_vectors)
        return {"dimensions": encoded["vector"].type.list_size, "cut_item_texts": pc.sum(encoded["cut"]).as_py()}

    @property
    def _item_texts(self) -> list[Path]:
        """Folder of what the model wrote about the items, nothing where it was not asked."""
        return [self.folder / "item_texts"] if self.config.prompt.item_request is not None else []

    @property
    def item_vectors(self) -> Path:
        return self.folder / "encoder" / "item_vectors.safetensors"

    @property
    def encoder(self) -> EncoderWorkerConfig:
        return EncoderWorkerConfig(
            encoder=self.config.encoder, folder=str(self.folder / "encoder"), language_model=self.config.llm, source=self.policy(0).source
        )

    def fit_all(self, name: str, jobs: list[FitJob]) -> Report:
        """Fits recommenders into the folder `name` of the run; its `fits` folder holds what each fit reported."""
        out = self.folder / name
        inputs = [*sorted({Path(folder) for job in jobs for folder in job.texts}), self.folder / "data", self.item_vectors]

        def work() -> Report:
            fitter = FitterConfig(
                data=str(self.folder / "data"),
                item_vectors=str(self.item_vectors),
                user_folds=self._user_folds,
                left_out=sorted(left_out([Path(folder) for job in jobs for folder in job.texts])),
            )
            self.map(f"{name} (fit)", Fitter, fitter, [job_unit(Path(job.out).name, job) for job in jobs], out / "fits")
            return {"fits": read_parquet(out / "fits").to_pylist()}

        settings = {"jobs": [job.model_dump(exclude={"out", "texts"}) for job in jobs], **self.pool_settings()}
        return self.stage(f"{name}/fit", settings, inputs, [out], work)

    def describe(self, samples: pa.Table) -> Report:
        """How texts look: well-formed share, distinct share, mean tokens and, for the built-in model, the share of grounded claims."""
        formed = self.with_form(samples)
        report = {
            "texts": len(samples),
            "well_formed": pc.mean(pc.cast(formed["well_formed"], pa.float64())).as_py(),
            "distinct": pc.count_distinct(samples["text"]).as_py() / len(samples),
            "mean_tokens": pc.mean(pc.list_value_length(samples["token_ids"])).as_py(),
        }
        if self.config.llm.built_in:
            pairs = zip(samples["user_id"].to_pylist(), samples["text"].to_pylist(), strict=True)
            shares = [share for user, text in pairs if (share := grounded_share(text, self._true_claims[user])) is not None]
            report["grounded"] = sum(shares) / max(1, len(shares))
        return report

    def with_form(self, samples: pa.Table) -> pa.Table:
        form = Form(self._claim_names)
        verdicts = [
            form(text, finished) for text, finished in zip(samples["text"].to_pylist(), samples["finished"].to_pylist(), strict=True)
        ]
        return samples.append_column("well_formed", pa.array(verdicts, pa.bool_()))

    # -- what is read once ------------------------------------------------------------------------------------------------------

    @cached_property
    def catalogue(self) -> Catalogue:
        items = read_parquet(self.folder / "data" / "items.parquet")
        return Catalogue(items, self._histories("train")["item_ids"].to_pylist())

    @property
    def _claim_names(self) -> dict[str, set[str]] | None:
        """For the built-in model, the names that well-formed texts may use."""
        return self.catalogue.names if self.config.llm.built_in else None

    @cached_property
    def _users(self) -> pa.Table:
        return read_parquet(self.folder / "data" / "users.parquet")

    @cached_property
    def profiles(self) -> dict[str, str]:
        return dict(zip(self._users["user_id"].to_pylist(), self._users["profile"].to_pylist(), strict=True))

    @cached_property
    def _user_folds(self) -> dict[str, int]:
        users = self._users.filter(pc.equal(self._users["split"], "train"))["user_id"].to_pylist()
        return fold_users(users, self.config.reward.folds, stable_seed(self.config.seed, "folds"))

    @cached_property
    def _true_claims(self) -> dict[str, set[str]]:
        """For each user the claims, written out, that the shown part of the history supports."""
        size, threshold = self.config.prompt.history_items, self.config.data.like_threshold
        rows = read_parquet(self.folder / "data" / "histories.parquet").to_pylist()
        return {
            row["user_id"]: set(map(str, facts(self.catalogue, row["item_ids"][-size:], row["ratings"][-size:], threshold))) for row in rows
        }

    def _histories(self, split: str) -> pa.Table:
        histories = read_parquet(self.folder / "data" / "histories.parquet")
        users = self._users.filter(pc.equal(self._users["split"], split))["user_id"]
        return histories.filter(pc.is_in(histories["user_id"], users.combine_chunks()))

    def _prompts_of(self, splits: list[str]) -> pa.Table:
        prompts = read_parquet(self.folder / "prompts" / "prompts.parquet")
        return prompts.filter(pc.is_in(prompts["split"], pa.array(splits))).combine_chunks()

    def pool_settings(self) -> Report:
        return {"threads": self.config.cluster.threads_per_worker}

    @property
    def _skipping(self) -> Report:
        """The part of a stage's key that says users may be missing."""
        return {"skip_failed_rows": True} if self.config.sampling.skip_failed_rows else {}

    def _failures(self, out: Path) -> Report:
        """How many users a pool has left out of its results, for a stage's report."""
        return {"failed_users": len(files.failed(out))} if self.config.sampling.skip_failed_rows else {}

    def map(self, label: str, worker: type, config: Any, units: Units, out: Path, skip_failed: bool = False) -> None:
        def announce(done: int, of: int) -> None:
            self.announce(label, done, of, out)

        for warning in map_units(worker, config, units, out, self.config.cluster, announce, self.folder / "logs", skip_failed):
            self.folder.log("warning", stage=label, message=warning)

    def stage(self, name: str, settings: Any, inputs: list[Path], outputs: list[Path], work: Callable[[], Report]) -> Report:
        """Runs a stage of the run folder; `settings` (a mapping or a part of the configuration) and the seed are part of its key."""
        values = settings if isinstance(settings, dict) else settings.model_dump(mode="json")
        self.announce(name, 0, 0, None)
        return self.folder.stage(name, {"seed": self.config.seed, **values}, inputs, outputs, work)


def read_parquet_units(folder: Path) -> Units:
    """The units of a pool's output folder, by name."""
    return [(path.stem, read_parquet(path)) for path in sorted(folder.glob("*.parquet")) if not files.is_empty(path)]


def left_out(vectors: list[Path]) -> set[str]:
    """Users whose texts could not be had: those that sampling or encoding into these folders of vectors has failed on."""
    return {user for folder in vectors for part in (folder.parent / "samples", folder) for user in files.failed(part)}


def aligned_with(round_folder: Path) -> str | None:
    """Hash of the pairs that the round's adapter was aligned on; None without an adapter."""
    summary = round_folder / "adapter" / "summary.json"
    return files.read_json(summary)["pairs_hash"] if summary.exists() else None


def into(folder: Path, work: Callable[[Path], Report]) -> Report:
    with files.atomic(folder) as partial:
        partial.mkdir()
        return work(partial)
