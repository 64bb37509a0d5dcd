"""Runs workers over units of work, one after another as a chain: in this process, or in pools of Ray actors through Ray Data.

A unit is a table that is always processed whole, as one batch, and whose result is one file for each step: results do not depend on
how many workers there are, and what is finished stays finished. Between steps only numbers of units travel; a step reads what the
step before has written. So nothing can be lost on the way, and neither the driver nor the object store grows with the data.
"""

import contextlib
import json
import math
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from dpo4rec.cluster.config import ClusterConfig
from dpo4rec.cluster.connect import GIB, start_ray
from dpo4rec.cluster.role_log import unfinished
from dpo4rec.cluster.units import Source, Tables, Units, cut, readable
from dpo4rec.cluster.worker import Step, UnitWorker
from dpo4rec.errors import InputError
from dpo4rec.settings import Settings

__all__ = ["Source", "Step", "Units", "cut", "map_units", "stream_units"]

Progress = Callable[[int, int], None]

BLOCKS_PER_WORKER = 64
"""Into which the units are parted on Ray: many, so that steps overlap and work is even; few, since each costs the driver milliseconds."""
RESTARTS = 10
"""Of each worker in a run. A death (killed, lost node) is mostly chance; this ends what kills a worker again and again."""
TASK_RETRIES = 60
"""Of a block of units. Ray takes one for every attempt to reach a worker, up to 5 s apart, and notices a lost node only after many."""


def stream_units(
    steps: list[Step],
    units: Source | Units,
    cluster: ClusterConfig,
    progress: Progress = lambda done, of: None,
    logs: Path | None = None,
) -> list[str]:
    """Takes each unit through the steps, whose results are written to `<step.out>/<unit>.parquet` at once.

    On Ray all steps run at the same time, each in its own pool: the second step works on the first units while the first step works on
    later ones. In debug mode the same classes run in this process, unit after unit. What is on disk is not computed again.

    Args:
        steps: each but the first reads what the one before has written.
        units: a source that reads units where they are worked on, or a list of few and small tables.
        progress: called with the number of finished units and of all units.
        logs: folder for one log file of each role and rank; None: none are written.

    Returns:
        What workers warn of (see `Step.worker`), each warning once.

    Raises:
        InputError: a worker fails again and again: names user or unit, and ends with the worker's last log lines. Or workers have lost
            their place, for instance with a node, and have found no other one within `cluster.wait_timeout_seconds`.
    """
    source = Tables(units) if isinstance(units, list) else units
    for step in steps:
        step.out.mkdir(parents=True, exist_ok=True)
    waiting = [number for number in range(len(source)) if not all(readable(step.file(source.name(number))) for step in steps)]
    done = len(source) - len(waiting)
    progress(done, len(source))
    if not waiting:
        return []
    warnings: set[str] = set()
    chain = [
        {"step": step, "source": source, "before": before, "threads": cluster.threads_per_worker, "logs": logs}
        for step, before in zip(steps, [None, *(step.out for step in steps)], strict=False)
    ]
    with contextlib.closing(_here(chain, waiting) if cluster.kind == "debug" else _on_ray(chain, waiting, cluster, logs)) as finished:
        for block in finished:
            failure = next(filter(None, block["failure"].to_pylist()), None)
            if failure is not None:
                raise InputError(*json.loads(failure))
            warnings.update(filter(None, block["warning"].to_pylist()))
            done += len(block)
            progress(done, len(source))
    return sorted(warnings)


def map_units(
    worker: Callable[[Any], Callable[[pa.Table], pa.Table]],
    config: Settings,
    units: Source | Units,
    out: Path,
    cluster: ClusterConfig,
    progress: Progress = lambda done, of: None,
    logs: Path | None = None,
    skip_failed: bool = False,
) -> list[str]:
    """`stream_units` with a single step: writes `worker(config)(table)` to `out/<unit>.parquet` for each unit."""
    name = getattr(worker, "__name__", "worker").lower()
    step = Step(worker, config, out, cluster.workers, cluster.gpus_per_worker, name, skip_failed=skip_failed)
    return stream_units([step], units, cluster, progress, logs)


def _here(chain: list[dict[str, Any]], waiting: list[int]) -> Generator[pa.Table, None, None]:
    threads = torch.get_num_threads()
    workers: list[UnitWorker] = []
    try:
        workers.extend(UnitWorker(**arguments) for arguments in chain)
        for number in waiting:
            unit = pa.table({"unit": [number], "failure": [""], "warning": [""]})
            for worker in workers:
                unit = worker(unit)
            yield unit
    finally:
        torch.set_num_threads(threads)
        for worker in workers:
            worker.log.close()


def _on_ray(chain: list[dict[str, Any]], waiting: list[int], cluster: ClusterConfig, logs: Path | None) -> Generator[pa.Table, None, None]:
    import ray

    from dpo4rec.cluster.placement import Placement

    start_ray(cluster)
    steps: list[Step] = [arguments["step"] for arguments in chain]
    blocks = min(len(waiting), BLOCKS_PER_WORKER * max(step.workers for step in steps))
    # what the cluster cannot give in whole CPUs is shared: the reservation decides on places, `threads` on speed
    cpus = min(1.0, math.floor(100 * (ray.cluster_resources()["CPU"] - 1) / sum(step.workers for step in steps)) / 100)
    memory = cluster.memory_per_worker_gib * GIB / len(steps)  # a worker's, for one actor of each step
    rows = [{"unit": number, "failure": "", "warning": ""} for number in waiting]
    stream: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=blocks)
    for step, arguments in zip(steps, chain, strict=True):
        stream = stream.map_batches(
            UnitWorker,
            fn_constructor_kwargs=arguments,
            batch_size=1,  # one unit; without a number Ray Data refuses pools with GPUs
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(step.workers, blocks)),
            num_cpus=cpus,
            num_gpus=step.gpus,
            memory=memory or None,
            max_restarts=RESTARTS,
            max_task_retries=TASK_RETRIES,
        )
    shares = [{"GPU": step.gpus, "memory": memory, "CPU": cpus} for step in steps for _ in range(min(step.workers, blocks))]
    stream.context.custom_execution_callback_classes = [partial(Placement, shares, cluster)]  # type: ignore[list-item]
    try:
        yield from stream.iter_batches(batch_size=None, batch_format="pyarrow")
    except ray.exceptions.RayError as error:
        raise _died(steps, logs, error) from error


def _died(steps: list[Step], logs: Path | None, error: Exception) -> InputError:
    at_work = [line for step in steps for line in (unfinished(logs, step.name) if logs is not None else [])]
    cause = f"a worker died more than {RESTARTS} times, or could not be reached for long ({type(error).__name__})"
    remedy = "See whether memory is short (cluster.memory_per_worker_gib, smaller units); the same command continues"
    return InputError(
        ", ".join(step.name for step in steps), cause, "\n".join([remedy, *(f"  at work when it died: {line}" for line in at_work)])
    )
