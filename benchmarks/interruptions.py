"""Kills a run with SIGKILL at random moments, continues it each time, and compares it with an undisturbed run of the same settings.

    python benchmarks/interruptions.py runs/quickstart runs/killed --kills 10 -- --preset quickstart

The first folder is the undisturbed run (made if absent). Writes benchmarks/results/interruptions.json; exits 1 if anything differs.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

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


def seconds_of(folder: Path) -> float:
    """Seconds that the stages of a finished run took."""
    return sum(stage["seconds"] for stage in read_json(folder / "manifest.json")["stages"].values())


def kill_and_continue(folder: Path, options: list[str], moments: list[float]) -> list[str]:
    """Starts the run, kills it after each of `moments` (seconds), and lets it end at last.

    Returns the stage that each kill hit; fewer than moments if the run ended before its next moment.
    """
    stages = []
    for moment in moments:
        with (folder.parent / f"{folder.name}.log").open("a") as log:
            process = subprocess.Popen(command(folder, options), stdout=log, stderr=log)
            try:
                process.wait(timeout=moment)
                break  # it ended before its moment
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] if (folder / "log.jsonl").exists() else []
        stages.append(events[-1].get("stage", "start") if events else "start")
    subprocess.run(command(folder, options), check=True, stdout=subprocess.DEVNULL)
    return stages


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("undisturbed", type=Path)
    parser.add_argument("killed", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    own, options = split_at_dashes(sys.argv[1:])
    given = parser.parse_args(own)
    subprocess.run(command(given.undisturbed, options), check=True, stdout=subprocess.DEVNULL)
    start_up = 12.0  # seconds before a run does anything: kills shall hit work
    clock, share = random.Random(given.seed), seconds_of(given.undisturbed) / given.kills
    moments = [start_up + 2 * share * clock.random() for _ in range(given.kills)]
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
