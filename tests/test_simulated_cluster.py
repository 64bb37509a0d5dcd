"""The pool on a simulated cluster: a head and a node with four fake GPUs."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.simulated_cluster import busy, drawn, simulate
from dpo4rec.files import read_parquet


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


def test_busy_share_counts_the_idle_end_but_not_the_start() -> None:
    # worker 1 sleeps 0-4 and 4-8, worker 2 starts at 2, sleeps 2-6 and is idle to the end
    slept = pa.table({"worker": [1, 1, 2], "begun": [0.0, 4.0, 2.0], "ended": [4.0, 8.0, 6.0], "mib": [1.0, 1.0, 1.0]})
    found = busy(slept, workers=2, called=-2.0)
    assert found["busy_share_2"] == pytest.approx((6 + 4) / (2 * 6))
    assert found["busy_share_with_start_up"] == pytest.approx(12 / (2 * 10))
    assert found["start_up_seconds"] == pytest.approx(4.0)
