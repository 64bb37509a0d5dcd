"""The same alignment in two processes: by the DeepSpeed launcher under ZeRO, and by Ray Train. All must agree with one process."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
from safetensors.torch import load_file
from test_alignment import KILLED, SETTINGS, make_model, make_rows, poisoned, steps_of

from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.alignment.job import read_job, write_job
from dpo4rec.alignment.pairs import read_preferences
from dpo4rec.alignment.ray_train import align_on_ray
from dpo4rec.alignment.schedule import training_steps
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


@pytest.mark.parametrize(("where", "stage"), [("--num-processes", 2), ("--hostfile", 3)])
def test_the_launcher_agrees_under_zero(job: Path, where: str, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    out, hosts, extensions = job / f"zero-{stage}", job / "hosts", job / "extensions"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    hosts.write_text("# this machine alone, which needs no ssh\nlocalhost slots=2\n")
    done = launch(job, where, hosts if where == "--hostfile" else 2, "--zero", stage, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((out / "summary.json").read_text())["zero_stage"] == stage
    np.testing.assert_allclose(steps_of(out)[:10], steps_of(job / "one")[:10], atol=1e-3)
    assert not extensions.exists()  # DeepSpeed has compiled nothing


@pytest.mark.parametrize(
    ("settings", "stage", "killed", "going_on"),
    [
        pytest.param({}, 0, 1, 2, id="lora", marks=pytest.mark.slow),
        pytest.param({"quantization": "nf4"}, 2, 2, 1, id="qlora-zero-2", marks=pytest.mark.slow),
        pytest.param({"quantization": "nf4"}, 3, 2, 2, id="qlora-zero-3", marks=pytest.mark.slow),
        pytest.param({"weights": "full"}, 3, 2, 3, id="full-zero-3", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_processes_goes_on_where_others_were_killed(
    job: Path, tmp_path: Path, settings: dict[str, Any], stage: int, killed: int, going_on: int
) -> None:
    round_ = tmp_path / "round-0"
    config = AlignmentConfig(**{**SETTINGS, "epochs": 2, "nll_weight": 0.5, **settings})
    write_job(round_, config, str(job / "model"), job / "pairs.parquet", None, seed=0, threads=1)
    read_job(round_).run(round_ / "one")
    (tmp_path / "killed.py").write_text(KILLED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(killed)]
    died = subprocess.run([*torchrun, str(tmp_path / "killed.py"), str(round_), "--zero", str(stage)], capture_output=True, text=True)
    assert "exitcode  : 9" in died.stderr, died.stderr
    if stage:
        with poisoned(round_ / ".adapter.checkpoints", "*_optim_states.pt"):
            refused = launch(round_, "--num-processes", going_on, "--zero", stage)
        assert refused.returncode
        assert "the training begins anew" in refused.stdout + refused.stderr
    done = launch(round_, "--num-processes", going_on, "--zero", stage)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming from" in done.stdout + done.stderr
    np.testing.assert_allclose(steps_of(round_ / "adapter"), steps_of(round_ / "one"), atol=1e-5)
    for path in (round_ / "one").glob("*.safetensors"):
        one, resumed = load_file(path), load_file(round_ / "adapter" / path.name)
        assert max(float((one[name] - resumed[name]).abs().max()) for name in one) < 1e-5


@pytest.mark.slow
def test_a_pairs_own_epsilon_is_exact_in_bf16_under_zero(job: Path, tmp_path: Path) -> None:
    """Every step is one pair twice, a process each, with two epsilons: the mean loss follows from the logged margin."""
    draw = np.random.default_rng(0)
    rows = {name: [values for values in column[:6] for _ in range(2)] for name, column in make_rows(6).items()}
    rows["epsilon"] = (0.49 * draw.random(12)).tolist()
    write_parquet(pa.table(rows), tmp_path / "pairs.parquet")
    settings = {"noise": "epsilon_column", "objective": "smoothed", "precision": "bf16", "beta": 1.0, "pairs_per_step": 2, "epochs": 4}
    config = AlignmentConfig(**{**SETTINGS, **settings})
    write_job(tmp_path, config, str(job / "model"), tmp_path / "pairs.parquet", None, seed=0, threads=1)
    done = launch(tmp_path, "--num-processes", 2, "--zero", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    preferences, _ = read_preferences(tmp_path / "pairs.parquet", None, 100, 128, config)
    steps = training_steps(preferences, AlignmentConfig(**{**SETTINGS, **settings, "workers": 2}), seed=0)
    wrong = np.array([np.mean([preferences.comparisons[row].epsilon for bin_ in step for row in bin_]) for step in steps])
    margins = np.array(steps_of(tmp_path / "adapter", "margin"))
    assert np.abs(margins).max() > 0.5
    expected = (1 - wrong) * np.logaddexp(0, -margins) + wrong * np.logaddexp(0, margins)
    np.testing.assert_allclose(steps_of(tmp_path / "adapter", "preference_loss"), expected, atol=1e-6)


def test_the_launcher_refuses_what_it_cannot_do(job: Path) -> None:
    assert launch().returncode == 2
    assert "--zero needs" in launch(job, "--zero", 4).stderr
    assert launch(job / "nowhere").returncode == 2
    there = launch(job, "--out", job / "one")
    assert there.returncode == 2
    assert "it is there already" in there.stdout + there.stderr


def kill_a_rank(checkpoint: Path) -> None:
    """Waits for a checkpoint and kills one of the training workers."""
    while not checkpoint.exists():
        time.sleep(0.02)
    workers = [child for child in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(child.cmdline())]
    max(workers, key=lambda worker: worker.create_time()).kill()


@pytest.fixture
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("local_ray")
def test_ray_train_agrees_and_hands_errors_back(job: Path) -> None:
    damaged = job / "damaged"
    config = AlignmentConfig(**{**SETTINGS, "workers": 2})
    write_parquet(pa.table({"prompt": ["w1"]}), damaged / "pairs.parquet")
    bad = write_job(damaged, config, str(job / "model"), damaged / "pairs.parquet", None, seed=0, threads=1)
    align_on_ray(job / "alignment.json", workers=2)
    with pytest.raises(InputError, match="columns are missing"):
        align_on_ray(bad, workers=2, retries=0)
    np.testing.assert_allclose(steps_of(job / "adapter")[:10], steps_of(job / "one")[:10], atol=1e-3)
    assert not (job / ".ray-train").exists()
    for rank in range(2):
        assert "step 1: peak_memory_gib" in (job.parent / "logs" / f"align-{rank}.log").read_text()
        assert "columns are missing" in (job / "logs" / f"align-{rank}.log").read_text()


@pytest.mark.slow
def test_processes_without_a_place_give_up(job: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "2")
    request.getfixturevalue("local_ray")
    with pytest.raises(InputError, match="no place for all of these processes"):
        align_on_ray(job / "alignment.json", workers=6, wait_seconds=60)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_ray_train_survives_a_lost_rank(job: Path, tmp_path: Path) -> None:
    folder = tmp_path / "round-0"
    config = AlignmentConfig(**{**SETTINGS, "epochs": 20})
    written = write_job(folder, config, str(job / "model"), job / "pairs.parquet", None, seed=0, threads=1)
    read_job(folder).run(folder / "one")
    killer = threading.Thread(target=kill_a_rank, args=[folder / ".adapter.checkpoints" / "checkpoint-6" / "complete"], daemon=True)
    killer.start()
    align_on_ray(written, workers=2)
    assert not killer.is_alive()
    assert json.loads((folder / "adapter" / "summary.json").read_text())["resumed_from"] >= 6
    one, resumed = (load_file(folder / name / "adapter_model.safetensors") for name in ("one", "adapter"))
    assert max(float((one[name] - resumed[name]).abs().max()) for name in one) < 1e-5


def test_a_job_moves_with_its_folder_and_its_settings_are_checked(job: Path) -> None:
    values = json.loads((job / "alignment.json").read_text())
    assert (values["model"], values["pairs"]) == ("model", "pairs.parquet")
    assert read_job(job, workers=2, zero_stage=3).config.zero_stage == 3
    with pytest.raises(InputError, match="workers"):
        read_job(job, workers=9)
    with pytest.raises(InputError, match="no such file"):
        read_job(job / "nowhere")
