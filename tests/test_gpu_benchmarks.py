"""The GPU benchmarks run through on CPU with tiny shapes, whatever becomes of one of their runs, and figures follow from the runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import dpo, sampling
from benchmarks.gpu.runs import Runs, fresh


@pytest.mark.slow
def test_a_part_runs_through_with_a_tiny_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu/dpo.py", "--part", "qlora", "--micro", "--out", str(tmp_path)])
    assert dpo.main() == 0
    (run,) = json.loads((tmp_path / "gpu_dpo_micro.json").read_text())["raw"]["qlora"]["runs"]
    assert run["status"] == "done", run
    assert run["packed"]
    assert not run["warnings"]
    assert run["pairs_per_second"] > 0
    assert str(tmp_path) not in json.dumps(run)


def test_a_run_that_takes_too_long_or_fails_is_told_from_one_that_is_done() -> None:
    assert fresh("benchmarks.gpu.sampling", {}, 0.2)["status"] == "timed out"
    failed = fresh("benchmarks.gpu.nothing", {}, 100)
    assert (failed["status"], failed["exit"]) == ("failed", 1)
    assert "benchmarks.gpu.nothing" in failed["error"]


def test_the_command_names_its_parts() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "gpu" / "run.sh"
    done = subprocess.run([str(script), "nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert all(part in done.stderr for part in [*dpo.PARTS, "sampling8b", "sampling1b"])


def test_what_no_longer_fits_is_skipped_and_takes_nothing_away(tmp_path: Path) -> None:
    file = tmp_path / "gpu_nothing.json"
    file.write_text(json.dumps({"raw": {"first": {"runs": [{"status": "done", "size": 3}]}}}))
    runs = Runs("benchmarks.gpu.sampling", "gpu_nothing", tmp_path, lambda parts: {"parts": len(parts)}, 0, 100)
    runs.begin("first")
    runs.do({"size": 4})
    written = json.loads(file.read_text())
    assert written["raw"]["first"]["runs"] == [{"status": "done", "size": 3}]
    assert written["figures"] == {"parts": 1}


def lora(side: str, pairs_per_second: float, **more: Any) -> dict[str, Any]:
    return {"status": "done", "shape": "8b", "side": side, "settings": {}, "pairs_per_second": pairs_per_second, **more}


def test_figures_of_training_are_of_the_best_runs() -> None:
    runs = [lora("trl", 2.0), lora("trl", 4.0), lora("ours", 9.0, mfu=0.4), lora("ours", 10.0, mfu=0.5, peak_gpu_memory_gib=70.0)]
    failed = {"status": "out of memory", "shape": "8b", "side": "trl", "settings": {}}
    found = dpo.figures({"lora8b": [*runs, failed]})
    assert found["pairs_per_second_ratio_vs_trl_8b_lora"] == 2.5
    assert found["mfu_8b_lora"] == 0.5
    assert found["peak_gpu_memory_gib_8b_lora"] == 70.0
    assert dpo.figures({"lora8b": [failed]}) == {}


def test_figures_of_memory() -> None:
    qlora = lora("ours", 1.0, peak_gpu_memory_gib=12.5)
    without = {"status": "out of memory", "shape": "3b", "settings": {}, "gib": 40}
    offloaded = {"status": "done", "shape": "3b", "settings": {"offload": True}, "gib": 40, "peak_gpu_memory_gib": 20.0}
    found = dpo.figures({"qlora": [qlora], "zero3": [without, offloaded]})
    assert found["peak_memory_gib_8b_qlora"] == 12.5
    assert found["fits_40_gib_3b_full_zero3"] == 0
    assert found["fits_40_gib_3b_full_zero3_offload"] == 1
    assert found["peak_memory_gib_3b_full_zero3_offload"] == 20.0


def test_the_bandwidth_limit_counts_weights_and_caches_of_a_step() -> None:
    """10 rows of one prompt of P tokens: a step reads 100 weights of 2 bytes, 3 bytes of each prompt token, and of 10 x 32 own tokens."""
    prompt = len(sampling.make_prompts(1, 512)[0])
    engine = {"status": "done", "shape": "micro", "side": "engine", "size": 10, "prompts": 1, "tokens_per_second": 5.0}
    limits = {"status": "done", "side": "limits", "weights": 100, "cache_bytes_per_token": 3, "copy_bytes_per_second": 1000.0}
    other = {"status": "done", "side": "continuous", "tokens_per_second": 2.0}
    found = sampling.figures({"8b": [engine, {**limits, "product_flops_per_second": 1e6}, other]})
    assert found["share_of_bandwidth_limit_8b"] == pytest.approx(5.0 * (200 + 3 * (prompt + 320)) / (10 * 1000.0))
    assert found["tokens_per_second_ratio_vs_continuous_batching_8b"] == 2.5
    assert "tokens_per_second_ratio_vs_generate_8b" not in found
