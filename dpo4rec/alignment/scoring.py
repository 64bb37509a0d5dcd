"""Log-probabilities of answers: packed rows through the model's own layers, or padded rows through its plain forward pass.

Shapes: A answers, N completion tokens, T tokens of a packed row, L positions of a padded one, V vocabulary, D hidden size.
"""

import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from dpo4rec.alignment import attention
from dpo4rec.alignment.batches import Batch, packed, padded

LOGITS_AT_ONCE = 2**25
"""Numbers: the logits of so many tokens exist at a time (128 MiB in float32)."""


class Scorer:
    """Scores batches by a model as wrapped for training; `base` is the causal language model inside.

    `packed` is whether packed rows can be scored. `allow_packing` decides it.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.base, self.packed = base, False
        self.trims_logits = "logits_to_keep" in inspect.signature(type(base).forward).parameters

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sum of the log-probabilities of every answer's tokens, [A] float32, log-softmax in float32."""
        if "spans" not in batch:
            return _padded_log_probs(model, batch, self.trims_logits)
        names = ("input_ids", "position_ids", "spans", "predictors", "targets")
        tokens = model(**{name: batch[name] for name in names})["log_probs"]
        return torch.zeros(len(batch["lengths"]), dtype=torch.float32, device=tokens.device).index_add(0, batch["owners"], tokens)

    @torch.no_grad()
    def allow_packing(self, model: nn.Module, device: torch.device, longest: int, tolerance: float) -> str | None:
        """Sets the model to packed rows if these are exact: judged by a small random input, whose log-probabilities must be those of
        padded rows. Returns why not, or None.

        Args:
            longest: tokens of the longest prompt with an answer; a sliding window must not be shorter.
            tolerance: nats per token.
        """
        config, head, native = self.base.config.get_text_config(), self.base.get_output_embeddings(), self.base.config._attn_implementation
        window = getattr(config, "sliding_window", None)
        if type(head) is not nn.Linear:
            return f"its output layer is a {type(head).__name__}"
        if window is not None and window < longest:
            return f"its attention window of {window} tokens is shorter than the longest text of {longest}"
        plain = self(model, _sample(config.vocab_size, device, packs=False))
        self.base.set_attn_implementation(attention.NAME)
        if self.base.config._attn_implementation != attention.NAME:
            return "its attention cannot be replaced"
        own_forwards = self.base.forward, head.forward
        _replace_forward(self.base, types.MethodType(_scoring_forward(self.base.forward), self.base))
        _replace_forward(head, types.MethodType(_scoring_head, head))
        try:
            error = (self(model, _sample(config.vocab_size, device, packs=True)) - plain).abs().max().item() / LONGEST_ANSWER
            reason = None if error <= tolerance else f"its log-probabilities would be off by {error:.2g} nats per token"
        except (RuntimeError, ValueError, TypeError, AttributeError) as failure:
            reason = f"it fails with a packed row ({type(failure).__name__}: {failure})"
        self.packed = reason is None
        if not self.packed:
            _replace_forward(self.base, own_forwards[0])
            _replace_forward(head, own_forwards[1])
            self.base.set_attn_implementation(native)
        return reason


LONGEST_ANSWER = 7


def _replace_forward(module: Any, forward: Any) -> None:
    module.forward = forward


def _sample(vocabulary: int, device: torch.device, packs: bool) -> Batch:
    draw, lengths = torch.Generator().manual_seed(0), ((9, (5, 3, LONGEST_ANSWER)), (4, (2,)), (17, (6, 6)))
    prompts = [
        (_random(draw, prompt, vocabulary), [_random(draw, answer, vocabulary) for answer in answers]) for prompt, answers in lengths
    ]
    batch = packed(prompts, attention.BLOCK if device.type == "cuda" else 1) if packs else padded(prompts)
    batch["lengths"] = torch.tensor([answer for _, answers in lengths for answer in answers])
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _random(draw: torch.Generator, length: int, vocabulary: int) -> tuple[int, ...]:
    return tuple(torch.randint(vocabulary, (length,), generator=draw).tolist())


def _scoring_forward(plain: Any) -> Any:
    def forward(self: PreTrainedModel, *args: Any, predictors: Tensor | None = None, **inputs: Any) -> Any:
        if predictors is None:
            return plain(*args, **inputs)
        targets, spans, ids = inputs["targets"], inputs["spans"], inputs["input_ids"]
        if ids.is_cuda:
            how: dict[str, Any] = {"attention_mask": attention.block_mask(spans, ids.device)}
        else:
            how = {"masks": attention.answer_masks(spans, ids.device)}
        hidden = self.base_model(input_ids=ids, position_ids=inputs["position_ids"], use_cache=False, spans=spans, **how)
        return {"log_probs": self.get_output_embeddings()(hidden.last_hidden_state[0, predictors], targets)}

    return forward


def _scoring_head(self: nn.Linear, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
    """The output layer: logits, or with targets their log-probabilities. Called as a module, so that ZeRO-3 has its weights at hand."""
    if targets is None:
        return functional.linear(hidden, self.weight, self.bias)
    dtype = _compute_dtype(self.weight.dtype, hidden.device)
    bias = None if self.bias is None else self.bias.to(dtype)
    return _TokenLogProbs.apply(hidden.to(dtype), self.weight.to(dtype), bias, targets)


def _compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What matrices are multiplied in: autocast's choice, or that of the weights."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(hidden W + b)[target] in float32, in chunks of tokens: full logits never exist.

    The first chunk's probabilities are kept for the gradient, those of further ones are computed again.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        ctx.rows, kept = max(1, LOGITS_AT_ONCE // len(weight)), None
        found = []
        for part, ids in zip(hidden.split(ctx.rows), targets.split(ctx.rows), strict=True):
            logits = functional.linear(part, weight, bias).float()
            total = logits.logsumexp(1, keepdim=True)
            found.append((logits.gather(1, ids[:, None]) - total).squeeze(1))
            if kept is None and any(ctx.needs_input_grad):
                kept = logits.sub_(total).exp_()
        ctx.save_for_backward(hidden, weight, bias, targets, kept)
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, kept = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden)
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        to_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        for start in range(0, len(hidden), ctx.rows):
            at = slice(start, start + ctx.rows)
            probabilities = functional.linear(hidden[at], weight, bias).float().softmax(1) if start else kept
            pull = probabilities * -grads[0][at, None]  # d log p_t / d logit_v = [v = t] - p_v
            pull = pull.scatter_add_(1, targets[at, None], grads[0][at, None]).to(hidden.dtype)
            to_hidden[at] = pull @ weight
            if to_weight is not None:
                to_weight.addmm_(pull.T, hidden[at])
            if to_bias is not None:
                to_bias += pull.sum(0)
        return to_hidden, to_weight, to_bias, None


def _padded_log_probs(model: nn.Module, batch: Batch, trims_logits: bool) -> Tensor:
    """Logits are computed from the position before the batch's first completion token on, never for the common prompt part."""
    mask = batch["completion_mask"].bool()
    keep = mask.shape[1] - int(mask.any(0).int().argmax()) + 1
    options: dict[str, Any] = {"logits_to_keep": keep} if trims_logits else {}
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **options).logits
    mask = mask[:, 1 - keep :]
    at_tokens = logits[:, -keep:-1][mask].float()  # [N, V]: padding costs no softmax
    targets = batch["input_ids"][:, 1 - keep :][mask]
    found = at_tokens.gather(1, targets[:, None]).squeeze(1) - at_tokens.logsumexp(1)
    per_position = torch.zeros(mask.shape, dtype=torch.float32, device=logits.device).masked_scatter(mask, found)
    return per_position.sum(1)
