"""The engine vLLM, an optional extra: the same prompts, seeds and decoding in, the same samples out as the built-in engine's.

It has not been run: it was written by the source of vLLM 0.33, and a test holds its calls against the signatures there. The source says:

- `n` and `seed` do not exclude each other, but with both, sample i of a prompt gets the seed `seed + i` (`ParentRequest`), and each
  sample becomes a request of its own. Our samples have seeds of their own, so each is a request from the start: the same work.
  The prefix cache computes their common prompt once.
- A seed makes a row's random numbers its own. Its probabilities still depend in their last bits on the rows that it is computed with, so
  that texts are reproducible only nearly, unless vLLM's batch-invariant mode is on (VLLM_BATCH_INVARIANT=1).
- A text that an end token ended has `finish_reason` "stop" and keeps that token as its last id.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from dpo4rec.errors import InputError
from dpo4rec.knowledge.config import Decoding, LanguageModelConfig
from dpo4rec.knowledge.generation import Sample
from dpo4rec.knowledge.language_model import load_tokenizer
from dpo4rec.knowledge.vllm_limits import RANKS


class VllmEngine:
    """A language model, and perhaps its adapter, in vLLM on this machine's GPU.

    Args:
        config: precision and trust; `refuse` has said that vLLM can do what it asks.
        source: folder or hub name of the model.
        adapter: folder of a LoRA adapter (PEFT), which stays apart from the weights.

    Raises:
        InputError: vLLM cannot be imported, or the model's tokenizer or the adapter cannot be read.
    """

    def __init__(self, config: LanguageModelConfig, source: str, adapter: Path | None) -> None:
        try:
            import vllm
            from vllm.inputs import TokensPrompt
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise InputError(
                "sampling.engine", f"vllm cannot be imported ({error})", "Run: pip install 'dpo4rec[vllm]', or use sampling.engine=builtin"
            ) from error
        self.params_type, self.prompt_type = vllm.SamplingParams, TokensPrompt
        self.end_ids = _end_ids(config, source)
        self.llm = vllm.LLM(
            model=source,
            trust_remote_code=config.trust_remote_code,
            dtype={"bf16": "bfloat16", "fp32": "float32"}[config.precision],
            seed=0,  # every request has a seed of its own
            max_model_len=-1,  # as long as the memory allows
            generation_config="vllm",  # nothing comes from the model's own
            enable_prefix_caching=True,
            enable_lora=adapter is not None,
            max_loras=1,
            max_lora_rank=_room_for(adapter) if adapter else RANKS[0],
        )
        self.adapter = LoRARequest(lora_name=str(adapter), lora_int_id=1, lora_path=str(adapter)) if adapter else None

    def generate(self, prompts: list[list[int]], seeds: list[list[int]], decoding: Decoding) -> list[list[Sample]]:
        """Draws `len(seeds[u])` samples for every prompt u.

        Args:
            prompts: U lists of token ids of any length.
            seeds: U lists of N seeds, one for each sample.

        Returns:
            U lists of N samples.

        Raises:
            RuntimeError: vLLM gave up a request.
        """
        requests = [self.prompt_type(prompt_token_ids=prompt) for prompt, own in zip(prompts, seeds, strict=True) for _ in own]
        params = [self._params(seed, decoding) for own in seeds for seed in own]
        answers = iter(self.llm.generate(requests, params, use_tqdm=False, lora_request=self.adapter))
        return [[_sample(next(answers).outputs[0]) for _ in own] for own in seeds]

    def _params(self, seed: int, decoding: Decoding) -> Any:
        return self.params_type(
            n=1,
            seed=seed,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=decoding.top_k,  # 0 keeps all, here and there
            min_p=0.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repetition_penalty=1.0,
            max_tokens=decoding.max_new_tokens,
            stop_token_ids=self.end_ids,
            detokenize=False,
        )


def _sample(output: Any) -> Sample:
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a request for the reason {output.finish_reason!r}")
    return Sample(list(output.token_ids), output.finish_reason == "stop")


def _end_ids(config: LanguageModelConfig, source: str) -> list[int]:
    """All tokens that end a text, as `language_model.end_ids` gives them of a loaded model."""
    try:
        settings = GenerationConfig.from_pretrained(source)
    except OSError:  # the model has no such file
        model = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
        settings = GenerationConfig.from_model_config(model)
    named = settings.eos_token_id
    ids: Iterable[Any] = named if isinstance(named, list) else [named]
    return sorted({int(i) for i in [*ids, load_tokenizer(config, source).eos_token_id] if i is not None})


def _room_for(adapter: Path) -> int:
    """The least of vLLM's ranks that holds the adapter's."""
    file = adapter / "adapter_config.json"
    try:
        rank = json.loads(file.read_text(encoding="utf-8"))["r"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(str(adapter), f"the adapter cannot be read ({error})", "Give the folder of a LoRA adapter of PEFT") from error
    fitting = [room for room in RANKS if room >= rank]
    if not fitting:
        raise InputError(str(file), f"vLLM takes adapters up to rank {RANKS[-1]}, this one has {rank}", "Use sampling.engine=builtin")
    return fitting[0]
