"""What the settings ask for against what the cluster has: this machine, and Ray nodes with GPUs that are only declared."""

import inspect
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from typer.testing import CliRunner

from dpo4rec.alignment.ray_train import scaling
from dpo4rec.cli import app
from dpo4rec.cluster.config import ClusterConfig
from dpo4rec.cluster.connect import lacking, needed, start_ray
from dpo4rec.cluster.doctor import PACKAGES, Asked, Row, check, diagnose, inspection
from dpo4rec.errors import InputError


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of two CPUs and a GPU each; the second one has another version of trl."""
    old = tmp_path_factory.mktemp("old")
    (old / "trl-0.1.dist-info").mkdir()
    (old / "trl-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 0.1\n")
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1})
    nodes.add_node(num_cpus=2, num_gpus=1, env_vars={"PYTHONPATH": os.pathsep.join([str(old), os.environ.get("PYTHONPATH", "")])})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", nodes.address)
        yield nodes
    ray.shutdown()
    nodes.shutdown()


def asked(folder: Path, **settings: float) -> Asked:
    return Asked(ClusterConfig(kind="ray", **settings), 1, folder / "new" / "run", {"data folder": folder})


def found(of: Asked) -> dict[str, Row]:
    return {row.what: row for row in diagnose(of)}


def test_this_machine_in_debug_mode(tmp_path: Path) -> None:
    good = CliRunner().invoke(app, ["doctor", str(tmp_path / "run"), "--preset", "quickstart"])
    assert good.exit_code == 0, good.output
    assert "missing" not in good.output
    bad = CliRunner().invoke(app, ["doctor", "--preset", "ml-1m", "--data", str(tmp_path / "nowhere"), "--set", "llm.name=/no/model"])
    assert bad.exit_code == 2
    assert "not all is well: data folder, model folder" in bad.output
    assert not (tmp_path / "run").exists()


def test_every_node_is_asked(cluster: Cluster, tmp_path: Path) -> None:
    rows = found(asked(tmp_path, gpus_per_worker=1))
    assert (rows["nodes"].found, rows["GPUs"].found, rows["CPUs"].asked) == ("2 of 2", "2 GPU", "3 CPU")
    assert (rows["trl"].found, rows["trl"].missing.count("which has 0.1")) == ("the same on 1 of 2", 1)
    assert (rows["run folder"].found, rows["data folder"].found) == ("on 2 of 2", "on 2 of 2")
    assert [what for what, row in rows.items() if row.missing] == ["trl"]
    assert found(asked(tmp_path / "nowhere"))["data folder"].missing.count("(") == 2  # each node is named


def test_a_job_is_refused_with_everything_that_is_missing(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"trl: .* on .*\(\w{6}\), which has 0.1; data folder: on "):
        check(asked(tmp_path / "nowhere"))


def test_a_job_waits_for_a_growing_cluster_and_then_gives_up(cluster: Cluster) -> None:
    lines: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(start_ray, ClusterConfig(kind="ray", workers=3, gpus_per_worker=1, wait_timeout_seconds=120), tell=lines.append)
        while not lines and not job.done():
            time.sleep(0.1)
        assert not job.done()
        cluster.add_node(num_cpus=2, num_gpus=1)
        job.result()
    assert len(lines) == 1
    assert "1 GPU missing" in lines[0]
    with pytest.raises(InputError, match="after 1 s the Ray cluster is too small: 1 GPU missing"):
        start_ray(ClusterConfig(kind="ray", workers=4, gpus_per_worker=1, wait_timeout_seconds=1), tell=lines.append)


def test_a_ray_of_our_own_cannot_grow(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    start_ray(ClusterConfig(kind="ray"))
    monkeypatch.delenv("RAY_ADDRESS")
    lines: list[str] = []
    with pytest.raises(InputError, match="too small"):
        start_ray(ClusterConfig(kind="ray", workers=4, gpus_per_worker=1), tell=lines.append)
    assert not lines


def test_a_workers_share_must_lie_on_one_node() -> None:
    nodes = [{"CPU": 8.0, "GPU": 1.0, "memory": 2.0**33}] * 4
    assert not lacking(ClusterConfig(kind="ray", workers=4, gpus_per_worker=1), nodes)
    assert "places for 2 of 6 workers" in lacking(ClusterConfig(kind="ray", workers=6, gpus_per_worker=0.6), nodes)["GPU"]
    assert lacking(ClusterConfig(kind="ray", workers=8, memory_per_worker_gib=8), nodes) == {"memory": "32.0 GiB memory"}
    assert lacking(ClusterConfig(kind="ray", workers=2), nodes[:1], training_workers=10) == {"CPU": "2 CPU"}


def test_alignment_has_gpus_where_the_cluster_has_enough(cluster: Cluster) -> None:
    start_ray(ClusterConfig(kind="ray"))
    gpus = int(ray.cluster_resources()["GPU"])  # only declared: the driver's machine has none
    assert scaling(gpus).num_gpus_per_worker == 1
    assert scaling(gpus + 1).num_gpus_per_worker == 0
    assert needed(ClusterConfig(kind="ray", gpus_per_worker=0.5), training_workers=2)["GPU"] == 2
    assert needed(ClusterConfig(kind="ray"), training_workers=2)["GPU"] == 0


def test_a_node_without_our_package_can_still_answer() -> None:
    alone = textwrap.dedent(inspect.getsource(inspection()))  # Ray sends the function by value: nothing around it may be used
    script = f"from __future__ import annotations\nimport sys\nsys.modules['dpo4rec'] = None\n{alone}"
    script += f"\nprint(inspect(['/'], {PACKAGES!r})['versions'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "'dpo4rec': None" in done.stdout
