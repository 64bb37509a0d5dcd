"""The same alignment in two processes: by the DeepSpeed launcher under ZeRO, and by Ray Train. All must agree with one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from test_alignment import KILLED, SETTINGS, make_model, make_rows, steps_of

from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.alignment.job import read_job, write_job
from dpo4rec.alignment.ray_train import align_on_ray
from dpo4rec.errors import InputError
from dpo4rec.files import write_parquet

LAUNCHER = Path(__file__).parents[1] / "launchers" / "align.sh"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A round's folder with its job, aligned by one process into `one`."""
    folder = tmp_path_factory.mktemp("round-0")
    make_model(folder / "model")
    write_parquet(pa.table(make_rows(45)), folder / "pairs.parquet")
    config = AlignmentConfig(**{**SETTINGS, "epochs": 2, "nll_weight": 0.5})
    write_job(folder, config, str(folder / "model"), folder / "pairs.parquet", None, seed=0, threads=1)
    read_job(folder).run(folder / "one")
    return folder


def launch(*arguments: Any) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(LAUNCHER), *map(str, arguments)], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_launcher_agrees_under_zero(job: Path, stage: int) -> None:
    out = job / f"zero-{stage}"
    done = launch(job, "--num-processes", 2, "--zero", stage, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((out / "summary.json").read_text())["zero_stage"] == stage
    np.testing.assert_allclose(steps_of(out)[:10], steps_of(job / "one")[:10], atol=1e-3)


def test_two_processes_go_on_where_one_was_killed(job: Path, tmp_path: Path) -> None:
    round_ = tmp_path / "round-0"
    shutil.copytree(job, round_, ignore=shutil.ignore_patterns("one", "zero-*", "adapter", ".*"))
    assert subprocess.run([sys.executable, "-c", KILLED, str(round_)]).returncode == 9
    done = launch(round_, "--num-processes", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming from" in done.stdout + done.stderr
    np.testing.assert_allclose(steps_of(round_ / "adapter")[:10], steps_of(job / "one")[:10], atol=1e-3)


def test_the_launcher_refuses_what_it_cannot_do(job: Path) -> None:
    assert launch().returncode == 2
    assert "--zero needs" in launch(job, "--zero", 4).stderr
    assert launch(job / "nowhere").returncode == 2
    there = launch(job, "--out", job / "one")
    assert there.returncode == 2
    assert "it is there already" in there.stdout + there.stderr


def test_ray_train_agrees_and_hands_errors_back(job: Path) -> None:
    damaged = job / "damaged"
    config = AlignmentConfig(**{**SETTINGS, "workers": 2})
    write_parquet(pa.table({"prompt": ["w1"]}), damaged / "pairs.parquet")
    bad = write_job(damaged, config, str(job / "model"), damaged / "pairs.parquet", None, seed=0, threads=1)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        align_on_ray(job / "alignment.json", workers=2)
        with pytest.raises(InputError, match="columns are missing"):
            align_on_ray(bad, workers=2, retries=0)
    finally:
        ray.shutdown()
    np.testing.assert_allclose(steps_of(job / "adapter")[:10], steps_of(job / "one")[:10], atol=1e-3)
    assert not (job / ".ray-train").exists()


def test_a_job_moves_with_its_folder_and_its_settings_are_checked(job: Path) -> None:
    values = json.loads((job / "alignment.json").read_text())
    assert (values["model"], values["pairs"]) == ("model", "pairs.parquet")
    assert read_job(job, workers=2, zero_stage=3).config.zero_stage == 3
    with pytest.raises(InputError, match="workers"):
        read_job(job, workers=9)
    with pytest.raises(InputError, match="no such file"):
        read_job(job / "nowhere")
