"""What samples and trains keeps to its device: on one that nothing may mix with the CPU, as a GPU, it does the same as on the CPU."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("devices")
    script = Path(__file__).with_name("pretended_device.py")
    subprocess.run([sys.executable, str(script), str(folder)], check=True, timeout=600)
    return json.loads((folder / "results.json").read_text())


def test_the_pretended_device_refuses_to_mix(results: dict[str, Any]) -> None:
    assert "tensors on pretended:0 and on the CPU" in results["mixed"]


def test_the_engine_draws_the_same_texts(results: dict[str, Any]) -> None:
    assert results["pretended"]["warning"] == results["cpu"]["warning"] == ""  # prompts are shared on both
    assert results["pretended"]["texts"] == results["cpu"]["texts"]
    assert results["cpu"]["texts"]["shared, plain"] == results["cpu"]["texts"]["apart, plain"]


@pytest.mark.parametrize("kind", ["packed", "padded", "full"])
def test_the_alignment_takes_the_same_steps(results: dict[str, Any], kind: str) -> None:
    on_cpu, pretended = (results[device]["logs"][kind] for device in ("cpu", "pretended"))
    assert len(on_cpu) == len(pretended) > 1
    for expected, found in zip(on_cpu, pretended, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
