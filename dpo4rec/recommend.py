"""Recommenders fitted and measured for their own sake, in a run folder: on the whole catalogue, retrieved candidates, frozen lists.

A fit is a folder `recommenders/<name>` with one model a seed; what it was told is in its `fit.json`. Its protocol follows from it.
"""

from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from dpo4rec import files
from dpo4rec.data.retrieved import CANDIDATES, prepare_retrieved, read_candidates
from dpo4rec.data.sequences import prepare_sequences
from dpo4rec.driver import Run
from dpo4rec.errors import InputError
from dpo4rec.files import stable_seed
from dpo4rec.fits import FitFolder, FitOptions, Protocol
from dpo4rec.knowledge.encoders import EncoderWorkerConfig
from dpo4rec.knowledge.user_texts import encode_texts, read_user_texts
from dpo4rec.prepared import into
from dpo4rec.ranking import candidates_of
from dpo4rec.recommenders.fitter import FitJob, Fitter, FitterConfig, job_unit
from dpo4rec.recommenders.sequential_fitter import SequentialFitter, SequentialFitterConfig, SequentialJob
from dpo4rec.settings import Settings
from dpo4rec.stages import Report


class Recommenders:
    """Fits of a run folder.

    Args:
        run: the opened run; `evaluation.seeds` of its configuration says how many models a fit makes.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.config, self.folder = run, run.config, run.folder

    def fit(self, options: FitOptions) -> Report:
        """Fits `evaluation.seeds` models and returns what each reported. Every step is a stage of the run folder.

        Raises:
            InputError: data, candidates or texts cannot be used.
        """
        data = self.data_of(options.protocol)
        fit = FitFolder(self.folder / "recommenders" / options.name)
        self._encode(options, fit.path / "texts", data)
        files.write_json(options.model_dump(mode="json"), fit.path / "fit.json")
        out = fit.path / "models"
        worker, config, jobs = self._jobs(fit, data, out)

        def work() -> Report:
            units = [job_unit(Path(job.out).name, job) for job in jobs]
            self.run.stream(f"{options.name} (fit)", [self.run.step(worker, config, out / "fits")], units)
            signal = {"user_signal": options.recommender.user_signal} if options.recommender else {}
            return {**signal, "fits": files.read_parquet(out / "fits").to_pylist()}

        return self.run.stage(*self._stage_of(fit, data), work)

    def fits(self) -> tuple[list[FitFolder], list[FitFolder]]:
        """The fits of the run folder, by name: those that are finished, and those that fitting again would not skip.

        The latter were interrupted, or a later fit of their name was refused its texts, or their protocol's data have changed since.
        """
        finished: list[FitFolder] = []
        others: list[FitFolder] = []
        for file in sorted((self.folder / "recommenders").glob("*/fit.json")):
            fit = FitFolder(file.parent)
            (finished if self._is_finished(fit) else others).append(fit)
        return finished, others

    def _is_finished(self, fit: FitFolder) -> bool:
        if fit.options.protocol == "retrieved":
            self._sequences()
            try:
                self._retrieved()
            except InputError:  # its retriever is unfinished, or the table of candidates is gone
                return False
        return self.run.is_done(*self._stage_of(fit, self.data_of(fit.options.protocol)))

    def _stage_of(self, fit: FitFolder, data: Path) -> tuple[str, Report, list[Path], list[Path]]:
        """Name, settings, inputs and outputs of the stage that makes the models."""
        settings = {"fit": fit.options, "seeds": self.config.evaluation.seeds, **self.run.pool_settings()}
        inputs = [data] if fit.texts is None else [data, fit.texts]
        return f"recommenders/{fit.options.name}/fit", settings, inputs, [fit.path / "models"]

    def data_of(self, protocol: Protocol) -> Path:
        """The folder of the protocol's data, made by its stages if need be."""
        if protocol == "frozen":
            self.run.prepare_data()
            return self.folder / "data"
        self._sequences()
        if protocol == "retrieved":
            self._retrieved()
            return self.folder / "retrieved"
        return self.folder / "sequences"

    def _sequences(self) -> None:
        config, out = self.config, self.folder / "sequences"
        self.run.stage(
            "sequences",
            {"data": config.data, "sequences": config.sequences},
            self.run.source_files("sequences"),
            [out],
            lambda: into(out, lambda folder: prepare_sequences(config.data, config.sequences, config.data_seed, folder)),
        )

    def _retrieved(self) -> None:
        config, out, sequences = self.config, self.folder / "retrieved", self.folder / "sequences"
        if config.retrieved.file is not None:
            inputs = [Path(config.retrieved.file).expanduser()]
        else:
            retriever = FitFolder(self.folder / "recommenders" / (config.retrieved.retriever or "sasrec"))
            if not ((retriever.path / "fit.json").exists() and retriever.options.sequential and self._is_finished(retriever)):
                cause = f"there is no finished fit of a model of the next item named {retriever.path.name!r} in {self.folder.path}"
                raise InputError("retrieved.retriever", cause, "Run `dpo4rec fit R --model sasrec` first, or set retrieved.file")
            inputs = [retriever.seeds()[0]]

        def work(folder: Path) -> Report:
            given = config.retrieved.file is not None
            table = read_candidates(config.retrieved) if given else candidates_of(retriever, sequences, config.retrieved.length)
            return prepare_retrieved(sequences, table.cast(CANDIDATES), config.retrieved, config.data, config.data_seed, folder)

        settings = {"retrieved": config.retrieved, "data": config.data}
        self.run.stage("retrieved", settings, [sequences, *inputs], [out], lambda: into(out, work))

    def _encode(self, options: FitOptions, folder: Path, data: Path) -> None:
        """Makes the text vectors that the fit reads."""
        if not (options.reads_user_text or options.reads_item_text):
            return
        paths = [Path(text).expanduser() for text in options.texts]
        encoder = EncoderWorkerConfig(
            encoder=self.config.encoder, folder=str(folder), language_model=self.config.llm, source=self.run.policy(0).source
        )

        def work() -> Report:
            texts = read_user_texts(paths) if paths else None
            known = files.read_parquet(data / ("sequences.parquet" if options.sequential else "users.parquet"))
            learners = known if options.sequential else known.filter(pc.equal(known["split"], "train"))
            of_ours = None if texts is None else texts.filter(pc.is_in(texts["user_id"], known["user_id"].combine_chunks()))
            if of_ours is not None and not of_ours.num_rows:
                cause, ours = "none of the users of these texts is in the run", known["user_id"][0].as_py()
                raise InputError(", ".join(map(str, paths)), cause, f"Give ids as the run has them, for instance {ours}")
            return encode_texts(encoder, files.read_parquet(data / "items.parquet"), of_ours, learners["user_id"].to_pylist())

        self.run.stage(f"recommenders/{options.name}/texts", self.config.encoder, [data / "items.parquet", *paths], [folder], work)

    def _jobs(self, fit: FitFolder, data: Path, out: Path) -> tuple[type, Settings, list[Any]]:
        """The worker, what its jobs share, and one job a seed."""
        options = fit.options
        seeds = [(str(out / f"seed-{seed}"), stable_seed(self.config.seed, "judge", seed)) for seed in range(self.config.evaluation.seeds)]
        if options.sequential:
            shared = SequentialFitterConfig(sequences=str(data), texts=str(fit.texts) if fit.texts else None)
            jobs = [SequentialJob(out=path, model=options.model, config=options.sequential, seed=seed) for path, seed in seeds]
            return SequentialFitter, shared, jobs
        of_users = [str(fit.user_texts)] if fit.user_texts else []
        fitter = FitterConfig(data=str(data), item_vectors=str(fit.item_texts) if fit.item_texts else None)
        return Fitter, fitter, [FitJob(out=path, recommender=options.recommender, seed=seed, texts=of_users) for path, seed in seeds]
