"""The pool on a simulated cluster: a head and a node with four fake GPUs."""

import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from ray.cluster_utils import Cluster

from benchmarks.simulated_cluster import HEAD, Sleeper, busy, drawn, simulate, stop
from dpo4rec.cluster import connect
from dpo4rec.cluster.config import ClusterConfig
from dpo4rec.cluster.pool import cut, map_units
from dpo4rec.errors import InputError
from dpo4rec.files import read_parquet
from dpo4rec.settings import Settings


def test_unit_times_keep_the_shape_of_the_measured_ones_and_have_the_mean_asked_for() -> None:
    seconds = drawn(400, mean=0.5, spread=0.3, measured=[1.0, 3.0])
    assert seconds.mean() == pytest.approx(0.5)
    assert len(np.unique(seconds.round(9))) == 2
    assert seconds.max() / seconds.min() == pytest.approx(3.0)
    assert drawn(20_000, 2.0, 0.3, []).std() == pytest.approx(0.6, rel=0.05)


@pytest.mark.slow
def test_no_more_units_run_at_a_time_than_there_are_gpus_and_each_runs_once(tmp_path: Path) -> None:
    seconds = np.full(24, 0.2)
    found = simulate(nodes=1, gpus_per_node=4, seconds=seconds, out=tmp_path / "units")
    slept = read_parquet(tmp_path / "units")
    assert len(slept) == found["units"] == 24
    assert 1 <= found["workers"] <= 4  # a slow machine may be done before the last has started
    assert len(Counter(slept["worker"].to_pylist())) == found["workers"]
    for at in slept["begun"].to_pylist():
        assert sum(begun <= at < ended for begun, ended in zip(slept["begun"].to_pylist(), slept["ended"].to_pylist(), strict=True)) <= 4
    assert found["mean_unit_seconds"] == pytest.approx(0.2, abs=0.1)


@pytest.mark.slow
def test_workers_whose_node_is_lost_wait_for_another_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The only GPU is lost twice in the middle of the last unit; the second time another one comes."""
    monkeypatch.setattr(connect, "SAY_EVERY_SECONDS", 2)
    nodes = Cluster(initialize_head=True, head_node_args=HEAD)
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    units = cut(pa.table({"seconds": [0.1, 0.1, 5.0]}), 1)
    done = [tmp_path / f"{name}.parquet" for name, _ in units]

    def start_and_lose_the_node(pool: ThreadPoolExecutor, timeout_seconds: float) -> Future[Any]:
        node, before = nodes.add_node(num_cpus=1, num_gpus=1), last_unit_begun(tmp_path / "logs")
        cluster = ClusterConfig(kind="ray", workers=1, gpus_per_worker=1, wait_timeout_seconds=timeout_seconds)
        job = pool.submit(map_units, Sleeper, Settings(), units, tmp_path, cluster, logs=tmp_path / "logs")
        while last_unit_begun(tmp_path / "logs") == before and not job.done():
            time.sleep(0.1)
        nodes.remove_node(node, allow_graceful=False)
        return job

    try:
        with ThreadPoolExecutor(1) as pool:
            job = start_and_lose_the_node(pool, timeout_seconds=8)
            with pytest.raises(
                InputError, match=r"after 8 s the Ray cluster is too small: places for 1 of 1 workers \(1 GPU and 1 CPU of each"
            ):
                job.result()
            assert "nobody is at work, waiting for 1 workers: places for 1 of 1 workers" in capsys.readouterr().err
            assert [path.exists() for path in done] == [True, True, False]
            job = start_and_lose_the_node(pool, timeout_seconds=120)
            while "nobody is at work" not in capsys.readouterr().err and not job.done():
                time.sleep(0.5)
            nodes.add_node(num_cpus=1, num_gpus=1)
            job.result()
    finally:
        stop(nodes)
    assert [path.exists() for path in done] == [True, True, True]


def last_unit_begun(logs: Path) -> int:
    """How often."""
    return sum(path.read_text().count("unit-00002 begun") for path in logs.glob("*.log"))


def test_busy_share_counts_the_idle_end_but_not_the_start() -> None:
    # worker 1 sleeps 0-4 and 4-8, worker 2 starts at 2, sleeps 2-6 and is idle to the end
    slept = pa.table({"worker": [1, 1, 2], "begun": [0.0, 4.0, 2.0], "ended": [4.0, 8.0, 6.0], "mib": [1.0, 1.0, 1.0]})
    found = busy(slept, workers=2, called=-2.0)
    assert found["busy_share_2"] == pytest.approx((6 + 4) / (2 * 6))
    assert found["busy_share_with_start_up"] == pytest.approx(12 / (2 * 10))
    assert found["start_up_seconds"] == pytest.approx(4.0)
