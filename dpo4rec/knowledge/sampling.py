"""The sampler: a worker that turns users' prompts into several texts each."""

from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from dpo4rec.files import stable_seed
from dpo4rec.knowledge.config import Decoding, LanguageModelConfig
from dpo4rec.knowledge.generation import BuiltinEngine
from dpo4rec.knowledge.language_model import end_ids, load_model, load_tokenizer
from dpo4rec.settings import Settings

SAMPLES = pa.schema(
    [
        ("user_id", pa.string()),
        ("sample", pa.int32()),
        ("text", pa.string()),
        ("completion", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("finished", pa.bool_()),
    ]
)


class SamplerConfig(Settings):
    """Everything a sampler needs; `source` is the base model's folder or hub name, `adapter` the policy's adapter folder."""

    language_model: LanguageModelConfig
    source: str
    adapter: str | None
    decoding: Decoding
    samples: int
    engine: Literal["builtin", "vllm"]
    rows_at_once: int
    """Of the built-in engine; vLLM finds its own."""
    seed: int
    purpose: str
    """Part of every row's seed: the round, or what the texts are for, so that no two stages share random numbers."""


class Sampler:
    """Worker: table with user_id, prompt_ids in; N rows a user with `SAMPLES` columns out.

    The seed of a row is a hash of run, purpose, user and sample (never of worker or order), and a unit is always one call of the engine.
    """

    def __init__(self, config: SamplerConfig) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(config.language_model, config.source)
        self.engine = self._engine(config, Path(config.adapter) if config.adapter else None)
        self.warning = getattr(self.engine, "warning", "")

    def _engine(self, config: SamplerConfig, adapter: Path | None) -> Any:
        if config.engine == "vllm":
            from dpo4rec.knowledge.vllm_engine import VllmEngine  # an extra

            return VllmEngine(config.language_model, config.source, adapter)
        model = load_model(config.language_model, config.source, adapter)
        return BuiltinEngine(model, end_ids(model, self.tokenizer), self.tokenizer.pad_token_id, config.rows_at_once)

    def __call__(self, unit: pa.Table) -> pa.Table:
        users, config = unit["user_id"].to_pylist(), self.config
        seeds = [[stable_seed(config.seed, config.purpose, user, sample) for sample in range(config.samples)] for user in users]
        drawn = self.engine.generate(unit["prompt_ids"].to_pylist(), seeds, config.decoding)
        rows = []
        for user, samples in zip(users, drawn, strict=True):
            for number, sample in enumerate(samples):
                answer = sample.token_ids[:-1] if sample.finished else sample.token_ids
                completion = str(self.tokenizer.decode(answer, skip_special_tokens=False))
                rows.append(
                    {
                        "user_id": user,
                        "sample": number,
                        "text": completion.strip(),
                        "completion": completion,
                        "token_ids": sample.token_ids,
                        "finished": sample.finished,
                    }
                )
        return pa.Table.from_pylist(rows, schema=SAMPLES)
