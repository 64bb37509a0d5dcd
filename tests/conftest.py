"""Fixtures that every test may use: real data sets where they are present, and a small simulated data folder."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the hub, and without a network each look at it takes half a minute
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's workers would give way to all else: beside another test process they starve

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dpo4rec.config import resolve
from dpo4rec.data.config import DataConfig, SimulationConfig
from dpo4rec.data.prepare import prepare
from dpo4rec.driver import Run
from dpo4rec.experiment import Experiment

REAL_DATA = Path(os.environ.get("DPO4REC_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

ORDER = ("ray_jobs", "run", "alignment_controls", "recommenders", "export", "alignment_processes", "pool")
"""Test files that take longest, in an order by which the two that start most processes seldom meet and none is left for the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}.py": number for number, name in enumerate(ORDER)}
    items.sort(key=lambda item: place.get(item.path.name, len(ORDER)))


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """`real_data("ml-1m")` is the data set's folder; the test is skipped where it is absent."""

    def folder(name: str) -> Path:
        if not (REAL_DATA / name).is_dir():
            pytest.skip(f"{name} is not in {REAL_DATA}: set DPO4REC_DATA to the folder that holds it")
        return REAL_DATA / name

    return folder


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of 120 users and 150 items; read-only."""
    out = tmp_path_factory.mktemp("simulated")
    prepare(DataConfig(simulation=SimulationConfig(users=120, items=150, interactions_per_user=24)), seed=0, out=out)
    return out


MICRO = {
    "rounds": 1,
    "data": {"simulation": {"users": 120, "items": 150, "interactions_per_user": 24}, "max_lists_per_user": 2},
    "llm": {"tiny": {"hidden_size": 32, "layers": 2, "prompts": 320, "prompts_per_step": 8, "checkpoint_every_steps": 10}},
    "sampling": {"samples": 3, "users_per_unit": 16, "decoding": {"max_new_tokens": 12}},
    "encoder": {"dimensions": 16},
    "recommender": {"epochs": 1, "embedding_dim": 8, "hidden_dim": 16, "expert_hidden_dim": 16},
    "reward": {"seeds": 1},
    "pairs": {"format_gate": False},  # such a small model seldom gets the form right
    "alignment": {"lora_rank": 2, "pairs_per_step": 8, "checkpoint_every_steps": 2, "nll_weight": 0.0},
    "evaluation": {"temperatures": [1.0], "texts_per_user": 2, "seeds": 1, "bootstrap_samples": 200},
    "cluster": {"threads_per_worker": 1, "training_threads": 1},
}
"""The quickstart made so small that a run takes seconds; its figures mean nothing."""


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A settings file for `--preset quickstart --config`."""
    file = tmp_path_factory.mktemp("micro") / "micro.yaml"
    file.write_text(yaml.safe_dump(MICRO))
    return file


@pytest.fixture(scope="session")
def micro_run(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished, undisturbed micro run in debug mode; read-only."""
    folder = tmp_path_factory.mktemp("run") / "undisturbed"
    run = Run(resolve("quickstart", micro, []), folder)
    run.rounds()
    Experiment(run).evaluate()
    run.folder.release()
    return folder
