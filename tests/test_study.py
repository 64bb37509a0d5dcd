"""The study: arms that share what they can, seeds on the same users, and tables of both."""

import json
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from typer.testing import CliRunner

from dpo4rec import study as studies
from dpo4rec.cli import app
from dpo4rec.config import resolve
from dpo4rec.errors import InputError
from dpo4rec.evaluation.metrics import log_likelihood
from dpo4rec.evaluation.significance import paired_bootstrap
from dpo4rec.preference.best_of import best_by_other_half
from dpo4rec.preference.config import RewardConfig
from dpo4rec.report.study import tables
from dpo4rec.run_folder import content_of, fork
from dpo4rec.study import RESULTS, Study, StudyConfig, load_study
from dpo4rec.study_results import keep_evaluations, study_results

ARMS = {"aligned": [], "at random": ["pairs.orientation=random"]}
ABLATIONS = {"beta 1": ["alignment.beta=1"]}
STUDY = {
    "preset": "quickstart",
    "seeds": 2,
    "quick": ["evaluation.bootstrap_samples=50"],
    "minutes_per_seed": 1,
    "minutes_per_ablation": 3,
    "quick_share": 0.5,
    "arms": ARMS,
    "aligned": "aligned",
    "ablations": ABLATIONS,
    "comparisons": [["aligned", "untuned text"], ["history + aligned", "history + untuned text"]],
    "exploratory": [["aligned", "at random"]],
    "expected": {"well_formed_rate": [-1, -0.5]},
}


@pytest.fixture(scope="module")
def finished(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[str]]:
    """Folder of a finished study of the micro run, what was said on the way, and the command's words."""
    root = tmp_path_factory.mktemp("study")
    (root / "studies").mkdir()
    values = {**yaml.safe_load(micro.read_text()), "rounds": 1}
    values["evaluation"] = {**values.get("evaluation", {}), "seeds": 1, "temperatures": [0.7, 1.0], "best_of": 3}
    values["data"]["split_seed"] = 5
    settings = [f"{key}={json.dumps(value)}" for key, value in values.items() if key != "seed"]
    (root / "studies" / "micro.yaml").write_text(yaml.safe_dump({**STUDY, "settings": settings}))
    options = ["reproduce", "micro", "--run-dir", str(root / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "STUDIES", root / "studies")
        result = CliRunner().invoke(app, options)
    assert result.exit_code == 1, result.output  # what is expected of it is impossible
    return root, result.output, options


def test_a_study_measures_arms_and_controls_over_its_seeds(finished: tuple[Path, str, list[str]]) -> None:
    root, said, _ = finished
    results = json.loads((root / "out" / "results.json").read_text())
    assert list(results["conditions"])[:3] == ["random", "popularity", "none"]
    assert {"raw titles as text", "best of the untuned texts", "aligned", "history + at random"} <= results["conditions"].keys()
    figures, conditions = results["figures"], results["conditions"]
    assert figures["delta_ndcg5_tuned_vs_untuned"] == pytest.approx(
        conditions["aligned"]["ndcg@5"] - conditions["untuned text"]["ndcg@5"], abs=1e-4
    )
    assert all(0 <= conditions["at random"]["texts"][name] <= 1 for name in ("well_formed", "distinct", "grounded"))
    with_texts = {"untuned text", "best of the untuned texts", "aligned", "at random"}
    assert {label for label, of in conditions.items() if "texts" in of} == with_texts
    assert {*conditions["best of the untuned texts"]["temperatures"]} <= {0.7, 1.0}
    chosen = pq.read_table(root / "out" / "seed-0" / "aligned" / "evaluation" / "best_of.parquet")
    assert 1 <= chosen.group_by("user_id").aggregate([("sample", "count")])["sample_count"].to_numpy().max() <= 2  # one a half of the lists
    assert [row["p_value"] <= row["p_value_holm"] for row in results["comparisons"][:-1]] == [True] * 2
    assert "p_value_holm" not in results["comparisons"][-1]
    shared = results["one recommender"]["at random"]
    of_runs = [json.loads((root / "out" / f"seed-{seed}" / "at-random" / RESULTS).read_text())["metrics"] for seed in (0, 1)]
    assert shared["tuned"] == pytest.approx(sum(of["tuned text, shared recommender"]["ndcg@5"] for of in of_runs) / 2, abs=1e-6)
    assert "about 5 minutes" in said
    begun = re.findall(r"^seed \d: .*", said, re.MULTILINE)
    assert begun == [*(f"seed {seed}: {arm}" for seed in (0, 1) for arm in ARMS), "seed 0: beta 1"]
    assert results["ablations"].keys() == {"aligned", "beta 1"}
    alone, beside = results["ablations"]["aligned"], results["ablations"]["aligned"]["beside a history"]
    assert alone["tuned"] - alone["untuned"] == pytest.approx(alone["difference"], abs=1e-6)
    per_user = pq.read_table(root / "out" / "seed-0" / "aligned" / "evaluation" / "per_user.parquet").to_pandas()
    own = per_user.groupby("condition")["ndcg@5"].mean()
    assert beside["difference"] == pytest.approx(own["history + tuned text"] - own["history + untuned text"], abs=1e-6)
    assert not (root / "out" / "seed-1" / "beta-1").exists()  # one seed is enough
    pairs, adapters = (
        [(root / "out" / "seed-0" / label / "round-0" / name).read_bytes() for label in ("aligned", "beta-1")]
        for name in ("pairs/pairs.parquet", "adapter/adapter_model.safetensors")
    )
    assert pairs[0] == pairs[1]
    assert adapters[0] != adapters[1]
    assert "unexpected: well_formed_rate" in said
    page = (root / "out" / "results.md").read_text()
    assert re.search(r"^\| aligned - untuned text \|.* \d\.\d{4} \|$", page, re.MULTILINE)
    assert re.search(r"^\| aligned - at random \|.* exploratory \|$", page, re.MULTILINE)


def test_arms_share_what_they_have_in_common_and_seeds_their_users(finished: tuple[Path, str, list[str]]) -> None:
    root, _, _ = finished
    here, other = (root / "out" / f"seed-{seed}" for seed in (0, 1))
    same = ("round-0/scores", "evaluation/judges/untuned", "language_model")
    for name in same:
        files = [path for path in (here / "aligned" / name).rglob("*") if path.is_file()]
        assert files
        assert all(path.samefile(here / "at-random" / path.relative_to(here / "aligned")) for path in files)
    pairs = [(here / arm / "round-0" / "pairs" / "pairs.parquet").read_bytes() for arm in ("aligned", "at-random")]
    assert pairs[0] != pairs[1]
    lists = [(seed / "aligned" / "data" / "lists.parquet").read_bytes() for seed in (here, other)]
    assert lists[0] == lists[1]
    texts = [sorted((seed / "aligned" / "round-0" / "samples").iterdir())[0].read_bytes() for seed in (here, other)]
    assert texts[0] != texts[1]


def test_a_finished_study_does_nothing_again(finished: tuple[Path, str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    root, _, options = finished
    monkeypatch.setattr(studies, "STUDIES", root / "studies")
    before = (root / "out" / "results.json").read_bytes()
    result = CliRunner().invoke(app, options)
    assert "0 of 2 seeds" in result.output
    assert (root / "out" / "results.json").read_bytes() == before


def test_expectations_are_of_the_study_as_it_is_shipped(finished: tuple[Path, str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    root, said, options = finished
    monkeypatch.setattr(studies, "STUDIES", root / "studies")
    as_shipped = Study(load_study("micro"), root / "out", ["cluster.wait_timeout_seconds=9"])
    assert study_results(as_shipped)["unexpected"].keys() == {"well_formed_rate"}
    assert "not checked" not in said
    other = CliRunner().invoke(app, [*options, "--set", "evaluation.seeds=1"])
    assert other.exit_code == 0
    assert "not checked" in other.output
    assert "unexpected" not in other.output


def test_an_arm_that_was_interrupted_is_not_taken_for_the_one_it_began_as(
    finished: tuple[Path, str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _, _ = finished
    monkeypatch.setattr(studies, "STUDIES", root / "studies")
    shutil.copytree(root / "out", tmp_path / "out")
    forked = tmp_path / "out" / "seed-1" / "at-random"
    shutil.rmtree(forked)

    def interrupt(*_: object) -> None:
        if forked.exists():
            raise KeyboardInterrupt

    work = Study(load_study("micro"), tmp_path / "out", [], announce=interrupt)
    with pytest.raises(KeyboardInterrupt):
        work.run([1])
    assert (forked / "round-0" / "scores").is_dir()
    assert work.unfinished() == [1]
    so_far = study_results(work)
    assert (so_far["seeds"], so_far["of_seeds"], so_far["unexpected"]) == (1, 2, {})  # what is expected is of both seeds
    assert "Seeds of the whole loop: 1 of 2." in tables(so_far)
    assert "Of one run" in tables(so_far)
    of_both = json.loads((root / "out" / "results.json").read_text())
    assert so_far["conditions"]["aligned"]["ndcg@5"] != of_both["conditions"]["aligned"]["ndcg@5"]
    shutil.rmtree(tmp_path / "out" / "seed-0" / "at-random")
    with pytest.raises(InputError, match="no seed has all its arms"):
        study_results(work)


def test_the_evaluations_that_were_kept_make_the_same_tables(
    finished: tuple[Path, str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _, options = finished
    monkeypatch.setattr(studies, "STUDIES", root / "studies")
    for seed in (0, 1):  # each of a machine of its own
        part = tmp_path / f"machine-{seed}"
        shutil.copytree(root / "out" / f"seed-{seed}", part / f"seed-{seed}")
        keep_evaluations(Study(load_study("micro"), part, []), tmp_path / "kept")
    kept = [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    assert {path.suffix for path in kept} == {".json", ".parquet", ".yaml"}
    assert len(kept) == 2 * (4 + 3) + 3  # of the first arm the titles, too; the ablation of one seed
    again = CliRunner().invoke(app, [*options[:-1], str(tmp_path / "kept")])
    assert "0 of 2 seeds" in again.output
    assert json.loads((tmp_path / "kept" / "results.json").read_text()) == study_results(Study(load_study("micro"), root / "out", []))
    assert (tmp_path / "kept" / "results.md").read_text() == (root / "out" / "results.md").read_text()
    own = tmp_path / "kept" / "seed-1" / "at-random" / "config.yaml"
    own.write_text(own.read_text().replace("beta: 0.1", "beta: 0.2"))
    mixed = CliRunner().invoke(app, [*options[:-1], str(tmp_path / "kept")])
    assert mixed.exit_code == 2
    assert "at-random/config.yaml" in mixed.output.replace("\n", "")
    assert "alignment.beta" in mixed.output


def test_studies_say_what_they_lack(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["reproduce", "nothing"]).exit_code == 2
    with pytest.raises(ValueError, match="no figures of a study"):
        StudyConfig.model_validate({**STUDY, "expected": {"unheard of": [0, 1]}})
    with pytest.raises(ValueError, match="both arms and ablations"):
        StudyConfig.model_validate({**STUDY, "ablations": {"at random": []}})
    with pytest.raises(ValueError, match="no conditions of this study"):
        StudyConfig.model_validate({**STUDY, "comparisons": [["aligned", "unheard of"]]})
    result = CliRunner().invoke(app, ["reproduce", "ml-1m-dpo4rec", "--data", str(tmp_path), "--seed", "9", "--run-dir", str(tmp_path)])
    assert result.exit_code == 2
    assert "--seed 9" in result.output
    for setting in ("seed=3", "rounds=4"):  # the seeds' and an arm's own
        with pytest.raises(InputError, match="sets it itself"):
            Study(load_study("ml-1m-dpo4rec"), tmp_path, ["data.folder=here", setting])
    with pytest.raises(InputError, match="no run folder"):
        fork(tmp_path, tmp_path / "new")


def test_every_shipped_study_can_be_begun() -> None:
    for name in studies.studies():
        config = load_study(name)
        for arm in config.variants.values():
            resolve(config.preset, None, [*config.settings, *config.quick, *arm, "data.folder=somewhere"])


def test_commands_of_the_docs_can_be_begun(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "results.md").read_text(encoding="utf-8")
    commands = [shlex.split(command) for command in re.findall(r"^dpo4rec reproduce .*", text, re.MULTILINE)]
    assert len(commands) == 3
    for words in commands:
        settings = [word for before, word in pairwise(words) if before == "--set"]
        work = Study(load_study(words[2]), tmp_path, ["data.folder=here", *settings], "--quick" in words)
        assert work.as_shipped == (len(words) == 5)


def test_the_text_is_chosen_by_the_lists_that_it_is_not_measured_on() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 7, 10, generator=generator), (torch.rand(7, 10, generator=generator) < 0.4).float()
    users = torch.tensor([3, 0, 3, 3, 0, 3, 1])
    chosen = best_by_other_half(RewardConfig(), logits, labels, users)
    rewards = log_likelihood(logits.flatten(0, 2), labels.repeat(10, 1)).view(2, 5, 7).mean(0)
    assert chosen[0] == chosen[3] == rewards[:, [2, 5]].sum(1).argmax()
    assert chosen[2] == chosen[5] == rewards[:, [0, 3]].sum(1).argmax()
    assert chosen[1] == rewards[:, 4].argmax()
    assert chosen[4] == rewards[:, 1].argmax()
    assert chosen[6] == 0


def test_bootstrap_over_runs_is_wider_where_runs_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(5, 400, generator=generator)
    alike, apart = noise + 0.02, noise + torch.linspace(-0.1, 0.14, 5)[:, None]
    zero = torch.zeros(5, 400)
    narrow, wide = (paired_bootstrap(values, zero, seed=0) for values in (alike, apart))
    assert narrow.difference == pytest.approx(wide.difference, abs=1e-6)
    assert narrow.p_value < 0.01 < 0.3 < wide.p_value
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)
    two = paired_bootstrap(torch.tensor([[0.1, 0.1], [0.3, 0.3]]), torch.zeros(2, 2), seed=0)
    assert (two.low, two.high) == (pytest.approx(0.1), pytest.approx(0.3))  # one of two is drawn: the variance of a mean of both
    users_apart = zero.clone()
    users_apart[0, 3] = torch.nan
    with pytest.raises(InputError, match="other users"):
        paired_bootstrap(users_apart, zero, seed=0)


def test_a_fork_begins_with_what_is_done_and_leaves_its_origin_alone(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    (source / "round-0" / "adapter").mkdir(parents=True)
    for name in ("manifest.json", "config.yaml", "log.jsonl", ".lock", "round-0/adapter/log.jsonl"):
        (source / name).write_text("{}")
    fork(source, target)
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()) == [
        "manifest.json",
        "round-0/adapter/log.jsonl",
    ]
    assert content_of([source / "round-0"]) == content_of([target / "round-0"])
    (target / "manifest.json").unlink()
    fork(source, target)  # is there already
    assert (source / "manifest.json").exists()
    assert not (target / "manifest.json").exists()
