"""The runs of a GPU benchmark: each in a fresh process with a time limit, all within a budget, every result on disk at once.

So neither a failure nor the end of the time takes what was measured before it. A result file grows by parts, which may be run on different
days: it begins as the one in the output folder or, without it, as the committed one.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, ROOT, provenance
from dpo4rec.files import read_json, write_json

LLAMA = {"vocab_size": 128_256, "num_key_value_heads": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "intermediate_size": 8192, "tie_word_embeddings": True},
    "3b": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "intermediate_size": 8192, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
    "micro": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 128, "vocab_size": 512},
}
SHAPES = {name: LLAMA | shape for name, shape in SHAPES.items()}
Run = dict[str, Any]
"""What a fresh process is told."""
Result = dict[str, Any]
"""The run, and what came of it: `status` is done, out of memory, failed, timed out or skipped."""


class Runs:
    """Writes `<folder>/<name>.json` after each run.

    Args:
        module: does a run: `python -m MODULE --one RUN --result FILE` with the run as JSON.
        figures: makes them of the results, by part.
        minutes: for all runs. One that, taking as long as the longest so far, would end later is skipped.
        limit_seconds: of one run.
    """

    def __init__(
        self,
        module: str,
        name: str,
        folder: Path,
        figures: Callable[[dict[str, list[Result]]], dict[str, float]],
        minutes: float,
        limit_seconds: float,
    ) -> None:
        self.module, self.figures, self.file = module, figures, folder / f"{name}.json"
        self.end, self.limit, self.longest = time.monotonic() + 60 * minutes, limit_seconds, 0.0
        earlier = [path for path in (self.file, RESULTS / f"{name}.json") if path.exists()]
        self.parts: dict[str, Any] = read_json(earlier[0])["raw"] if earlier else {}

    def begin(self, part: str) -> None:
        """What the file had of the part is replaced, once a run of it was tried."""
        self.part, self.done = part, list[Result]()

    def do(self, run: Run, **unwritten: Any) -> None:
        """`unwritten`: what the process must know, and the file need not."""
        left = self.end - time.monotonic()
        fits = left > max(self.longest, 1)
        result = fresh(self.module, run | unwritten, min(left, self.limit)) if fits else {"status": "skipped"}
        self.longest = max(self.longest, result.get("seconds", 0))
        self.done.append(run | result)
        print(json.dumps(self.done[-1]), flush=True)
        about = provenance()
        if any(one["status"] != "skipped" for one in self.done):
            self.parts[self.part] = {**about, "runs": self.done}
        write_json({**about, "figures": self.found(), "raw": self.parts}, self.file)

    def found(self) -> dict[str, float]:
        """The figures of all parts so far."""
        figures = self.figures({part: raw["runs"] for part, raw in self.parts.items()})
        return {name: round(value, 4) for name, value in figures.items()}


def fresh(module: str, run: Run, seconds: float) -> Result:
    """One run in a fresh process, which is ended with all that it started when its time is over."""
    with tempfile.TemporaryDirectory() as name:
        result, log = Path(name) / "result.json", Path(name) / "log"
        words = [sys.executable, "-m", module, "--one", json.dumps(run), "--result", str(result)]
        begun = time.monotonic()
        with log.open("w", encoding="utf-8") as stream:
            process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()
        about = {
            "seconds": round(time.monotonic() - begun, 1),
            "warnings": [line[:300] for line in said if line.startswith("WARNING:dpo4rec")],
        }
        if status == 0 and result.exists():
            return {"status": "done", **about, **read_json(result)}
        return {"status": _status(status, said), **about, "exit": status, "error": _error(said)}


def _status(exit_: int | None, said: list[str]) -> str:
    if exit_ is None:
        return "timed out"
    return "out of memory" if any("OutOfMemoryError" in line or "CUDA out of memory" in line for line in said) else "failed"


def _error(said: list[str]) -> str:
    """The last line that names one, else the last; without where this machine has the project and Python."""
    lines = [line.strip() for line in said if line.strip()]
    named = [line for line in lines if "Error" in line.split(":")[0]] or lines or [""]
    return named[-1].replace(f"{ROOT}/", "").replace(sys.executable, "python")[:300]


def best(results: list[Result], key: str, **of: Any) -> Result | None:
    """The finished run with most of `key` among those with the values `of`."""
    found = [one for one in results if one["status"] == "done" and all(one.get(name) == value for name, value in of.items())]
    return max(found, key=lambda one: float(one[key]), default=None)
