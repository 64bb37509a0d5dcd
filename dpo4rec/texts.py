"""Texts by a policy: sampled, encoded, described."""

from operator import methodcaller
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec import files
from dpo4rec.cluster.pool import Step, cut
from dpo4rec.cluster.units import Files, Rows
from dpo4rec.data.user_rows import UserRows, of_split
from dpo4rec.files import batches, read_parquet
from dpo4rec.knowledge.config import Decoding
from dpo4rec.knowledge.description import TrueClaims, describe
from dpo4rec.knowledge.encoders import Encoder, EncoderWorkerConfig, TfidfEncoder
from dpo4rec.knowledge.form import Form
from dpo4rec.knowledge.language_model import load_tokenizer
from dpo4rec.knowledge.prompts import item_prompt_table
from dpo4rec.knowledge.sampling import Sampler, SamplerConfig
from dpo4rec.prepared import Policy, Prepared
from dpo4rec.stages import Report

Users = tuple[str, list[Any]]
"""Of the users in the table of prompts: a column, and its values that are meant."""


def of_splits(*splits: str) -> Users:
    return "split", list(splits)


class Texts(Prepared):
    """The stages that make texts. A folder of texts holds `samples` and, once they are encoded, `vectors`."""

    # -- sampling ---------------------------------------------------------------------------------------------------------------

    def texts(self, name: str, policy: Policy, users: Users, decoding: Decoding, samples: int) -> Report:
        """Samples texts for these users into `<name>/samples`."""
        out, sampler = self.folder / name, self.sampler(name, policy, decoding, samples)

        def work() -> Report:
            self.stream(f"{name}/sample", [self.sampling_step(sampler, out)], self.prompt_units(users))
            return {**self.describe(out / "samples"), **self.failures(out / "samples")}

        settings = {"sampler": self.sampler_settings(sampler), "splits": users[1], **self.pool_settings()}
        return self.stage(f"{name}/sample", settings, [self.prompts.parent, *policy.files], [out / "samples"], work)

    def encoded_texts(self, name: str, policy: Policy, users: Users, decoding: Decoding, samples: int) -> Report:
        report = self.texts(name, policy, users, decoding, samples)
        self.encode(name)
        return report

    def prompt_units(self, users: Users) -> Rows:
        return Rows(self.prompts, self.config.sampling.users_per_unit, ["user_id", "prompt_ids"], users)

    def sampling_step(self, sampler: SamplerConfig, folder: Path, **more: Any) -> Step:
        usual = {"skip_failed": self.config.sampling.skip_failed_rows, "gpus": self.config.cluster.gpus_per_worker}
        return self.step(Sampler, sampler, folder / "samples", **usual | more)

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

    def sampler_settings(self, sampler: SamplerConfig) -> SamplerConfig:
        """The part of a stage's settings that says how texts are drawn; the policy's files are among its inputs."""
        return sampler.model_copy(update={"source": "", "adapter": None})

    def write_item_texts(self) -> Report:
        """One text for each item by the untuned model: KAR's item-factual knowledge."""
        config, out = self.config, self.folder / "item_texts"
        sampler = self.sampler("item_texts", self.policy(0), config.sampling.decoding, 1)

        def work() -> Report:
            tokenizer = load_tokenizer(config.llm, self.policy(0).source)
            prompts = item_prompt_table(config.prompt, read_parquet(self.folder / "data" / "items.parquet"), tokenizer)
            self.stream(
                "item-texts",
                [self.step(Sampler, sampler, out, gpus=config.cluster.gpus_per_worker)],
                cut(prompts, config.sampling.users_per_unit),
            )
            texts = read_parquet(out)
            return {"texts": len(texts), "unfinished": len(texts) - pc.sum(texts["finished"].cast(pa.int64())).as_py()}

        settings = {
            "request": config.prompt.item_request,
            "chat_template_arguments": config.prompt.chat_template_arguments,
            "sampler": self.sampler_settings(sampler),
            **self.pool_settings(),
        }
        return self.stage("item-texts", settings, [self.folder / "data", *self.policy(0).files], [out], work)

    # -- encoding ---------------------------------------------------------------------------------------------------------------

    def encode(self, name: str) -> Report:
        """Vectors of the texts in `<name>/samples` into `<name>/vectors`."""
        out = self.folder / name

        def work() -> Report:
            self.stream(f"{name}/encode", [self.encoding_step(out)], Files(out / "samples"))
            return {**self.cut_texts(name), **self.failures(out / "vectors")}

        settings = {"encoder": self.config.encoder, **self.pool_settings()}
        return self.stage(f"{name}/encode", settings, [out / "samples", self.encoder_folder], [out / "vectors"], work)

    def encoding_step(self, folder: Path, **more: Any) -> Step:
        """Reads what the sampling step has written."""
        gpus = 0 if self.config.encoder.kind == "tfidf" else self.config.cluster.gpus_per_worker
        usual = {
            "skip_failed": self.config.sampling.skip_failed_rows,
            "gpus": gpus,
            "take": methodcaller("select", ["user_id", "sample", "text"]),
        }
        return self.step(Encoder, self.encoder, folder / "vectors", **usual | more)

    def cut_texts(self, name: str) -> Report:
        """How many texts are longer than the encoder reads, for a stage's report; where there are any, the log has a warning."""
        count = sum(pc.sum(part["cut"]).as_py() for part in batches(self.folder / name / "vectors", ["cut"]))
        if count:
            self.folder.log("warning", stage=name, message=f"{count} texts are longer than the encoder reads and were cut")
        return {"cut_texts": count}

    def fit_encoder(self, name: str) -> Report:
        """TF-IDF sees the items' texts and the training users' texts in `<name>`; item vectors are written for every kind of encoder."""
        samples, item_texts = self.folder / name / "samples", [self.folder / "item_texts"] if self.config.prompt.item_request else []

        def work() -> Report:
            items = read_parquet(self.folder / "data" / "items.parquet", ["item_id", "text"])
            for texts in item_texts:
                written = read_parquet(texts)["text"]  # in the order of the items
                items = items.set_column(1, "text", pc.binary_join_element_wise(items["text"], written, " "))
            if self.config.encoder.kind == "tfidf":
                learned = items["text"].to_pylist() + self._training_texts(samples)
                TfidfEncoder.fit(learned, self.config.encoder.dimensions, self.encoder_folder)
            encoded = Encoder(self.encoder)(items)
            files.write_tensors({"item_vectors": files.matrix(encoded["vector"])}, self.item_vectors)
            return {"dimensions": encoded["vector"].type.list_size, "cut_item_texts": pc.sum(encoded["cut"]).as_py()}

        return self.stage("encoder", self.config.encoder, [self.folder / "data", samples, *item_texts], [self.encoder_folder], work)

    def _training_texts(self, samples: Path) -> list[str]:
        users, found = UserRows(self.folder / "data" / "users.parquet"), []
        for part in batches(samples, ["user_id", "text"]):
            found += of_split(part, users, "train")["text"].to_pylist()
        return found

    @property
    def encoder_folder(self) -> Path:
        return self.folder / "encoder"

    @property
    def item_vectors(self) -> Path:
        return self.encoder_folder / "item_vectors.safetensors"

    @property
    def encoder(self) -> EncoderWorkerConfig:
        return EncoderWorkerConfig(
            encoder=self.config.encoder, folder=str(self.encoder_folder), language_model=self.config.llm, source=self.policy(0).source
        )

    # -- what texts say ---------------------------------------------------------------------------------------------------------

    def describe(self, samples: Path) -> Report:
        """How the texts of a folder look; for the built-in model also the share of grounded claims."""
        prompt, threshold = self.config.prompt, self.config.data.like_threshold
        histories = self.folder / "data" / "histories.parquet"
        truth = TrueClaims(self.catalogue, histories, prompt, threshold) if self.config.llm.built_in else None
        return describe(samples, self.form, truth)

    @property
    def claim_names(self) -> dict[str, set[str]] | None:
        """For the built-in model, the names that well-formed texts may use."""
        return self.catalogue.names if self.config.llm.built_in else None

    @property
    def form(self) -> Form:
        return Form(self.claim_names)
