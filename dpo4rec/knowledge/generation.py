"""The built-in engine: several texts from each prompt, which is computed once for all of them.

Random numbers belong to rows, not to the batch: the token that sample s of user u draws at step t depends on its own seed and on the
model's probabilities alone. A call is one unit of work: how its prompts are batched follows from the call's arguments alone, so
its bytes stay the same wherever it runs on the same kind of hardware.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from dpo4rec.knowledge.config import Decoding
from dpo4rec.knowledge.drawing import draw
from dpo4rec.knowledge.shared_prompt import Group, SharedPromptModel, share_prompts

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""How far the logits of shared prompts may be from the plain forward pass's, as a share of the largest: rounding's doing."""


@dataclass(frozen=True)
class Sample:
    """One sampled text: token ids (with the end token when `finished`)."""

    token_ids: list[int]
    finished: bool


class BuiltinEngine:
    """Draws texts with a transformers model in this process.

    Args:
        end_ids: tokens that end a text.
        padding_id: stands in for what is not there.
        rows: about so many texts are drawn at the same time: speed against memory. It may change last bits.

    `warning` says why prompts are not shared, where they are not.
    """

    def __init__(self, model: PreTrainedModel, end_ids: set[int], padding_id: int, rows: int) -> None:
        self.model, self.end_ids, self.padding_id, self.rows = model, end_ids, padding_id, rows
        self.shared, reason = share_prompts(model, TOLERANCE[model.dtype])
        self.warning = f"prompts are not shared by their samples, which is slower: {reason}" if reason is not None else ""

    def generate(self, prompts: list[list[int]], seeds: list[list[int]], decoding: Decoding) -> list[list[Sample]]:
        """Draws `len(seeds[u])` samples for every prompt u; all prompts must want the same number.

        Args:
            prompts: U lists of token ids of any length.
            seeds: U lists of N seeds, one for each sample.

        Returns:
            U lists of N samples.
        """
        steps, samples = decoding.max_new_tokens, len(seeds[0])
        # prompts of like length together, so that little is padded; those that start later take the place of texts that have ended
        order = sorted(range(len(prompts)), key=lambda user: len(prompts[user]))
        size = max(1, self.rows // (GROUPS * samples))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        draws = [_uniforms([seeds[user] for user in batch], steps).to(self.model.device) for batch in batches]
        groups = [Group([prompts[user] for user in batch], samples, steps, self.padding_id, self.model.device) for batch in batches]
        ends = torch.tensor(sorted(self.end_ids), device=self.model.device)
        if self.shared is None:
            for group, uniforms in zip(groups, draws, strict=True):
                _draw_apart(self.model, group, uniforms, decoding, ends)
        else:
            _draw_together(self.shared, groups, draws, decoding, ends, self.rows)
        rows = torch.cat([group.tokens for group in groups]).tolist()
        kept = iter([_until_end(row, self.end_ids) for row in rows])
        by_user = {user: [next(kept) for _ in range(samples)] for batch in batches for user in batch}
        return [by_user[user] for user in range(len(prompts))]


GROUPS = 4
"""So many groups fill the batch at first: a group is as many prompts as are prefilled at a time."""


@torch.inference_mode()
def _draw_together(model: SharedPromptModel, groups: list[Group], draws: list[Tensor], decoding: Decoding, ends: Tensor, most: int) -> None:
    """Fills the groups' tokens, a new group starting whenever there is room for it among `most` running rows."""
    waiting = list(zip(groups, draws, strict=True))
    running: list[tuple[Group, Tensor]] = []
    while waiting or running:
        while waiting and sum(len(group.rows) for group, _ in [*running, waiting[0]]) <= (most if running else math.inf):
            group, uniforms = waiting.pop(0)
            group.take(draw(model.prefill(group), uniforms[:, 0], decoding), ends)
            running.append((group, uniforms))
        running = [(group, uniforms) for group, uniforms in running if len(group.rows)]
        if not running:
            continue
        logits = model.decode(tuple(group for group, _ in running))
        numbers = torch.cat([uniforms[group.rows, group.step] for group, uniforms in running])
        tokens = draw(logits, numbers, decoding).split([len(group.rows) for group, _ in running])
        for (group, _), drawn in zip(running, tokens, strict=True):
            group.take(drawn, ends)


@torch.inference_mode()
def _draw_apart(model: PreTrainedModel, group: Group, uniforms: Tensor, decoding: Decoding, ends: Tensor) -> None:
    """The same for a model whose attention cannot be replaced: through its own cache, the prompt's part repeated for every sample."""
    logits, cache, mask = _prefill_apart(model, group)
    while True:
        rows, at = group.rows, group.step
        group.take(draw(logits, uniforms[:, at], decoding)[rows], ends)
        if not len(group.rows):
            return
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = group.lengths.repeat_interleave(group.samples)[:, None] + at
        logits = model(group.tokens[:, at : at + 1], past_key_values=cache, attention_mask=mask, position_ids=positions).logits[:, -1]


def _prefill_apart(model: PreTrainedModel, group: Group) -> tuple[Tensor, StaticCache, Tensor]:
    """Logits of the first new token [U * N, V]; a cache with room for the tokens; attention mask [U * N, P]."""
    longest = group.ids.shape[1]
    shift = (torch.arange(longest, device=model.device) + group.lengths[:, None]) % longest
    ids, mask = group.ids.gather(1, shift), (~group.beyond).long().gather(1, shift)  # padded on the left: all end at one position
    once = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(ids, past_key_values=once, attention_mask=mask, position_ids=positions)
    cache = StaticCache(config=model.config, max_cache_len=longest + group.tokens.shape[1])
    for index, layer in enumerate(once.layers):
        keys, values = (kept.repeat_interleave(group.samples, 0) for kept in (layer.keys, layer.values))  # type: ignore[union-attr]
        cache.update(keys, values, index)
    return output.logits[:, -1].repeat_interleave(group.samples, 0), cache, mask.repeat_interleave(group.samples, 0)


def _uniforms(seeds: list[list[int]], steps: int) -> Tensor:
    """A number for every slot and step, [U * N, S] float64."""
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random(steps) for user in seeds for seed in user]))


def _until_end(row: list[int], ends: set[int]) -> Sample:
    for index, token in enumerate(row):
        if token in ends:
            return Sample(row[: index + 1], True)
    return Sample(row, False)
