"""Runs a worker over units of work: in this process, or in a pool of Ray actors through Ray Data.

A unit is a table that is always processed whole, as one batch, and whose result is one file: results do not depend on how many
workers there are, and what is finished stays finished.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dpo4rec import files
from dpo4rec.cluster.config import ClusterConfig
from dpo4rec.cluster.connect import start_ray
from dpo4rec.settings import Settings

Units = list[tuple[str, pa.Table]]


def map_units(
    worker: Callable[[Any], Callable[[pa.Table], pa.Table]],
    config: Settings,
    units: Units,
    out: Path,
    cluster: ClusterConfig,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Writes `worker(config)(table)` to `out/<name>.parquet` for each unit `(name, table)`; units whose file is there are skipped.

    Args:
        worker: class with `__init__(config)` and `__call__(table) -> table`.
        progress: called with the number of finished units and of all units.
    """
    out.mkdir(parents=True, exist_ok=True)
    waiting = [(name, table) for name, table in units if not readable(out / f"{name}.parquet")]
    done = len(units) - len(waiting)
    progress(done, len(units))
    if not waiting:
        return
    arguments = {"worker": worker, "config": config, "out": out, "threads": cluster.threads_per_worker}
    tagged = [table.append_column("__unit__", pa.array([name] * len(table))) for name, table in waiting]
    for finished in _here(arguments, tagged) if cluster.kind == "debug" else _on_ray(arguments, tagged, cluster):
        done += finished
        progress(done, len(units))


def cut(table: pa.Table, rows: int) -> Units:
    """Consecutive units of `rows` rows (the last may be shorter), named by their number."""
    return [(f"unit-{start // rows:05d}", table.slice(start, rows)) for start in range(0, len(table), rows)]


def readable(path: Path) -> bool:
    """True when the Parquet file is there and whole; a damaged one is deleted, so that its unit runs again."""
    if not path.exists():
        return False
    try:
        pq.read_metadata(path)
        return True
    except (pa.ArrowException, OSError):
        files.remove(path)
        return False


class UnitWorker:
    """A worker whose results go to disk at once, each unit to a file of its own."""

    def __init__(self, worker: Callable[[Any], Callable[[pa.Table], pa.Table]], config: Settings, out: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self.worker, self.out = worker(config), out

    def __call__(self, block: pa.Table) -> pa.Table:
        names = block["__unit__"].unique().to_pylist()
        for name in names:
            mask = pa.compute.equal(block["__unit__"], name)
            files.write_parquet(self.worker(block.filter(mask).drop_columns(["__unit__"]).combine_chunks()), self.out / f"{name}.parquet")
        return pa.table({"unit": pa.array(names, pa.string())})


def _here(arguments: dict[str, Any], tables: Iterable[pa.Table]) -> Iterator[int]:
    threads = torch.get_num_threads()
    try:
        worker = UnitWorker(**arguments)
        for table in tables:
            yield len(worker(table))
    finally:
        torch.set_num_threads(threads)


def _on_ray(arguments: dict[str, Any], tables: list[pa.Table], cluster: ClusterConfig) -> Iterator[int]:
    import ray

    start_ray(cluster)
    finished = ray.data.from_arrow(tables).map_batches(
        UnitWorker,
        fn_constructor_kwargs=arguments,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(cluster.workers, len(tables))),
        num_cpus=1,
        num_gpus=cluster.gpus_per_worker,
        memory=cluster.memory_per_worker_gib * 2**30 or None,
        max_restarts=3,
        max_task_retries=3,
    )
    for batch in finished.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield len(batch)
