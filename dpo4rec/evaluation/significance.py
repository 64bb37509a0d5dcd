"""Is one system better than another? A paired bootstrap over users."""

from dataclasses import dataclass

import numpy as np
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

    The interval is the percentile interval of the resampled mean differences. The p-value shifts their distribution to the null
    of no difference (Efron and Tibshirani 1993, section 16.4; Smucker et al., CIKM 2007): the share of resamples at least as far from
    the observed difference as that is from 0, with one added to both counts so that it is never 0.

    Raises:
        InputError: no user has a value in both.
    """
    differences = (a.double() - b.double()).numpy()
    differences = differences[~np.isnan(differences)]
    users = len(differences)
    if not users:
        raise InputError("paired bootstrap", "no user has a value under both systems", "Compare systems over the same users' lists")
    generator = np.random.default_rng(seed)
    sizes = [min(CHUNK, samples - start) for start in range(0, samples, CHUNK)]
    means = np.concatenate([differences[generator.integers(users, size=(size, users))].mean(1) for size in sizes])
    observed = float(differences.mean())
    extreme = int((np.abs(means - observed) >= abs(observed)).sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return Comparison(observed, float(low), float(high), (extreme + 1) / (samples + 1), users)
