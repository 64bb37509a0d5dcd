"""Will it fit, and how long will it take: the memory of a GPU and the time of an alignment run, before anything runs."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import PositiveInt, ValidationError, model_validator
from transformers import LlamaConfig, PreTrainedConfig

from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.alignment.memory import Pairs, Part, memory, peak
from dpo4rec.alignment.methods import model_settings
from dpo4rec.alignment.sizes import Sizes, sizes
from dpo4rec.errors import InputError
from dpo4rec.files import read_json
from dpo4rec.knowledge.config import LanguageModelConfig
from dpo4rec.settings import Settings

GIB = 2**30


class Shape(Settings):
    """A model of Llama's architecture by its numbers."""

    hidden: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    intermediate: PositiveInt
    vocabulary: PositiveInt
    tied: bool = False

    @model_validator(mode="after")
    def _heads_divide(self) -> "Shape":
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError(f"hidden {self.hidden} must be a multiple of heads {self.heads}, and that of kv_heads {self.kv_heads}")
        return self

    def settings(self) -> PreTrainedConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
        )


def read_shape(text: str) -> PreTrainedConfig:
    """The model of "hidden=4096,layers=32,heads=32,kv_heads=8,intermediate=14336,vocabulary=128256", with ",tied" where input and output
    share their embeddings.

    Raises:
        InputError: a number is missing, unknown or none.
    """
    values = {key.strip(): value or True for key, _, value in (part.partition("=") for part in text.split(","))}
    try:
        return Shape.model_validate(values).settings()
    except ValidationError as error:
        first = error.errors()[0]
        needed = "hidden=4096,layers=32,heads=32,kv_heads=8,intermediate=14336,vocabulary=128256[,tied]"
        where = ", ".join(["--shape", *map(str, first["loc"])])
        raise InputError(where, first["msg"].removeprefix("Value error, "), f"Write for instance {needed}") from error


def model_of(model: str | None, shape: str | None, llm: LanguageModelConfig) -> PreTrainedConfig:
    """The model that the command line names, or else the configured one. Raises `InputError` when it is not known before a run."""
    if model and shape:
        raise InputError("--shape", "there is --model, too", "Give one of them")
    if shape:
        return read_shape(shape)
    if model is None and llm.built_in:
        raise InputError("--model", "the built-in model is made of the data, so its size is not known yet", "Give --model or --shape")
    return model_settings(model or llm.name)


def measured_speed(tokens_per_second: float | None, summary: Path | None) -> float | None:
    """Tokens a second as given, or from the `summary.json` of a finished alignment.

    Raises:
        InputError: both are given, or the summary has no speed.
    """
    if summary is None:
        return tokens_per_second
    if tokens_per_second is not None:
        raise InputError("--measured", "there is --tokens-per-second, too", "Give one of them")
    speed = read_json(summary).get("speed", {}).get("tokens_per_second")
    if speed is None:
        raise InputError(str(summary), "it holds no tokens_per_second", "Give the summary.json of an alignment of two steps or more")
    return float(speed)


def plan(
    settings: PreTrainedConfig, config: AlignmentConfig, pairs: Pairs, gpu_memory_gib: float, tokens_per_second: float | None
) -> dict[str, Any]:
    """The memory of one GPU by parts, what to change if it is too small, and the time.

    Args:
        settings: of the model.
        gpu_memory_gib: what a GPU has.
        tokens_per_second: of all workers together, as a run's `summary.json` says; None: no time is estimated.

    Returns:
        "parameters", "trained", "tokens_per_pass", "parts" (name, bytes, when), "peak_bytes", "gpu_bytes", "cpu_bytes" (of one process),
        "fits", "changes" (each with "settings" and its "peak_bytes"; empty where it fits) and "time" (None or "steps",
        "reference_seconds", "training_seconds").

    Raises:
        InputError: the method is not `preference`, a pair is longer than `max_tokens`, or the model cannot be counted.
    """
    if config.method != "preference":
        raise InputError("alignment.method", f"{config.method} is not planned", "Plan method: preference; the others train no pairs")
    if pairs.prompt_tokens + pairs.answer_tokens > config.max_tokens:
        raise InputError(
            "--prompt-tokens, --answer-tokens",
            f"{pairs.prompt_tokens} + {pairs.answer_tokens} is over alignment.max_tokens = {config.max_tokens}: such pairs are dropped",
            "Give lower numbers, or raise it",
        )
    known: dict[tuple[object, ...], Sizes] = {}

    def sized(changed: AlignmentConfig) -> Sizes:
        key = tuple(changed.model_dump(include=COUNTED).values()), changed.zero_stage > 0
        return known.setdefault(key, known.get(key) or sizes(settings, changed))

    def parts_of(changed: AlignmentConfig) -> list[Part]:
        return memory(settings, changed, sized(changed), pairs)

    parts, space = parts_of(config), int(gpu_memory_gib * GIB)
    return {
        "parameters": sized(config).parameters,
        "trained": sized(config).trained,
        "tokens_per_pass": pairs.per_pass(config) * pairs.tokens(config.packing != "none"),
        "parts": [asdict(part) for part in parts],
        "peak_bytes": peak(parts),
        "gpu_bytes": space,
        "cpu_bytes": sum(part.bytes for part in parts if part.when == "cpu"),
        "fits": peak(parts) <= space,
        "changes": [] if peak(parts) <= space else _changes(config, lambda changed: peak(parts_of(changed)), space),
        "time": _time(config, pairs, tokens_per_second) if tokens_per_second else None,
    }


COUNTED = {"weights", "lora_rank", "lora_targets", "quantization", "precision", "gradient_checkpointing"}
"""What `sizes` depends on, beside whether there is ZeRO."""


def _changes(config: AlignmentConfig, peak_of: Callable[[AlignmentConfig], int], space: int) -> list[dict[str, Any]]:
    """Single changes that help, each with its peak; where none is enough, as many of them as are, one after the other."""
    found: list[tuple[dict[str, Any], int]] = []
    now = peak_of(config)
    for change in _candidates(config):
        changed = _changed(config, change)
        if changed and (size := peak_of(changed)) < now:
            found.append((change, size))
    if found and min(size for _, size in found) > space:
        found.append(_together(config, [change for change, _ in found], peak_of, space))
    return [{"settings": change, "peak_bytes": size} for change, size in found]


def _together(
    config: AlignmentConfig, changes: list[dict[str, Any]], peak_of: Callable[[AlignmentConfig], int], space: int
) -> tuple[dict[str, Any], int]:
    made, now = dict[str, Any](), peak_of(config)
    for change in changes:
        changed = _changed(config, made | change)
        if now > space and changed and (size := peak_of(changed)) < now:
            made, now = made | change, size
    return made, now


def _candidates(config: AlignmentConfig) -> Iterator[dict[str, Any]]:
    """From what costs least (time) to what changes most (numbers, what is trained)."""
    yield {"gradient_checkpointing": True}
    yield {"tokens_per_batch": config.tokens_per_batch // 2}
    yield {"precision": "bf16"}
    if config.workers > 1:
        yield from ({"zero_stage": stage} for stage in range(config.zero_stage + 1, 4))
    yield {"zero_stage": 3, "workers": max(2, 2 * config.workers)}
    yield {"zero_stage": max(2, config.zero_stage), "offload": True}
    yield {"zero_stage": 3, "offload": True}
    yield {"weights": "lora"}
    yield {"quantization": "nf4"}


def _changed(config: AlignmentConfig, change: dict[str, Any]) -> AlignmentConfig | None:
    """The configuration with the change, None where it is refused."""
    try:
        return AlignmentConfig.model_validate({**config.model_dump(), **change})
    except ValidationError:
        return None


def _time(config: AlignmentConfig, pairs: Pairs, tokens_per_second: float) -> dict[str, float]:
    """The reference is one forward pass over the pairs: 2 of the 4 FLOPs a parameter and token of training (full weights: 6; 2 more with
    gradient checkpointing)."""
    steps = math.ceil(pairs.number / config.pairs_per_step)
    epoch = steps * config.pairs_per_step * pairs.tokens(config.packing != "none") / tokens_per_second
    flops = (6 if config.weights == "full" else 4) + (2 if config.gradient_checkpointing else 0)
    reference = 0.0 if config.objective == "simpo" else epoch * 2 / flops
    return {"steps": steps * config.epochs, "reference_seconds": reference, "training_seconds": epoch * config.epochs}
