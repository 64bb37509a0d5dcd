"""Metrics against hand-worked lists and scikit-learn; the bootstrap against known differences."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score

from dpo4rec.errors import InputError
from dpo4rec.evaluation.metrics import METRICS, average_precision, log_likelihood, ndcg, per_user
from dpo4rec.evaluation.significance import paired_bootstrap

SCORES = torch.tensor([[4.0, 3.0, 2.0, 1.0]])


@pytest.mark.parametrize(
    ("labels", "k", "ndcg_value", "precision"),
    [
        ([1, 0, 0, 0], 3, 1.0, 1.0),
        ([0, 1, 0, 1], 3, (1 / math.log2(3)) / (1 + 1 / math.log2(3)), 0.5),
        ([0, 1, 1, 0], 3, (1 / math.log2(3) + 0.5) / (1 + 1 / math.log2(3)), (1 / 2 + 2 / 3) / 2),
        ([0, 0, 0, 1], 3, 0.0, 0.0),
        ([0, 0, 0, 1], 10, 1 / math.log2(5), 0.25),
    ],
)
def test_metrics_by_hand(labels: list[int], k: int, ndcg_value: float, precision: float) -> None:
    assert ndcg(SCORES, torch.tensor([labels]), k).item() == pytest.approx(ndcg_value)
    assert average_precision(SCORES, torch.tensor([labels]), k).item() == pytest.approx(precision)


def test_ndcg_agrees_with_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(50, 10, generator=generator)
    labels = (torch.rand(50, 10, generator=generator) < 0.4).int()
    labels[:, 0] = 1
    for k in (1, 3, 5, 7, 10):
        expected = [ndcg_score(labels[i : i + 1].numpy(), scores[i : i + 1].numpy(), k=k) for i in range(50)]
        np.testing.assert_allclose(ndcg(scores, labels, k).numpy(), expected, rtol=1e-5)


def test_lists_without_positives_are_nan_in_every_metric() -> None:
    labels = torch.tensor([[0, 0, 0, 0]])
    assert all(math.isnan(metric(SCORES, labels).item()) for metric in METRICS.values())


def test_ties_rank_by_candidate_position() -> None:
    assert ndcg(torch.zeros(1, 4), torch.tensor([[1, 0, 0, 0]]), 1).item() == 1
    assert ndcg(torch.zeros(1, 4), torch.tensor([[0, 0, 0, 1]]), 1).item() == 0


def test_log_likelihood_is_the_negative_binary_cross_entropy() -> None:
    logits, labels = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    expected = (math.log(1 / (1 + math.exp(-2))) + math.log(1 - 1 / (1 + math.exp(1)))) / 2
    assert log_likelihood(logits, labels).item() == pytest.approx(expected)


def test_per_user_leaves_out_nan() -> None:
    means = per_user(torch.tensor([1.0, torch.nan, 0.0, torch.nan]), torch.tensor([0, 0, 0, 2]), 4)
    np.testing.assert_array_equal(means.numpy(), [0.5, np.nan, np.nan, np.nan])


def test_bootstrap_finds_a_difference_and_not_its_absence() -> None:
    generator = torch.Generator().manual_seed(0)
    base, noise = torch.rand(300, generator=generator), 0.1 * torch.randn(300, generator=generator)
    better = paired_bootstrap(base + 0.05 + noise, base, seed=0)
    assert better.low < better.difference < better.high
    assert better.low > 0
    assert better.p_value < 0.01
    same = paired_bootstrap(base + noise - noise.mean(), base, seed=0)
    assert same.low < 0 < same.high
    assert same.p_value > 0.9


def test_bootstrap_interval_is_that_of_the_normal_approximation() -> None:
    differences = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    comparison = paired_bootstrap(differences, torch.zeros(2000), seed=0)
    half = 1.96 * differences.std().item() / math.sqrt(2000)
    assert comparison.high - comparison.difference == pytest.approx(half, rel=0.05)
    assert comparison.difference - comparison.low == pytest.approx(half, rel=0.05)


def test_bootstrap_pairs_users_and_depends_on_its_seed_alone() -> None:
    a, b = torch.tensor([1.0, 2.0, torch.nan, 4.0]), torch.tensor([0.0, 3.0, 1.0, torch.nan])
    comparison = paired_bootstrap(a, b, seed=3, samples=500)
    assert comparison == paired_bootstrap(a, b, seed=3, samples=500)
    assert (comparison.users, comparison.difference) == (2, 0.0)
    with pytest.raises(InputError, match="no user"):
        paired_bootstrap(torch.tensor([torch.nan]), torch.tensor([1.0]), seed=0)
