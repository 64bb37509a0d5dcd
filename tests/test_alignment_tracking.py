"""Trackers: what TensorBoard is told, and that a tracker that fails stops no run."""

import importlib.util
import json
import logging
from pathlib import Path

import pyarrow as pa
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_alignment import SETTINGS, make_model, make_rows, steps_of

from dpo4rec.alignment.align import align
from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.config import resolve
from dpo4rec.driver import Run
from dpo4rec.errors import InputError
from dpo4rec.files import write_parquet


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    write_parquet(pa.table(make_rows(24)), folder / "pairs.parquet")
    return str(make_model(folder / "model")), folder / "pairs.parquet"


def test_tensorboard_gets_every_line_of_the_log(inputs: tuple[str, Path], tmp_path: Path) -> None:
    model, pairs = inputs
    align(AlignmentConfig(**SETTINGS), model, pairs, None, 0, tmp_path / "adapter", threads=1, tracking="tensorboard")
    told = EventAccumulator(str(tmp_path / "tracking")).Reload()
    losses = [event.value for event in told.Scalars("train/loss")]
    assert losses == pytest.approx(steps_of(tmp_path / "adapter"), rel=1e-6)
    assert [event.step for event in told.Scalars("train/margin")] == [1, 2, 3]


def test_a_tracker_that_fails_stops_nothing_and_is_named_once(
    inputs: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, pairs = inputs
    (tmp_path / "a file").write_text("where TensorBoard wants to make a folder")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "a file"))
    with caplog.at_level(logging.WARNING, logger="dpo4rec"):
        align(AlignmentConfig(**SETTINGS), model, pairs, None, 0, tmp_path / "tracked", threads=1, tracking="tensorboard")
    assert len([record for record in caplog.records if "tensorboard failed" in record.getMessage()]) == 1
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
    align(AlignmentConfig(**SETTINGS), model, pairs, None, 0, tmp_path / "untracked", threads=1)
    name = "adapter_model.safetensors"
    assert (tmp_path / "tracked" / name).read_bytes() == (tmp_path / "untracked" / name).read_bytes()
    assert json.loads((tmp_path / "tracked" / "summary.json").read_text())["steps"] == 3


def test_a_tracker_that_is_not_installed_is_refused_before_anything_runs(tmp_path: Path) -> None:
    if importlib.util.find_spec("mlflow"):
        pytest.skip("mlflow is installed")
    with pytest.raises(InputError, match="pip install mlflow"):
        Run(resolve("quickstart", None, ["tracking=mlflow"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
