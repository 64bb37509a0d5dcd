"""The objectives are their formulas, written out here in numpy; every combination with a noise model works or is refused."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from test_alignment import SETTINGS, make_model, make_rows, steps_of

from dpo4rec.alignment.align import align
from dpo4rec.alignment.config import NOISE_OF, AlignmentConfig
from dpo4rec.alignment.objective import Objective
from dpo4rec.alignment.pairs import Comparison, Preferences
from dpo4rec.errors import InputError
from dpo4rec.files import write_parquet

BETA = 0.3
POLICY = np.array([-3.0, -5.0, -4.0, -9.0, -2.0])
REFERENCE = np.array([-4.0, -4.5, -4.2, -7.0, -2.5])
LENGTHS = np.array([2, 4, 3, 6, 1])
CHANGE = POLICY - REFERENCE


def softplus(x: np.ndarray | float) -> Any:
    return np.log1p(np.exp(x))


def losses(rejected: list[list[int]], epsilon: float = 0.0, margin: float = 1.0, **settings: Any) -> Any:
    """Of answers 0 and 4, each against `rejected`."""
    config = AlignmentConfig(beta=BETA, **settings)
    width = max(map(len, rejected))
    rows = [Comparison(chosen, tuple(bad), epsilon, margin) for chosen, bad in zip((0, 4), rejected, strict=True)]
    batch = {
        "index": torch.arange(2),
        "lengths": torch.tensor(LENGTHS),
        "chosen": torch.tensor([0, 4]),
        "rejected": torch.tensor([bad + [-1] * (width - len(bad)) for bad in rejected]),
    }
    objective = Objective(config, Preferences([], [], rows), torch.device("cpu"))
    reference = np.zeros(5) if config.objective == "simpo" else REFERENCE
    return objective(torch.tensor(POLICY).float(), torch.tensor(reference).float(), batch)


PAIRS = [[1], [3]]
GAP = BETA * (CHANGE[[0, 4]] - CHANGE[[1, 3]])
PER_TOKEN = (CHANGE / LENGTHS)[[0, 4]] - (CHANGE / LENGTHS)[[1, 3]]
LIKELY = BETA * ((POLICY / LENGTHS)[[0, 4]] - (POLICY / LENGTHS)[[1, 3]])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, softplus(-GAP)),
        ({"objective": "smoothed", "noise": "epsilon_column"}, 0.8 * softplus(-GAP) + 0.2 * softplus(GAP)),
        ({"objective": "robust", "noise": "epsilon_column"}, (0.8 * softplus(-GAP) - 0.2 * softplus(GAP)) / 0.6),
        ({"objective": "margin"}, softplus(1.5 - GAP)),
        ({"objective": "hinge"}, np.maximum(0, 1.5 - GAP)),
        ({"objective": "ipo"}, (PER_TOKEN - 1 / (2 * BETA)) ** 2),
        ({"objective": "simpo"}, softplus(1.5 - LIKELY)),
        ({"objective": "softmax"}, softplus(-GAP)),
        ({"objective": "dmpo"}, softplus(-GAP)),
    ],
    ids=str,
)
def test_a_pair_has_the_loss_of_the_formula(settings: dict[str, Any], expected: np.ndarray) -> None:
    found = losses(PAIRS, epsilon=0.2, margin=1.5, **settings)
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5)
    with_nll = losses(PAIRS, epsilon=0.2, margin=1.5, nll_weight=0.5, **settings)
    np.testing.assert_allclose(with_nll.loss, expected - 0.5 * (POLICY / LENGTHS)[[0, 4]], rtol=1e-5)


def test_one_against_many() -> None:
    """Answer 0 against 1 and 2, answer 4 against 3 alone."""
    first, second = BETA * (CHANGE[0] - CHANGE[[1, 2]]), BETA * (CHANGE[4] - CHANGE[3])
    softmax = losses([[1, 2], [3]], objective="softmax")
    np.testing.assert_allclose(softmax.loss, [np.log1p(np.exp(-first).sum()), softplus(-second)], rtol=1e-5)
    dmpo = losses([[1, 2], [3]], objective="dmpo")
    np.testing.assert_allclose(dmpo.loss, [softplus(-first.mean()), softplus(-second)], rtol=1e-5)
    np.testing.assert_allclose(dmpo.gap, [first.mean(), second], rtol=1e-5)


NOISE = ("none", "epsilon", "epsilon_column", "margin_column")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a file of 24 pairs on 8 prompts with an epsilon and a margin each."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("objectives")
    make_model(folder / "model")
    rows = make_rows(24)
    for name in ("prompt", "prompt_ids"):
        rows[name] = [rows[name][row // 3] for row in range(24)]
    for name in ("chosen", "chosen_ids"):
        rows[name] = [rows[name][row // 3] for row in range(24)]
    write_parquet(pa.table({**rows, "epsilon": np.linspace(0, 0.4, 24), "margin": np.linspace(0, 2, 24)}), folder / "pairs.parquet")
    return folder


@pytest.mark.parametrize(("objective", "noise"), product(NOISE_OF, NOISE))
def test_every_combination_trains_or_is_refused(folder: Path, tmp_path: Path, objective: str, noise: str) -> None:
    settings = {**SETTINGS, "objective": objective, "noise": noise, "nll_weight": 0.1}
    if noise not in NOISE_OF[objective]:
        with pytest.raises(ValidationError, match="no formula"):
            AlignmentConfig(**settings)
        return
    align(AlignmentConfig(**settings), str(folder / "model"), folder / "pairs.parquet", None, 0, tmp_path / "a")
    assert np.isfinite(steps_of(tmp_path / "a")).all()
    steps = 1 if objective in ("softmax", "dmpo") else 3  # 8 comparisons of 1 against 3, or 24 pairs
    assert len(steps_of(tmp_path / "a")) == steps


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"epsilon": 0.2}, "epsilon would be ignored"),
        ({"margin": 2.0}, "margin would be ignored"),
        ({"objective": "margin", "noise": "margin_column", "margin": 2.0}, "margin would be ignored"),
        ({"objective": "simpo", "reference": "base"}, "reference would be ignored"),
        ({"weights": "full", "reference": "base"}, "needs weights: lora"),
        ({"objective": "robust", "noise": "epsilon", "epsilon": 0.5}, "less than 0.5"),
    ],
)
def test_what_would_be_ignored_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        AlignmentConfig(**settings)


@pytest.mark.parametrize(
    ("columns", "noise", "says"),
    [
        ({}, "epsilon", "column epsilon is missing"),
        ({"epsilon": [0.1, 0.5]}, "epsilon", "row 1.*epsilon is 0.5"),
        ({"epsilon": [None, 0.1]}, "epsilon", "row 0.*epsilon is None"),
        ({"margin": [1.0, float("nan")]}, "margin", "row 1.*margin is nan"),
    ],
)
def test_bad_noise_columns_are_refused_with_their_place(folder: Path, tmp_path: Path, columns: Any, noise: str, says: str) -> None:
    ids = {"prompt_ids": [[5], [6]], "chosen_ids": [[6], [7]], "rejected_ids": [[7], [8]]}
    write_parquet(pa.table({**ids, **columns}), tmp_path / "pairs.parquet")
    config = AlignmentConfig(objective="robust" if noise == "epsilon" else "margin", noise=f"{noise}_column")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=says):
        align(config, str(folder / "model"), tmp_path / "pairs.parquet", None, 0, tmp_path / "a")
