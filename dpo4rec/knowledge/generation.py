"""Sampling several texts from one prompt: the prompt is computed once and its keys and values serve all its samples.

Random numbers belong to rows, not to the batch: the token that sample s of user u draws at step t depends on its own seed and on
the model's probabilities alone. Shapes: U prompts, N samples each, R = U * N rows, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from dpo4rec.knowledge.config import Decoding


@dataclass(frozen=True)
class Sample:
    """One sampled text: token ids (with the end token when `finished`)."""

    token_ids: list[int]
    finished: bool


@torch.inference_mode()
def generate(
    model: PreTrainedModel, prompts: list[list[int]], seeds: list[list[int]], decoding: Decoding, end_ids: set[int], padding_id: int
) -> list[list[Sample]]:
    """Draws `len(seeds[u])` samples for every prompt u; all prompts must want the same number.

    Args:
        prompts: U lists of token ids of any length.
        seeds: U lists of N seeds, one for each sample.

    Returns:
        U lists of N samples.
    """
    samples = len(seeds[0])
    rows, steps = len(prompts) * samples, decoding.max_new_tokens
    uniforms = np.stack([np.random.default_rng(seed).random(steps) for user in seeds for seed in user])  # [R, steps]
    draws = torch.from_numpy(uniforms).to(model.device)
    logits, cache, mask = prefill(model, prompts, samples, steps, padding_id)
    lengths = mask.sum(1, keepdim=True)  # [R, 1] the position of the next token
    ends = torch.tensor(sorted(end_ids), device=model.device)
    tokens = torch.full((rows, steps), padding_id, device=model.device)
    running = torch.ones(rows, dtype=torch.bool, device=model.device)
    for step in range(steps):
        token = draw(logits, draws[:, step], decoding)
        tokens[:, step] = torch.where(running, token, padding_id)
        running &= ~torch.isin(token, ends)
        if step + 1 == steps or not bool(running.any()):
            break
        mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
        output = model(token[:, None], past_key_values=cache, attention_mask=mask, position_ids=lengths + step)
        logits = output.logits[:, -1]
    kept = [_until_end(row, end_ids) for row in tokens.tolist()]
    return [kept[u * samples : (u + 1) * samples] for u in range(len(prompts))]


def prefill(
    model: PreTrainedModel, prompts: list[list[int]], samples: int, steps: int, padding_id: int
) -> tuple[Tensor, StaticCache, Tensor]:
    """Runs the prompts once and repeats their keys and values for each sample.

    Returns:
        Logits of the first new token [R, V]; a cache with room for `steps` more tokens; attention mask [R, longest prompt].
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[padding_id] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    once = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(ids, past_key_values=once, attention_mask=mask, position_ids=positions, logits_to_keep=1)
    cache = StaticCache(config=model.config, max_cache_len=longest + steps)
    for index, layer in enumerate(once.layers):
        keys, values = (kept.repeat_interleave(samples, 0) for kept in (layer.keys, layer.values))  # type: ignore[union-attr]
        cache.update(keys, values, index)
    return output.logits[:, -1].repeat_interleave(samples, 0), cache, mask.repeat_interleave(samples, 0)


def draw(logits: Tensor, uniforms: Tensor, decoding: Decoding) -> Tensor:
    """Tokens [R] by inverting the cumulative distribution at `uniforms` [R] (float64, in [0, 1))."""
    scores = logits.float() / decoding.temperature
    if decoding.top_k and decoding.top_k < scores.shape[-1]:
        least = scores.topk(decoding.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if decoding.top_p < 1:
        ordered, order = scores.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        cut = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, before >= decoding.top_p)
        scores = scores.masked_fill(cut, float("-inf"))
    cumulative = scores.double().softmax(-1).cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=scores.shape[-1] - 1)


def _until_end(row: list[int], end_ids: set[int]) -> Sample:
    for index, token in enumerate(row):
        if token in end_ids:
            return Sample(row[: index + 1], True)
    return Sample(row, False)
