"""Units through a chain of workers, in this process and on a real local Ray: nothing lost, nothing twice, faults named."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pool_workers import Counter, Writer, WriterConfig, wait_for

from dpo4rec import texts
from dpo4rec.cluster import pool
from dpo4rec.cluster.config import ClusterConfig
from dpo4rec.cluster.pool import Step, cut, map_units, stream_units
from dpo4rec.cluster.units import Files, Rows
from dpo4rec.config import resolve
from dpo4rec.driver import Run
from dpo4rec.errors import InputError
from dpo4rec.experiment import Experiment
from dpo4rec.export import Export
from dpo4rec.files import content_hash, failed, matrix, read_parquet, stable_seed, write_parquet
from dpo4rec.knowledge.sampling import Sampler, SamplerConfig
from dpo4rec.preference.reward import Scorer
from dpo4rec.recommenders.fitter import FitJob, Fitter, FitterConfig, job_unit
from dpo4rec.stages import Announce

HERE, RAY = ClusterConfig(kind="debug"), ClusterConfig(kind="ray", workers=2)


USERS = pa.table({"user_id": [f"u{number}" for number in range(20)], "split": ["train", "test"] * 10})


def chain(folder: Path, writer: WriterConfig | None = None, skip_failed: bool = False) -> list[Step]:
    return [
        Step(Writer, writer or WriterConfig(), folder / "texts", 2, 0.5, "writer", skip_failed=skip_failed),
        Step(Counter, WriterConfig(), folder / "lengths", 2, 0.5, "counter", skip_failed=skip_failed),
    ]


def lines(logs: Path, role: str, word: str) -> list[tuple[str, str]]:
    """(time, text) of the lines of a role that hold the word, in order."""
    found = [line.split(" ", 1) for file in logs.glob(f"{role}-*.log") for line in file.read_text().splitlines()]
    return sorted((time, text) for time, text in found if word in text)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain's result in this process; read-only."""
    folder = tmp_path_factory.mktemp("undisturbed")
    stream_units(chain(folder), cut(USERS, 3), HERE)
    return folder


# -- in this process ------------------------------------------------------------------------------------------------------------


def test_a_chain_gives_what_its_steps_give_one_after_another(undisturbed: Path, tmp_path: Path) -> None:
    map_units(Writer, WriterConfig(), cut(USERS, 3), tmp_path / "texts", HERE)
    assert map_units(Counter, WriterConfig(), Files(tmp_path / "texts"), tmp_path / "lengths", HERE) == [Counter.warning]
    assert content_hash(tmp_path) == content_hash(undisturbed)
    table = read_parquet(tmp_path / "lengths")
    assert table["user_id"].to_pylist() == [user for user in USERS["user_id"].to_pylist() for _ in range(2)]
    assert table["length"].to_pylist() == [len(text) for text in table["text"].to_pylist()]


@pytest.mark.parametrize("where", [None, ("split", ["test"])])
def test_rows_of_a_file_are_the_units_of_its_table(where: tuple[str, list[str]] | None, tmp_path: Path) -> None:
    pq.write_table(USERS, tmp_path / "users.parquet", row_group_size=7)
    table = USERS.filter(pa.compute.equal(USERS["split"], "test")) if where else USERS
    expected = [(name, unit.select(["user_id"])) for name, unit in cut(table, 3)]
    rows = Rows(tmp_path / "users.parquet", 3, ["user_id"], where)
    assert [(rows.name(number), rows.read(number).to_pydict()) for number in range(len(rows))] == [(n, t.to_pydict()) for n, t in expected]


def test_a_unit_is_read_when_its_turn_comes(undisturbed: Path, tmp_path: Path) -> None:
    class Watched(Rows):
        def read(self, number: int) -> pa.Table:
            assert len(list((tmp_path / "run" / "lengths").glob("*.parquet"))) == number  # all before it have gone through all steps
            return super().read(number)

    pq.write_table(USERS, tmp_path / "users.parquet", row_group_size=5)
    stream_units(chain(tmp_path / "run"), Watched(tmp_path / "users.parquet", 3), HERE)
    assert content_hash(tmp_path / "run") == content_hash(undisturbed)


def test_what_is_there_is_read_and_not_made_again(undisturbed: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    stream_units(chain(tmp_path), cut(USERS, 3), HERE)
    damaged, lost = tmp_path / "texts" / "unit-00001.parquet", tmp_path / "lengths" / "unit-00003.parquet"
    damaged.write_bytes(damaged.read_bytes()[:50])
    lost.unlink()
    stream_units(chain(tmp_path), cut(USERS, 3), HERE, lambda done, of: seen.append((done, of)), tmp_path / "logs")
    assert seen == [(5, 7), (6, 7), (7, 7)]
    assert [text.split()[1] for _, text in lines(tmp_path / "logs", "writer", " done")] == ["unit-00001"]
    assert [text.split()[1] for _, text in lines(tmp_path / "logs", "counter", " done")] == ["unit-00003"]
    assert content_hash(tmp_path / "lengths") == content_hash(undisturbed / "lengths")


def test_what_a_step_does_not_take_is_not_in_its_result(tmp_path: Path) -> None:
    def even(table: pa.Table) -> pa.Table:
        return table.filter(pa.compute.is_in(table["user_id"], pa.array(["u0", "u2", "u7"]))).select(["user_id", "text"])

    write, count = chain(tmp_path)
    stream_units([write, Step(Counter, count.config, count.out, take=even)], cut(USERS, 3), HERE)
    assert read_parquet(count.out, ["user_id", "length"])["user_id"].to_pylist() == ["u0", "u0", "u2", "u2", "u7", "u7"]
    assert read_parquet(count.out).column_names == ["user_id", "text", "length"]


def test_the_failing_user_is_named_with_the_workers_last_words(tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        stream_units(chain(tmp_path, WriterConfig(fails_on=["u7", "u8"])), cut(USERS, 3), HERE, logs=tmp_path / "logs")
    named_as_the_failing_user(raised.value, tmp_path)


def named_as_the_failing_user(error: InputError, folder: Path) -> None:
    assert error.where == "writer, user_id u7"
    assert "ArithmeticError: cannot write for u7" in str(error)
    assert "skip_failed_rows" in error.remedy
    assert 'raise ArithmeticError(f"cannot write for {user}")' in error.remedy  # the end of its traceback
    assert len(lines(folder / "logs", "writer", "unit-00002 failed as a whole")) == 2


def test_a_worker_that_cannot_start_says_so(tmp_path: Path) -> None:
    class Unable(Writer):
        def __init__(self, config: WriterConfig) -> None:
            raise InputError("encoder.name", "cannot be loaded", "Give a folder")

    with pytest.raises(InputError, match=r"^encoder.name: cannot be loaded. Give a folder$"):
        map_units(Unable, WriterConfig(), cut(USERS, 3), tmp_path, HERE)


def test_failing_users_are_left_out_and_listed(undisturbed: Path, tmp_path: Path) -> None:
    steps = chain(tmp_path, WriterConfig(fails_on=["u7", "u19"]), skip_failed=True)
    stream_units(steps, cut(USERS, 3), HERE)  # u19 is alone in its unit with u18
    whole = read_parquet(undisturbed / "lengths").to_pylist()
    assert read_parquet(tmp_path / "lengths").to_pylist() == [row for row in whole if row["user_id"] not in ("u7", "u19")]
    assert failed(tmp_path / "texts") == {user: f"ArithmeticError: cannot write for {user}" for user in ("u7", "u19")}
    assert failed(tmp_path / "lengths") == {}
    before = content_hash(tmp_path)
    stream_units(steps, cut(USERS, 3), HERE)  # what is left out is done, too
    assert content_hash(tmp_path) == before


def test_a_unit_of_one_failing_user_is_empty(tmp_path: Path) -> None:
    stream_units(chain(tmp_path, WriterConfig(fails_on=["u7"]), skip_failed=True), cut(USERS, 1), HERE)
    assert set(read_parquet(tmp_path / "lengths", ["user_id"])["user_id"].to_pylist()) == set(USERS["user_id"].to_pylist()) - {"u7"}
    assert len(Files(tmp_path / "lengths")) == 19
    assert failed(tmp_path / "texts").keys() == {"u7"}


def test_a_broken_worker_is_not_taken_for_bad_users(tmp_path: Path) -> None:
    steps = chain(tmp_path, WriterConfig(fails_on=["u6", "u7", "u8"]), skip_failed=True)
    with pytest.raises(InputError, match="writer, unit-00002: the worker fails on each user of the unit"):
        stream_units(steps, cut(USERS, 3), HERE)


class FussySampler(Sampler):
    """Fails on some users, however often it is asked, and warns of it."""

    fails_on: set[str] = set()

    def __init__(self, config: SamplerConfig) -> None:
        super().__init__(config)
        self.warning = "some users are not to its taste"

    def __call__(self, unit: pa.Table) -> pa.Table:
        if self.fails_on & set(unit["user_id"].to_pylist()):
            raise ArithmeticError("not this one")
        return super().__call__(unit)


@pytest.mark.slow
def test_a_run_goes_on_without_failing_users_and_counts_them(micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(resolve("quickstart", micro, ["sampling.skip_failed_rows=true"]), tmp_path)
    run.prepare()
    users = {row["split"]: row["user_id"] for row in read_parquet(tmp_path / "data" / "users.parquet").to_pylist()}
    monkeypatch.setattr(texts, "Sampler", FussySampler)
    monkeypatch.setattr(FussySampler, "fails_on", set(users.values()))  # one of each split
    run.rounds()
    results = Experiment(run).evaluate()
    stages = json.loads((tmp_path / "manifest.json").read_text())["stages"]
    assert stages["round-0/sample"]["report"]["failed_users"] == 2
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"round-0/sample"} < {event["stage"] for event in events if event.get("message") == "some users are not to its taste"}
    assert failed(tmp_path / "round-0" / "samples").keys() == {users["train"], users["validation"]}
    monkeypatch.setattr(FussySampler, "fails_on", {users["test"]})  # the others get their texts now
    written = Export(run, tmp_path / "OUT").write(None)["parts"]["users.parquet"]
    assert (written["failed_users"], written["written"]) == (1, 2)
    exported = set(read_parquet(tmp_path / "OUT" / "users.parquet")["user_id"].to_pylist())
    assert set(read_parquet(tmp_path / "data" / "users.parquet")["user_id"].to_pylist()) - exported == {users["test"]}
    run.folder.release()
    Run(resolve("quickstart", micro, []), tmp_path).folder.release()  # whether users may be left out can be said anew
    assert users["train"] not in read_parquet(tmp_path / "round-0" / "pairs" / "answers.parquet")["user_id"].to_pylist()
    per_user = read_parquet(tmp_path / "evaluation" / "per_user.parquet").to_pandas()
    assert users["test"] not in set(per_user.user_id)
    assert per_user.groupby("condition").size().unique().tolist() == [results["test_users"]]  # the same users in every condition


# -- a round whose texts are scored as they are drawn ---------------------------------------------------------------------------


def drawing(micro_run: Path, micro: Path, folder: Path, announce: Announce = lambda *_: None) -> Run:
    """The micro run with the same data and language model, recommenders fitted on the texts of 30 of its 60 training users."""
    shutil.copytree(micro_run, folder, ignore=shutil.ignore_patterns("config.yaml", "round-*", "evaluation", "encoder"))
    return Run(resolve("quickstart", micro, ["reward.fit_users=30"]), folder, announce)


@pytest.fixture(scope="module")
def drawn(micro_run: Path, micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a run in this process, finished; read-only."""
    run = drawing(micro_run, micro, tmp_path_factory.mktemp("drawn") / "run")
    run.rounds()
    Experiment(run).evaluate()
    run.folder.release()
    return run.folder.path


def users_of(folder: Path) -> set[str]:
    return set(read_parquet(folder, ["user_id"])["user_id"].to_pylist())


def folds_of(run: Path) -> dict[str, int]:
    return {row["user_id"]: row["fold"] for row in read_parquet(run / "folds.parquet").to_pylist() if row["fold"] >= 0}


def test_recommenders_are_fitted_on_the_texts_of_some_users_and_score_all(drawn: Path) -> None:
    splits = {row["user_id"]: row["split"] for row in read_parquet(drawn / "data" / "users.parquet").to_pylist()}
    validation, training = ({user for user, of in splits.items() if of == split} for split in ("validation", "train"))
    for round_ in ("round-0", "round-1"):  # the last for the evaluation's recommenders
        assert validation < users_of(drawn / round_ / "fit" / "vectors")
        assert len(users_of(drawn / round_ / "fit" / "vectors") & training) == 30
    for part in ("samples", "vectors", "scores"):
        assert users_of(drawn / "round-0" / part) == training
    assert users_of(drawn / "round-0" / "pairs" / "answers.parquet") == training
    assert not (drawn / "round-1" / "samples").exists()
    results = json.loads((drawn / "evaluation" / "results.json").read_text())
    assert results["rewards"][0]["texts"] == 3 * len(training)
    assert "tuned text" in results["metrics"]


def refitted(run: Run, changed: Callable[[str], bool], folder: Path) -> Path:
    """The first recommender of the run's round 0, fitted again when the vectors of some users' texts are others."""
    texts = read_parquet(run.folder / "round-0" / "fit" / "vectors")
    vectors, noise = matrix(texts["vector"]).numpy(), np.random.default_rng(0)
    rows = [changed(user) for user in texts["user_id"].to_pylist()]
    vectors[rows] = noise.random((sum(rows), vectors.shape[1]), np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    write_parquet(texts.set_column(texts.column_names.index("vector"), "vector", column), folder / "vectors" / "unit-00000.parquet")
    seed = stable_seed(run.config.seed, "reward", 0, 0, 0)
    of_texts = {"seed": seed, "held_out": 0, "texts": [str(folder / "vectors")]}
    job = FitJob(out=str(folder / "model"), recommender=run.config.recommender, **of_texts)
    fitter = FitterConfig(data=str(run.folder / "data"), item_vectors=str(run.item_vectors), folds=str(run.folds))
    Fitter(fitter)(job_unit("one", job)[1])
    return folder / "model"


def test_nobody_is_judged_by_a_recommender_that_was_fitted_on_his_texts(drawn: Path, tmp_path: Path) -> None:
    run, folds = Run(resolve(None, drawn / "config.yaml", []), drawn), folds_of(drawn)
    scorer, fitted = run.scorer(0), drawn / "round-0" / "recommender" / "fold-0-seed-0"
    without = refitted(run, lambda user: folds.get(user) == 0, tmp_path / "without")
    other = refitted(run, lambda user: folds.get(user) == 1, tmp_path / "other")
    run.folder.release()
    assert content_hash(without) == content_hash(fitted) != content_hash(other)  # the texts of fold 0 have not been read
    again = Scorer(scorer.model_copy(update={"recommenders": [scorer.recommenders[0], [str(other)]]}))
    scores, changed = read_parquet(drawn / "round-0" / "scores"), again(read_parquet(drawn / "round-0" / "vectors"))
    same = dict(zip(scores["user_id"].to_pylist(), np.isclose(scores["reward"], changed["reward"], atol=1e-6).tolist(), strict=True))
    assert same == {user: fold == 0 for user, fold in folds.items()}  # fold 0 is judged by its own recommender alone


def test_a_run_that_is_stopped_while_texts_are_scored_ends_the_same(drawn: Path, micro_run: Path, micro: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, *_: object) -> None:
        if stage == "round-0/score" and done == 2:
            raise KeyboardInterrupt

    run = drawing(micro_run, micro, tmp_path / "run", stop)
    run.prepare()
    run.sample(0)
    run.fit(0)
    with pytest.raises(KeyboardInterrupt):
        run.score(0)
    run.folder.release()
    here = tmp_path / "run" / "round-0"
    for part in ("samples", "vectors", "scores"):
        assert [file.name for file in sorted((here / part).iterdir())] == ["unit-00000.parquet", "unit-00001.parquet"]
    (here / "vectors" / "unit-00001.parquet").unlink()
    run = Run(resolve(None, tmp_path / "run" / "config.yaml", []), tmp_path / "run")
    run.score(0)
    run.folder.release()
    for part in ("fit", "samples", "vectors", "scores", "recommender/fold-0-seed-0", "recommender/fold-1-seed-0"):
        assert content_hash(here / part) == content_hash(drawn / "round-0" / part), part
    stages = [json.loads((folder / "manifest.json").read_text())["stages"] for folder in (tmp_path / "run", drawn)]
    assert stages[0]["round-0/score"]["report"] == stages[1]["round-0/score"]["report"]


def test_more_fitting_users_than_there_are_is_an_input_error(micro_run: Path, micro: Path, tmp_path: Path) -> None:
    run = Run(resolve("quickstart", micro, ["reward.fit_users=60"]), tmp_path)
    shutil.copytree(micro_run / "data", tmp_path / "data")
    with pytest.raises(InputError, match=r"reward.fit_users: it is 60, and there are 60 training users"):
        run.prepare()
    run.folder.release()


class PatientSampler(Sampler):
    """Draws a user's texts when a file is there; which user and file says `patience.json` in the folder PATIENCE."""

    def __call__(self, unit: pa.Table) -> pa.Table:
        patience = json.loads((Path(os.environ["PATIENCE"]) / "patience.json").read_text())
        if patience["user"] in unit["user_id"].to_pylist():
            wait_for(Path(patience["file"]))
        return super().__call__(unit)


# -- on Ray ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A local Ray with GPUs that it is told of, whose workers can import what lies here; the folder where samplers look for patience."""
    import ray

    patience = tmp_path_factory.mktemp("patience")
    importable = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PATIENCE", str(patience))
        environment.setenv("PYTHONPATH", importable)
        ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False)
    yield patience
    ray.shutdown()


def test_steps_on_ray_work_at_the_same_time_and_give_the_same_bytes(local_ray: Path, undisturbed: Path, tmp_path: Path) -> None:
    pq.write_table(USERS, tmp_path / "users.parquet", row_group_size=5)
    units = Rows(tmp_path / "users.parquet", 3)
    first = tmp_path / "run" / "lengths" / "unit-00000.parquet"  # the first step ends only when the second has a result
    warnings = stream_units(chain(tmp_path / "run", WriterConfig(waits_for=str(first))), units, RAY, logs=tmp_path / "logs")
    assert warnings == [Counter.warning]
    assert content_hash(tmp_path / "run") == content_hash(undisturbed)
    names = {file.name for file in (tmp_path / "logs").iterdir()}
    assert {"writer-0.log", "counter-0.log"} <= names <= {f"{role}-{rank}.log" for role in ("writer", "counter") for rank in (0, 1)}


def test_texts_are_scored_on_ray_while_others_are_sampled(
    local_ray: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(drawn, folder, ignore=shutil.ignore_patterns("logs"))
    here = folder / "round-0"
    for part in ("samples", "vectors", "scores"):
        shutil.rmtree(here / part)
    last, first = max(users_of(drawn / "round-0" / "samples")), here / "scores" / "unit-00000.parquet"
    (local_ray / "patience.json").write_text(json.dumps({"user": last, "file": str(first)}))
    monkeypatch.setattr(texts, "Sampler", PatientSampler)
    run = Run(resolve(None, folder / "config.yaml", ["cluster.kind=ray"]), folder)
    run.score(0)
    run.folder.release()
    for part in ("samples", "vectors", "scores"):
        assert content_hash(here / part) == content_hash(drawn / "round-0" / part), part
    scored, sampled = lines(folder / "logs", "scorer", "unit-00000 done"), lines(folder / "logs", "patientsampler", " done")
    assert scored[0] < sampled[-1]


def test_a_worker_killed_in_the_middle_of_a_unit_loses_nothing(local_ray: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    stream_units(chain(run, WriterConfig(dies_on="u7", dies=str(tmp_path))), cut(USERS, 3), RAY, logs=tmp_path / "logs")
    assert (tmp_path / "died").exists()
    assert len(lines(tmp_path / "logs", "writer", "unit-00002 begun")) == 2
    assert len(lines(tmp_path / "logs", "writer", "pid")) == 3  # two workers, and the one in place of the dead
    assert content_hash(run) == content_hash(undisturbed)


def test_the_failing_user_is_named_on_ray_as_well(local_ray: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        stream_units(chain(tmp_path, WriterConfig(fails_on=["u7"])), cut(USERS, 3), RAY, logs=tmp_path / "logs")
    named_as_the_failing_user(raised.value, tmp_path)


@pytest.mark.slow
def test_a_unit_that_kills_every_worker_stops_the_run(local_ray: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "RESTARTS", 1)
    steps = chain(tmp_path / "run", WriterConfig(dies_on="u7", dies=str(tmp_path), always=True))
    with pytest.raises(InputError, match=re.compile(r"died more than 1 times.*unit-00002 begun: 3 rows, u6 to u8", re.DOTALL)):
        stream_units(steps, cut(USERS, 3), RAY, logs=tmp_path / "logs")
