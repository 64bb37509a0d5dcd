"""What lies in a GPU's memory in training, part by part: arithmetic on what `sizes` counted.

It follows what the Trainer, PEFT, torch's AdamW and DeepSpeed 0.19 do with the settings of `ds_configs/`. Letters: n trained numbers, w
workers, b bytes of a trained number (4; with DeepSpeed and bf16: 2), T tokens of a forward pass, N completion tokens among them, V
vocabulary, D hidden size, c bytes of a number in matrix products (2 in bf16, 4 in fp32).
"""

from dataclasses import dataclass
from typing import Any, Literal

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from transformers import PreTrainedConfig

from dpo4rec.alignment.arguments import deepspeed_file
from dpo4rec.alignment.attention import BLOCK
from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.alignment.schedule import cut
from dpo4rec.alignment.scoring import LOGITS_AT_ONCE
from dpo4rec.alignment.sizes import Sizes
from dpo4rec.files import read_json

OUTSIDE = 2**30
"""Bytes of the CUDA context, its libraries and the allocator's holes: an allowance, not a count."""
PADDED_LOGITS_BYTES = 20
"""Of each logit in a padded pass: logits, those at completions in float32, and three of that size in the backward pass."""
When = Literal["always", "pass", "step", "cpu"]
"""Always there, in a forward and backward pass, in the optimizer's step; or in the CPU's memory."""


@dataclass(frozen=True)
class Part:
    """Bytes of one process."""

    name: str
    bytes: int
    when: When = "always"


@dataclass(frozen=True)
class Pairs:
    """The data of a plan: pairs with an own prompt each, all of the same length."""

    number: int
    prompt_tokens: int
    answer_tokens: int

    def tokens(self, packing: bool) -> int:
        """Of a pair: its prompt once, or for each answer."""
        return (1 if packing else 2) * self.prompt_tokens + 2 * self.answer_tokens

    def per_pass(self, config: AlignmentConfig) -> int:
        """Pairs of the largest forward pass, as `cut` deals them."""
        each, step = self.tokens(config.packing != "none"), list(range(config.pairs_per_step))
        bins = cut([step], step, lambda rows: each * len(rows), config.tokens_per_batch, config.workers)
        return len(bins[0][0])


def memory(settings: PreTrainedConfig, config: AlignmentConfig, sizes: Sizes, pairs: Pairs) -> list[Part]:
    """The parts, those of no bytes left out. Parts of a pass or a step are what is there at the worst moment of it."""
    parts = [*_model(config, sizes), *_optimizer(settings, config, sizes), *_pass(settings, config, sizes, pairs)]
    # log-probabilities of the reference of two answers, epsilon and margin
    parts += [Part("reference cache", 16 * pairs.number), Part("CUDA", OUTSIDE)]
    return [part for part in parts if part.bytes]


def peak(parts: list[Part]) -> int:
    """Bytes of the GPU at the worst moment: a pass or a step, whichever takes more."""
    by_time = {when: sum(part.bytes for part in parts if part.when == when) for when in ("always", "pass", "step")}
    return by_time["always"] + max(by_time["pass"], by_time["step"])


def _model(config: AlignmentConfig, sizes: Sizes) -> list[Part]:
    """Under ZeRO-3 every process has its share of all weights, with offload in CPU memory, and gathers what it computes with."""
    full = config.weights == "full"
    weights = sizes.frozen_bytes + (sizes.trained_bytes if full else 0)
    adapter = 0 if full else sizes.trained_bytes * (2 if config.reference == "round_0" else 1)
    parts = [("weights", weights), ("adapter", adapter)]
    constants = Part("4-bit constants", sizes.constants_bytes)
    if config.zero_stage < 3:
        return [*(Part(name, size) for name, size in parts), constants]
    live = DeepSpeedZeroConfig(stage=3).max_live_parameters * (2 if config.precision == "bf16" else 4)
    shares = [Part(name, -(-size // config.workers), "cpu" if config.offload else "always") for name, size in parts]
    return [*shares, constants, Part("ZeRO-3: gathered weights, at most", min(weights + adapter, live))]


def _optimizer(settings: PreTrainedConfig, config: AlignmentConfig, sizes: Sizes) -> list[Part]:
    """Gradients: n b (ZeRO-2, 3: / w); DDP's buckets hold them once more. AdamW: 8 n, under ZeRO with float32 masters 12 n / w (ZeRO-3 in
    fp32 trains its shares themselves). In a step: 4 n for AdamW's square roots, under ZeRO with gradients in float32 8 n / w. Offload
    puts masters, AdamW and gradients (float32 and as they come) into CPU memory.
    """
    n, stage = sizes.trained, config.zero_stage
    if not stage:
        buckets = sizes.trained_bytes if config.workers > 1 else 0
        return [
            Part("gradients", sizes.trained_bytes),
            Part("optimizer", 8 * n),
            Part("DDP buckets", buckets),
            Part("AdamW's roots", 4 * n, "step"),
        ]
    share, gradients = -(-n // config.workers), -(-sizes.trained_bytes // config.workers)
    states = share * (8 if stage == 3 and config.precision == "fp32" and not config.offload else 12)
    bucket = Part("ZeRO buckets", _bucket_bytes(settings, config), "always" if stage == 3 else "pass")
    if config.offload:
        return [bucket, Part("gradients", gradients + 4 * share, "cpu"), Part("optimizer", states, "cpu")]
    whole = sizes.trained_bytes if stage == 1 else 0
    return [
        Part("gradients", whole + gradients),
        Part("optimizer", states),
        bucket,
        Part("AdamW's roots, gradients in float32", 8 * share, "step"),
    ]


def _bucket_bytes(settings: PreTrainedConfig, config: AlignmentConfig) -> int:
    """The buffer through which gradients are averaged: as `ds_configs/` says, where "auto" is the hidden size squared."""
    given: Any = read_json(deepspeed_file(config))["zero_optimization"].get("reduce_bucket_size")
    numbers = settings.get_text_config().hidden_size ** 2 if given == "auto" else given
    return (2 if config.precision == "bf16" else 4) * int(numbers or DeepSpeedZeroConfig().reduce_bucket_size)


def _pass(settings: PreTrainedConfig, config: AlignmentConfig, sizes: Sizes, pairs: Pairs) -> list[Part]:
    """Of a packed row, filled up to whole blocks, or of padded rows with as many tokens."""
    number, c = pairs.per_pass(config), 2 if config.precision == "bf16" else 4
    tokens = -(-number * pairs.tokens(config.packing != "none") // BLOCK) * BLOCK
    autocast = config.precision == "bf16" and not config.zero_stage
    return [
        Part("16-bit copies of weights", 2 * sizes.copied if autocast else 0, "pass"),
        Part("dequantised weights", c * sizes.largest, "pass"),
        Part("activations", tokens * sizes.kept, "pass"),
        Part("recomputed layer", tokens * sizes.layer, "pass"),
        Part("logits", _logits(settings, config, number, pairs.answer_tokens), "pass"),
    ]


def _logits(settings: PreTrainedConfig, config: AlignmentConfig, number: int, answer: int) -> int:
    """The output layer's (`_TokenLogProbs`): its input of N D numbers and their gradient; of a chunk of logits the probabilities that were
    kept, their gradient in float32 and in c bytes; with further chunks twice as much of float32. Full weights: V D c for their gradient,
    in bf16 under autocast 4 V D more to convert it.
    """
    text, c = settings.get_text_config(), 2 if config.precision == "bf16" else 4
    vocabulary, hidden, n = text.vocab_size, text.hidden_size, 2 * number * answer
    if config.packing == "none":
        return PADDED_LOGITS_BYTES * 2 * number * (answer + 1) * vocabulary
    rows = max(1, LOGITS_AT_ONCE // vocabulary)
    chunk = min(n, rows) * vocabulary * ((16 if n > rows else 8) + (c if c == 2 or n > rows else 0))
    convert = 4 if c == 2 and not config.zero_stage else 0
    return chunk + 2 * n * hidden * c + (vocabulary * hidden * (c + convert) if config.weights == "full" else 0)
