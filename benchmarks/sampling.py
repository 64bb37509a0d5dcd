"""Sampling by the built-in engine against transformers' `generate`: the same model, prompts, decoding parameters and machine.

    python benchmarks/sampling.py                       # writes benchmarks/results/sampling.json
    python benchmarks/sampling.py --prompts 16 --quick

Model: Llama shape, hidden 256, 6 layers, vocabulary 8,000, random weights. 10 texts of 64 new tokens from each prompt of 64 to 384
tokens, T = 1; no text ends early. `generate` gets `num_return_sequences=10` and prompts of like length together, left-padded; its rate is
that of the best batch tried. Every rate is the best of `--repeats`, the sides taking turns.

The limit is what the machine's plain matrix product would allow: FLOP/s of [rows, 256] x [256, 688] / FLOPs a token. FLOPs a token =
2 * weights of layers and output + 4 * hidden * layers * mean context + its share of the prompt's prefill, once for all samples.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.record import record
from dpo4rec.knowledge.config import Decoding
from dpo4rec.knowledge.generation import BuiltinEngine

SAMPLES, NEW, SHORTEST, LONGEST = 10, 64, 64, 384
SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": 8_000}
Prompts = list[list[int]]


def make_prompts(count: int, vocabulary: int) -> Prompts:
    draw = random.Random(0)
    return [[draw.randrange(2, vocabulary) for _ in range(draw.randint(SHORTEST, LONGEST))] for _ in range(count)]


def make_model(shape: dict[str, int], dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None, pad_token_id=0))
    return model.eval().to(dtype)


def by_engine(model: PreTrainedModel, prompts: Prompts, rows: int) -> Callable[[], int]:
    """One call of the engine for all prompts; the function returns the number of new tokens."""
    engine = BuiltinEngine(model, set(), 0, rows)
    if engine.shared is None:
        raise RuntimeError("prompts are not shared")
    seeds = [[user * SAMPLES + sample for sample in range(SAMPLES)] for user in range(len(prompts))]
    return lambda: sum(len(text.token_ids) for user in engine.generate(prompts, seeds, Decoding(max_new_tokens=NEW)) for text in user)


def by_generate(model: PreTrainedModel, prompts: Prompts, batch: int) -> Callable[[], int]:
    """`batch` prompts a call."""
    ordered = sorted(prompts, key=len)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": SAMPLES, "max_new_tokens": NEW}

    @torch.inference_mode()
    def run() -> int:
        tokens = 0
        for start in range(0, len(ordered), batch):
            part = ordered[start : start + batch]
            longest = max(map(len, part))
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in part], device=model.device)
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in part], device=model.device)
            found: Any = model.generate(ids, attention_mask=mask, pad_token_id=0, **options)  # type: ignore[operator]
            tokens += found.shape[0] * (found.shape[1] - longest)
        return tokens

    return run


def rate(run: Callable[[], int]) -> float:
    """Tokens a second."""
    begun = time.perf_counter()
    tokens = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return tokens / (time.perf_counter() - begun)


def product_rate(rows: int, dtype: torch.dtype) -> float:
    """FLOP/s of a plain matrix product of the model's feed-forward layer on `rows` rows."""
    hidden, wide = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    left, right = torch.randn(rows, hidden).to(dtype), torch.randn(hidden, wide).to(dtype)
    best = 0.0
    for _ in range(20):
        begun = time.perf_counter()
        for _ in range(50):
            left @ right
        best = max(best, 50 * 2 * rows * hidden * wide / (time.perf_counter() - begun))
    return best


def flops_per_token(prompts: Prompts) -> float:
    hidden, layers, vocabulary = SHAPE["hidden_size"], SHAPE["num_hidden_layers"], SHAPE["vocab_size"]
    of_layers = 2 * layers * (4 * hidden**2 + 3 * hidden * SHAPE["intermediate_size"])
    prompt = sum(map(len, prompts)) / len(prompts)
    prefill = prompt * (of_layers + 4 * hidden * layers * prompt / 2) / (SAMPLES * NEW)
    return prefill + of_layers + 2 * hidden * vocabulary + 4 * hidden * layers * (prompt + NEW / 2)


def measure(given: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    prompts = make_prompts(given.prompts, SHAPE["vocab_size"])
    runs = {f"generate, {batch} prompts": by_generate(make_model(SHAPE, dtype), prompts, batch) for batch in given.generate_batches}
    runs |= {f"engine, {rows} rows": by_engine(make_model(SHAPE, dtype), prompts, rows) for rows in given.rows}
    rates = dict.fromkeys(runs, 0.0)
    for _ in range(given.repeats):
        for name, run in runs.items():
            rates[name] = max(rates[name], rate(run))
            print(f"{dtype} {name}: {rates[name]:.0f} tokens/s", flush=True)
    product = product_rate(max(given.rows), dtype)
    sides = {side: max(value for name, value in rates.items() if name.startswith(side)) for side in ("engine", "generate")}
    return {"rates": rates, **sides, "product_gflops_per_second": product / 1e9, "limit": product / flops_per_token(prompts)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[320, 640], help="texts that the engine draws at once")
    parser.add_argument("--generate-batches", type=int, nargs="+", default=[1, 4, 16, 32], help="prompts a call of generate, times 10 rows")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="no file is written")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    raw = {name: measure(given, dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    figures = {"tokens_per_second_ratio_vs_generate": raw["fp32"]["engine"] / raw["fp32"]["generate"]}
    figures["tokens_per_second_ratio_vs_generate_bf16"] = raw["bf16"]["engine"] / raw["bf16"]["generate"]
    for name, of in raw.items():
        figures |= {f"share_of_limit{'' if name == 'fp32' else '_bf16'}": of["engine"] / of["limit"]}
        figures |= {f"tokens_per_second_{name}": of["engine"], f"tokens_per_second_generate_{name}": of["generate"]}
        figures |= {f"product_gflops_per_second_{name}": of["product_gflops_per_second"]}
    figures = {name: round(value, 3) for name, value in figures.items()}
    if not given.quick:
        record("sampling", figures, raw)
    print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
