"""Sampling on one GPU: the built-in engine against transformers' `generate` and continuous batching, in bf16; Llama shapes, random
weights.

    python -m benchmarks.gpu.sampling --part 8b --minutes 9 --out FOLDER     # writes FOLDER/gpu_sampling.json
    python -m benchmarks.gpu.sampling --micro --out FOLDER                   # the same with a tiny shape, on CPU too

Prompts, samples, lengths and decoding parameters are those of benchmarks/sampling.py; each side at its best size (rows drawn at once,
prompts a call, requests a batch), each size in a fresh process, the first of `--repeats` being warm-up. Continuous batching takes
FlashAttention where `flash_attn` or `kernels` is installed; without, its attention is `paged|sdpa`, which multiplies every request with
every other's keys, and the result says so (`flash_attention`).

Two limits stand beside it. Bandwidth: a step of R rows reads all weights (without looked-up embeddings), the keys and values of R / 10
prompts and those of R samples, on average half grown, at the measured rate of a copy (bytes read and written). Arithmetic: 2 FLOPs for
each weight and token, prompts shared by their samples, at the measured rate of a matrix product of the feed-forward layer's shape.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from benchmarks.gpu.runs import SHAPES, Result, Run, Runs, best
from benchmarks.sampling import NEW, SAMPLES, Prompts, by_engine, by_generate, make_model, make_prompts, rate
from dpo4rec.files import write_json

SIZES = {"engine": (1280, 640, 2560, 320), "generate": (64, 32, 128, 16), "continuous": (256, 64, 1024)}
BYTES = 2
"""Of a number in bf16."""


def by_continuous(model: PreTrainedModel, prompts: Prompts, size: int) -> Callable[[], int]:
    """`size` requests a batch. The keys and values of a prompt's samples are shared where its blocks are full."""
    decoding = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": SAMPLES, "max_new_tokens": NEW}
    config: Any = GenerationConfig(**decoding, eos_token_id=-1, pad_token_id=0)
    room = {} if model.device.type == "cuda" else {"num_blocks": 128, "max_batch_tokens": 512}  # else most of the memory
    batching = ContinuousBatchingConfig(max_requests_per_batch=size, **room)

    def run() -> int:
        found: Any = model.generate_batch(prompts, config, continuous_batching_config=batching, persistent_manager=True)
        lengths = [len(request.generated_tokens) for request in found.values() if request.error is None]
        # transformers 5.17 waits for all texts of a prompt and returns the first; no text ends early, so all are as long
        if len(lengths) not in (len(prompts), len(prompts) * SAMPLES) or set(lengths) != {NEW}:
            raise RuntimeError(f"{len(lengths)} of {len(prompts)} x {SAMPLES} texts were drawn, of {set(lengths)} tokens")
        return len(prompts) * SAMPLES * NEW

    return run


def one(run: Run) -> Result:
    """A run in this process."""
    device, shape = "cuda" if torch.cuda.is_available() else "cpu", SHAPES[run["shape"]]
    if run["side"] == "limits":
        return limits(shape, run["size"], device)
    with torch.device(device):
        model = make_model(shape, torch.bfloat16)  # type: ignore[arg-type]
    prompts = make_prompts(run["prompts"], shape["vocab_size"])
    side = {"engine": by_engine, "generate": by_generate, "continuous": by_continuous}[run["side"]](model, prompts, run["size"])
    rates = [rate(side) for _ in range(run["repeats"])]
    found: Result = {"tokens_per_second": max(rates), "rates": rates}
    if run["side"] == "continuous":
        model.destroy_cached_continuous_batching_manager()
        found["flash_attention"] = is_flash_attn_2_available() or is_flash_attn_3_available()
    return found | ({"peak_gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30} if device == "cuda" else {})


def limits(shape: dict[str, Any], rows: int, device: str) -> Result:
    """What the machine moves and multiplies, and what a token needs of it."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    looked_up = 0 if shape.get("tie_word_embeddings") else model.get_input_embeddings().weight.numel()
    numbers = sum(weight.numel() for weight in model.parameters()) - looked_up
    per_head = shape["hidden_size"] // shape["num_attention_heads"]
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    source = torch.zeros(2**30 if device == "cuda" else 2**24, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, device=device, dtype=torch.bfloat16) for size in ((rows, hidden), (hidden, wide)))
    return {
        "weights": numbers,
        "cache_bytes_per_token": 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * per_head * BYTES,
        "copy_bytes_per_second": 2 * source.nbytes / _seconds(lambda: target.copy_(source), device),
        "product_flops_per_second": 2 * rows * hidden * wide / _seconds(lambda: left @ right, device),
    }


def _seconds(work: Callable[[], Any], device: str) -> float:
    """Of one call: the best of five series."""
    found, calls = [], 20 if device == "cuda" else 2
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(calls):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append((time.perf_counter() - begun) / calls)
    return min(found)


def figures(parts: dict[str, list[Result]]) -> dict[str, float]:
    """Of whatever was run."""
    found: dict[str, float] = {}
    for shape, runs in parts.items():
        rates = {side: result for side in SIZES if (result := best(runs, "tokens_per_second", side=side))}
        found |= {f"tokens_per_second_{side}_{shape}": result["tokens_per_second"] for side, result in rates.items()}
        if "engine" not in rates:
            continue
        engine, limit = rates["engine"], best(runs, "weights", side="limits")
        for side, name in (("generate", "generate"), ("continuous", "continuous_batching")):
            if side in rates:
                found[f"tokens_per_second_ratio_vs_{name}_{shape}"] = engine["tokens_per_second"] / rates[side]["tokens_per_second"]
        if limit:
            found |= {f"share_of_{name}_limit_{shape}": engine["tokens_per_second"] / most for name, most in _most(engine, limit).items()}
    return found


def _most(engine: Result, limit: Result) -> dict[str, float]:
    """Tokens a second that bandwidth or arithmetic alone would allow the engine's rows."""
    rows, prompts = engine["size"], make_prompts(engine["prompts"], SHAPES[engine["shape"]]["vocab_size"])
    prompt = sum(map(len, prompts)) / len(prompts)
    read = BYTES * limit["weights"] + limit["cache_bytes_per_token"] * rows * (prompt / SAMPLES + NEW / 2)
    flops = 2 * limit["weights"] * (1 + prompt / (SAMPLES * NEW))
    return {
        "bandwidth": rows * limit["copy_bytes_per_second"] / read,
        "arithmetic": limit["product_flops_per_second"] / flops,
    }


def run_part(runs: Runs, shape: str, given: argparse.Namespace) -> None:
    """The limits first, then by turns the sizes of each side."""
    name, prompts, sizes = (
        (shape, given.prompts, SIZES) if not given.micro else ("micro", 4, {"engine": (40,), "generate": (4,), "continuous": (40,)})
    )
    runs.begin(shape)
    runs.do({"side": "limits", "shape": name, "size": sizes["engine"][0]})
    for place in range(max(map(len, sizes.values()))):
        for side, of in sizes.items():
            if place < len(of):
                runs.do({"side": side, "shape": name, "size": of[place], "prompts": prompts, "repeats": given.repeats})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=("1b", "8b"), help="[default: both; with --micro one of them]")
    parser.add_argument("--prompts", type=int, default=256, help="10 texts each")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60.0, help="what no longer fits is skipped")
    parser.add_argument("--limit-seconds", type=float, default=180.0, help="of one run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of gpu_sampling.json")
    parser.add_argument("--micro", action="store_true", help="a tiny shape, into gpu_sampling_micro.json")
    parser.add_argument("--one", help="one run in this process, as JSON")
    parser.add_argument("--result", type=Path, help="of --one")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if given.one:
        write_json(one(json.loads(given.one)), given.result)
        return 0
    name = "gpu_sampling_micro" if given.micro else "gpu_sampling"
    runs = Runs("benchmarks.gpu.sampling", name, given.out, figures, given.minutes, given.limit_seconds)
    for shape in given.part or ("8b", "1b")[: 1 if given.micro else 2]:
        run_part(runs, shape, given)
    print(json.dumps(runs.found(), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
