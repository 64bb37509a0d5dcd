"""One prefill serves all samples of a prompt: attention to the prompt's keys and values, which are kept once, and to a sample's own.

Shapes: U prompts of a group with N samples each (U * N slots), R rows still running, P tokens of the longest prompt, S new tokens at
most, H heads, H' key-value heads (g = H / H'), D numbers a head, V vocabulary.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

NAME = "shared_prompt"
"""The `attn_implementation` under which transformers finds it."""


class Group:
    """Prompts that are prefilled together, and the samples drawn from them. All its running rows have drawn equally many tokens.

    Args:
        prompts: U lists of token ids.
        samples: N.
        steps: S.
        padding_id: fills the tokens of shorter prompts and of ended samples.
    """

    def __init__(self, prompts: list[list[int]], samples: int, steps: int, padding_id: int, device: torch.device) -> None:
        self.samples, self.step, longest = samples, 0, max(map(len, prompts))
        ids = [prompt + [padding_id] * (longest - len(prompt)) for prompt in prompts]
        self.ids = torch.tensor(ids, device=device)  # [U, P]
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.beyond = torch.arange(longest, device=device) >= self.lengths[:, None]  # [U, P] true at padding
        self.bias = torch.where(self.beyond, float("-inf"), 0.0)  # added to scores: on CPU ten times as fast as filling where beyond
        self.tokens = torch.full((len(prompts) * samples, steps), padding_id, device=device)
        self.rows = torch.arange(len(self.tokens), device=device)  # the slots [R] that still run
        self.prompt: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: keys and values [U, H', P, D]
        self.own: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: keys and values [U * N, H', S, D]

    @property
    def last(self) -> Tensor:
        """The tokens [R] that were drawn last."""
        return self.tokens[self.rows, self.step - 1]

    @property
    def positions(self) -> Tensor:
        """Of `last`, [R]."""
        return self.lengths[self.rows // self.samples] + self.step - 1

    def take(self, drawn: Tensor, ends: Tensor) -> None:
        """Notes the tokens [R] that were drawn, and lets go of the rows that ended by one of `ends` or have S tokens."""
        self.tokens[self.rows, self.step] = drawn
        self.step += 1
        running = ~torch.isin(drawn, ends) & (self.step < self.tokens.shape[1])
        self.rows = self.rows[running]
        if not len(self.rows):
            self.prompt, self.own = {}, {}

    def prefill(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Causal attention over the prompts, which are padded on the right where no token sees it; [U, P, H, D]."""
        self.prompt[layer] = key.contiguous(), value.contiguous()  # read again at every step
        groups = query.shape[1] // key.shape[1]
        found = functional.scaled_dot_product_attention(
            query, repeat_kv(key, groups), repeat_kv(value, groups), is_causal=True, scale=scaling
        )
        return found.transpose(1, 2).contiguous()

    def decode(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of each running row's last token (query [R, H, D], key and value [R, H', D]), [R, H, D]."""
        slots, at = len(self.tokens), self.step - 1
        (users, heads, longest, width), groups = self.prompt[layer][0].shape, query.shape[1] // key.shape[1]
        if layer not in self.own:
            room = (slots, heads, self.tokens.shape[1], width)
            self.own[layer] = key.new_zeros(room), key.new_zeros(room)  # rows that have ended are computed with the others, so no NaN
        keys, values = self.own[layer]
        keys[self.rows, :, at], values[self.rows, :, at] = key, value
        keys, values = keys[:, :, : at + 1], values[:, :, : at + 1]
        grid = query.new_zeros(slots, heads, groups, width)
        grid[self.rows] = query.view(-1, heads, groups, width) * scaling
        # the samples of a prompt are the rows of one matrix product with its keys
        by_prompt = grid.view(users, self.samples, heads, groups, width).transpose(1, 2).reshape(users, heads, -1, width)
        to_prompt = by_prompt @ self.prompt[layer][0].transpose(2, 3)  # [U, H', N * g, P]
        to_prompt += self.bias.to(query.dtype)[:, None, None]
        to_own = (grid @ keys.transpose(2, 3)).view(users, self.samples, heads, groups, -1)  # [U, N, H', g, step]
        to_own = to_own.transpose(1, 2).reshape(users, heads, self.samples * groups, -1)
        weights = torch.cat([to_prompt, to_own], -1).softmax(-1, dtype=torch.float32).to(query.dtype)
        found = weights[..., :longest] @ self.prompt[layer][1]  # [U, H', N * g, D]
        found = found.view(users, heads, self.samples, groups, width).transpose(1, 2)
        of_own = weights[..., longest:].view(users, heads, self.samples, groups, -1).transpose(1, 2).reshape(slots, heads, groups, -1)
        found = found.reshape(slots, heads, groups, width) + of_own @ values
        return found[self.rows].flatten(1, 2)


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    prefilling: Group | None = None,
    decoding: tuple[Group, ...] = (),
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers; the model's forward hands `prefilling` or `decoding` through.

    Args:
        query: [U, H, P, D] in prefill; [1, H, R, D] in decoding, the rows of all groups one after the other; key and value likewise.

    Returns: [U, P, H, D] or [1, R, H, D], None.
    """
    layer: Any = module.layer_idx
    if prefilling is not None:
        return prefilling.prefill(layer, query, key, value, scaling), None
    sizes = [len(group.rows) for group in decoding]
    parts = zip(decoding, *(states[0].transpose(0, 1).split(sizes) for states in (query, key, value)), strict=True)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return torch.cat([group.decode(layer, q, k, v, scale) for group, q, k, v in parts])[None], None


AttentionInterface.register(NAME, shared_prompt_attention)


class SharedPromptModel:
    """A causal language model that prefills and decodes groups. `why_not` says why a model cannot be one."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def prefill(self, group: Group) -> Tensor:
        """Logits of every slot's first token, [U * N, V]."""
        lasts, which = (group.lengths - 1).unique(return_inverse=True)
        logits = self.model(group.ids, use_cache=False, prefilling=group, logits_to_keep=lasts).logits  # [U, distinct lengths, V]
        return logits[torch.arange(len(which), device=which.device), which].repeat_interleave(group.samples, 0)

    def decode(self, groups: tuple[Group, ...]) -> Tensor:
        """Logits of the token after each running row's last one, [R, V]: the rows of all groups one after the other."""
        ids = torch.cat([group.last for group in groups])[None]
        positions = torch.cat([group.positions for group in groups])[None]
        return self.model(ids, position_ids=positions, use_cache=False, decoding=groups).logits[0]


@torch.inference_mode()
def share_prompts(model: PreTrainedModel, tolerance: float) -> tuple[SharedPromptModel | None, str | None]:
    """The model with its attention replaced, and None; or, where that would not be exact, None and the reason, the model as it was.

    Judged by a small random input, whose logits must be those of the plain forward pass within `tolerance` of the largest.
    """
    config = model.config.get_text_config()
    native, of_model = config._attn_implementation, inspect.signature(type(_plain(model)).forward).parameters
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        return None, f"its attention sees a window of {config.sliding_window} tokens"
    if "logits_to_keep" not in of_model:
        return None, "it computes logits at all positions"
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(config.vocab_size, (size,), generator=draw).tolist() for size in (9, 4)]
    following = torch.randint(config.vocab_size, (2, 4), generator=draw).to(model.device)  # [steps, slots]
    expected = [model(torch.tensor([prompts[slot // 2] + following[:, slot].tolist()], device=model.device)).logits[0] for slot in range(4)]
    _plain(model).set_attn_implementation(NAME)
    try:
        error = _error(SharedPromptModel(model), prompts, following, expected)
        reason = None if error <= tolerance else f"its logits would be off by {error:.2g}"
    except (RuntimeError, ValueError, TypeError, AttributeError) as failure:
        reason = f"it fails with shared prompts ({type(failure).__name__}: {failure})"
    if reason is None:
        return SharedPromptModel(model), None
    _plain(model).set_attn_implementation(native)
    return None, reason


def _error(shared: SharedPromptModel, prompts: list[list[int]], following: Tensor, expected: list[Tensor]) -> float:
    """Largest difference from the logits `expected` of four samples, as a share of the largest; row 0 ends early."""
    group, none = Group(prompts, 2, 3, 0, shared.model.device), following.new_tensor([-1])
    found, error = shared.prefill(group), 0.0
    for tokens in following:
        for row, logits in zip(group.rows.tolist(), found, strict=True):
            at = len(prompts[row // 2]) + group.step - 1
            error = max(error, (logits - expected[row][at]).abs().max().item())
        group.take(tokens[group.rows], none if group.step else tokens[:1])
        found = shared.decode((group,))
    return error / max(logits.abs().max().item() for logits in expected)


def _plain(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
