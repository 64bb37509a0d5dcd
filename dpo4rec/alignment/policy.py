"""The model that is trained: loaded with its adapter, and written so that what lies on disk is what was trained."""

import contextlib
import json
import logging
from pathlib import Path

import deepspeed
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.alignment.reference import ADAPTER
from dpo4rec.errors import InputError
from dpo4rec.files import read_tensors, remove

logger = logging.getLogger(__name__)
Policy = PreTrainedModel | PeftModel


def load_policy(config: AlignmentConfig, model: str, initial_adapter: Path | None, device: torch.device) -> Policy:
    """Loads the language model and its LoRA adapter: a fresh one, or last round's to go on with. Dropout is off everywhere.

    Args:
        model: folder, or name on the hub.
        device: where 4-bit weights are to lie (the Trainer moves the others).

    Raises:
        InputError: the model or the adapter cannot be read, the adapter is not of the configured kind, or the model has not its modules.
    """
    base = _load_base(config, model, device)
    if config.gradient_checkpointing:
        _checkpoint_activations(config, base)
    if config.weights == "full":
        policy: Policy = base
    elif initial_adapter is None:
        check_targets(config, base.config)
        policy = get_peft_model(base, new_adapter(config))
    else:
        _check_adapter(config, initial_adapter)
        policy = PeftModel.from_pretrained(base, initial_adapter, is_trainable=True)
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return policy


def weights_dtype(config: AlignmentConfig) -> torch.dtype:
    """What the model is loaded in. Full weights keep float32 masters, whatever the precision."""
    return torch.bfloat16 if config.precision == "bf16" and config.weights == "lora" else torch.float32


def check_targets(config: AlignmentConfig, settings: PreTrainedConfig) -> None:
    """Raises `InputError` when the model of `settings` has no module of a name in `lora_targets`. No weights are made."""
    if config.weights == "full" or isinstance(config.lora_targets, str):
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    matrices = {name.removesuffix(".weight") for name, parameter in model.named_parameters() if parameter.dim() > 1}
    for target in config.lora_targets:
        if not any(name == target or name.endswith(f".{target}") for name in matrices):
            known = sorted({name.rpartition(".")[2] for name in matrices})
            raise InputError("alignment.lora_targets", f"the model has no module {target!r}", f"It has {', '.join(known)}")


def new_adapter(config: AlignmentConfig) -> LoraConfig:
    """The adapter that a first round trains."""
    targets = config.lora_targets if isinstance(config.lora_targets, str) else list(config.lora_targets)
    return LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets, task_type="CAUSAL_LM")


def add_reference_adapter(policy: Policy, folder: Path) -> None:
    """Lays a frozen adapter beside the trained one, to be the reference (`as_reference`).

    Raises:
        InputError: it cannot be read.
    """
    assert isinstance(policy, PeftModel)
    try:
        policy.load_adapter(str(folder), ADAPTER, is_trainable=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(str(folder), f"the adapter cannot be read ({error})", "Give the folder of a LoRA adapter of PEFT") from error


def whole_weights(policy: Policy) -> dict[str, Tensor]:
    """The trained tensors by name, copied to the CPU: adapter or all. Every process must call it: ZeRO-3 gathers them one by one."""
    return {
        name: _whole(parameter)
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad or not isinstance(policy, PeftModel)
    }


def write_policy(policy: Policy, weights: dict[str, Tensor], folder: Path) -> None:
    """Writes an adapter (PEFT) or a full model as safetensors; one process does it, with what `whole_weights` gave."""
    if isinstance(policy, PeftModel):
        policy.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False, selected_adapters=["default"])
        remove(folder / "README.md")  # an unfilled model card
        _sort_lists(folder / "adapter_config.json")  # PEFT writes sets in the order of their hashes
    else:
        policy.save_pretrained(str(folder), state_dict=weights)


def check_written(policy: Policy, weights: dict[str, Tensor], folder: Path) -> int:
    """Reads the folder again and compares it with the trained tensors; returns their number.

    Raises:
        RuntimeError: a tensor is missing, not finite or different, or the adapter is still zero.
    """
    expected = weights
    if isinstance(policy, PeftModel):
        expected = get_peft_model_state_dict(policy, state_dict=weights, save_embedding_layers=False)
    written = {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in read_tensors(path).items()}
    if written.keys() != expected.keys():
        raise RuntimeError(f"{folder}: {len(written)} tensors were written, {len(expected)} were trained, their names differ")
    for name, tensor in expected.items():
        if not written[name].isfinite().all() or not torch.equal(written[name], tensor):
            raise RuntimeError(f"{folder}: the tensor {name} is not finite or not what was trained")
    moved = [tensor for name, tensor in written.items() if "lora_B" in name] or list(written.values())  # B starts at zero
    if not any(tensor.any() for tensor in moved):
        raise RuntimeError(f"{folder}: the written weights are all zero: nothing was learned")
    return len(written)


def _load_base(config: AlignmentConfig, model: str, device: torch.device) -> PreTrainedModel:
    dtype = weights_dtype(config)
    options: dict[str, object] = {}
    if config.quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        if config.zero_stage < 3:  # ZeRO-3 places the shards by itself
            options["device_map"] = {"": device}
    try:
        settings = _without_dropout(AutoConfig.from_pretrained(model, trust_remote_code=False))
        return AutoModelForCausalLM.from_pretrained(model, config=settings, dtype=dtype, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {model}", f"it cannot be loaded ({error})", "Give a folder or a hub name of a causal language model"
        ) from error


def _without_dropout(settings: PreTrainedConfig) -> PreTrainedConfig:
    for name, value in vars(settings).items():
        if "drop" in name and isinstance(value, float):
            setattr(settings, name, 0.0)
    return settings


def needs_reentrant(config: AlignmentConfig) -> bool:
    """Whether activations must be checkpointed with `use_reentrant=True`."""
    return config.weights == "lora" and config.zero_stage == 3


def _checkpoint_activations(config: AlignmentConfig, base: PreTrainedModel) -> None:
    if needs_reentrant(config):
        logger.warning("LoRA under ZeRO-3: activations are checkpointed with use_reentrant=True, the only kind that finds gathered weights")
        base.enable_input_require_grads()  # else the frozen embedding cuts the gradient
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": needs_reentrant(config)})


def _check_adapter(config: AlignmentConfig, folder: Path) -> None:
    try:
        found = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(str(folder), f"the adapter cannot be read ({error})", "Give the folder of a LoRA adapter of PEFT") from error
    if (found.r, found.lora_alpha) != (config.lora_rank, config.lora_alpha):
        raise InputError(
            str(folder),
            f"its rank and alpha are {found.r} and {found.lora_alpha}, the configuration says {config.lora_rank} and {config.lora_alpha}",
            "A round goes on with the adapter of the round before: use its lora_rank and lora_alpha",
        )


def _whole(parameter: nn.Parameter) -> Tensor:
    gathered: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if hasattr(parameter, "ds_id"):
        gathered = deepspeed.zero.GatheredParameters([parameter])
    with gathered:
        return parameter.detach().to("cpu", copy=True)


def _sort_lists(path: Path) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    values["target_modules"] = sorted(values["target_modules"])
    path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")
