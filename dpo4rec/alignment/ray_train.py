"""The same alignment in the workers of Ray Train, which starts them anew when one is lost."""

from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer

from dpo4rec.alignment.config import Tracking
from dpo4rec.alignment.job import read_job
from dpo4rec.errors import InputError
from dpo4rec.files import remove


def align_on_ray(job: Path, workers: int, cpus_per_worker: float = 1, retries: int = 2, tracking: Tracking = "none") -> None:
    """Aligns what `alignment.json` says into `adapter` beside it, with `workers` processes of a Ray that is already initialised.

    A lost worker ends the others; all start again from the newest complete checkpoint, at most `retries` times.
    The round's folder must be visible to all nodes under the same path.

    Args:
        job: the path of `alignment.json`, as `write_job` returns it.
        workers: processes; each takes one GPU if the cluster has so many.
        cpus_per_worker: CPUs that Ray reserves for each.
        tracking: as of `align`.

    Raises:
        InputError: as `align`.
        RuntimeError: training failed more often than `retries`.
    """
    folder = job.parent.resolve()
    read_job(folder, workers=workers)  # refuse before processes start
    storage = folder / ".ray-train"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"folder": str(folder), "workers": workers, "tracking": tracking},
        scaling_config=scaling(workers, cpus_per_worker),
        run_config=RunConfig(name="alignment", storage_path=str(storage), failure_config=FailureConfig(max_failures=retries)),
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
            if attempt == retries or not isinstance(error.controller_failure, RayActorError):
                raise RuntimeError(str(error)) from error
            remove(storage)


def scaling(workers: int, cpus_per_worker: float = 1) -> ScalingConfig:
    """What the processes ask for: a GPU each where the cluster has so many, whatever the driver's own machine has."""
    use_gpu = ray.cluster_resources().get("GPU", 0) >= workers
    return ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": cpus_per_worker})


def _worker(settings: dict[str, Any]) -> None:
    folder = Path(settings["folder"])
    read_job(folder, workers=settings["workers"]).run(folder / "adapter", settings["tracking"])
