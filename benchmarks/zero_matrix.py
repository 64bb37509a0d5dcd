"""Every kind of weights under every ZeRO stage, with and without checkpointed activations: two processes against one, on CPU.

    python benchmarks/zero_matrix.py runs/zero-matrix

Small random Llama, 48 pairs, 12 steps in float32. Writes benchmarks/results/zero_matrix.json: of each combination the largest difference of
a step's loss from the run of one process, and of a trained tensor; `failed` counts combinations that did not train or did not agree.
Combinations that are done are not repeated.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.record import record
from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.alignment.job import read_job, write_job
from dpo4rec.files import read_json, read_tensors, remove, write_json, write_parquet

KINDS: dict[str, dict[str, str]] = {"full": {"weights": "full"}, "lora": {}, "qlora": {"quantization": "nf4"}}
SETTINGS: dict[str, Any] = {"pairs_per_step": 8, "tokens_per_batch": 128, "learning_rate": 1e-3, "epochs": 2}
AGREES = 1e-3
LAUNCHER = Path(__file__).parents[1] / "launchers" / "align.sh"


def make_data(folder: Path) -> None:
    """A model of random weights and pairs of random ids."""
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=128)).save_pretrained(folder / "model")
    draw = np.random.default_rng(0)
    longest = {"prompt_ids": 16, "chosen_ids": 9, "rejected_ids": 9}
    rows = {name: [draw.integers(0, 128, draw.integers(2, most)).tolist() for _ in range(48)] for name, most in longest.items()}
    write_parquet(pa.table(rows), folder / "pairs.parquet")


def make_round(folder: Path, kind: str, checkpointing: bool) -> Path:
    """The folder of a kind with its job, aligned by one process into `one`."""
    round_ = folder / f"{kind}{'-checkpointing' if checkpointing else ''}"
    if not (round_ / "one").exists():
        config = AlignmentConfig.model_validate({**SETTINGS, **KINDS[kind], "gradient_checkpointing": checkpointing})
        write_job(round_, config, str(folder / "model"), folder / "pairs.parquet", None, seed=0, threads=1)
        read_job(round_).run(round_ / "one")
    return round_


def by_two(round_: Path, stage: int) -> dict[str, Any]:
    """What two processes under a ZeRO stage make of the round: differences from one process, or the last lines of the failure."""
    out, found = round_ / f"zero-{stage}", round_ / f"zero-{stage}.json"
    if found.exists():
        return read_json(found)
    remove(out)
    words = [str(LAUNCHER), str(round_), "--num-processes", "2", "--zero", str(stage), "--out", str(out)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        return {"failure": "\n".join((done.stdout + done.stderr).splitlines()[-12:])}
    mine, theirs = (np.array(losses_of(folder)) for folder in (round_ / "one", out))
    trained = {name: value for path in (round_ / "one").glob("*.safetensors") for name, value in read_tensors(path).items()}
    written = {name: value for path in out.glob("*.safetensors") for name, value in read_tensors(path).items()}
    result = {
        "zero_stage": read_json(out / "summary.json")["zero_stage"],
        "packed": read_json(out / "summary.json")["packed"],
        "loss_difference": float(np.abs(mine - theirs).max()),
        "weight_difference": max(float((trained[name] - written[name]).abs().max()) for name in trained),
    }
    write_json(result, found)
    return result


def losses_of(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    torch.set_num_threads(1)
    if not (folder / "pairs.parquet").exists():
        make_data(folder)
    results: dict[str, Any] = {}
    for kind, checkpointing in product(KINDS, (False, True)):
        round_ = make_round(folder, kind, checkpointing)
        for stage in range(4):
            name = f"{kind}, ZeRO-{stage}{', checkpointing' if checkpointing else ''}"
            results[name] = by_two(round_, stage)
            print(name, results[name], flush=True)
    failed = [name for name, of in results.items() if not of.get("loss_difference", 1) < AGREES]
    figures = {name: of["loss_difference"] for name, of in results.items() if "loss_difference" in of}
    record("zero_matrix", {"combinations": len(results), "failed": len(failed), **figures}, results)
    print(shlex.join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
