"""Kills a run with SIGKILL at random moments, continues it each time, and compares it with an undisturbed run of the same settings.

    python benchmarks/interruptions.py runs/quickstart runs/killed --kills 10 -- --preset quickstart

The first folder is the undisturbed run (made if absent). Writes benchmarks/results/interruptions.json; exits 1 if anything differs.
"""

import argparse
import contextlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.record import record
from dpo4rec.files import content_hash, read_json

OF_A_RUN = ("data", "language_model", "prompts", "encoder", "evaluation/texts", "evaluation/results.json", "evaluation/per_user.parquet")
OF_A_ROUND = ("samples", "vectors", "scores", "pairs")


def fingerprint(folder: Path) -> dict[str, str]:
    """Content of everything that a run is for: texts, scores, pairs, weights, metrics."""
    paths = [folder / name for name in OF_A_RUN] + [path for name in OF_A_ROUND for path in folder.glob(f"round-*/{name}")]
    paths += [*folder.glob("round-*/adapter/*.safetensors"), *folder.glob("**/model.safetensors")]
    return {str(path.relative_to(folder)): content_hash(path) for path in sorted(paths) if path.exists()}


def command(folder: Path, options: list[str]) -> list[str]:
    return [sys.executable, "-m", "dpo4rec.cli", "run", "--run-dir", str(folder), *options]


def split_at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    """What stands before and after `--`."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def draw_moments(folder: Path, kills: int, clock: random.Random) -> list[tuple[str, float]]:
    """Stages of a finished run that took a second or more, drawn at random, in their order, and a random moment in each, in seconds."""
    stages = [(name, stage["seconds"]) for name, stage in read_json(folder / "manifest.json")["stages"].items() if stage["seconds"] >= 1]
    chosen = sorted(clock.sample(range(len(stages)), min(kills, len(stages))))
    return [(stages[place][0], clock.uniform(0, stages[place][1])) for place in chosen]


def kill_and_continue(folder: Path, options: list[str], moments: list[tuple[str, float]]) -> list[str]:
    """Starts the run, kills it so many seconds after a stage has begun, for each of `moments`, and lets it end at last.

    Returns the stage that each kill hit; a run that ends before its moment is not killed.
    """
    hit = []
    for stage, seconds in moments:
        before = len(events(folder))
        with (folder.parent / f"{folder.name}.log").open("a") as log:
            process = subprocess.Popen(command(folder, options), stdout=log, stderr=log)
        while process.poll() is None and not any(event.get("stage") == stage for event in events(folder)[before:]):
            time.sleep(0.1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)
        if process.poll() is None:
            process.kill()
            process.wait()
            hit.append(events(folder)[-1]["stage"])
    subprocess.run(command(folder, options), check=True, stdout=subprocess.DEVNULL)
    return hit


def events(folder: Path) -> list[dict[str, Any]]:
    """What the run has logged so far; a line that is being written is left out."""
    path = folder / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("undisturbed", type=Path)
    parser.add_argument("killed", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    own, options = split_at_dashes(sys.argv[1:])
    given = parser.parse_args(own)
    subprocess.run(command(given.undisturbed, options), check=True, stdout=subprocess.DEVNULL)
    moments = draw_moments(given.undisturbed, given.kills, random.Random(given.seed))
    begun = time.monotonic()
    stages = kill_and_continue(given.killed, options, moments)
    one, other = fingerprint(given.undisturbed), fingerprint(given.killed)
    differing = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    figures = {"kills": len(stages), "compared": len(one), "differing": len(differing), "seconds": round(time.monotonic() - begun, 1)}
    record("interruptions", figures, {"moments": moments, "stages": stages, "differing": differing})
    print(json.dumps(figures), differing)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
