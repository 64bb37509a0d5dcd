"""The whole job through its public doors: commands, run folder, resuming, Ray."""

import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ir_measures
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer
from typer.testing import CliRunner

from benchmarks.interruptions import command, draw_moments, fingerprint, kill_and_continue
from benchmarks.obvious_script import difference
from dpo4rec.cli import app
from dpo4rec.conditions import CONDITIONS
from dpo4rec.config import resolve
from dpo4rec.driver import Run
from dpo4rec.errors import InputError
from dpo4rec.experiment import Experiment
from dpo4rec.files import read_json, write_json
from dpo4rec.run_folder import fork


def options(micro: Path, *more: str) -> list[str]:
    return ["--preset", "quickstart", "--config", str(micro), *more]


def test_a_run_measures_every_condition(micro_run: Path) -> None:
    results = json.loads((micro_run / "evaluation" / "results.json").read_text())
    assert list(results["metrics"]) == [condition.label for condition in CONDITIONS]
    for values in results["metrics"].values():
        assert all(0 <= value <= 1 for value in values.values())
    assert {"well_formed", "distinct", "grounded"} <= set(results["texts"]["tuned"])
    assert results["lists_hash"] == json.loads((micro_run / "data" / "summary.json").read_text())["lists_hash"]
    per_user = pq.read_table(micro_run / "evaluation" / "per_user.parquet").to_pandas()
    mean = per_user[per_user.condition == "tuned text"]["ndcg@5"].mean()
    assert mean == pytest.approx(results["metrics"]["tuned text"]["ndcg@5"])


def test_exported_rankings_give_the_runs_metrics(micro_run: Path, tmp_path: Path) -> None:
    shutil.copytree(micro_run, tmp_path / "run")
    assert CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), "--trec", str(tmp_path / "trec")]).exit_code == 0
    assert len(list((tmp_path / "trec").glob("*.run"))) == len(CONDITIONS)
    values = pq.read_table(micro_run / "evaluation" / "per_user.parquet").to_pandas().set_index(["condition", "user_id"])["ndcg@5"]
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "trec" / "qrels")))
    for condition in ("popularity", "history", "history + item text"):  # without a text of several, whose mean a run reports
        run = ir_measures.read_trec_run(str(tmp_path / "trec" / f"{condition.replace(' ', '-')}.run"))
        found = [(of.query_id.split("#")[0], of.value) for of in ir_measures.iter_calc([ir_measures.nDCG @ 5], qrels, run)]
        theirs = pd.DataFrame(found, columns=["user_id", "value"]).groupby("user_id")["value"].mean()
        pd.testing.assert_series_equal(values[condition].sort_index(), theirs, check_names=False, atol=1e-6, rtol=0)


def test_pairs_hold_what_was_sampled(micro_run: Path) -> None:
    samples = {(row["user_id"], row["sample"]): row for row in pq.read_table(micro_run / "round-0" / "samples").to_pylist()}
    rewards = {(row["user_id"], row["sample"]): row["reward"] for row in pq.read_table(micro_run / "round-0" / "scores").to_pylist()}
    pairs = pq.read_table(micro_run / "round-0" / "pairs" / "pairs.parquet").to_pylist()
    assert len(pairs) > 20
    for pair in pairs:
        for side in ("chosen", "rejected"):
            key = pair["user_id"], pair[f"{side}_sample"]
            assert pair[f"{side}_ids"] == samples[key]["token_ids"]
            assert pair[f"reward_{side}"] == pytest.approx(rewards[key])


def test_scores_are_those_of_one_text_at_a_time(micro_run: Path) -> None:
    assert difference(resolve(None, micro_run / "config.yaml", []), micro_run, users=60) < 1e-5


def test_texts_are_described_by_what_their_files_hold(micro_run: Path, micro: Path) -> None:
    samples = pq.read_table(micro_run / "round-0" / "samples").to_pandas()
    report = json.loads((micro_run / "manifest.json").read_text())["stages"]["round-0/sample"]["report"]
    assert report["texts"] == len(samples)
    assert report["distinct"] == samples.text.nunique() / len(samples)
    assert report["mean_tokens"] == samples.token_ids.map(len).mean()
    assert {"well_formed", "grounded", "texts", "distinct", "mean_tokens"} == report.keys()


def test_running_again_skips_everything(micro_run: Path, micro: Path) -> None:
    before = fingerprint(micro_run)
    lines = len((micro_run / "log.jsonl").read_text().splitlines())
    done = subprocess.run(command(micro_run, options(micro)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tuned text" in done.stdout
    events = [json.loads(line)["event"] for line in (micro_run / "log.jsonl").read_text().splitlines()[lines:]]
    assert set(events) == {"skipped"}
    assert fingerprint(micro_run) == before


def test_a_run_that_is_killed_again_and_again_ends_like_an_undisturbed_one(micro_run: Path, micro: Path, tmp_path: Path) -> None:
    assert kill_and_continue(tmp_path / "killed", options(micro), draw_moments(micro_run, 2, random.Random(0)))
    assert fingerprint(tmp_path / "killed") == fingerprint(micro_run)


def test_other_settings_are_refused_by_a_run_folder(micro_run: Path, micro: Path) -> None:
    with pytest.raises(InputError, match=r"config.yaml.*alignment.beta, seed"):
        Run(resolve("quickstart", micro, ["seed=1", "alignment.beta=0.7"]), micro_run)


def test_a_folder_of_an_older_version_goes_on_with_the_defaults_of_keys_that_were_added(
    micro_run: Path, micro: Path, tmp_path: Path
) -> None:
    shutil.copytree(micro_run, tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    older = yaml.safe_load(file.read_text())
    del older["sampling"]["rows_at_once"], older["sequential"]
    file.write_text(yaml.safe_dump(older))
    with pytest.raises(InputError, match=r"another value of sampling.rows_at_once"):
        Run(resolve("quickstart", micro, ["sampling.rows_at_once=64"]), tmp_path / "run")
    manifest = read_json(tmp_path / "run" / "manifest.json")
    for stage in manifest["stages"].values():
        forget(stage["settings"], {"offload", "order", "precision"})  # of the alignment, of prompts, of both models
    write_json(manifest, tmp_path / "run" / "manifest.json")
    (tmp_path / "run" / "log.jsonl").unlink()
    run = Run(resolve("quickstart", micro, []), tmp_path / "run")
    run.rounds()
    run.folder.release()
    assert yaml.safe_load(file.read_text()) == yaml.safe_load((micro_run / "config.yaml").read_text())
    assert {json.loads(line)["event"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()} == {"skipped"}


def forget(settings: Any, names: set[str]) -> None:
    """Takes these keys out of what a manifest says of settings."""
    for name in names & settings.keys() if isinstance(settings, dict) else ():
        del settings[name]
    for part in settings.values() if isinstance(settings, dict) else settings if isinstance(settings, list) else ():
        forget(part, names)


def test_what_is_gone_takes_nothing_along(micro_run: Path, micro: Path, tmp_path: Path) -> None:
    """An adapter that was moved away is no reason to remove the texts that it wrote, nor are raw files for the data made of them."""
    shutil.copytree(micro_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "round-0" / "adapter")
    run = Run(resolve("quickstart", micro, []), tmp_path / "run")
    with pytest.raises(InputError, match=r"adapter: there is no such file.*put it back"):
        run.sample(1)
    run.folder.release()
    assert fingerprint(tmp_path / "run" / "round-1" / "samples") == fingerprint(micro_run / "round-1" / "samples")
    raw = tmp_path / "raw"
    raw.mkdir()
    tables = {"interactions": ("user_id,item_id,rating,timestamp", [f"u{u},i{(i + u) % 60},5,{i}" for u in range(40) for i in range(30)])}
    tables["items"] = ("item_id,title", [f"i{i},Title {i}" for i in range(60)])
    for name, (header, rows) in tables.items():
        (raw / f"{name}.csv").write_text("\n".join([header, *rows]))
    table = "data.table={interactions: interactions.csv, items: items.csv}"
    small = ["data.simulation=null", "data.source=table", f"data.folder={raw}", table, "data.list_length=5", "data.history_length=5"]
    run = Run(resolve("quickstart", None, small), tmp_path / "table")
    run.prepare_data()
    before = fingerprint(tmp_path / "table" / "data")
    raw.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"interactions.csv: there is no such file.*put it back"):
        run.prepare_data()
    assert fingerprint(tmp_path / "table" / "data") == before
    run.folder.release()


def test_a_run_starts_from_another_ones_folder(micro_run: Path, micro: Path, tmp_path: Path) -> None:
    """What the other settings do not change is taken over; the rest is as in a run from nothing."""
    before, rate = fingerprint(micro_run), ["--set", "alignment.learning_rate=1e-5"]
    with pytest.raises(InputError, match=r"another value of alignment.learning_rate.*run --start-from"):
        Run(resolve("quickstart", micro, ["alignment.learning_rate=1e-5"]), micro_run)
    done = CliRunner().invoke(app, ["run", "--start-from", str(micro_run), "--run-dir", str(tmp_path / "later"), *rate])
    assert done.exit_code == 0, done.output
    stages = [json.loads(line) for line in (tmp_path / "later" / "log.jsonl").read_text().splitlines()]
    skipped = {event["stage"] for event in stages if event["event"] == "skipped"}
    assert {"prepare", "prompts", "round-0/sample", "round-0/score", "round-0/pair"} <= skipped
    whole = CliRunner().invoke(app, ["run", *options(micro), "--run-dir", str(tmp_path / "whole"), *rate])
    assert whole.exit_code == 0, whole.output
    assert fingerprint(tmp_path / "later") == fingerprint(tmp_path / "whole")
    assert fingerprint(micro_run) == before


def test_one_driver_at_a_time(micro: Path, tmp_path: Path) -> None:
    first = Run(resolve("quickstart", micro, []), tmp_path)
    with pytest.raises(InputError, match="another process"):
        Run(resolve("quickstart", micro, []), tmp_path)
    first.folder.release()


def test_stages_want_what_comes_before_them(micro_run: Path, micro: Path, tmp_path: Path) -> None:
    for part in ("data", "prompts", "language_model"):
        shutil.copytree(micro_run / part, tmp_path / part)
    shutil.copy(micro_run / "config.yaml", tmp_path)
    run = Run(resolve("quickstart", micro, []), tmp_path)
    with pytest.raises(InputError, match=r"samples.*there is no such file"):
        run.pair(0)
    run.folder.release()


def test_settings_may_be_corrected_until_a_stage_is_done_by_them(tmp_path: Path) -> None:
    short = Run(
        resolve("quickstart", None, ["data.simulation.users=60", "data.history_length=600", "data.list_length=500"]), tmp_path / "run"
    )
    with pytest.raises(InputError):
        short.prepare_data()
    short.folder.release()
    run = Run(resolve("quickstart", None, ["data.simulation.users=60"]), tmp_path / "run")
    assert run.prepare_data()["users"]["train"]
    run.folder.release()
    with pytest.raises(InputError, match=r"made with another value of data\.simulation\.users"):
        Run(resolve("quickstart", None, ["data.simulation.users=61"]), tmp_path / "run")


def test_units_without_a_user_to_score_are_nothing_special(micro_run: Path, micro: Path, tmp_path: Path) -> None:
    """All users of such a unit choose the epoch; with one user a unit some are of that kind."""
    folder = tmp_path / "run"
    fork(micro_run, folder, without=("round-0",))
    run = Run(resolve("quickstart", micro, ["sampling.users_per_unit=1"]), folder)
    for stage in (run.sample, run.fit, run.score):
        stage(0)
    assert run.pair(0)["pairs"] > 0
    run.folder.release()
    assert any(not pq.read_metadata(unit).num_rows for unit in (folder / "round-0" / "scores").glob("*.parquet"))


def test_a_folder_of_something_else_is_refused_and_left_alone(micro: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ratings.dat").write_text("mine")
    with pytest.raises(InputError, match="no run folder and not empty"):
        Run(resolve("quickstart", micro, []), tmp_path)
    assert (tmp_path / "data" / "ratings.dat").read_text() == "mine"
    assert not (tmp_path / "config.yaml").exists()


def test_raw_files_where_the_run_writes_its_own_are_refused(tmp_path: Path) -> None:
    for name in ("interactions", "items"):
        pq.write_table(pa.table({"user_id": ["a"]}), tmp_path / f"{name}.parquet")
    run = Run(resolve("quickstart", None, ["data.source=table", f"data.folder={tmp_path / 'run' / 'data'}"]), tmp_path / "run")
    shutil.copytree(tmp_path, tmp_path / "run" / "data", ignore=shutil.ignore_patterns("run"))
    with pytest.raises(InputError, match="the run would replace it"):
        run.prepare()
    assert len(list((tmp_path / "run" / "data").iterdir())) == 2
    run.folder.release()


def test_damaged_models_are_made_again(micro_run: Path, micro: Path, tmp_path: Path) -> None:
    """Where what is left cannot tell what is whole, the stage begins anew; what it makes is the same."""
    folder = tmp_path / "copy"
    shutil.copytree(micro_run, folder)
    models = "round-0/recommender/fold-0-seed-0/model.safetensors", "round-0/adapter/adapter_model.safetensors"
    for name in models:
        (folder / name).unlink()
    run = Run(resolve("quickstart", micro, []), folder)
    run.fit(0)
    assert run.align(0)["by"] == "driver"
    run.folder.release()
    assert [(folder / name).read_bytes() for name in models] == [(micro_run / name).read_bytes() for name in models]


def test_a_half_written_checkpoint_of_the_warm_up_is_passed_over(micro_run: Path, micro: Path, tmp_path: Path) -> None:
    run = Run(resolve("quickstart", micro, []), tmp_path)
    (tmp_path / ".language_model.checkpoints" / "checkpoint-9999").mkdir(parents=True)
    run.prepare()
    run.folder.release()
    model = "language_model/model.safetensors"
    assert (tmp_path / model).read_bytes() == (micro_run / model).read_bytes()


def test_a_launcher_does_not_join_a_driver(micro_run: Path, micro: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(micro_run, folder)
    run = Run(resolve("quickstart", micro, []), folder)
    start = [sys.executable, "-m", "dpo4rec.alignment", str(folder / "round-0"), "--out", str(tmp_path / "elsewhere")]
    done = subprocess.run(start, capture_output=True, text=True, check=False)
    run.folder.release()
    assert done.returncode == 2
    assert "another process is running in this folder" in done.stderr
    assert not (tmp_path / "elsewhere").exists()


def test_a_damaged_result_is_named_and_the_rest_stays(micro_run: Path, micro: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(micro_run, folder)
    shard = folder / "round-0" / "scores" / "unit-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:100])
    run = Run(resolve("quickstart", micro, []), folder)
    with pytest.raises(InputError, match=r"unit-00001.parquet.*damaged"):
        Experiment(run).run.pair(0)
    run.score(0)  # makes the damaged unit again
    run.pair(0)
    run.folder.release()
    assert fingerprint(folder)["round-0/pairs"] == fingerprint(micro_run)["round-0/pairs"]


def test_stage_commands_use_the_folders_settings(micro_run: Path) -> None:
    for stage in ("sample", "fit", "score", "pair", "align"):
        done = CliRunner().invoke(app, [stage, str(micro_run), "--round", "0"])
        assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["evaluate", str(micro_run)])
    assert "history + tuned text" in done.output
    done = CliRunner().invoke(app, ["pair", str(micro_run.parent / "nowhere")])
    assert done.exit_code == 2
    assert "no run folder yet" in done.output


def test_trl_trains_on_the_pairs_file_as_it_is(micro_run: Path, tmp_path: Path) -> None:
    dataset = Dataset.from_parquet(str(micro_run / "round-0" / "pairs" / "pairs.parquet"), cache_dir=str(tmp_path / "cache"))
    arguments = DPOConfig(
        output_dir=str(tmp_path), max_steps=1, logging_steps=1, per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to=[]
    )
    tokenizer = AutoTokenizer.from_pretrained(micro_run / "language_model")
    trainer = DPOTrainer(model=str(micro_run / "language_model"), args=arguments, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
