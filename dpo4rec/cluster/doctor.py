"""What the settings ask for against what the cluster has, one row each. In debug mode the cluster is this machine."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dpo4rec.cluster.config import ClusterConfig
from dpo4rec.cluster.connect import GIB, Resources, amount, connect, lacking, needed, node_resources, start_ray
from dpo4rec.errors import InputError

PACKAGES = ("torch", "transformers", "peft", "trl", "ray", "deepspeed", "bitsandbytes")
ANSWER_SECONDS = 60
FREE_DISK_GIB = 1.0
"""Least free space beside the run folder; what a run writes beyond it depends on its data and model."""
STORE_PER_WORKER_GIB = 1 / 16
"""Object store of a worker: the unit it reads and the one it has written, with room; units are a few MiB."""


@dataclass(frozen=True)
class Asked:
    """What a run asks for.

    Args:
        run_folder: absolute; it need not be there yet.
        folders: other absolute paths that every node must see, by what they hold.
    """

    cluster: ClusterConfig
    training_workers: int
    run_folder: Path
    folders: dict[str, Path]


class Row(NamedTuple):
    """One line of the table; `missing` is empty where all is well."""

    what: str
    asked: str
    found: str
    missing: str


class Found(NamedTuple):
    """What there is: each node's resources, each answering node's report (see `inspection`), and why others gave none."""

    nodes: list[Resources]
    reports: dict[str, dict[str, Any]]
    silent: dict[str, str]


def check(asked: Asked) -> None:
    """Before a Ray job: waits until the workers fit, then looks at all nodes.

    Raises:
        InputError: names everything that is missing.
    """
    start_ray(asked.cluster, asked.training_workers)
    if missing := [f"{row.what}: {row.missing}" for row in diagnose(asked) if row.missing]:
        raise InputError("cluster", "; ".join(missing), "Mend it, or look with: dpo4rec doctor")


def diagnose(asked: Asked) -> list[Row]:
    """The table. Connects to Ray first where the settings say so; waits for nothing but the nodes' answers."""
    with _marker(asked.run_folder) as marker:
        inspect, paths = inspection(), [str(marker), *map(str, asked.folders.values())]
        here = inspect(paths, PACKAGES)
        if asked.cluster.kind == "debug":
            return rows(asked, Found([_machine()], {here["host"]: here}, {}), marker, here)
        connect(asked.cluster, asked.training_workers)
        found = Found(node_resources(), *_ask_nodes(inspect, paths, here))
        return rows(asked, found, marker, here)


@contextmanager
def _marker(folder: Path) -> Iterator[Path]:
    """A file beside which the run folder lies or will lie: a node that sees it has the same disk.

    Raises:
        InputError: nothing can be written there.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        file = tempfile.NamedTemporaryFile(dir=there, prefix=".doctor-")  # noqa: SIM115, closed below
    except OSError as error:
        raise InputError(str(folder), f"the run folder cannot be written ({error.strerror})", "Give another one") from error
    with file:
        yield Path(file.name)


def inspection() -> Callable[[list[str], tuple[str, ...]], dict[str, Any]]:
    """The function that looks at the machine it runs on: `inspect(paths, packages) -> report`.

    It is made in here because Ray sends such a function by value: a node that lacks our package can still say so.
    """

    def inspect(paths: list[str], packages: tuple[str, ...]) -> dict[str, Any]:
        import importlib
        import importlib.metadata
        import os
        import platform
        import shutil

        def version(name: str) -> str | None:
            try:
                return importlib.metadata.version(name)
            except ImportError:
                return None

        try:  # the code of a job travels with it, and is not installed
            ours = str(importlib.import_module("dpo4rec").__version__)
        except ImportError:
            ours = None
        disk = os.path.dirname(paths[0])  # noqa: PTH120, nothing but the standard library's plainest is used here
        return {
            "host": platform.node(),
            "versions": {"python": platform.python_version(), "dpo4rec": ours, **{name: version(name) for name in packages}},
            "paths": [path for path in paths if os.path.exists(path)],  # noqa: PTH110
            "free_bytes": shutil.disk_usage(disk).free if os.path.exists(disk) else None,  # noqa: PTH110
        }

    return inspect


def _machine() -> Resources:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count(), "memory": memory}


def _ask_nodes(inspect: Callable[..., dict[str, Any]], paths: list[str], here: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Reports by node, and errors by node. The driver's own node is the `here` that has been looked at already."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own, reports, asked = ray.get_runtime_context().get_node_id(), {}, {}
    for node in (node for node in ray.nodes() if node["Alive"]):
        name = f"{node['NodeManagerHostname']} ({node['NodeID'][:6]})"
        if node["NodeID"] == own:
            reports[name] = here
        else:
            pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(inspect).options(num_cpus=0, scheduling_strategy=pinned, max_retries=0)
            asked[task.remote(paths, PACKAGES)] = name
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS) if asked else ([], [])
    silent = {asked[reference]: f"no answer within {ANSWER_SECONDS} s" for reference in late}
    for reference in ready:
        try:
            reports[asked[reference]] = ray.get(reference)
        except ray.exceptions.RayError as error:
            silent[asked[reference]] = str(error).strip().splitlines()[-1]
    return reports, silent


# -- what is found, judged ------------------------------------------------------------------------------------------------------------


def rows(asked: Asked, found: Found, marker: Path, here: dict[str, Any]) -> list[Row]:
    """The table's rows, from what the nodes have and say; `here` is the driver's own report, which the others must agree with."""
    return [
        _nodes(found),
        *_resources(asked, found.nodes),
        _disk(found),
        *(_version(name, here["versions"][name], found) for name in here["versions"]),
        _seen("run folder", asked.run_folder, marker, found),
        *(_seen(what, path, path, found) for what, path in asked.folders.items()),
    ]


def _nodes(found: Found) -> Row:
    of = len(found.reports) + len(found.silent)
    missing = ", ".join(f"{name}: {why}" for name, why in found.silent.items())
    return Row("nodes", "an answer of each", f"{len(found.reports)} of {of}", missing)


def _resources(asked: Asked, nodes: list[Resources]) -> list[Row]:
    cluster, need = asked.cluster, needed(asked.cluster, asked.training_workers)
    lack, titles = lacking(cluster, nodes, asked.training_workers), {"CPU": "CPUs", "GPU": "GPUs", "memory": "memory"}
    have = {name: sum(node.get(name, 0) for node in nodes) for name in titles}
    found = [Row(title, _asked(name, need[name]), amount(name, have[name]), lack.get(name, "")) for name, title in titles.items()]
    if cluster.kind == "debug":
        return found
    store, wanted = sum(node.get("object_store_memory", 0) for node in nodes), cluster.workers * STORE_PER_WORKER_GIB * GIB
    missing = amount("object_store_memory", wanted - store) if store < wanted else ""
    return [*found, Row("object store", _asked("object_store_memory", wanted), amount("object_store_memory", store), missing)]


def _asked(name: str, value: float) -> str:
    return amount(name, value) if value else "-"


def _disk(found: Found) -> Row:
    free = {name: report["free_bytes"] / GIB for name, report in found.reports.items() if report["free_bytes"] is not None}
    short = [f"{FREE_DISK_GIB - value:.1f} GiB on {name}" for name, value in free.items() if value < FREE_DISK_GIB]
    least = min(free.values(), default=0.0)
    return Row("disk", f"{FREE_DISK_GIB:g} GiB free at the run folder", f"{least:.1f} GiB at least", ", ".join(short))


def _version(name: str, own: str | None, found: Found) -> Row:
    others = {node: report["versions"][name] for node, report in found.reports.items() if report["versions"][name] != own}
    missing = [f"{own} on {node}, which has {version or 'none'}" for node, version in others.items()] if own else ["not installed here"]
    same = len(found.reports) - len(others)
    return Row(name, own or "any", f"the same on {same} of {len(found.reports)}", ", ".join(missing))


def _seen(what: str, path: Path, probe: Path, found: Found) -> Row:
    blind = [node for node, report in found.reports.items() if str(probe) not in report["paths"]]
    return Row(what, str(path), f"on {len(found.reports) - len(blind)} of {len(found.reports)}", f"on {', '.join(blind)}" if blind else "")
