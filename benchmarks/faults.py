"""Kills samplers, scorers, nodes and the driver of a streaming chain at random moments, and compares what is left with an undisturbed run.

    python benchmarks/faults.py runs/faults --kills 50

Runs take turns on a local Ray and on three nodes with fake GPUs. Every process dies by SIGKILL: a node is its raylet, and another
node takes its place; a driver is started again. The chain is sampler, encoder and scorer with a micro model, paced by sleeps so that runs
last long enough to be hit. A run that is done is not run again: the same command goes on where it was stopped. Writes
benchmarks/results/faults.json; exits 1 if a row is lost, is there twice, or a byte differs.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray.cluster_utils import Cluster

from benchmarks.record import record
from dpo4rec.cluster.config import ClusterConfig
from dpo4rec.cluster.pool import Step, stream_units
from dpo4rec.cluster.units import Rows
from dpo4rec.files import content_hash, read_json, read_parquet, remove, write_json
from dpo4rec.knowledge.encoders import Encoder, EncoderWorkerConfig
from dpo4rec.knowledge.sampling import Sampler, SamplerConfig
from dpo4rec.preference.reward import Scorer, ScorerConfig

SETTINGS = [
    "data.simulation.users=240",
    "data.simulation.items=150",
    "data.simulation.interactions_per_user=24",
    "data.max_lists_per_user=2",
    "llm.tiny.hidden_size=32",
    "llm.tiny.layers=2",
    "llm.tiny.prompts=1280",
    "sampling.samples=3",
    "sampling.decoding.max_new_tokens=12",
    "encoder.dimensions=16",
    "recommender.epochs=1",
    "recommender.embedding_dim=8",
    "recommender.hidden_dim=16",
    "recommender.expert_hidden_dim=16",
    "reward.seeds=1",
    "cluster.training_threads=1",
]
USERS_PER_UNIT, LONGEST_RUN_SECONDS = 4, 600
PACE_SECONDS = {"sampler": 1.0, "encoder": 0.2, "scorer": 0.7}
"""Of a unit, beside its work: a device that is busy."""
NODE = {"num_cpus": 4, "num_gpus": 3, "object_store_memory": 100 * 2**20}
OUTS = ("samples", "vectors", "scores")


# -- the chain ------------------------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """A micro run up to its recommenders, whose parts the chain is made of."""
    from dpo4rec.config import resolve
    from dpo4rec.driver import Run  # here, because a driver that is started again needs none of it, and would start later

    run = Run(resolve("quickstart", None, SETTINGS), folder)
    run.prepare()
    run.sample(0)
    run.fit(0)
    sampling = run.config.sampling
    sampler = run.sampler("faults", run.policy(0), sampling.decoding, sampling.samples)
    parts = {"sampler": sampler, "encoder": run.encoder, "scorer": run.scorer(0)}
    write_json({name: part.model_dump(mode="json") for name, part in parts.items()}, folder / "parts.json")
    run.folder.release()


def chain(prepared: Path, out: Path, gpus: bool, paced: bool) -> list[Step]:
    parts = read_json(prepared / "parts.json")
    scorer = ScorerConfig.model_validate(parts["scorer"])
    take = {name: partial(given, PACE_SECONDS[name] if paced else 0) for name in PACE_SECONDS}
    of_texts = partial(take["encoder"], columns=["user_id", "sample", "text"])
    samples, vectors, scores = (out / name for name in OUTS)
    return [
        Step(Sampler, SamplerConfig.model_validate(parts["sampler"]), samples, 2, 1.0 * gpus, "sampler", take["sampler"]),
        Step(Encoder, EncoderWorkerConfig.model_validate(parts["encoder"]), vectors, 1, 0.0, "encoder", of_texts),
        Step(Scorer, scorer, scores, 2, 0.5 * gpus, "scorer", take["scorer"]),
    ]


def given(seconds: float, table: pa.Table, columns: list[str] | None = None) -> pa.Table:
    """What a worker is given of its input, after a while."""
    time.sleep(seconds)
    return table if columns is None else table.select(columns)


def drive(prepared: Path, out: Path, kind: str, gpus: bool) -> None:
    """The chain from begin to end, or from where it was left."""
    prompts = prepared / "prompts" / "prompts.parquet"
    units = Rows(prompts, USERS_PER_UNIT, ["user_id", "prompt_ids"], ("split", ["train", "validation"]))
    stream_units(chain(prepared, out, gpus, kind == "ray"), units, ClusterConfig(kind=kind), logs=out / "logs")  # type: ignore[arg-type]


# -- faults ---------------------------------------------------------------------------------------------------------------------


class Place:
    """Where a run takes place: a local Ray that its driver starts, or, with nodes, a cluster that outlives its driver."""

    def __init__(self, prepared: Path, out: Path, nodes: bool) -> None:
        self.prepared, self.out = prepared, out
        self.kinds = ["sampler", "scorer", "driver"] + ["node"] * nodes
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}) if nodes else None
        self.nodes = [self.cluster.add_node(**NODE) for _ in range(2)] if self.cluster else []

    def start(self) -> None:
        environment = {**os.environ, "RAY_ADDRESS": self.cluster.address if self.cluster else ""}
        words = [sys.executable, __file__, str(self.prepared), "--drive", str(self.out), *(["--gpus"] if self.cluster else [])]
        with (self.out.parent / f"{self.out.name}.log").open("a") as log:
            self.driver = subprocess.Popen(words, stdout=log, stderr=log, env=environment)

    def ends_within(self, seconds: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.driver.wait(timeout=seconds)
        return self.driver.poll() is not None

    def kill(self, kind: str, clock: random.Random) -> bool:
        """Kills one of the kind and lets what a cluster would replace be replaced; False when the run ends before one is alive."""
        if kind == "driver":
            self.driver.kill()
            self.driver.wait()
            self.start()
        elif kind == "node":
            node = self.nodes.pop(clock.randrange(len(self.nodes)))
            os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
            self.cluster.remove_node(node, allow_graceful=False)
            self.nodes.append(self.cluster.add_node(**NODE))
        else:
            while not (alive := living(self.out / "logs", kind)):
                if self.ends_within(0.2):
                    return False
            os.kill(clock.choice(alive), signal.SIGKILL)
        return True

    def close(self) -> None:
        if self.driver.poll() is None:
            self.driver.kill()
        if self.cluster is not None:
            self.cluster.shutdown()


def living(logs: Path, role: str) -> list[int]:
    """Processes of a role's workers, by their logs; a number that now belongs to another process is left out."""
    found = []
    for file in sorted(logs.glob(f"{role}-*.log")):
        pids = [int(line.split(" pid ")[1].split()[0]) for line in file.read_text().splitlines() if " pid " in line]
        with contextlib.suppress(OSError, IndexError):
            if Path(f"/proc/{pids[-1]}/cmdline").read_bytes().startswith(b"ray::"):
                found.append(pids[-1])
    return found


def disturbed(place: Place, kills: int, clock: random.Random) -> list[dict[str, Any]]:
    """One run under up to `kills` faults, each kind as often as the others. Returns them, each with its second."""
    begun, faults = time.monotonic(), []
    kinds = [kind for _ in range(kills) for kind in clock.sample(place.kinds, len(place.kinds))]
    try:
        place.start()
        while len(faults) < kills and not place.ends_within(clock.uniform(1, 12)):
            kind = kinds[len(faults)]
            if place.kill(kind, clock):
                faults.append({"kind": kind, "second": round(time.monotonic() - begun, 1)})
        if not place.ends_within(LONGEST_RUN_SECONDS) or place.driver.returncode:
            sys.exit(f"the run {place.out} did not end well after {faults}: see {place.out}.log")
    finally:
        place.close()
    return faults


def run_of(folder: Path, number: int, kills: int, seed: int) -> dict[str, Any]:
    """A disturbed run from the beginning, on three nodes if its number is odd, and what is left of it."""
    out, nodes, begun = folder / f"run-{number}", number % 2 == 1, time.monotonic()
    remove(out)
    faults = disturbed(Place(folder / "prepared", out, nodes), kills, random.Random(f"{seed}-{number}"))
    left = compare(folder / "undisturbed", out)
    return {"nodes": 3 if nodes else 1, "seconds": round(time.monotonic() - begun, 1), **left, "faults": faults}


# -- what is left ---------------------------------------------------------------------------------------------------------------


def compare(undisturbed: Path, out: Path) -> dict[str, int]:
    """Rows lost and doubled over all steps, and files whose bytes differ."""
    lost = doubled = 0
    for name in OUTS:
        want, have = (keys(folder / name) for folder in (undisturbed, out))
        lost += len(want.keys() - have.keys())
        doubled += sum(count - 1 for count in have.values())
    expected, found = ({path.relative_to(of): content_hash(path) for path in of.glob("*/*.parquet")} for of in (undisturbed, out))
    differing = sum(expected.get(path) != found.get(path) for path in expected.keys() | found.keys())
    return {"rows_lost": lost, "rows_doubled": doubled, "files_differing": differing, "rows": sum(keys(out / "samples").values())}


def keys(folder: Path) -> Counter[tuple[str, int]]:
    table = read_parquet(folder, ["user_id", "sample"])
    return Counter(zip(table["user_id"].to_pylist(), table["sample"].to_pylist(), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--kills-per-run", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drive", type=Path, help="inner: be the driver of the run in this folder")
    parser.add_argument("--gpus", action="store_true", help="inner: workers ask for GPUs")
    options = parser.parse_args()
    if options.drive:
        drive(options.folder, options.drive, "ray", options.gpus)
        return 0
    folder = options.folder.resolve()
    prepare(folder / "prepared")
    drive(folder / "prepared", folder / "undisturbed", "debug", False)
    runs: list[dict[str, Any]] = []
    while (left := options.kills - sum(len(run["faults"]) for run in runs)) > 0:
        result = folder / f"run-{len(runs)}.json"
        if not result.exists():
            write_json(run_of(folder, len(runs), min(left, options.kills_per_run), options.seed), result)
        runs.append(read_json(result))
        print(json.dumps(runs[-1]), flush=True)
    totals = {name: sum(run[name] for run in runs) for name in ("rows_lost", "rows_doubled", "files_differing")}
    kinds = Counter(fault["kind"] for run in runs for fault in run["faults"])
    figures = {"kills": sum(kinds.values()), **totals, "runs": len(runs), "seconds": sum(run["seconds"] for run in runs)}
    record("faults", figures, {"kinds": kinds, "runs": runs})
    print(json.dumps(figures))
    return 1 if any(totals.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
