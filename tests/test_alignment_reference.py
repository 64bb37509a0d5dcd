"""The reference's log-probabilities: of which policy, computed once, found again, verified."""

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from peft.tuners.lora import Linear
from test_alignment import SETTINGS, make_model, make_rows, steps_of

from dpo4rec.alignment.align import align
from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.files import read_tensors, write_parquet, write_tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, pairs, and the adapters of two rounds."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("reference")
    make_model(folder / "model")
    write_parquet(pa.table(make_rows(20)), folder / "pairs.parquet")
    run(folder, folder / "first" / "adapter")
    run(folder, folder / "second" / "adapter", folder / "first" / "adapter")
    return folder


def run(folder: Path, out: Path, initial: Path | None = None, round_0: Path | None = None, **changes: Any) -> Path:
    config = AlignmentConfig(**{**SETTINGS, **changes})
    align(config, str(folder / "model"), folder / "pairs.parquet", initial, 0, out, round_0_adapter=round_0)
    return out


def table(out: Path) -> torch.Tensor:
    (file,) = (out.parent / ".reference").iterdir()
    return read_tensors(file)["log_probs"]


def test_the_config_names_the_reference(folder: Path, tmp_path: Path) -> None:
    first, second = folder / "first" / "adapter", folder / "second" / "adapter"
    base = run(folder, tmp_path / "base" / "adapter", second, reference="base")
    torch.testing.assert_close(table(base), table(first))  # the first round began without an adapter
    assert abs(steps_of(base, "chosen_change")[0]) > 0.1
    round_0 = run(folder, tmp_path / "round_0" / "adapter", second, first, reference="round_0")
    torch.testing.assert_close(table(round_0), table(second))  # the second round began with the first one's adapter
    assert {path.name for path in round_0.iterdir()} == {path.name for path in first.iterdir()}  # the reference's is not written
    without = run(folder, tmp_path / "none" / "adapter", second, reference="round_0")
    torch.testing.assert_close(table(without), table(base))


def test_it_is_computed_once(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    once = run(folder, tmp_path / "a")
    with caplog.at_level(logging.INFO):
        again = run(folder, tmp_path / "b", learning_rate=1e-3)
    assert any("reference log-probabilities from" in record.message for record in caplog.records)
    assert steps_of(again)[0] == steps_of(once)[0]
    assert len(list((tmp_path / ".reference").iterdir())) == 1
    run(folder, tmp_path / "c", folder / "first" / "adapter")
    assert len(list((tmp_path / ".reference").iterdir())) == 2


def test_a_fresh_adapter_is_switched_off_for_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters_at_work = []
    forward = Linear.forward

    def watched(self: Linear, *args: Any, **more: Any) -> torch.Tensor:
        if torch.is_grad_enabled():  # a training step begins
            monkeypatch.setattr(Linear, "forward", forward)
        else:
            adapters_at_work.append(not self.disable_adapters)
        return forward(self, *args, **more)

    for initial in (None, folder / "first" / "adapter"):
        adapters_at_work.clear()
        monkeypatch.setattr(Linear, "forward", watched)
        run(folder, tmp_path / f"{initial is None}" / "adapter", initial, packing="none")  # to look for packing runs the model, too
        assert set(adapters_at_work) == {initial is not None}


def test_one_that_is_not_whole_is_computed_again(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    once = run(folder, tmp_path / "a")
    (file,) = (tmp_path / ".reference").iterdir()
    values = read_tensors(file)["log_probs"]
    for broken in (values[:-1], values.where(values != values[0], torch.nan)):
        write_tensors({"log_probs": broken}, file)
        assert steps_of(run(folder, tmp_path / "b")) == steps_of(once)
        torch.testing.assert_close(read_tensors(file)["log_probs"], values)
    assert sum("computed again" in record.message for record in caplog.records) == 2


def test_a_reference_that_is_another_policys_stops_the_run(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "a")
    (file,) = (tmp_path / ".reference").iterdir()
    write_tensors({"log_probs": read_tensors(file)["log_probs"] - 1}, file)
    with pytest.raises(RuntimeError, match="1 nats from the reference"):
        run(folder, tmp_path / "b")
