"""Preference training against stock TRL: the same model, pairs, optimizer and machine; each run in a fresh process.

    python benchmarks/dpo.py                      # all, and writes benchmarks/results/dpo.json
    python benchmarks/dpo.py --weights lora --trl-batches 1 2 --curve --quick

Model: Llama shape, hidden 256, 6 layers, vocabulary 8,000, random weights, fp32. Prompts of 384 tokens, answers of 64, lengths drawn
evenly from +-40 %. TRL is `DPOTrainer` with the reference computed before training (`precompute_ref_log_probs`); its batch size is the
best of those tried, at the same number of pairs an optimizer step. A rate counts from the end of the first step to the end of the
last; the reference is not in it. Peak memory is the highest resident memory of the process.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, TrainerCallback

from benchmarks.record import record
from dpo4rec.alignment.align import align
from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.files import read_json, read_parquet, write_parquet

PER_STEP = 16
Shape = dict[str, int | bool]
SHAPE: Shape = {"vocab_size": 8_000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4}
Result = dict[str, Any]


def make_model(
    folder: Path, known: Sequence[str] = (), dtype: torch.dtype = torch.float32, device: str = "cpu", **shape: int | bool
) -> None:
    """Random weights, and a tokenizer of one token a word: the `known` ones, and made-up ones beside them.

    Args:
        device: where the weights are made.
        shape: what is not as in SHAPE, by LlamaConfig's names.
    """
    config: Any = LlamaConfig(**SHAPE | shape, pad_token_id=1, eos_token_id=2, bos_token_id=None, max_position_embeddings=2048)
    words = ["<unk>", "<pad>", "</s>", *known, *(f"w{i}" for i in range(config.vocab_size - 3 - len(known)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)


def make_pairs(path: Path, prompt: int, answer: int, answers: int, pairs: int, vocabulary: int = 8_000) -> None:
    """`answers` per prompt make half as many pairs; no answer is in two pairs."""
    draw = random.Random(0)

    def text(length: int) -> str:
        return " ".join(f"w{draw.randrange(vocabulary - 3)}" for _ in range(draw.randint(round(0.6 * length), round(1.4 * length))))

    rows = []
    for _ in range(pairs * 2 // answers):
        shared = text(prompt)
        rows += [{"prompt": shared, "chosen": f" {text(answer)}", "rejected": f" {text(answer)}"} for _ in range(answers // 2)]
    write_parquet(pa.Table.from_pylist(rows), path)


def run_ours(folder: Path, weights: str, tokens: int, **more: Any) -> Result:
    """With what `summary.json` says of the speed; `more` are settings of AlignmentConfig."""
    settings = {"weights": weights, "pairs_per_step": PER_STEP, "tokens_per_batch": tokens}
    config = AlignmentConfig.model_validate({**settings, "max_tokens": 2048, "checkpoint_every_steps": 10**6, **more})
    align(config, str(folder / "model"), folder / "pairs.parquet", None, 0, folder / "ours")
    summary = read_json(folder / "ours" / "summary.json")
    return {"pairs_per_second": summary["speed"].pop("comparisons_per_second"), "packed": summary["packed"], **summary["speed"]}


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def run_trl(folder: Path, weights: str, batch: int, per_step: int = PER_STEP, **more: Any) -> Result:
    """`more` are arguments of DPOConfig."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    clock = Clock()
    options: dict[str, Any] = {
        "output_dir": str(folder / "trl"), "beta": 0.1, "per_device_train_batch_size": batch, "num_train_epochs": 1, "learning_rate": 2e-4,
        "gradient_accumulation_steps": per_step // batch, "max_length": None, "precompute_ref_log_probs": True, "optim": "adamw_torch",
        "gradient_checkpointing": False, "bf16": False, "use_cpu": not torch.cuda.is_available(), "weight_decay": 0.0, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True,
    }  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if weights == "lora" else None
    trainer = DPOTrainer(
        model=str(folder / "model"),
        args=DPOConfig(**options | more),
        train_dataset=Dataset.from_list(read_parquet(folder / "pairs.parquet").to_pylist()),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "model"),
        peft_config=lora,
        callbacks=[clock],
    )
    trainer.train()
    rate = per_step * (len(clock.ends) - 1) / (clock.ends[-1] - clock.ends[0])
    result = {"pairs_per_second": rate, "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    return result | ({"peak_gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30} if torch.cuda.is_available() else {})


def one(side: str, weights: str, size: int, prompt: int, answers: int, steps: int, threads: int) -> Result:
    """One run in this process. `size` is TRL's batch or our tokens a batch."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        make_pairs(folder / "pairs.parquet", prompt, 64, answers, PER_STEP * steps)
        result = (run_ours if side == "ours" else run_trl)(folder, weights, size)
    return {"side": side, "weights": weights, "size": size, "prompt": prompt, "answers": answers, **result}


def fresh(given: argparse.Namespace, side: str, weights: str, size: int, prompt: int = 384, answers: int = 2) -> Result:
    """One run in a fresh process."""
    words = [sys.executable, __file__, "--one", side, "--size", size, "--prompt", prompt, "--answers", answers]
    words += ["--weights", weights, "--steps", given.steps, "--threads", given.threads]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    result: Result = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(result), flush=True)
    return result


def best(results: list[Result]) -> Result:
    return max(results, key=lambda result: result["pairs_per_second"])


def compare(given: argparse.Namespace) -> tuple[dict[str, float], list[Result]]:
    """All runs, and the figures made of them."""
    runs, figures = [], {}
    for weights in given.weights:
        trl = [fresh(given, "trl", weights, batch) for batch in given.trl_batches]
        ours = [fresh(given, "ours", weights, tokens) for tokens in given.tokens]
        four = fresh(given, "ours", weights, best(ours)["size"], answers=4)
        trl_four = fresh(given, "trl", weights, best(trl)["size"], answers=4)
        runs += [*trl, *ours, four, trl_four]
        tail = "" if weights == given.weights[0] else f"_{weights}"
        figures |= {
            f"pairs_per_second_ratio_vs_trl{tail}": best(ours)["pairs_per_second"] / best(trl)["pairs_per_second"],
            f"answers_per_second_ratio_vs_trl_4_answers{tail}": four["pairs_per_second"]
            / max(trl_four["pairs_per_second"], best(trl)["pairs_per_second"]),
            f"peak_memory_ratio_vs_trl{tail}": best(ours)["peak_memory_gib"] / best(trl)["peak_memory_gib"],
        }
    for prompt in given.curve:
        pair = [fresh(given, "trl", given.weights[0], 1, prompt), fresh(given, "ours", given.weights[0], given.tokens[0], prompt)]
        runs += pair
        figures[f"ratio_at_prompt_{prompt}"] = pair[1]["pairs_per_second"] / pair[0]["pairs_per_second"]
        figures[f"tokens_ratio_at_prompt_{prompt}"] = (2 * prompt + 128) / (prompt + 128)
    return {name: round(value, 3) for name, value in figures.items()}, runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--weights", nargs="+", choices=("lora", "full"), default=["lora", "full"], help="the first one's figures are named plainly"
    )
    parser.add_argument("--trl-batches", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 4096], help="tokens_per_batch of ours to try")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--curve", nargs="*", type=int, default=[64, 192, 384, 768], help="prompt lengths at which the ratio is measured")
    parser.add_argument("--quick", action="store_true", help="no file is written")
    parser.add_argument("--one", choices=("ours", "trl"), help="one run in this process, for --size, --prompt, --answers")
    parser.add_argument("--size", type=int)
    parser.add_argument("--prompt", type=int, default=384)
    parser.add_argument("--answers", type=int, default=2)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one, given.weights[0], given.size, given.prompt, given.answers, given.steps, given.threads)))
        return 0
    figures, runs = compare(given)
    if not given.quick:
        record("dpo", figures, runs)
    print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
