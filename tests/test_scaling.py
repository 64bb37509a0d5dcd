"""The cost model of docs/scaling.md, and the page itself."""

from dataclasses import fields

import pytest

from benchmarks import scaling
from dpo4rec.files import read_json

ONES = {field.name: 1.0 for field in fields(scaling.Inputs)} | {"folds": 2.0}


def inputs(**values: float) -> scaling.Inputs:
    return scaling.Inputs(**{**ONES, **values})


def test_time_is_work_over_rate() -> None:
    of = inputs(answer_tokens=200, tokens_per_second=1000, busy_share=0.5, samples=10)
    assert scaling.sampling_seconds(of, users=100, samples=10, gpus=8) == pytest.approx(100 * 10 * 200 / (8 * 1000 * 0.5))
    assert scaling.scoring_seconds(inputs(texts_per_second=50, cores_per_gpu=4), 100, 10, 2) == pytest.approx(1000 / (50 * 4))
    fit = inputs(lists=8, folds=2, epochs=5, fit_lists_per_second=1000)
    assert scaling.fit_seconds(fit, 1000) == pytest.approx(8 * 1000 / 2 * 5 / 1000)


def test_alignment_stops_gaining_where_a_step_has_a_pair_for_each_gpu() -> None:
    of = inputs(training_gpus_at_most=64, pairs_per_second=3)
    assert scaling.alignment_seconds(of, 6400, 8) == pytest.approx(8 * scaling.alignment_seconds(of, 6400, 64))
    assert scaling.alignment_seconds(of, 6400, 512) == scaling.alignment_seconds(of, 6400, 64)


def test_limits_come_in_the_order_in_which_they_are_met() -> None:
    users = [at for _, at in scaling.limits(inputs(driver_gib=64, driver_bytes_per_user=2**30), gpus=8)]
    assert users == sorted(users)
    assert 64 in users


def test_a_round_at_the_limit_of_the_disk_fills_it() -> None:
    of = inputs(disk_bytes=1e13, adapter_bytes=1e8, bytes_per_text=1500, samples=10)
    users = dict(scaling.limits(of, gpus=8))["10 TB of disk for one round"]
    assert scaling.round_bytes(of, users, of.samples) == pytest.approx(1e13)


def test_the_page_is_what_the_results_say() -> None:
    text = scaling.PAGE.read_text(encoding="utf-8")
    wanted = {file for file, _, _ in scaling.MEASURED.values()}
    if any(not (scaling.RESULTS / f"{name}.json").exists() for name in wanted):
        pytest.skip("a benchmark that feeds the page has no committed result")
    assert scaling.filled(text, scaling.read()) == text


def test_inputs_are_named_once_and_measured_ones_say_where() -> None:
    assert {field.name for field in fields(scaling.Inputs)} == scaling.MEASURED.keys() | scaling.ASSUMED.keys()
    assert not scaling.MEASURED.keys() & scaling.ASSUMED.keys()
    for file, key, _ in scaling.MEASURED.values():
        result = scaling.RESULTS / f"{file}.json"
        assert not result.exists() or key in read_json(result)["figures"], (file, key)


def test_every_table_of_the_page_is_filled() -> None:
    text = scaling.filled(scaling.PAGE.read_text(encoding="utf-8"), inputs())
    assert "Not computed yet" not in text
    assert "assumption: " in text
    assert "measured: `round.json`" in text
