from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dpo4rec.cli import app
from dpo4rec.config import Config, presets, resolve
from dpo4rec.errors import InputError


@pytest.mark.parametrize("preset", presets())
def test_every_shipped_preset_resolves_and_survives_a_dump(preset: str) -> None:
    settings = [] if preset == "quickstart" else ["data.folder=/data"]
    config = resolve(preset, None, settings)
    assert Config.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_command_line_beats_file_beats_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("alignment: {beta: 0.2, epochs: 2}\n")
    config = resolve("quickstart", file, ["alignment.beta=0.3"])
    assert (config.alignment.beta, config.alignment.epochs, config.data.source) == (0.3, 2, "simulation")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("alignment.betta=0.1", ["alignment.betta", "nearest is 'beta'"]),
        ("aligment.beta=0.1", ["aligment", "nearest is 'alignment'"]),
        ("alignment.beta=-1", ["alignment.beta", "greater than 0"]),
        ("llm.tiny.writers=[{kind_weights: {opera: 1}}]", ["llm.tiny.writers", "opera"]),
        ("llm.tiny.writers=[{weigth: 1}]", ["llm.tiny.writers.0.weigth", "nearest is 'weight'"]),
        ("llm.tiny.writers=[{length_weights: [-1, 2]}]", ["length_weights", "-1"]),
        ("llm.tiny.writers=[{kind_weights: {}}]", ["kind_weights", "one of them above"]),
        ("evaluation.temperatures=[0, 0.5]", ["evaluation.temperatures.0", "greater than 0"]),
        ("recommender.user_signal=history", ["user_signal must hold text"]),
        ("llm.quantization=nf4", ["tiny model"]),
        ("llm.trust_remote_code=true", ["tiny model brings no code"]),
        ("recommender={model: dlcm, heads: 4}", ["dlcm has no attention"]),
        ("data.folder=2024-02-30", ["YAML"]),
        ("alignment.quantization=nf4", ["must be the same"]),
        ("encoder.kind=sentence-transformers", ["encoder.name"]),
        ("encoder.max_tokens=9", ["encoder.kind=language-model"]),
        ("reward.k=3", ["no cut-off"]),
        ("data.folder=/x", ["data", "folder"]),
        ("beta", ["key=value"]),
        ("a=[", ["YAML"]),
    ],
)
def test_bad_settings_are_named(setting: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        resolve("quickstart", None, [setting])
    for word in words:
        assert word in str(caught.value)


def test_a_file_that_holds_no_settings_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: Frühling".encode("latin-1"))
    for path, cause in (
        (tmp_path, "cannot be read"),
        (tmp_path / "latin.yaml", "not valid YAML"),
        (tmp_path / "none.yaml", "no such file"),
    ):
        with pytest.raises(InputError, match=cause) as caught:
            resolve("quickstart", path, [])
        assert str(path) in str(caught.value)


def test_help_says_the_defaults_and_all_presets() -> None:
    words = " ".join(CliRunner().invoke(app, ["run", "--help"]).output.split())
    assert "[default: runs/PRESET]" in words
    assert all(preset in words for preset in presets())


def test_a_runs_pairs_have_no_columns_of_noise() -> None:
    for *settings, instead in (
        ["objective=smoothed", "noise=epsilon_column", "epsilon"],
        ["objective=margin", "noise=margin_column", "none"],
    ):
        with pytest.raises(InputError, match=f"a column of the pairs that a run does not write: use {instead}"):
            resolve("quickstart", None, [f"alignment.{setting}" for setting in settings])


def test_an_objective_against_several_texts_wants_several() -> None:
    assert resolve("quickstart", None, ["alignment.objective=softmax"]).pairs.malformed_pair
    with pytest.raises(InputError, match="one each, for which it is sigmoid"):
        resolve("ml-1m", None, ["data.folder=ml-1m", "alignment.objective=softmax"])


def test_a_wrong_combination_is_told_without_a_dump_of_the_settings() -> None:
    with pytest.raises(InputError) as caught:
        resolve("quickstart", None, ["llm.quantization=nf4"])
    assert str(caught.value).endswith("set llm.quantization=none. See docs/configuration.md")


def test_vllm_draws_what_it_can() -> None:
    assert resolve("quickstart", None, ["sampling.engine=vllm", "llm.precision=bf16"]).sampling.engine == "vllm"
    for setting, cause in (("llm.precision=fp32", "llm.precision=bf16"), ("evaluation.temperatures=[3.0]", "not at 3")):
        with pytest.raises(InputError, match=cause):
            resolve("quickstart", None, ["llm.precision=bf16", "sampling.engine=vllm", setting])
    with pytest.raises(InputError, match="rows_at_once is for"):
        resolve("quickstart", None, ["llm.precision=bf16", "sampling.engine=vllm", "sampling.rows_at_once=64"])


def test_errors_leave_with_status_2_and_one_line() -> None:
    result = CliRunner().invoke(app, ["run", "--preset", "quickstrat"])
    assert result.exit_code == 2
    assert "error: --preset: there is no preset 'quickstrat'; the nearest is 'quickstart'" in result.output
    assert "Traceback" not in result.output


def test_dry_run_prints_settings_and_stages_and_makes_nothing(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", "--preset", "quickstart", "--run-dir", str(tmp_path / "r"), "--dry-run", "--set", "seed=7"])
    assert result.exit_code == 0, result.output
    resolved = yaml.safe_load(result.output.split("stages:")[0])
    assert resolved["seed"] == 7
    assert "round-1: sample, fit, score, pair, align" in result.output
    assert not (tmp_path / "r").exists()


def test_an_interrupted_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> Config:
        raise KeyboardInterrupt

    monkeypatch.setattr("dpo4rec.config.resolve", interrupt)
    done = CliRunner().invoke(app, ["run", "--preset", "quickstart", "--dry-run"])
    assert (done.exit_code, done.stderr) == (130, "interrupted: the same command goes on where it stopped\n")


def test_a_data_folder_may_have_any_name() -> None:
    done = CliRunner().invoke(app, ["run", "--preset", "ml-1m", "--data", "/data/my set #2: é", "--dry-run"])
    assert yaml.safe_load(done.output.split("stages:")[0])["data"]["folder"] == "/data/my set #2: é"


def test_item_texts_want_a_model_that_can_write_them() -> None:
    with pytest.raises(InputError, match="built-in model"):
        resolve("quickstart", None, ["prompt.item_request=Introduce {title}"])
    with pytest.raises(InputError, match="must hold"):
        resolve("quickstart", None, ["llm.name=some/model", "prompt.item_request=Introduce it"])
