"""Writes a benchmark's result with what is needed to believe it: command, commit, date, machine, versions."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from dpo4rec.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "peft", "trl", "ray", "deepspeed", "bitsandbytes", "numpy", "pyarrow")


def record(name: str, figures: dict[str, float], raw: Any) -> Path:
    """Writes `benchmarks/results/<name>.json`."""
    write_json({**provenance(), "figures": figures, "raw": raw}, RESULTS / f"{name}.json")
    return RESULTS / f"{name}.json"


def provenance() -> dict[str, Any]:
    """Command, its paths cut to their last part; commit (the variable COMMIT, where a copy has no history); date, machine, versions."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    words = ["python", *(_script(word) if i == 0 else _bare(word) for i, word in enumerate(sys.argv))]
    machine = {"cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()}
    return {
        "command": shlex.join(words),
        "commit": found.stdout.strip() or os.environ.get("COMMIT", ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "versions": {"python": platform.python_version(), **{name: version for name in PACKAGES if (version := _version(name))}},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _script(word: str) -> str:
    path = Path(word).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else f"benchmarks/{path.name}"


def _bare(word: str) -> str:
    key, equals, value = word.rpartition("=")  # of --set key=value, too
    return f"{key}{equals}{Path(value).name if Path(value).is_absolute() else value}"
