"""The same alignment in the workers of Ray Train, which starts them anew when one is lost."""

import logging
import math
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError  # no public names

from dpo4rec.alignment.config import Tracking
from dpo4rec.alignment.job import read_job
from dpo4rec.errors import InputError
from dpo4rec.files import remove

START_SECONDS = 60
"""After which Ray Train gives up one attempt to place all processes."""


def align_on_ray(
    job: Path, workers: int, cpus_per_worker: float = 1, retries: int = 2, tracking: Tracking = "none", wait_seconds: float = 600
) -> None:
    """Aligns what `alignment.json` says into `adapter` beside it, with `workers` processes of a Ray that is already initialised.

    A lost worker ends the others; all start again from the newest complete checkpoint, at most `retries` times.
    The round's folder must be visible to all nodes under the same path.

    Args:
        job: the path of `alignment.json`, as `write_job` returns it.
        workers: processes; each takes one GPU if the cluster has so many.
        cpus_per_worker: CPUs that Ray reserves for each.
        tracking: as of `align`.
        wait_seconds: how long the processes may wait for a place in all, in whole attempts of Ray Train's (60 s each, at least one).

    Raises:
        InputError: as `align`, or the processes have found no place, at first or after a node was lost.
        RuntimeError: training failed more often than `retries`.
    """
    folder = job.parent.resolve()
    read_job(folder, workers=workers)  # refuse before processes start
    storage = folder / ".ray-train"
    # by default Ray Train tries for ever to place its processes (mypy sees the class of its first version)
    attempts = max(1, math.ceil(wait_seconds / START_SECONDS))
    failures = FailureConfig(max_failures=retries, controller_failure_limit=attempts - 1)  # type: ignore[call-arg]
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"folder": str(folder), "workers": workers, "tracking": tracking},
        scaling_config=scaling(workers, cpus_per_worker),
        run_config=RunConfig(name="alignment", storage_path=str(storage), failure_config=failures),
    )
    try:
        _fit(trainer, storage, retries)
    except WorkerGroupError as error:
        causes = [getattr(failure, "_base_exc", failure) for failure in error.worker_failures.values()]  # Ray wraps them
        raise next((cause for cause in causes if isinstance(cause, InputError)), RuntimeError(str(error))) from error
    finally:
        remove(storage)


def _fit(trainer: TorchTrainer, storage: Path, retries: int) -> None:
    """Starts again, too, when Ray Train looks at a worker while it takes down the group of a lost one: it calls that a fault of its own."""
    for attempt in range(retries + 1):
        try:
            trainer.fit()
            return
        except ControllerError as error:
            if isinstance(error.controller_failure, WorkerGroupStartupTimeoutError | WorkerGroupStartupFailedError):
                raise InputError(
                    "alignment.workers",
                    "the Ray cluster had no place for all of these processes for too long (cluster.wait_timeout_seconds)",
                    "Start more nodes, or wait for other jobs to end: the same command goes on from the newest checkpoint",
                ) from error
            if attempt == retries or not isinstance(error.controller_failure, RayActorError):
                raise RuntimeError(str(error)) from error
            remove(storage)


def scaling(workers: int, cpus_per_worker: float = 1) -> ScalingConfig:
    """What the processes ask for: a GPU each where the cluster has so many, whatever the driver's own machine has."""
    use_gpu = ray.cluster_resources().get("GPU", 0) >= workers
    return ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": cpus_per_worker})


def _worker(settings: dict[str, Any]) -> None:
    logging.basicConfig(level=logging.INFO)
    folder = Path(settings["folder"])
    read_job(folder, workers=settings["workers"]).run(folder / "adapter", settings["tracking"])
