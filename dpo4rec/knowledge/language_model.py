"""Loading a language model: from the hub or a folder, in fp32, bf16 or 4-bit, with or without an adapter."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpo4rec.errors import InputError
from dpo4rec.knowledge.config import LanguageModelConfig


def load_tokenizer(config: LanguageModelConfig, source: str) -> PreTrainedTokenizerBase:
    """Raises `InputError` when the folder or hub name `source` cannot be loaded."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise _unloadable(source, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: LanguageModelConfig, source: str, adapter: Path | None) -> PreTrainedModel:
    """The model at `source` for inference, its adapter merged unless the weights are 4-bit; on the GPU when there is one."""
    quantized = config.quantization == "nf4"
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
            quantization_config=four_bit if quantized else None,
            trust_remote_code=config.trust_remote_code,
            device_map="cuda" if torch.cuda.is_available() else None,
        )
    except (OSError, ValueError) as error:
        raise _unloadable(source, error) from error
    if adapter is None:
        return model.eval()
    from peft import PeftModel  # takes seconds to import, which an actor without an adapter need not spend

    adapted: Any = PeftModel.from_pretrained(model, str(adapter))
    return (adapted if quantized else adapted.merge_and_unload()).eval()


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """All tokens that end a text: the tokenizer's and those that the model's own configuration names (chat models have several)."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    ids = set(named) if isinstance(named, list) else {named}
    return {int(i) for i in ids | {tokenizer.eos_token_id} if i is not None}


def _unloadable(source: str, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return InputError(
        f"llm.name {source!r}",
        f"the language model cannot be loaded ({reason})",
        "Give a folder with the model, a hub name that this machine can reach, or llm.name=tiny",
    )
