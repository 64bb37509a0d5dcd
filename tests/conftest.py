"""Fixtures that every test may use: real data sets where they are present, and a small simulated data folder."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo4rec.data.config import DataConfig, SimulationConfig
from dpo4rec.data.prepare import prepare

REAL_DATA = Path(os.environ.get("DPO4REC_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


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
