"""Is one system better than another? Paired tests over users, and their correction where several are read together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from torch import Tensor

from dpo4rec.errors import InputError

CHUNK = 250  # resamples held in memory at once


@dataclass(frozen=True)
class Comparison:
    """Difference a - b of the means over users, its 95 % interval [low, high], two-sided p-value, and number of users."""

    difference: float
    low: float
    high: float
    p_value: float
    users: int


def paired_bootstrap(a: Tensor, b: Tensor, seed: int, samples: int = 10_000) -> Comparison:
    """Compares two systems by their values on the same users, a and b [U]; users with NaN in either are left out.

    With values of several independent runs of the whole method, a and b [R, U], the systems of a run being compared on the same users, runs
    are drawn with replacement as users are, so that the interval is of what another run with other users would show. Of R runs R - 1 are
    drawn: R would make the part of the variance that runs have too small by (R - 1) / R, a fifth of it for five (Rao and Wu, JASA 1988).
    Values of one run say nothing of another.

    The interval is the percentile interval of the resampled mean differences. The p-value shifts their distribution to the null
    of no difference (Efron and Tibshirani 1993, section 16.4; Smucker et al., CIKM 2007): the share of resamples at least as far from
    the observed difference as that is from 0, with one added to both counts so that it is never 0.

    Raises:
        InputError: no user has a value in both, or (several runs) a user has values in some of the runs alone.
    """
    differences = _differences(a, b)
    users = differences.shape[-1]
    generator = np.random.default_rng(seed)
    sizes = [min(CHUNK, samples - start) for start in range(0, samples, CHUNK)]
    means = np.concatenate([_resampled(differences, generator, size) for size in sizes])
    observed = float(differences.mean())
    extreme = int((np.abs(means - observed) >= abs(observed)).sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return Comparison(observed, float(low), float(high), (extreme + 1) / (samples + 1), users)


def _resampled(differences: np.ndarray, generator: np.random.Generator, size: int) -> np.ndarray:
    """Means [size] of resamples of the users, and of the runs where there are several."""
    if differences.ndim == 1:
        return differences[generator.integers(len(differences), size=(size, len(differences)))].mean(1)
    of_runs, of_users = differences.shape
    runs, users = _shares(generator, max(1, of_runs - 1), of_runs, size), _shares(generator, of_users, of_users, size)
    return ((runs @ differences) * users).sum(1)


def _shares(generator: np.random.Generator, drawn: int, of: int, size: int) -> np.ndarray:
    """How much each of `of` weighs [size, of] where so many are drawn with replacement."""
    return generator.multinomial(drawn, np.full(of, 1 / of), size) / drawn


def wilcoxon(a: Tensor, b: Tensor) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test of values on the same users, a and b [U]; users with NaN in either are left out.

    Users without a difference are left out, as Wilcoxon (1945) does; 1 if no user has one. Exact for few users, else by the normal
    approximation, as scipy chooses.

    Raises:
        InputError: no user has a value in both.
    """
    differences = _differences(a, b)
    return float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979) of the p-values of one family, in their order.

    The i-th smallest of m is multiplied by m - i + 1, is at least the one before, and at most 1. Rejecting where the result is below alpha
    keeps the chance of any false rejection below alpha, whatever the dependence.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected.tolist()


def correct(rows: Sequence[dict[str, Any]], *names: str) -> None:
    """Adds to each row `<name>_holm`, the p-value `name` corrected over all the rows, which are one family."""
    for name in names:
        for row, corrected in zip(rows, holm([row[name] for row in rows]), strict=True):
            row[f"{name}_holm"] = corrected


def _differences(a: Tensor, b: Tensor) -> np.ndarray:
    differences = (a.double() - b.double()).numpy()
    lacking = np.isnan(differences)
    if lacking.all(-1).any():
        raise InputError("paired comparison", "no user has a value under both systems", "Compare systems over the same users' lists")
    if differences.ndim == 1:
        return differences[~lacking]
    if (lacking.any(0) != lacking.all(0)).any():
        raise InputError("paired comparison", "the runs have other users", "Give all runs the same data.split_seed")
    return differences[:, ~lacking[0]]
