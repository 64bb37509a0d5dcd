"""Where work runs."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from dpo4rec.settings import Settings


class ClusterConfig(Settings):
    """Where work runs and how wide. Kind and number of workers never change a result; numbers of threads may change last bits."""

    kind: Literal["debug", "ray"] = "debug"
    """debug: everything in this process, without Ray; ray: actor pools and training workers."""
    workers: PositiveInt = 2
    """Actors of each pool (Ray only; debug has one worker)."""
    threads_per_worker: PositiveInt = 1
    """CPU threads of a pool's worker, in both kinds."""
    training_threads: PositiveInt = 2
    """CPU threads of the warm-up and of each alignment process."""
    gpus_per_worker: Annotated[float, Field(ge=0, le=1)] = 0
    """Share of a GPU of each actor that holds a language model, be it of texts or of vectors: the model lies on one GPU, and several actors
    may share that. Recommenders are fitted and score on CPU. Above 0, each process of the alignment has one GPU, too; at 0 it has one where
    the cluster has enough."""
    memory_per_worker_gib: Annotated[float, Field(ge=0)] = 0
    """Memory that Ray reserves for each worker, or for the actors of all steps that work at the same time; 0 reserves none."""
    wait_timeout_seconds: NonNegativeFloat = 600
    """How long a job waits for a cluster that is still too small, for instance because its nodes are starting."""
