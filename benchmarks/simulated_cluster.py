"""The scheduling of a large cluster on a small machine: our own pool over fake GPUs, with workers that sleep for as long as a unit takes.

    python benchmarks/simulated_cluster.py                                # 64 workers; writes benchmarks/results/simulated_cluster.json
    python benchmarks/simulated_cluster.py --run runs/quickstart          # unit times as a run in debug mode had them
    python benchmarks/simulated_cluster.py --nodes 2 --gpus-per-node 2 --units-per-worker 10 --mean-seconds 0.5 --quick

`ray.cluster_utils.Cluster` starts the nodes (a raylet each, with fake GPUs); all else is real: `dpo4rec.cluster.pool.map_units` with
cluster.kind=ray, one process and one GPU a worker, one file a unit. Unit times are drawn with a fixed seed from the times between the unit
files of `--run`, stretched to `--mean-seconds`, or else from a log-normal of that mean and of `--spread` (standard deviation / mean). Real
units take longer than these: what the scheduler costs a unit counts for less then.

- busy_share_W: time that the W workers slept / (W x time), both from the moment when the last of them began its first unit to the end of
  the last unit. Start-up is outside of it, the idle end of the job is inside.
- busy_share_with_start_up: the same from the moment when `map_units` was called.
- driver_cpu_seconds_per_unit: processor time of the driver during the job / units.
- worker_mib: mean of the proportional set size of a worker's process; shared pages count once for all.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.record import record
from dpo4rec.cluster.config import ClusterConfig
from dpo4rec.cluster.pool import map_units
from dpo4rec.files import read_parquet
from dpo4rec.settings import Settings

STORE_BYTES = 100 * 2**20
"""Object store of each node: units are tiny."""
HEAD = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}


class Sleeper:
    """Worker: table with `seconds` in; when it slept, and in which process, out."""

    def __init__(self, config: Settings) -> None:
        pass

    def __call__(self, unit: pa.Table) -> pa.Table:
        begun = time.time()
        for seconds in unit["seconds"].to_pylist():
            time.sleep(seconds)
        return pa.table({"worker": [os.getpid()], "begun": [begun], "ended": [time.time()], "mib": [memory_mib()]})


def memory_mib() -> float:
    """Proportional set size of this process."""
    line = next(line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) / 1024


def drawn(units: int, mean: float, spread: float, measured: list[float]) -> np.ndarray:
    """Seconds of each unit: of those measured, or log-normal; their mean is `mean`."""
    rng = np.random.default_rng(0)
    sigma = np.sqrt(np.log1p(spread**2))
    seconds = rng.choice(measured, units) if measured else rng.lognormal(-(sigma**2) / 2, sigma, units)
    return seconds * mean / seconds.mean()


def measured_seconds(run: Path) -> list[float]:
    """Times between the unit files of round 0: the seconds of each unit but the first, where one worker made them in turn."""
    ends = sorted(file.stat().st_mtime for file in (run / "round-0" / "samples").glob("*.parquet"))
    if len(ends) < 3:
        raise SystemExit(f"{run}: there are no three units of round 0 to take times from")
    return np.diff(ends).tolist()


def simulate(nodes: int, gpus_per_node: int, seconds: np.ndarray, out: Path) -> dict[str, Any]:
    """Runs the units and says how busy the workers were; starts and stops the cluster."""
    from ray.cluster_utils import Cluster

    workers = nodes * gpus_per_node
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=gpus_per_node, num_gpus=gpus_per_node, object_store_memory=STORE_BYTES)
        os.environ["RAY_ADDRESS"] = cluster.address  # as a job finds the cluster that it was submitted to
        units = [(f"unit-{i:05d}", pa.table({"seconds": [value]})) for i, value in enumerate(seconds.tolist())]
        before, called = resource.getrusage(resource.RUSAGE_SELF), time.time()
        map_units(Sleeper, Settings(), units, out, ClusterConfig(kind="ray", workers=workers, gpus_per_worker=1))
        after = resource.getrusage(resource.RUSAGE_SELF)
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        stop(cluster)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**busy(read_parquet(out), workers, called), "driver_cpu_seconds_per_unit": cpu / len(units)}


def stop(cluster: Any) -> None:
    import ray

    ray.shutdown()
    cluster.shutdown()


def busy(slept: pa.Table, workers: int, called: float) -> dict[str, Any]:
    """Shares of time in which the workers slept.

    Args:
        slept: worker, begun, ended (seconds since 1970), mib; one row a unit.
        called: when the job was given to the pool.
    """
    begun, ended, of = slept["begun"].to_numpy(), slept["ended"].to_numpy(), slept["worker"].to_numpy()
    first = np.array([begun[of == worker].min() for worker in np.unique(of)])
    end = ended.max()

    def share(start: float) -> float:
        return float(np.clip(ended - np.maximum(begun, start), 0, None).sum() / (workers * (end - start)))

    return {
        f"busy_share_{workers}": share(first.max()),
        "busy_share_with_start_up": share(called),
        "workers": len(first),
        "units": len(slept),
        "mean_unit_seconds": float((ended - begun).mean()),
        "steady_seconds": float(end - first.max()),
        "start_up_seconds": float(first.max() - called),
        "units_per_second": float((begun >= first.max()).sum() / (end - first.max())),
        "worker_mib": float(slept["mib"].to_numpy().mean()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--gpus-per-node", type=int, default=8, help="and as many workers")
    parser.add_argument("--units-per-worker", type=int, default=50, help="enough for all workers to be up long before the end")
    parser.add_argument("--mean-seconds", type=float, default=5.0)
    parser.add_argument("--spread", type=float, default=0.3, help="standard deviation / mean, without --run")
    parser.add_argument("--run", type=Path, help="folder of a run in debug mode, whose unit times are taken")
    parser.add_argument("--quick", action="store_true", help="no file is written")
    given = parser.parse_args()
    measured = measured_seconds(given.run) if given.run else []
    units = given.units_per_worker * given.nodes * given.gpus_per_node
    seconds = drawn(units, given.mean_seconds, given.spread, measured)
    with tempfile.TemporaryDirectory() as folder:
        found = simulate(given.nodes, given.gpus_per_node, seconds, Path(folder) / "units")
    figures = {name: round(value, 4) for name, value in found.items()}
    if not given.quick:
        record("simulated_cluster", figures, {"measured_unit_seconds": measured})
    print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    from benchmarks.simulated_cluster import main as importable  # actors import their class by this name, not from __main__

    sys.exit(importable())
