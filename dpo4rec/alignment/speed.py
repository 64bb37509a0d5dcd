"""How fast a run trains and what memory it takes, as seen by the first process."""

import resource
import time

import torch

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12}
"""Dense bf16 operations a second of GPUs, by a part of their names (NVIDIA's data sheets)."""


class Speed:
    """Counts from the end of the first step on, which has the warm-up and the reference in it.

    Args:
        parameters: of the model, without the embeddings that are looked up.
        trains_all: full weights rather than an adapter.
        processes: that share the work.
    """

    def __init__(self, parameters: int, trains_all: bool, processes: int) -> None:
        self.flops_per_token = (6 if trains_all else 4) * parameters
        self.processes = processes
        self.begun: float | None = None
        self.seconds = self.comparisons = self.tokens = self.computed = 0.0

    def step(self, comparisons: float, tokens: float, computed: float) -> None:
        """After each step: its comparisons, tokens, and tokens with padding, over all processes."""
        now = time.perf_counter()
        if self.begun is not None:
            self.seconds = now - self.begun
            self.comparisons, self.tokens, self.computed = self.comparisons + comparisons, self.tokens + tokens, self.computed + computed
        else:
            self.begun = now

    def summary(self) -> dict[str, float]:
        """Comparisons and tokens (without padding) a second, share of padding, peak memory of this process and device, MFU.

        MFU = tokens/s x FLOPs per token / (processes x peak of the GPU); a token takes 6 N FLOPs with full weights and 4 N with an adapter
        (no weight gradients), N the parameters; attention and recomputation do not count. Rates are missing after a single step, MFU on
        unknown devices.
        """
        found = peaks()
        if self.seconds:
            rate = self.tokens / self.seconds
            found |= {"comparisons_per_second": self.comparisons / self.seconds, "tokens_per_second": rate}
            found["padding"] = 1 - self.tokens / self.computed
            peak = _peak_flops()
            if peak:
                found["mfu"] = rate * self.flops_per_token / (self.processes * peak)
        return {name: round(value, 4) for name, value in found.items()}


def peaks() -> dict[str, float]:
    """The most memory that this process and its GPU have held so far, GiB."""
    found = {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if torch.cuda.is_available():
        found["peak_gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return {name: round(value, 4) for name, value in found.items()}


def _peak_flops() -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
