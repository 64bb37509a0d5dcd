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

from dpo4rec.files import write_json

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "trl", "ray", "deepspeed", "numpy", "pyarrow")


def record(name: str, figures: dict[str, float], raw: Any) -> Path:
    """Writes `benchmarks/results/<name>.json`; paths of the command are cut to their last part."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()
    words = ["python", *(f"benchmarks/{Path(word).name}" if i == 0 else _bare(word) for i, word in enumerate(sys.argv))]
    write_json(
        {
            "command": shlex.join(words),
            "commit": commit,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
            "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}},
            "figures": figures,
            "raw": raw,
        },
        RESULTS / f"{name}.json",
    )
    return RESULTS / f"{name}.json"


def _bare(word: str) -> str:
    return Path(word).name if Path(word).is_absolute() else word
