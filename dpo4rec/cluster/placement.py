"""Pools never wait silently for workers that have lost their place: a node is gone, and no other one has room for them."""

import time
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

from dpo4rec.cluster import connect
from dpo4rec.cluster.config import ClusterConfig
from dpo4rec.cluster.connect import Resources


class Placement(ExecutionCallback):
    """Watches the pools of a chain; Ray Data calls it at every step of their execution, many times a second.

    Ray starts a worker anew where there is room, and waits for ever where there is none. While nobody is at work because of that, this
    says every 30 s what is missing, and after `cluster.wait_timeout_seconds` it ends the execution. A worker that still computes is left
    alone. So are workers that would fit but are not there: they are starting, or another job holds their place.

    Args:
        shares: what each worker asks for.
    """

    def __init__(self, shares: list[Resources], cluster: ClusterConfig) -> None:
        self.shares, self.cluster = shares, cluster
        self.looked = self.worked = self.fitted = self.said = time.monotonic()

    def on_execution_step(self, executor: Any) -> None:
        """Raises `InputError` when nobody has been at work for long and the cluster is too small."""
        now = time.monotonic()
        if now - self.looked < connect.POLL_SECONDS:
            return
        self.looked = now
        absent = _absent(executor)
        missing = connect.lacking_places(self.shares, connect.node_resources()) if absent else ""
        self.worked = self.worked if absent else now
        self.fitted = self.fitted if missing else now
        if missing and now - self.fitted >= self.cluster.wait_timeout_seconds:
            raise connect.too_small(self.cluster, missing)
        if now - max(self.worked, self.said) >= connect.SAY_EVERY_SECONDS:
            left = self.cluster.wait_timeout_seconds - (now - self.fitted)
            why = f"{missing} missing; this ends in {left:.0f} s" if missing else "they are starting, or another job holds their place"
            connect.say(f"nobody is at work, waiting for {absent} workers: {why}")
            self.said = now


def _absent(executor: Any) -> int:
    """How many workers are not alive, 0 while one that is has something to do."""
    pools = [pool for operator in executor._topology for pool in operator.get_autoscaling_actor_pools()]
    if any(worker.num_tasks_in_flight and not worker.is_restarting for pool in pools for worker in pool._running_actors.values()):
        return 0
    return sum(pool.num_pending_actors() + pool.num_restarting_actors() for pool in pools)
