"""Connects to Ray, and waits until the cluster can hold what the settings ask for.

A cluster may still be growing, so a job that cannot be placed yet waits: it says every 30 s what is missing, and gives up after
`cluster.wait_timeout_seconds`. A Ray of this process's own can never grow: there it gives up at once.
"""

import os
import sys
import time
from collections.abc import Callable

from dpo4rec.cluster.config import ClusterConfig
from dpo4rec.errors import InputError

GIB = 2**30
SAY_EVERY_SECONDS = 30
POLL_SECONDS = 1
Resources = dict[str, float]
"""Amounts in Ray's names: "CPU", "GPU", "memory" and "object_store_memory" (bytes)."""


def needed(cluster: ClusterConfig, training_workers: int = 0) -> Resources:
    """What the pools, and later the alignment's processes, ask of all nodes together.

    Ray Data hangs silently when the actors leave no CPU for its own read and write tasks, so one CPU beyond the workers' is asked for.

    Args:
        training_workers: processes of the alignment, each with a CPU, and with a GPU where the pools' workers have a share of one.
    """
    if cluster.kind == "debug":
        return {"CPU": 1, **_of_one(cluster)}
    need = {name: cluster.workers * amount for name, amount in _of_one(cluster).items()}
    return {
        **need,
        "CPU": max(cluster.workers + 1, training_workers),
        "GPU": max(need["GPU"], training_workers if cluster.gpus_per_worker else 0),
    }


def _of_one(cluster: ClusterConfig) -> Resources:
    return {"GPU": cluster.gpus_per_worker, "memory": cluster.memory_per_worker_gib * GIB}


def lacking(cluster: ClusterConfig, nodes: list[Resources], training_workers: int = 0) -> dict[str, str]:
    """What these nodes lack, by resource; nothing where all workers find a place.

    A worker's share must lie on one node: four GPUs have no place for six workers of .6.
    """
    have = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU", "memory")}
    need = needed(cluster, training_workers)
    found = {name: amount(name, need[name] - have[name]) for name in have if need[name] > have[name]}
    workers, one = cluster.workers if cluster.kind == "ray" else 1, {"CPU": 1.0, **_of_one(cluster)}
    if not found and (places := lacking_places([one] * workers, nodes)):
        found["GPU" if one["GPU"] else "memory"] = places
    return found


def lacking_places(shares: list[Resources], nodes: list[Resources]) -> str:
    """How many of the workers find no place when those that ask for most are placed first; empty where all do.

    Args:
        shares: what each worker asks for.
    """
    free, without = [dict(node) for node in nodes], []
    for share in sorted(shares, key=lambda share: [share.get(name, 0) for name in ("GPU", "memory", "CPU")], reverse=True):
        place = next((node for node in free if all(node.get(name, 0) >= value - 1e-9 for name, value in share.items())), None)
        if place is None:
            without.append(" and ".join(amount(name, value) for name, value in share.items() if value))
        else:
            place.update({name: place.get(name, 0) - value for name, value in share.items()})
    each = " or ".join(sorted(set(without)))
    return f"places for {len(without)} of {len(shares)} workers ({each} of each must lie on one node)" if without else ""


def amount(resource: str, value: float) -> str:
    """`2 GPU`, `1.5 GiB memory`."""
    return f"{value / GIB:.1f} GiB {resource.replace('_', ' ')}" if "memory" in resource else f"{value:g} {resource}"


def start_ray(cluster: ClusterConfig, training_workers: int = 0, tell: Callable[[str], None] | None = None) -> None:
    """Connects to the cluster this job was submitted to, or starts a local Ray, and waits until the workers fit.

    A job's own runtime environment (working folder, variables) is left as it is.

    Args:
        training_workers: processes of the alignment that must fit, too.
        tell: called with what is missing, every 30 s; by default it is printed on the error stream.

    Raises:
        InputError: there is no cluster under RAY_ADDRESS, or it is too small and stays so.
    """
    connected = connect(cluster, training_workers)
    wait(cluster, training_workers, tell or say, all_free=connected and can_grow())


def connect(cluster: ClusterConfig, training_workers: int = 0) -> bool:
    """Connects without waiting. Returns whether it had to: False when this process was connected already."""
    import ray

    if ray.is_initialized():
        return False
    if not can_grow():
        cpus = max(os.cpu_count() or 1, int(needed(cluster, training_workers)["CPU"]) + 1)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1")  # nobody else's business
    else:
        try:
            ray.init(log_to_driver=True)
        except (ConnectionError, RuntimeError) as error:  # nobody answers, or with another version of Ray or Python
            raise InputError("RAY_ADDRESS", str(error).strip().rstrip("."), "Start the cluster, or correct the address") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # Ray gives up after 30 minutes, a fit may take hours
    return True


def can_grow() -> bool:
    """Whether Ray is a cluster that others keep; a Ray that this process starts has this machine and no more."""
    return bool(os.environ.get("RAY_ADDRESS"))


def node_resources() -> list[Resources]:
    """What each living node has, whoever uses it at the moment."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def wait(cluster: ClusterConfig, training_workers: int, tell: Callable[[str], None], all_free: bool) -> None:
    """Waits until the workers fit; with `all_free` also until no other job holds what they need.

    Raises:
        InputError: they do not fit in time.
    """
    deadline, said = time.monotonic() + cluster.wait_timeout_seconds, -float(SAY_EVERY_SECONDS)
    try:
        while missing := _missing(cluster, training_workers, all_free):
            now = time.monotonic()
            if not can_grow() or now >= deadline:
                raise too_small(cluster, missing)
            if now - said >= SAY_EVERY_SECONDS:
                tell(f"waiting for the cluster: {missing} missing; this ends in {deadline - now:.0f} s")
                _ask_autoscaler(cluster)
                said = now
            time.sleep(min(POLL_SECONDS, deadline - now))
    finally:
        if said > 0:
            _ask_autoscaler(None)


def _missing(cluster: ClusterConfig, training_workers: int, all_free: bool) -> str:
    import ray

    found = lacking(cluster, node_resources(), training_workers)
    if found or not all_free:
        return ", ".join(found.values())
    free, need = ray.available_resources(), needed(cluster, training_workers)
    held = [amount(name, value - free.get(name, 0)) for name, value in need.items() if value > free.get(name, 0)]
    return f"{', '.join(held)} (held by other jobs)" if held else ""


def too_small(cluster: ClusterConfig, missing: str) -> InputError:
    """What to raise when nothing more is waited for."""
    waited = f"after {cluster.wait_timeout_seconds:g} s " if can_grow() else ""
    remedy = "Start more nodes, or ask for less (cluster.workers, gpus_per_worker, memory_per_worker_gib; alignment.workers)"
    return InputError("cluster", f"{waited}the Ray cluster is too small: {missing} missing", remedy)


def _ask_autoscaler(cluster: ClusterConfig | None) -> None:
    """Tells an autoscaler, where the cluster has one, which nodes are waited for; None takes the wish back."""
    from ray.autoscaler.sdk import request_resources

    one = {"CPU": 1.0, **{name: share for name, share in _of_one(cluster).items() if share}} if cluster else {}
    request_resources(bundles=[one] * cluster.workers + [{"CPU": 1.0}] if cluster else [])


def say(line: str) -> None:
    """Prints on the error stream."""
    print(line, file=sys.stderr, flush=True)
