"""How large a model and its activations are in training, counted on the model's own code without its weights.

The model is built on torch's meta device and adapted as `load_policy` does; its forward pass is run on fake tensors, which have shapes and
types but no numbers, and what autograd keeps for the backward pass is counted. So there is no formula of one architecture. (For a layer of
a GPT of hidden size h Korthikanti et al. 2022, arXiv 2205.05198, section 4.1, find 34 h bytes a token in 16 bit; without dropout's masks
31 h, and no scores of attention are kept here.)
"""

import contextlib
import copy
import logging
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.alignment.policy import Policy, check_targets, new_adapter, weights_dtype
from dpo4rec.errors import InputError

logging.getLogger(FakeTensorMode.__module__).setLevel(logging.CRITICAL)  # what fails is told by an InputError
NAME = "counted"
"""The `attn_implementation` under which transformers finds `_counted_attention`."""
TOKENS = 509
"""A prime: what is kept of the tokens is a multiple of it, 16-bit copies of weights are not."""


@dataclass(frozen=True)
class Sizes:
    """Of a whole model. Bytes are those of a process that has all of it, without ZeRO."""

    parameters: int
    """Numbers of the model, without adapter."""
    trained: int
    """Numbers that are trained: all, or the adapter's."""
    frozen_bytes: int
    """Weights that are not trained."""
    constants_bytes: int
    """What 4-bit weights are dequantised with."""
    trained_bytes: int
    copied: int
    """Numbers of the trained matrices, of which autocast keeps a 16-bit copy through a pass."""
    largest: int
    """Numbers of the largest 4-bit matrix, which is dequantised to be used; 0 where none is."""
    kept: int
    """Bytes a token that are kept for the backward pass, without the output layer's."""
    layer: int
    """Bytes a token that a layer keeps while it is computed again for the backward pass; 0 without gradient checkpointing."""


def sizes(settings: PreTrainedConfig, config: AlignmentConfig) -> Sizes:
    """The sizes of the model of `settings` when it is trained as `config` says.

    Where all layers have the same parameters, models of one and of two layers are counted, and each further layer counts like the second.

    Raises:
        InputError: the architecture is not a language model's, it lacks what `lora_targets` names, or its code does not run without numbers
            (some mixtures of experts).
    """
    check_targets(config, settings)
    try:
        with torch.device("meta"):
            alike, depth = _layers(AutoModelForCausalLM.from_config(settings))
        if alike:
            one, two = (_counted(_shallow(settings, layers), config) for layers in (1, 2))
            first, second = (vars(one), vars(two))
            found = Sizes(**{name: first[name] + (depth - 1) * (second[name] - first[name]) for name in first})
        else:
            found = _counted(settings, config)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # of any architecture's own code
        raise InputError(
            f"model {settings.model_type}",
            f"its memory cannot be counted without running it in {config.precision} ({type(error).__name__}: {error})",
            "Try the other alignment.precision, or --shape: a dense model about as wide and deep",
        ) from error
    if config.gradient_checkpointing:
        whole = sizes(settings, config.model_copy(update={"gradient_checkpointing": False}))
        found = replace(found, layer=whole.kept // depth)
    return found


def _layers(model: PreTrainedModel) -> tuple[bool, int]:
    """Whether the layers have the same parameters, and their number."""
    layers = max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len, default=nn.ModuleList())
    kinds = {(type(layer), tuple((name, value.shape) for name, value in layer.named_parameters())) for layer in layers}
    return len(kinds) == 1 and len(layers) > 2, max(1, len(layers))


def _shallow(settings: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    shallow = copy.deepcopy(settings)
    shallow.get_text_config().num_hidden_layers = layers
    return shallow


def _counted(settings: PreTrainedConfig, config: AlignmentConfig) -> Sizes:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(settings, dtype=weights_dtype(config), attn_implementation=NAME)
        head = base.get_output_embeddings()
        linear = [module.weight for module in base.modules() if isinstance(module, nn.Linear) and module is not head]
        packed = {id(weight): weight.numel() for weight in linear if config.quantization == "nf4"}
        parameters = sum(value.numel() for value in base.parameters())
        policy = cast(Policy, base if config.weights == "full" else get_peft_model(base, new_adapter(config)))
    if config.zero_stage and config.precision == "bf16":
        cast(nn.Module, policy).to(torch.bfloat16)  # so does DeepSpeed, with the adapter, too
    trained = [value for value in policy.parameters() if value.requires_grad]
    frozen = [value for value in policy.parameters() if not value.requires_grad]
    looked_up = {id(module.weight) for module in base.modules() if isinstance(module, nn.Embedding)} - {id(head.weight)}
    return Sizes(
        parameters=parameters,
        trained=sum(value.numel() for value in trained),
        frozen_bytes=sum((value.numel() + 1) // 2 if id(value) in packed else value.nbytes for value in frozen),
        constants_bytes=sum(_constants_bytes(numbers) for numbers in packed.values()),
        trained_bytes=sum(value.nbytes for value in trained),
        copied=sum(value.numel() for value in trained if value.ndim > 1 and id(value) not in looked_up),
        largest=max(packed.values(), default=0),
        kept=_kept_bytes(base, policy, config) // TOKENS,
        layer=0,
    )


def _constants_bytes(numbers: int) -> int:
    """Of a 4-bit matrix with double quantisation: 8 bits a block of 64 numbers, 32 bits for 256 blocks, and the tables of both levels
    (Dettmers et al. 2023, arXiv 2305.14314, section 3)."""
    blocks = -(-numbers // 64)
    return blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)


def _kept_bytes(base: PreTrainedModel, policy: Policy, config: AlignmentConfig) -> int:
    """Bytes of all that autograd keeps of `TOKENS` tokens; a storage counts once, weights do not."""
    if config.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train()
    half = config.precision == "bf16" and not config.zero_stage
    if config.quantization == "nf4" and half:
        _leave_inputs_as_they_are(policy)
    kept: dict[int, torch.UntypedStorage] = {}  # holds them, so that no two have the same address

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() % TOKENS == 0:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode():
        _fake_weights(policy)
        weights = {value.untyped_storage()._cdata for value in policy.parameters()}
        row = {"input_ids": torch.zeros(1, TOKENS, dtype=torch.long), "position_ids": torch.arange(TOKENS)[None]}
        cast_ = torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()
        with saved_tensors_hooks(keep, lambda tensor: tensor), cast_:
            base.base_model(**row, use_cache=False)
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


def _fake_weights(policy: nn.Module) -> None:
    """Puts a fake tensor in place of every weight and buffer; shared ones stay shared. Weights that follow a fake tensor cannot be moved by
    torch's own `to_empty`."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the original, so that no two have the same id
    for module in policy.modules():
        for values in (module._parameters, module._buffers):
            for name, value in values.items():
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype)
                    fake = nn.Parameter(fake, value.requires_grad) if isinstance(value, nn.Parameter) else fake
                    cast(dict[str, Any], values)[name] = made.setdefault(id(value), (value, fake))[1]


def _leave_inputs_as_they_are(policy: nn.Module) -> None:
    """Around 4-bit layers peft leaves it to autocast to convert inputs; around others it converts them first, once for each layer."""
    for module in policy.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            cast(Any, module).cast_input_dtype_enabled = False


class _KeptByAttention(torch.autograd.Function):
    """Keeps what FlexAttention does: query, key, value, output, and a float32 number a head and token. The output lies in memory as queries
    do, token by token. It has no backward: fake tensors are only counted."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, tokens = query.shape[:3]
        out = query.new_empty(batch, tokens, heads, value.shape[3]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out


def _counted_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return cast(Tensor, _KeptByAttention.apply(query, key, value)).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _counted_attention)
