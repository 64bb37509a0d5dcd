"""Attention in a packed row: a prompt's answers see the prompt and themselves, never each other nor other prompts.

Shapes: H heads, D numbers a head, T tokens of the row; one row.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv

from dpo4rec.alignment.batches import Spans

NAME = "shared_prefix"
"""The `attn_implementation` under which transformers finds it."""
BLOCK = 128
"""FlexAttention on GPU works on square blocks of this size: packed rows are a multiple of it there."""


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | None,
    scaling: float | None = None,
    spans: Spans = (),
    masks: dict[tuple[int, tuple[int, ...]], Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers; the model's forward hands `spans` and `masks` through.

    On CPU every prompt is computed apart, so that what must not be seen costs nothing. On GPU FlexAttention skips the mask's empty
    blocks.

    Args:
        query: [1, H, T, D]; key and value [1, H', T, D] with H a multiple of H'.
        attention_mask: what `block_mask` makes (GPU), or None.
        spans: of the row, see `Collator`.
        masks: of `answer_masks`.

    Returns: [1, T, H, D], None.
    """
    if attention_mask is not None:
        return flex_attention_forward(module, query, key, value, attention_mask, scaling, **options)[0], None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    sizes = [prompt + sum(answers) for prompt, answers in spans]
    parts = []
    for span, q, k, v in zip(spans, query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True):
        prompt = span[0]
        parts.append(
            functional.scaled_dot_product_attention(q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt], is_causal=True, scale=scaling)
        )
        if span[1]:
            mask = (masks or {})[span]
            parts.append(functional.scaled_dot_product_attention(q[:, :, prompt:], k, v, attn_mask=mask, scale=scaling))
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def answer_masks(spans: Spans, device: torch.device) -> dict[tuple[int, tuple[int, ...]], Tensor]:
    """What the answers of each prompt see, [answer tokens, prompt + answer tokens] of booleans."""
    masks = {}
    for prompt, answers in set(spans):
        owner = torch.repeat_interleave(torch.arange(len(answers)), torch.tensor(answers, dtype=torch.long)).to(device)
        own = (owner[:, None] == owner[None, :]).tril()
        masks[prompt, answers] = functional.pad(own, (prompt, 0), value=True)
    return masks


def block_mask(spans: Spans, device: torch.device) -> BlockMask:
    """The mask of the whole row for FlexAttention."""
    sizes = torch.tensor([size for prompt, answers in spans for size in (prompt, *answers)], device=device)
    prompts = torch.tensor([at for at, (_, answers) in enumerate(spans) for _ in range(1 + len(answers))], device=device)
    pieces = torch.tensor([piece for _, answers in spans for piece in range(1 + len(answers))], device=device)  # 0: the prompt
    prompt_of, piece_of = prompts.repeat_interleave(sizes), pieces.repeat_interleave(sizes)

    def sees(batch: Tensor, head: Tensor, at: Tensor, seen: Tensor) -> Tensor:
        related = (piece_of[seen] == 0) | (piece_of[seen] == piece_of[at])
        return (at >= seen) & (prompt_of[at] == prompt_of[seen]) & related

    return create_block_mask(sees, None, None, len(prompt_of), len(prompt_of), device=device, BLOCK_SIZE=BLOCK)


AttentionInterface.register(NAME, shared_prefix_attention)
