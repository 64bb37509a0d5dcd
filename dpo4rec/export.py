"""What a run leaves for production, in a folder of its own: adapter, merged model, re-ranker, and every user's text and vector.

A part that is there, whole and made from the same is not made again; an interrupted export goes on where it stopped.
"""

import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from dpo4rec import files
from dpo4rec.data.new_users import read_new_users
from dpo4rec.driver import Run
from dpo4rec.errors import InputError
from dpo4rec.experiment import Experiment
from dpo4rec.exported_users import write_users
from dpo4rec.files import content_hash, read_json, read_parquet, write_json
from dpo4rec.knowledge.config import Decoding
from dpo4rec.knowledge.language_model import load_model, load_tokenizer
from dpo4rec.knowledge.prompts import prompt_table
from dpo4rec.prepared import Policy
from dpo4rec.recommenders.exported import write_reranker
from dpo4rec.stages import Report
from dpo4rec.user_table import UserTable


class Export:
    """An export of a finished run.

    Args:
        run: opened; its rounds and its evaluation are done.
        out: the folder to write, new or of an earlier export.

    Raises:
        InputError: the run is not finished, its re-ranker cannot be exported, or the folder holds something else than an export.
    """

    def __init__(self, run: Run, out: Path) -> None:
        self.run, self.config, self.out = run, run.config, out.resolve()
        if self.config.recommender.model == "mir":
            cause = "MIR reads a user's whole history by a GRU, which no program of any length can be made of"
            raise InputError("recommender.model", cause, "Export a run with prm, dlcm or setrank")
        self.experiment = Experiment(run)
        self.policy: Policy = run.policy(self.config.rounds)
        if self.policy.adapter is not None and not self.policy.adapter.is_dir():
            raise files.missing(self.policy.adapter)
        temperature = self.experiment.temperatures["tuned"]
        self.decoding: Decoding = self.config.sampling.decoding.model_copy(update={"temperature": temperature})
        self.manifest: Report = read_json(out / "manifest.json") if (out / "manifest.json").exists() else {"parts": {}}
        others = not self.manifest.get("parts") and out.is_dir() and any(not file.name.startswith(".") for file in out.iterdir())
        if others or "parts" not in self.manifest:
            raise InputError(str(out), "it is no export and not empty: files of yours would be replaced", "Give a new folder")

    def write(self, new_users: Path | None = None) -> Report:
        """Writes all parts and the manifest, and returns the manifest's.

        Args:
            new_users: file of interactions, see `read_new_users`: of users whom the run has not seen, or who have done more since.

        Raises:
            InputError: the run lacks something, the file cannot be used, or `out` holds texts of another policy or encoder.
        """
        table = UserTable(self.out / "users.parquet", self.origin)  # before anything is written: is the folder ours?
        weights = {"language_model": self.config.llm.name, "policy": self.origin["policy"]}
        if self.policy.adapter is not None:
            self._part("adapter", weights, self._write_adapter)
        self._part("model", {**weights, "precision": self.config.llm.precision}, self._write_model)
        data, vectors = self.run.folder / "data", self.run.item_vectors
        self._part("reranker", self._reranker_origin, lambda folder: write_reranker(self._reranker, data, vectors, folder))
        self.manifest["parts"]["users.parquet"] = {"origin": self.origin, **self._write_users(table, new_users)}
        self._write_manifest()
        return self.manifest

    @cached_property
    def origin(self) -> Report:
        """What a user's text and vector are made from, besides the prompt."""
        config = self.config
        return {
            "language_model": config.llm.name,
            "policy": content_hash(*self.policy.files),
            "precision": config.llm.precision,
            "quantization": config.llm.quantization,
            "encoder": content_hash(self.run.folder / "encoder"),
            "encoder_settings": config.encoder.model_dump(mode="json"),
            "decoding": self.decoding.model_dump(mode="json"),
            "seed": config.seed,
        }

    @property
    def _reranker(self) -> Path:
        """Of the recommenders fitted on the last policy's texts, the one that reads what the run's reads, best on the validation users."""
        name = "history-tuned" if self.config.recommender.reads_history else "tuned"
        fits = read_parquet(self.experiment.judge(name, 0).with_name("fits")).to_pylist()
        of_kind = [fit for fit in fits if fit["out"].startswith(f"{name}-seed-")]
        best = max(of_kind, key=lambda fit: fit["validation_ndcg"])
        return self.experiment.judge(name, 0).with_name(best["out"])

    @property
    def _reranker_origin(self) -> Report:
        return {"judge": content_hash(self._reranker), "data": content_hash(self.run.folder / "data"), "encoder": self.origin["encoder"]}

    def _part(self, name: str, origin: Report, work: Callable[[Path], Report]) -> None:
        """Makes the folder `name` unless it is there, whole and of this origin."""
        path, entry = self.out / name, self.manifest["parts"].get(name)
        if entry and entry["origin"] == origin and path.is_dir() and entry["content"] == content_hash(path):
            return
        self.run.announce(f"export/{name}", 0, 0, None)
        with files.atomic(path) as partial:
            partial.mkdir()
            report = work(partial)
        self.manifest["parts"][name] = {"origin": origin, "content": content_hash(path), **report}
        self._write_manifest()

    def _write_manifest(self) -> None:
        summary = read_json(self.run.folder / "data" / "summary.json")
        run = {"rounds": self.config.rounds, "seed": self.config.seed, "lists_hash": summary["lists_hash"], "source": summary["source"]}
        self.manifest |= {"versions": self.run.folder.manifest["versions"], "run": run}
        write_json(self.manifest, self.out / "manifest.json")

    def _write_adapter(self, folder: Path) -> Report:
        assert self.policy.adapter is not None
        for file in [self.policy.adapter / "adapter_config.json", *self.policy.adapter.glob("*.safetensors")]:
            shutil.copy(file, folder / file.name)
        settings = read_json(folder / "adapter_config.json")
        write_json({**settings, "base_model_name_or_path": self.config.llm.name}, folder / "adapter_config.json")  # no path of this machine
        return {}

    def _write_model(self, folder: Path) -> Report:
        """The adapter merged into weights that were never quantised; saved as the hub has models."""
        whole = self.config.llm.model_copy(update={"quantization": "none"})
        model = load_model(whole, self.policy.source, self.policy.adapter)
        model.save_pretrained(str(folder))
        load_tokenizer(whole, self.policy.source).save_pretrained(str(folder))
        return {"parameters": model.num_parameters()}

    def _write_users(self, table: UserTable, new_users: Path | None) -> Report:
        prompts = read_parquet(self.run.prompts, ["user_id", "prompt_ids"])
        given, left_out = self._new_prompts(new_users) if new_users else (None, {})
        return {**write_users(self.run, table, self.decoding, self._drawn(), prompts, given), **left_out}

    def _new_prompts(self, file: Path) -> tuple[pa.Table, dict[str, int]]:
        items = read_parquet(self.run.folder / "data" / "items.parquet", ["item_id"])
        users, left_out = read_new_users(file, self.config.data, items, self.run.profiles)
        tokenizer = load_tokenizer(self.config.llm, self.policy.source)
        return prompt_table(self.config.prompt, self.run.catalogue, users, users, tokenizer).select(["user_id", "prompt_ids"]), left_out

    def _drawn(self) -> list[Path]:
        """Folders of the run's texts by this policy at this temperature."""
        names = [self.experiment.texts_of("tuned", split, self.decoding.temperature) for split in ("test", "validation")]
        if self.config.sampling.decoding == self.decoding:
            names.append(self.run.fitting_texts(self.config.rounds))
        folders = [self.run.folder / name for name in names]
        return [folder for folder in folders if (folder / "samples").is_dir()]
