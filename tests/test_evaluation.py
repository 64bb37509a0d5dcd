"""Metrics against hand-worked lists, scikit-learn, ir-measures and plain loops; tests of significance against known differences."""

import itertools
import math
import re
from pathlib import Path

import ir_measures
import numpy as np
import pytest
import torch
from ir_measures import AP, RR, P, R, Success, nDCG
from scipy import stats
from sklearn.metrics import ndcg_score

from dpo4rec.errors import InputError
from dpo4rec.evaluation.beyond_accuracy import beyond_accuracy
from dpo4rec.evaluation.metrics import DEFINITIONS, accuracy, average_precision, log_likelihood, ndcg, per_user
from dpo4rec.evaluation.significance import holm, paired_bootstrap, wilcoxon
from dpo4rec.evaluation.trec import Ranking, rankings_of, write_qrels, write_run

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
    assert all(math.isnan(metric(SCORES, labels, 3).item()) for metric in (ndcg, average_precision))


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


def test_accuracy_by_hand() -> None:
    found = accuracy(torch.tensor([[0, 1, 0, 1, 0]]), torch.tensor([4]), [4])
    expected = {"map": 0.5, "ap": 0.25, "hr": 1.0, "mrr": 0.5, "recall": 0.5, "precision": 0.5}
    gains = [1 / math.log2(rank + 1) for rank in range(1, 5)]
    assert found["ndcg@4"].item() == pytest.approx((gains[1] + gains[3]) / sum(gains))
    assert {name: found[f"{name}@4"].item() for name in expected} == pytest.approx(expected)


def test_accuracy_without_hits_is_0_and_without_relevant_items_nan() -> None:
    found = accuracy(torch.zeros(2, 3), torch.tensor([5, 0]), [1, 3, 10])
    assert len(found) == 3 * len(DEFINITIONS)
    for values in found.values():
        assert values[0] == 0
        assert values[1].isnan()


def test_re_ranked_lists_and_their_hits_have_the_same_metrics() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(30, 10, generator=generator), (torch.rand(30, 10, generator=generator) < 0.2).float()
    found = accuracy(labels.gather(1, scores.argsort(dim=1, descending=True)), labels.sum(1), [1, 3, 5, 7, 10])
    for k in (1, 3, 5, 7, 10):
        torch.testing.assert_close(found[f"ndcg@{k}"], ndcg(scores, labels, k), equal_nan=True)
        torch.testing.assert_close(found[f"map@{k}"], average_precision(scores, labels, k), equal_nan=True)


def test_impossible_hits_and_cutoffs_are_refused() -> None:
    with pytest.raises(ValueError, match="more hits"):
        accuracy(torch.ones(1, 3), torch.tensor([2]), [3])
    with pytest.raises(ValueError, match="at least 1"):
        accuracy(torch.ones(1, 3), torch.tensor([3]), [0])


IR_MEASURES = {"ndcg": nDCG, "ap": AP, "mrr": RR, "precision": P, "recall": R, "hr": Success}
ITEM_IDS = [f"item-{number}" for number in range(60)]


@pytest.mark.parametrize("ties", [False, True], ids=["distinct scores", "many ties"])
def test_accuracy_agrees_with_ir_measures_on_the_exported_files(ties: bool, tmp_path: Path) -> None:
    """Lists of 20 of 60 items; users have 1 to 8 relevant items, most of them not retrieved; some lists are short."""
    generator = torch.Generator().manual_seed(0)
    users, depth = [f"user-{number}" for number in range(80)], 20
    top = torch.stack([torch.randperm(60, generator=generator)[:depth] + 1 for _ in users])
    top[::7, 12:] = 0
    scores = torch.randn(80, depth, generator=generator).sort(dim=1, descending=True).values
    scores = scores.round() if ties else scores
    relevant = [torch.randperm(60, generator=generator)[: 1 + n % 8] + 1 for n in range(80)]
    hits = torch.stack([torch.isin(codes, of) for codes, of in zip(top, relevant, strict=True)])

    write_run(rankings_of(users, ITEM_IDS, top, scores), tmp_path / "a.run", tag="test")
    write_qrels(((user, [ITEM_IDS[c - 1] for c in of]) for user, of in zip(users, relevant, strict=True)), tmp_path / "a.qrels")
    cutoffs = [1, 5, 10, 20]
    measures = {f"{name}@{k}": measure @ k for name, measure in IR_MEASURES.items() for k in cutoffs}
    theirs = {
        (str(value.measure), value.query_id): value.value
        for value in ir_measures.iter_calc(
            list(measures.values()),
            list(ir_measures.read_trec_qrels(str(tmp_path / "a.qrels"))),
            list(ir_measures.read_trec_run(str(tmp_path / "a.run"))),
        )
    }
    ours = accuracy(hits, torch.tensor([len(of) for of in relevant]), cutoffs)
    for name, measure in measures.items():
        expected = [theirs[str(measure), user] for user in users]
        np.testing.assert_allclose(ours[name].numpy(), expected, atol=1e-6, rtol=0, err_msg=name)
    assert (ours["map@20"] > ours["ap@20"] + 0.01).any()  # KAR's is another metric


def test_run_lines_keep_order_and_scores(tmp_path: Path) -> None:
    scores = [0.1, 0.1, 0.1 - 1e-12, -3e-30, -3e-30]
    write_run([("u", list("edcba"), scores)], tmp_path / "x.run", tag="t")
    lines = [line.split() for line in (tmp_path / "x.run").read_text().splitlines()]
    assert [line[:4] for line in lines] == [["u", "Q0", item, str(rank)] for rank, item in enumerate("edcba", start=1)]
    written = np.array([line[4] for line in lines], dtype=np.float32)
    assert (np.diff(written) < 0).all()
    np.testing.assert_allclose(written, scores, rtol=1e-6)
    assert written[0] == np.float32(0.1)


@pytest.mark.parametrize(
    ("rankings", "message"),
    [
        ([("", ["i"], [1.0])], "a name is empty"),
        ([("u", [""], [1.0])], "a name is empty"),
        ([("u", ["i"], [1.0]), ("u", ["j"], [1.0])], "topic was there before"),
        ([("u", ["i", "i"], [2.0, 1.0])], "stands there twice"),
        ([("u", ["i", "j"], [1.0, 2.0])], "scores rise"),
        ([("u", ["i", "j"], [1.0, -math.inf])], "finite"),
        ([("u", ["i", "j"], [1.0])], "finite"),
    ],
)
def test_rankings_that_a_run_file_cannot_hold_are_refused(rankings: list[Ranking], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write_run(rankings, tmp_path / "x.run", tag="t")
    assert list(tmp_path.iterdir()) == []


def test_the_python_of_the_docs_writes_trec_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[1] / "docs" / "evaluation.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    exec(code, {})
    assert (tmp_path / "sasrec.run").read_text() == "ann Q0 alien 1 0.9 sasrec\nann Q0 heat 2 0.4 sasrec\nbob Q0 fargo 1 0.7 sasrec\n"
    assert (tmp_path / "test.qrels").read_text() == "ann 0 heat 1\nbob 0 alien 1\n"


ITEMS, TRAINING_USERS, CUTOFFS = 50, 40, (1, 5, 10)


def lists_and_catalogue() -> dict[str, torch.Tensor]:
    """33 lists of 10 of 50 items, some short or empty, with histories, popularity (some 0) and vectors (some 0)."""
    generator = torch.Generator().manual_seed(1)
    top = torch.stack([torch.randperm(30, generator=generator)[:10] + 1 for _ in range(33)])
    top[3, 4:], top[4] = 0, 0
    histories = torch.stack([torch.randperm(ITEMS, generator=generator)[:7] + 1 for _ in range(33)])
    histories[5, 2:], histories[6] = 0, 0
    popularity = torch.randint(0, TRAINING_USERS, (ITEMS + 1,), generator=generator) * (torch.rand(ITEMS + 1, generator=generator) < 0.8)
    vectors = torch.randn(ITEMS + 1, 6, generator=generator)
    vectors[[2, 9]] = 0
    return {"top": top, "histories": histories, "popularity": popularity, "item_vectors": vectors}


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def test_beyond_accuracy_agrees_with_plain_loops() -> None:
    data = lists_and_catalogue()
    of_lists, together = beyond_accuracy(**data, cutoffs=CUTOFFS, user_count=TRAINING_USERS)
    count = data["popularity"].tolist()
    head, held = set(), 0
    for item in sorted(range(1, ITEMS + 1), key=lambda code: (-count[code], code)):
        if held < 0.8 * sum(count[1:]):
            head.add(item)
            held += count[item]
    for k in CUTOFFS:
        expected: dict[str, list[float]] = {name: [] for name in ("popularity", "popularity_lift", "long_tail", "novelty", "diversity")}
        shown = [0] * (ITEMS + 1)
        for codes, past in zip(data["top"].tolist(), data["histories"].tolist(), strict=True):
            items, had = [c for c in codes[:k] if c], [c for c in past if c]
            for item in items:
                shown[item] += 1
            usual = mean([count[c] for c in had])
            expected["popularity"].append(mean([count[c] for c in items]))
            expected["popularity_lift"].append((mean([count[c] for c in items]) - usual) / usual)
            expected["long_tail"].append(mean([c not in head for c in items]))
            expected["novelty"].append(mean([-math.log2(max(count[c], 1) / TRAINING_USERS) for c in items]))
            vectors = [v for v in (data["item_vectors"][c] for c in items) if v.any()]
            cosines = [torch.cosine_similarity(a, b, dim=0).item() for a, b in itertools.combinations(vectors, 2)]
            expected["diversity"].append(1 - mean(cosines))
        for name, values in expected.items():
            np.testing.assert_allclose(of_lists[f"{name}@{k}"].numpy(), values, rtol=1e-4, atol=1e-5, err_msg=f"{name}@{k}")
        assert together[f"coverage@{k}"] == pytest.approx(sum(n > 0 for n in shown[1:]) / ITEMS)
        differences = sum(abs(a - b) for a in shown[1:] for b in shown[1:])  # Gini: the mean difference of pairs by twice the mean
        assert together[f"gini@{k}"] == pytest.approx(differences / (2 * ITEMS * sum(shown[1:])))


def test_beyond_accuracy_does_not_depend_on_the_chunk() -> None:
    data = lists_and_catalogue()
    whole, together = beyond_accuracy(**data, cutoffs=CUTOFFS, user_count=TRAINING_USERS, users_at_once=1000)
    for users_at_once in (1, 8):
        parts, of_parts = beyond_accuracy(**data, cutoffs=CUTOFFS, user_count=TRAINING_USERS, users_at_once=users_at_once)
        assert of_parts == together
        for name, values in whole.items():
            torch.testing.assert_close(parts[name], values, equal_nan=True)


def test_beyond_accuracy_at_the_edges() -> None:
    one_for_all, everything = torch.ones(4, 1, dtype=torch.long), torch.arange(1, 5)[:, None]
    catalogue = {"popularity": torch.tensor([9, 4, 9, 0, 1]), "histories": torch.full((4, 1), 3), "item_vectors": None}
    of_lists, together = beyond_accuracy(one_for_all, **catalogue, cutoffs=[1], user_count=4)
    assert together == {"coverage@1": 0.25, "gini@1": 0.75}
    assert of_lists["novelty@1"].tolist() == [0] * 4  # all users have item 1
    assert of_lists["popularity_lift@1"].isnan().all()  # nobody had the history's item in training
    assert "diversity@1" not in of_lists
    of_lists, together = beyond_accuracy(everything, **catalogue, cutoffs=[1], user_count=4)
    assert together == {"coverage@1": 1, "gini@1": 0}
    assert of_lists["novelty@1"].tolist() == [0, 0, 2, 2]  # more than all users; none counts as one
    assert of_lists["long_tail@1"].tolist() == [0, 0, 1, 1]  # items 1 and 2 have 13 of 14 interactions
    assert of_lists["popularity@1"].tolist() == [4, 9, 0, 1]


def test_wilcoxon_agrees_with_scipy_and_leaves_out_nan() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(200, generator=generator), torch.rand(200, generator=generator)
    b[:50] = a[:50]  # ties
    expected = stats.wilcoxon(a[:190].double().numpy(), b[:190].double().numpy()).pvalue
    a[190:195], b[195:] = torch.nan, torch.nan
    assert wilcoxon(a, b) == pytest.approx(expected)
    assert wilcoxon(a[:50], b[:50]) == 1
    assert wilcoxon(torch.arange(1, 6), torch.zeros(5)) == pytest.approx(2 / 2**5)  # all five signs alike, exact
    with pytest.raises(InputError, match="no user"):
        wilcoxon(torch.tensor([torch.nan]), torch.tensor([1.0]))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1, 1]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
