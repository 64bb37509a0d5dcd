"""Does memory grow with the number of users? Simulated users through sampling, encoding and scoring, each step in a fresh process.

    python benchmarks/scale_memory.py                             # 50,000 to 1,000,000 users; writes benchmarks/results/scale_memory.json
    python benchmarks/scale_memory.py --sizes 2000 20000 --quick
    python benchmarks/scale_memory.py --cluster ray               # the driver apart from its workers; and the object store

A stub model (1 layer, hidden 32) writes 2 texts of 2 tokens a user; users have 8 interactions of 200 items: a history of 4 and one list of
10. Recommenders are fitted on the texts of 20,000 users (`reward.fit_users`; of fewer users on a quarter), 2,000 validate. The steps are
the driver's own: "pool" samples and encodes the texts for fitting, "chain" samples, encodes and scores the texts of all training users, all
at the same time. In debug mode the driver is the worker, too, so that the workers' memory is in its peak.

- peak_memory_gib_<step>_<users>: highest resident memory of the process that ran the step (VmHWM); its imports alone take about half a GiB.
- peak_memory_ratio_1m_over_50k: of pool and chain, the step with the highest peak at 1,000,000 users / at 50,000.
- bytes_per_user_<step>: (peak at the most users - peak at the fewest) / difference of users.
- object_store_gib_<step>_<users> (Ray alone): resident shared memory of the raylet at the end of the step, from which little returns.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.dpo import make_model
from benchmarks.recommenders import fresh
from benchmarks.record import record
from dpo4rec.config import Config
from dpo4rec.driver import Run
from dpo4rec.files import write_parquet

ITEMS, INTERACTIONS, SAMPLES = 200, 8, 2
FITTING, VALIDATING = 20_000, 2_000
GENRES = ("Drama", "Comedy", "Action", "Crime")
FRAME = ("The", "user", "rated:", "-", "rated", "Preferences:", *(f"{stars}:" for stars in range(1, 6)))
Result = dict[str, Any]


def configured(given: argparse.Namespace) -> Config:
    table = {"timestamp_column": None, "genres_column": "genres"}
    shares = dict.fromkeys(("validation_share", "test_share"), min(0.1, VALIDATING / given.users))
    sizes = {"embedding_dim": 8, "hidden_dim": 16, "expert_hidden_dim": 16}
    return Config.model_validate(
        {
            "rounds": 1,
            "data": {"source": "table", "folder": str(given.folder / "tables"), "table": table, **shares},
            "prompt": {"role": "", "request": "Preferences:", "profile": False},
            "llm": {"name": str(given.folder / "model")},
            "sampling": {"samples": SAMPLES, "users_per_unit": given.users_per_unit, "decoding": {"max_new_tokens": 2}},
            "encoder": {"dimensions": 16},
            "recommender": {"epochs": 1, "batch_size": 1024, **sizes},
            "reward": {"seeds": 1, "fit_users": min(FITTING, given.users // 4)},
            "cluster": {"kind": given.cluster, "workers": 1, "threads_per_worker": given.threads, "training_threads": given.threads},
        }
    )


def write_tables(given: argparse.Namespace) -> None:
    """Interactions, written a part at a time, items, and the model that knows their words."""
    folder, names = given.folder / "tables", [f"item{i}" for i in range(ITEMS)]
    genres = [[GENRES[i % len(GENRES)]] for i in range(ITEMS)]
    write_parquet(pa.table({"item_id": names, "title": names, "genres": genres}), folder / "items.parquet")
    schema = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("rating", pa.float32())])
    with pq.ParquetWriter(folder / "interactions.parquet", schema) as writer:
        for part in interactions(given.users, names, schema):
            writer.write_table(part)
    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 86, "num_hidden_layers": 1}
    make_model(given.folder / "model", [*FRAME, *(f"{name}," for name in names), *GENRES], **shape)


def interactions(users: int, names: list[str], schema: pa.Schema, at_once: int = 50_000) -> Iterator[pa.Table]:
    rng, items = np.random.default_rng(0), pa.array(names)
    for start in range(0, users, at_once):
        count = min(at_once, users - start)
        picked = np.argsort(rng.random((count, ITEMS)), axis=1)[:, :INTERACTIONS].ravel()
        owners = pa.array([f"u{user:08d}" for user in range(start, start + count)]).take(
            pa.array(np.repeat(np.arange(count), INTERACTIONS))
        )
        ratings = rng.integers(1, 6, len(picked)).astype(np.float32)
        yield pa.table([owners, items.take(pa.array(picked)), pa.array(ratings)], schema=schema)


STEPS: dict[str, Callable[[Run], object]] = {
    "prepare": lambda run: run.prepare_data(),
    "prompts": lambda run: run.prepare(),
    "pool": lambda run: run.sample(0),
    "fitting": lambda run: run.fit(0),
    "chain": lambda run: run.score(0),
}
MUST_BE_FLAT = ("pool", "chain")


def one(given: argparse.Namespace) -> Result:
    """One step in this process."""
    started = time.perf_counter()
    if given.one == "tables":
        write_tables(given)
    else:
        STEPS[given.one](Run(configured(given), given.folder / "run"))
    stores = [kib(status, "RssShmem") for status in raylets()]
    store = {"object_store_gib": sum(stores) / 2**20} if stores else {}
    peak = kib(Path("/proc/self/status"), "VmHWM") / 2**20
    return {"users": given.users, "step": given.one, "seconds": time.perf_counter() - started, "peak_gib": peak, **store}


def raylets() -> list[Path]:
    """The status files of the raylets that this process started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if status.read_text().startswith("Name:\traylet") and kib(status, "PPid") == os.getpid():
                found.append(status)
        except OSError:  # it has ended
            continue
    return found


def kib(status: Path, name: str) -> int:
    """A number of a process's status file; memory is in KiB there."""
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


def short(users: int) -> str:
    """50000 -> "50k", 1000000 -> "1m"."""
    return f"{users // 10**6}m" if users % 10**6 == 0 else f"{users // 1000}k" if users % 1000 == 0 else str(users)


def figures_of(results: list[Result], sizes: list[int]) -> dict[str, float]:
    peaks = {(of["step"], of["users"]): of["peak_gib"] for of in results if of["step"] in STEPS}
    least, most = min(sizes), max(sizes)
    low, high = (max(peaks[step, users] for step in MUST_BE_FLAT) for users in (least, most))
    figures = {f"peak_memory_ratio_{short(most)}_over_{short(least)}": high / low}
    figures |= {f"peak_memory_gib_{step}_{short(users)}": peak for (step, users), peak in peaks.items()}
    if most > least:
        grown = {step: (peaks[step, most] - peaks[step, least]) * 2**30 / (most - least) for step in STEPS}
        figures |= {f"bytes_per_user_{step}": float(round(value)) for step, value in grown.items()}
    stores = [of for of in results if "object_store_gib" in of]
    figures |= {f"object_store_gib_{of['step']}_{short(of['users'])}": of["object_store_gib"] for of in stores}
    figures |= {f"seconds_{of['step']}_{short(most)}": of["seconds"] for of in results if of["users"] == most}
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[50_000, 100_000, 250_000, 500_000, 1_000_000], help="numbers of users")
    parser.add_argument("--users-per-unit", type=int, default=1000)
    parser.add_argument("--cluster", choices=("debug", "ray"), default="debug")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="no file is written")
    parser.add_argument("--one", choices=("tables", *STEPS), help="one step in this process, with --folder and --users")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--users", type=int)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given)))
        return 0
    results = []
    same = ["--users-per-unit", given.users_per_unit, "--cluster", given.cluster, "--threads", given.threads]
    for users in sorted(given.sizes):
        with tempfile.TemporaryDirectory() as folder:
            for step in ("tables", *STEPS):
                results.append(fresh(__file__, ["--one", step, "--folder", folder, "--users", users, *same], given.threads))
    figures = figures_of(results, given.sizes)
    if not given.quick:
        record("scale_memory", figures, results)
    print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
