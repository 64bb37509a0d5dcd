import numpy as np
import pyarrow as pa
import pytest
import torch

from dpo4rec.preference.agreement import agreement, rank_correlation
from dpo4rec.preference.config import PairConfig
from dpo4rec.preference.folds import fold_users
from dpo4rec.preference.pairs import PAIRS, make_pairs
from dpo4rec.preference.reward import standardise

PROMPTS = pa.table({"user_id": ["u", "v"], "prompt": ["pu", "pv"], "prompt_ids": [[1, 2], [3]]})


def texts(rows: list[tuple[str, int, str, bool]]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"user_id": u, "sample": s, "text": t, "completion": f" {t}", "token_ids": [s, 9], "finished": True, "well_formed": f}
            for u, s, t, f in rows
        ]
    )


def scores(rows: list[tuple[str, int, float]]) -> pa.Table:
    return pa.Table.from_pylist([{"user_id": u, "sample": s, "reward": -1 + v / 10, "standardised": v} for u, s, v in rows])


SAMPLES = texts(
    [("u", 0, "a", True), ("u", 1, "b", True), ("u", 2, "c", False), ("u", 3, "d", True), ("v", 0, "a", True), ("v", 1, "a", True)]
)
SCORES = scores([("u", 0, 0.0), ("u", 1, 1.0), ("u", 2, 2.0), ("u", 3, -1.0), ("v", 0, 0.5), ("v", 1, -0.5)])


def test_best_against_worst_and_a_text_out_of_form_loses() -> None:
    table, report = make_pairs(PairConfig(), PROMPTS, SAMPLES, SCORES, seed=0)
    assert table.schema == PAIRS
    reward, form = table.to_pylist()
    assert (reward["prompt"], reward["chosen"], reward["rejected"]) == ("pu", " b", " d")
    assert (reward["prompt_ids"], reward["chosen_ids"], reward["rejected_ids"]) == ([1, 2], [1, 9], [3, 9])
    assert reward["gap"] == pytest.approx(0.2)
    assert (form["chosen"], form["rejected"]) == (" b", " c")  # "c" has the highest reward, but is not well-formed
    assert report == {
        "pairs": 2,
        "pairs_below_gap": 0,
        "pairs_unequal_length": 0,
        "users_tied": 1,
        "users_none_well_formed": 0,
        "duplicate_texts": 1,
    }


def test_without_the_gate_the_best_is_chosen_whatever_its_form() -> None:
    table, _ = make_pairs(PairConfig(format_gate=False, pairs_per_user=2), PROMPTS, SAMPLES, SCORES, seed=0)
    assert [(row["chosen"], row["rejected"]) for row in table.to_pylist()] == [(" c", " d"), (" b", " a")]


def test_form_may_be_asked_for_without_being_taught() -> None:
    table, _ = make_pairs(PairConfig(malformed_pair=False, pairs_per_user=2), PROMPTS, SAMPLES, SCORES, seed=0)
    assert [(row["chosen"], row["rejected"]) for row in table.to_pylist()] == [(" b", " d")]
    with pytest.raises(ValueError, match="without the gate"):
        PairConfig(format_gate=False, malformed_pair=False)


def test_the_smallest_gaps_are_left_out() -> None:
    table, report = make_pairs(PairConfig(format_gate=False, pairs_per_user=2, keep_share=0.5), PROMPTS, SAMPLES, SCORES, seed=0)
    assert [(row["chosen"], row["rejected"]) for row in table.to_pylist()] == [(" c", " d")]
    assert report["pairs_below_gap"] == 1


def test_pairs_of_unlike_lengths_are_left_out() -> None:
    lengths = {"b": 6, "d": 2, "c": 3}  # best against worst: 3 times; best against the malformed one: 2 times
    ids = [list(range(lengths.get(text, 2))) for text in SAMPLES["text"].to_pylist()]
    samples = SAMPLES.set_column(SAMPLES.column_names.index("token_ids"), "token_ids", pa.array(ids))
    for most, expected in ((1.5, []), (2.0, [" c"]), (3.0, [" d", " c"])):
        table, report = make_pairs(PairConfig(max_length_ratio=most), PROMPTS, samples, SCORES, seed=0)
        assert table["rejected"].to_pylist() == expected
        assert (report["pairs"], report["pairs_unequal_length"]) == (len(expected), 2 - len(expected))


def test_random_orientation_keeps_the_pairs() -> None:
    users = [f"u{i}" for i in range(40)]
    prompts = pa.table({"user_id": users, "prompt": users, "prompt_ids": [[1]] * 40})
    samples = texts([(u, s, t, True) for u in users for s, t in enumerate("ab")])
    scored = scores([(u, s, float(s)) for u in users for s in range(2)])
    table, _ = make_pairs(PairConfig(orientation="random"), prompts, samples, scored, seed=1)
    assert set(table["gap"].to_numpy().round(3)) == {np.float32(0.1), np.float32(-0.1)}
    for row in table.to_pylist():
        assert row["gap"] == pytest.approx(row["reward_chosen"] - row["reward_rejected"])
        assert row["chosen"].strip() == "ab"[row["chosen_sample"]]


def test_pairs_oriented_by_length_are_the_same_pairs() -> None:
    samples = texts([(u, s, t, True) for u in "uv" for s, t in enumerate("ab")])
    lengths = {("u", 0): 3, ("u", 1): 1, ("v", 0): 2, ("v", 1): 2}  # of v neither is longer: the reward decides
    ids = [[5] * lengths[row["user_id"], row["sample"]] for row in samples.to_pylist()]
    samples = samples.set_column(samples.column_names.index("token_ids"), "token_ids", pa.array(ids))
    scored = scores([(u, s, float(s)) for u in "uv" for s in range(2)])
    longer, other = make_pairs(PairConfig(orientation="length"), PROMPTS, samples, scored, seed=0)[0].to_pylist()
    assert (longer["user_id"], longer["chosen"], longer["rejected"]) == ("u", " a", " b")
    assert longer["gap"] == pytest.approx(-0.1)
    assert (other["user_id"], other["chosen"], other["rejected"]) == ("v", " b", " a")


def test_standardised_rewards_have_mean_0_and_deviation_1_within_a_user() -> None:
    raw = torch.tensor([[1.0, 10.0], [3.0, 10.0], [5.0, 10.0], [7.0, 1.0], [9.0, 3.0]])
    result = standardise(raw, torch.tensor([0, 0, 0, 1, 1]))
    assert torch.allclose(result[:3, 0], torch.tensor([-1.2247, 0.0, 1.2247]), atol=1e-4)
    assert torch.equal(result[:3, 1], torch.zeros(3))
    assert torch.allclose(result[3:], torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))


def test_folds_are_even_and_depend_on_the_seed_alone() -> None:
    folds = fold_users(11, 2, seed=3)
    assert sorted(np.bincount(folds)) == [5, 6]
    assert folds.tolist() == fold_users(11, 2, seed=3).tolist() != fold_users(11, 2, seed=4).tolist()


def test_rewards_that_follow_the_truth_correlate_with_it() -> None:
    preferences = {("genre", "Comedy"): 1.0, ("genre", "Horror"): -2.0, ("era", "1990s"): 0.5}
    assert agreement("Enjoys Comedy. Avoids Horror. Prefers the 1990s. Loved Heat.", preferences) == 3.5
    assert agreement("not claims", preferences) == 0
    users = ("u", "v")
    truth = pa.Table.from_pylist([{"user_id": u, "kind": k, "name": n, "weight": w} for u in users for (k, n), w in preferences.items()])
    samples = texts([(u, s, t, True) for u in users for s, t in enumerate(["Enjoys Horror.", "Enjoys Comedy.", "Avoids Horror."])])
    follow = rank_correlation([(samples, scores([(u, s, s - 1.0) for u in users for s in range(3)]), truth)])
    assert follow == {"mean": pytest.approx(1.0), "standard_error": 0.0, "users": 2}
