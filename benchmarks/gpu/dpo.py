"""Preference training on one GPU against stock TRL, 4-bit weights, and ZeRO-3 with offload: Llama shapes, random weights, no hub.

    python -m benchmarks.gpu.dpo --part lora8b --minutes 9 --out FOLDER      # writes FOLDER/gpu_dpo.json
    python -m benchmarks.gpu.dpo --micro --out FOLDER                        # the same with tiny shapes, on CPU too

Prompts of 1,024 tokens, answers of 128, lengths drawn evenly from +-40 %; everything else as in benchmarks/dpo.py, in bf16: the adapter
is float32 and the model bf16 on both sides, TRL's attention is SDPA. MFU as `summary.json` says: 4 N FLOPs a token of the packed row
(adapter), attention and recomputation not counted.

`lora1b`, `lora8b`: pairs a second, the best of the sizes on each side, gradient checkpointing on or off. `qlora`: 4-bit 8B, one pair a
pass.
`zero3`: full weights of a 3B shape under ZeRO-3 with the process kept to 40 GiB of the GPU, without and with offload. (What is too large
for 141 GB, at 24 bytes a parameter, would be offloaded at 20 bytes a parameter into the machine's memory, and 128 GiB cannot hold that.)
"""

import argparse
import json
import logging
import os
import socket
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.dpo import make_model, make_pairs, run_ours, run_trl
from benchmarks.gpu.runs import SHAPES, Result, Run, Runs, best
from dpo4rec.files import write_json

BF16: dict[str, dict[str, Any]] = {"ours": {"precision": "bf16"}, "trl": {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}}}
CHECKPOINTING: dict[str, Any] = {"gradient_checkpointing": True}
QLORA: dict[str, Any] = {"quantization": "nf4"}
ZERO_3: dict[str, Any] = {"zero_stage": 3, **CHECKPOINTING}


def ours(tokens: int, weights: str = "lora", **settings: Any) -> Run:
    """`settings` of AlignmentConfig."""
    return {"side": "ours", "weights": weights, "size": tokens, "settings": settings}


def trl(batch: int, **settings: Any) -> Run:
    """`settings` of DPOConfig."""
    return {"side": "trl", "weights": "lora", "size": batch, "settings": settings}


@dataclass(frozen=True)
class Part:
    """Runs of the same model and pairs, those that matter most first."""

    shape: str
    per_step: int
    steps: int
    runs: tuple[Run, ...]
    prompt: int = 1024
    answer: int = 128
    gib: float | None = None
    """Of the GPU's memory, what a run may take."""


LORA = (trl(4), ours(16384), trl(8, **CHECKPOINTING), ours(32768, **CHECKPOINTING), trl(16, **CHECKPOINTING), ours(8192), trl(2))
PARTS = {
    "lora8b": Part("8b", 16, 7, (*LORA, trl(4, **CHECKPOINTING))),
    "lora1b": Part("1b", 32, 13, (*LORA, trl(8), ours(32768), trl(16), trl(32, **CHECKPOINTING))),
    "qlora": Part("8b", 1, 9, (ours(2048, **QLORA, **CHECKPOINTING), ours(2048, **QLORA))),
    "zero3": Part("3b", 4, 3, (ours(4096, "full", **ZERO_3), ours(4096, "full", **ZERO_3, offload=True)), gib=40),
}


def micro(part: Part) -> Part:
    """A tiny shape, and of each side the last run."""
    last = {run["side"]: {**run, "size": 2 if run["side"] == "trl" else 256} for run in part.runs}
    return replace(part, shape="micro", per_step=min(part.per_step, 4), steps=2, runs=tuple(last.values()), prompt=48, answer=8, gib=None)


def one(run: Run) -> Result:
    """A run in this process."""
    if run["gib"] is not None:
        torch.cuda.set_per_process_memory_fraction(run["gib"] * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    if run["settings"].get("zero_stage"):
        _alone()
    folder, settings = Path(run["folder"]), {**BF16[run["side"]], **run["settings"]}
    if run["side"] == "trl":
        return run_trl(folder, run["weights"], run["size"], run["per_step"], **settings)
    return run_ours(folder, run["weights"], run["size"], pairs_per_step=run["per_step"], **settings)


def _alone() -> None:
    """What a launcher would say to the only process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def run_part(runs: Runs, name: str, part: Part) -> None:
    """The model and the pairs are made once; every run has a folder of its own with links to them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs.begin(name)
    with tempfile.TemporaryDirectory() as temporary:
        made, shape = Path(temporary), SHAPES[part.shape]
        make_model(made / "model", dtype=torch.bfloat16, device=device, **shape)
        make_pairs(made / "pairs.parquet", part.prompt, part.answer, 2, part.per_step * part.steps, shape["vocab_size"])
        if device == "cuda":
            torch.cuda.empty_cache()
        for number, run in enumerate(part.runs):
            folder = made / f"run-{number}"
            folder.mkdir()
            for shared in ("model", "pairs.parquet"):
                (folder / shared).symlink_to(made / shared)
            runs.do({**run, "shape": part.shape, "per_step": part.per_step, "gib": part.gib}, folder=str(folder))


def figures(parts: dict[str, list[Result]]) -> dict[str, float]:
    """Of whatever was run."""
    found: dict[str, float] = {}
    for name, runs in parts.items():
        found |= _lora(runs) if name.startswith("lora") else _qlora(runs) if name == "qlora" else _zero3(runs)
    return found


def _lora(runs: list[Result]) -> dict[str, float]:
    our, their, found = best(runs, "pairs_per_second", side="ours"), best(runs, "pairs_per_second", side="trl"), dict[str, float]()
    tail = f"{runs[0]['shape']}_lora"
    for side, result in (("", our), ("trl_", their)):
        for key in ("pairs_per_second", "mfu", "peak_gpu_memory_gib"):
            if result and key in result:
                found[f"{key}_{side}{tail}"] = result[key]
    if our and their:
        found[f"pairs_per_second_ratio_vs_trl_{tail}"] = our["pairs_per_second"] / their["pairs_per_second"]
    return found


def _qlora(runs: list[Result]) -> dict[str, float]:
    peaks = {_checkpointed(one): one["peak_gpu_memory_gib"] for one in runs if "peak_gpu_memory_gib" in one}
    found = {f"peak_memory_gib_{runs[0]['shape']}_qlora": min(peaks.values())} if peaks else {}
    return found | {f"peak_memory_gib_{runs[0]['shape']}_qlora{tail}": peak for tail, peak in peaks.items()}


def _checkpointed(run: Run) -> str:
    return "_checkpointing" if run["settings"].get("gradient_checkpointing") else "_no_checkpointing"


def _zero3(runs: list[Result]) -> dict[str, float]:
    found: dict[str, float] = {}
    for run in runs:
        tail = f"{run['shape']}_full_zero3{'_offload' if run['settings'].get('offload') else ''}"
        if run["status"] in ("done", "out of memory"):
            found[f"fits_{run['gib'] or 0:g}_gib_{tail}"] = float(run["status"] == "done")
        if "peak_gpu_memory_gib" in run:
            found[f"peak_memory_gib_{tail}"] = run["peak_gpu_memory_gib"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, help="[default: all; with --micro all but lora1b, which is lora8b then]")
    parser.add_argument("--minutes", type=float, default=60.0, help="what no longer fits is skipped")
    parser.add_argument("--limit-seconds", type=float, default=240.0, help="of one run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of gpu_dpo.json")
    parser.add_argument("--micro", action="store_true", help="tiny shapes, into gpu_dpo_micro.json")
    parser.add_argument("--one", help="one run in this process, as JSON")
    parser.add_argument("--result", type=Path, help="of --one")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if given.one:
        write_json(one(json.loads(given.one)), given.result)
        return 0
    name = "gpu_dpo_micro" if given.micro else "gpu_dpo"
    runs = Runs("benchmarks.gpu.dpo", name, given.out, figures, given.minutes, given.limit_seconds)
    for part in given.part or [part for part in PARTS if not (given.micro and part == "lora1b")]:
        run_part(runs, part, micro(PARTS[part]) if given.micro else PARTS[part])
    print(json.dumps(runs.found(), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
