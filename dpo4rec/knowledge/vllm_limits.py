"""What vLLM cannot do that the built-in engine can. Free of heavy imports: it is asked while a configuration is read."""

from collections.abc import Iterable

from dpo4rec.knowledge.config import LanguageModelConfig

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's `max_lora_rank` may have (vllm/config/lora.py, 0.33)."""
TEMPERATURES = (0.01, 2.0)
"""What vLLM takes as it is: it raises lower temperatures to the first, silently but for a warning, and refuses higher ones."""


def refuse(language_model: LanguageModelConfig, temperatures: Iterable[float], lora_rank: int | None) -> str | None:
    """Why vLLM cannot sample with these settings, as a sentence that ends in a remedy; None where it can.

    Args:
        temperatures: all that the run may sample at.
        lora_rank: of the adapter that is trained; None: full weights are trained.
    """
    if language_model.quantization != "none":
        return (
            f"sampling.engine=vllm loads no {language_model.quantization} weights with an adapter the way they were trained: "
            "use sampling.engine=builtin, or llm.quantization=none"
        )
    if language_model.precision != "bf16":
        return "vLLM's adapter kernels compute in 16 bits alone: sampling.engine=vllm needs llm.precision=bf16"
    least, most = TEMPERATURES
    for temperature in temperatures:
        if not least <= temperature <= most:
            return (
                f"vLLM samples at temperatures from {least:g} to {most:g}, not at {temperature:g}: use sampling.engine=builtin for others"
            )
    if lora_rank is not None and lora_rank > RANKS[-1]:
        return f"vLLM takes adapters up to rank {RANKS[-1]}: lower alignment.lora_rank={lora_rank}, or use sampling.engine=builtin"
    return None
