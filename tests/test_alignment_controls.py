"""The controls of preference training: imitating the best texts, imitating by reward, and GRPO."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model_state_dict
from pydantic import ValidationError
from safetensors.torch import load_file
from test_alignment import SETTINGS, make_model, make_rows, steps_of
from test_alignment_processes import launch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl.trainer import utils

from dpo4rec.alignment.align import align
from dpo4rec.alignment.answers import imitation_weights, read_answers
from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.alignment.likelihood import LikelihoodTrainer, likelihood_steps
from dpo4rec.alignment.online import Online, Reward, read_reward
from dpo4rec.alignment.policy import load_policy
from dpo4rec.alignment.policy_trainer import score_answers_alone
from dpo4rec.config import resolve
from dpo4rec.driver import Run
from dpo4rec.errors import InputError
from dpo4rec.files import read_json, read_parquet, stable_seed, write_json, write_parquet
from dpo4rec.knowledge.config import Decoding
from dpo4rec.preference.answers import ANSWERS, make_answers
from dpo4rec.preference.config import PairConfig
from dpo4rec.preference.online import OnlineReward

PROMPTS, PER_PROMPT = 19, 3


def make_table(path: Path, text: str = "prompt") -> Path:
    """Three answers a prompt, the first the best; 19 prompts are no multiple of 8."""
    rows = make_rows(PROMPTS)
    table: dict[str, list[Any]] = {name: [] for name in ("user_id", "prompt", "prompt_ids", "completion_ids", "standardised")}
    for user in range(PROMPTS):
        answers = [rows["chosen_ids"][user], rows["rejected_ids"][user], [7, 8, 9, 2]]
        for ids, reward in zip(answers, (1.2, -0.9, -0.3), strict=True):
            values = (f"u{user}", f"{text} {user}", rows["prompt_ids"][user], ids, reward)
            for name, value in zip(table, values, strict=True):
                table[name].append(value)
    write_parquet(pa.table(table), path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(make_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_table(tmp_path_factory.mktemp("answers") / "answers.parquet")


def run(model: str, table: Path, out: Path, reward: Reward | None = None, **changes: Any) -> Path:
    online = Online(Decoding(max_new_tokens=6), reward) if reward else None
    align(AlignmentConfig(**{"method": "rejection_sampling", **SETTINGS, **changes}), model, table, None, 0, out, online=online)
    return out


def log_of(folder: Path) -> str:
    return (folder / "training_log.jsonl").read_text()


@pytest.fixture(scope="module")
def imitated(model: str, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six epochs of rejection sampling."""
    return run(model, table, tmp_path_factory.mktemp("imitated") / "adapter", epochs=6)


def test_rejection_sampling_makes_the_best_texts_likelier(imitated: Path) -> None:
    assert steps_of(imitated)[0] == pytest.approx(math.log(100), abs=0.3)  # an untrained model of 100 tokens
    assert steps_of(imitated)[-1] < steps_of(imitated)[0] - 0.3
    summary = read_json(imitated / "summary.json")
    assert (summary["prompts"], summary["answers"], summary["steps"], summary["dropped"]) == (PROMPTS, PROMPTS, 18, {})
    assert {path.name for path in imitated.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "summary.json",
        "training_log.jsonl",
    }
    assert [path.name for path in imitated.parent.iterdir()] == ["adapter"]  # neither checkpoints nor a reference are left


def test_rejection_sampling_is_trls_sft_on_the_same_rows(model: str, table: Path, imitated: Path, tmp_path: Path) -> None:
    """TRL masks the prompts by itself; 18 steps, no loss and no weight differs."""
    config = AlignmentConfig(**{"method": "rejection_sampling", **SETTINGS, "epochs": 6})
    answers, _ = read_answers(table, 100, 128, config)
    order = [row for step in likelihood_steps(answers, config, seed=0) for bin_ in step for row in bin_]
    rows = [(answers.prompts[prompt], ids) for prompt, ids in (answers.answers[row] for row in order)]
    data = {"input_ids": [[*prompt, *ids] for prompt, ids in rows]}
    data["completion_mask"] = [[0] * len(prompt) + [1] * len(ids) for prompt, ids in rows]
    torch.manual_seed(stable_seed(0, "adapter"))
    policy = load_policy(config, model, None, torch.device("cpu"))
    arguments = SFTConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=8, num_train_epochs=1, learning_rate=5e-3, warmup_steps=1,
        completion_only_loss=True, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, bf16=False,
        gradient_checkpointing=False, train_sampling_strategy="sequential", weight_decay=0.0, max_length=128,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    trainer = SFTTrainer(model=policy, args=arguments, train_dataset=Dataset.from_dict(data), processing_class=tokenizer)
    trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "grad_norm" in line]
    np.testing.assert_allclose(steps_of(imitated), theirs, atol=1e-4)
    weights = load_file(imitated / "adapter_model.safetensors")
    for name, tensor in get_peft_model_state_dict(policy).items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-4, rtol=0)


def test_on_cpu_no_position_of_a_prompt_is_scored(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scored, head = [], utils._ChunkedLogProbFunction

    class Counting:
        @staticmethod
        def apply(hidden: torch.Tensor, *others: Any) -> Any:
            scored.append(len(hidden))
            return head.apply(hidden, *others)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Counting)
    plain = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.arange(3, 27).reshape(2, 12)
    expected = plain(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    score_answers_alone()
    utils.add_fused_lm_head(plain)
    found = plain(ids, labels=ids.masked_fill(torch.arange(12) < 9, -100), fused_lm_head=True).log_probs
    assert scored == [6]
    torch.testing.assert_close(found[:, 8:], expected[:, 8:])


def test_weights_follow_the_formula() -> None:
    weights = imitation_weights([1.0, -1.0, 0.5], 0.5)
    assert weights == pytest.approx([math.exp(r / 0.5) / sum(math.exp(x / 0.5) for x in (1.0, -1.0, 0.5)) for r in (1.0, -1.0, 0.5)])
    assert imitation_weights([1e3, -1e3], 1e-3) == [1.0, 0.0]  # neither overflow nor nan
    assert imitation_weights([0.0, 2.0, 2.0], None) == [0.0, 1.0, 0.0]


def test_all_weight_on_one_text_is_rejection_sampling(model: str, table: Path, imitated: Path, tmp_path: Path) -> None:
    out = run(model, table, tmp_path / "a", epochs=6, method="reward_weighted", reward_temperature=1e-4)
    assert log_of(out) == log_of(imitated)
    assert (out / "adapter_model.safetensors").read_bytes() == (imitated / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("tokens", [40, 4096])
def test_the_loss_is_the_weighted_mean_over_tokens_however_it_is_batched(model: str, table: Path, tmp_path: Path, tokens: int) -> None:
    out = run(model, table, tmp_path / "a", method="reward_weighted", tokens_per_batch=tokens, pairs_per_step=PROMPTS)
    language_model = AutoModelForCausalLM.from_pretrained(model)
    total = norm = 0.0
    for row in read_parquet(table).to_pylist():
        weight = math.exp(row["standardised"]) / sum(map(math.exp, (1.2, -0.9, -0.3)))
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        labels = ids.clone()
        labels[0, : len(row["prompt_ids"])] = -100
        with torch.no_grad():
            per_token = float(language_model(ids, labels=labels).loss)
        total += weight * per_token * len(row["completion_ids"])
        norm += weight * len(row["completion_ids"])
    assert steps_of(out)[0] == pytest.approx(total / norm, abs=1e-5)
    assert steps_of(out, "answers") == [PROMPTS * PER_PROMPT]


def test_sft_goes_on_where_it_was_killed(model: str, table: Path, imitated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_step = LikelihoodTrainer.write_step

    def killed(self: LikelihoodTrainer, record: dict[str, float], starts_at_reference: bool = False) -> None:
        write_step(self, record, starts_at_reference)
        if record["step"] == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LikelihoodTrainer, "write_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(model, table, tmp_path / "adapter", epochs=6)
    assert (tmp_path / ".adapter.checkpoints" / "checkpoint-6" / "complete").exists()
    out = run(model, table, tmp_path / "adapter", epochs=6)
    assert log_of(out) == log_of(imitated)
    assert (out / "adapter_model.safetensors").read_bytes() == (imitated / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "changes", [{"weights": "full"}, {"precision": "bf16"}, {"gradient_checkpointing": True}, {"quantization": "nf4"}], ids=str
)
def test_variants_imitate_too(model: str, table: Path, imitated: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    out = run(model, table, tmp_path / "a", **changes)
    assert steps_of(out)[0] == pytest.approx(steps_of(imitated)[0], abs=1e-5 if "gradient_checkpointing" in changes else 0.02)
    weights = load_file(out / ("model.safetensors" if "weights" in changes else "adapter_model.safetensors"))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}  # TRL would round a 4-bit model's adapter


def low_words(users: list[str], texts: list[str], finished: list[bool]) -> list[float]:
    """Share of a text's words that are among the first half of the vocabulary."""
    assert all(user.startswith("u") for user in users)
    return [sum(int(word[1:]) < 50 for word in text.split() if word[0] == "w") / max(1, len(text.split())) for text in texts]


GRPO: dict[str, Any] = {"method": "grpo", "grpo": {"samples": 4}, "epochs": 4, "learning_rate": 1e-2, "weights": "full"}


@pytest.fixture(scope="module")
def reinforced(model: str, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(model, table, tmp_path_factory.mktemp("reinforced") / "adapter", low_words, **GRPO)


def test_grpo_raises_its_reward(reinforced: Path) -> None:
    rewards = steps_of(reinforced, "reward")
    assert len(rewards) == 12
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.12
    summary = read_json(reinforced / "summary.json")
    assert summary["prompts"] == PROMPTS
    assert 0 < summary["speed"]["peak_memory_gib"] < 24


def test_grpo_goes_on_where_it_was_killed(model: str, table: Path, reinforced: Path, tmp_path: Path) -> None:
    calls = []

    def dies(users: list[str], texts: list[str], finished: list[bool]) -> list[float]:
        calls.append(len(texts))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return low_words(users, texts, finished)

    with pytest.raises(KeyboardInterrupt):
        run(model, table, tmp_path / "adapter", dies, **GRPO)
    assert set(calls) == {32}  # a step's texts at once
    out = run(model, table, tmp_path / "adapter", low_words, **GRPO)
    assert log_of(out) == log_of(reinforced)
    assert (out / "model.safetensors").read_bytes() == (reinforced / "model.safetensors").read_bytes()


def test_grpo_samples_from_the_ids_of_the_table_whatever_the_text(model: str, reinforced: Path, tmp_path: Path) -> None:
    out = run(model, make_table(tmp_path / "answers.parquet", "w9 w9 w9 another text"), tmp_path / "a", low_words, **GRPO)
    assert log_of(out) == log_of(reinforced)


@pytest.mark.parametrize(
    "changes", [{"weights": "full"}, {"gradient_checkpointing": True}, {"quantization": "nf4"}, {"precision": "bf16"}], ids=str
)
def test_variants_reinforce_too_and_stay_near_where_they_started(model: str, table: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = {**GRPO, "weights": "lora", "epochs": 1, "grpo": {"samples": 4, "kl_weight": 0.1}, **changes}
    out = run(model, table, tmp_path / "a", low_words, **settings)
    kl = steps_of(out, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-4)
    assert kl[-1] > 1e-4
    assert not [name for name in load_file(next(out.glob("*.safetensors"))) if ".ref." in name]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "rejection_sampling", "beta": 0.3}, "beta would be ignored with method: rejection_sampling"),
        ({"method": "reward_weighted", "nll_weight": 0.5}, "nll_weight"),
        ({"method": "reward_weighted", "grpo": {"samples": 4}}, "grpo"),
        ({"method": "grpo", "reference": "base"}, "reference"),
        ({"method": "grpo", "reward_temperature": 0.5}, "reward_temperature"),
        ({"method": "grpo", "pairs_per_step": 8, "workers": 3}, "workers"),
        ({"reward_temperature": 0.5}, "method: preference"),
    ],
)
def test_settings_that_a_method_would_ignore_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        AlignmentConfig(**changes)


def test_pair_settings_are_refused_without_pairs(micro: Path) -> None:
    with pytest.raises(InputError, match=r"pairs\.keep_share would be ignored"):
        resolve("quickstart", micro, ["alignment.method=grpo", "pairs.keep_share=0.5"])


def test_bad_tables_and_rewards_are_refused(model: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.parquet"
    good = {"prompt_ids": [[5]], "completion_ids": [[6]], "standardised": [0.0]}
    for columns, says in (
        ({"standardised": None}, "standardised is missing"),
        ({"standardised": [math.nan]}, "row 0.*finite"),
        ({"completion_ids": [[100]]}, "row 0.*ids outside"),
        ({"completion_ids": [[6] * 200]}, "no answer is left.*too_long"),
    ):
        write_parquet(pa.table({name: values for name, values in (good | columns).items() if values is not None}), path)
        with pytest.raises(InputError, match=says):
            run(model, path, tmp_path / "a")
    write_parquet(pa.table(good), path)
    with pytest.raises(InputError, match="no reward"):
        run(model, path, tmp_path / "a", method="grpo")
    with pytest.raises(InputError, match=r"the column user_id is missing"):
        run(model, path, tmp_path / "a", low_words, method="grpo")
    with pytest.raises(InputError, match="it is not of dpo4rec"):
        read_reward("subprocess.Popen", path)


def test_the_table_of_answers_has_every_well_formed_text() -> None:
    texts = [("u", 0, "a", True), ("u", 1, "b", False), ("v", 0, "c", True)]
    names = ("user_id", "sample", "completion", "well_formed")
    samples = pa.Table.from_pylist([{**dict(zip(names, text, strict=True)), "token_ids": [text[1], 9]} for text in texts])
    prompts = pa.table({"user_id": ["v", "u"], "prompt": ["pv", "pu"], "prompt_ids": [[3], [1, 2]]})
    scores = pa.table({"user_id": ["u", "u", "v"], "sample": [0, 1, 0], "reward": [-1.0, -2.0, -3.0], "standardised": [1.0, -1.0, 0.0]})
    answers = make_answers(PairConfig(), prompts, samples, scores)
    assert answers.schema == ANSWERS
    assert [(row["prompt"], row["completion"], row["reward"]) for row in answers.to_pylist()] == [("pv", "c", -3.0), ("pu", "a", -1.0)]
    assert answers["completion_ids"].to_pylist() == [[0, 9], [0, 9]]
    assert len(make_answers(PairConfig(format_gate=False), prompts, samples, scores)) == 3


@pytest.fixture(scope="module")
def grpo_run(micro_run: Path, micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro run with GRPO in place of pairs, on the same first samples; moved after it was finished."""
    folder = tmp_path_factory.mktemp("grpo") / "run"
    controlled(micro_run, micro, folder, ["alignment.method=grpo", "alignment.grpo.samples=2"])
    return Path(shutil.move(folder, folder.with_name("moved")))


def controlled(micro_run: Path, micro: Path, folder: Path, settings: list[str]) -> None:
    shutil.copytree(micro_run, folder, ignore=shutil.ignore_patterns("config.yaml", "adapter", "round-1", "evaluation"))
    run = Run(resolve("quickstart", micro, settings), folder)
    run.rounds()
    run.folder.release()
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert "round-0/score" in [event["stage"] for event in events if event["event"] == "skipped"]


def test_a_run_with_grpo_ends_with_texts_of_its_policy(grpo_run: Path) -> None:
    summary = read_json(grpo_run / "round-0" / "adapter" / "summary.json")
    assert summary["steps"] == len(steps_of(grpo_run / "round-0" / "adapter", "reward")) > 5
    samples = read_parquet(grpo_run / "round-1" / "samples")
    assert samples["text"].to_pylist() != read_parquet(grpo_run / "round-0" / "samples")["text"].to_pylist()


def test_the_reward_of_grpo_is_that_of_the_score_stage(grpo_run: Path, tmp_path: Path) -> None:
    reward = OnlineReward.read(grpo_run / "round-0" / "reward.json")
    scores = {(row["user_id"], row["sample"]): row["reward"] for row in read_parquet(grpo_run / "round-0" / "scores").to_pylist()}
    samples = [row for row in read_parquet(grpo_run / "round-0" / "samples").to_pylist() if (row["user_id"], row["sample"]) in scores]
    users, texts, finished = ([row[name] for row in samples] for name in ("user_id", "text", "finished"))
    np.testing.assert_allclose(reward(users, texts, finished), list(scores.values()), atol=1e-5)


@pytest.mark.slow
def test_two_processes_of_the_launcher_find_the_reward(grpo_run: Path) -> None:
    out = grpo_run / "round-0" / "by-launcher"
    done = launch(grpo_run / "round-0", "--num-processes", 2, "--zero", 2, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    one = grpo_run / "round-0" / "adapter"
    assert len(steps_of(out)) == len(steps_of(one))
    assert np.mean(steps_of(out, "reward")) == pytest.approx(np.mean(steps_of(one, "reward")), abs=0.1)
    assert read_json(out / "summary.json")["zero_stage"] == 2


def test_a_text_out_of_form_is_rewarded_below_all_others_of_its_user(grpo_run: Path) -> None:
    settings = grpo_run / "round-0" / "gated.json"
    values = read_json(grpo_run / "round-0" / "reward.json")
    write_json(values | {"format_gate": True, "names": {"liked_genre": ["Drama", "Comedy"]}}, settings)
    reward = OnlineReward.read(settings)
    user, other = [row["user_id"] for row in read_parquet(grpo_run / "folds.parquet").to_pylist() if row["fold"] >= 0][:2]
    texts = ["Enjoys Drama.", "Enjoys Comedy.", "Enjoys", "Enjoys Drama.", "nothing"]
    first, second, unfinished, alone, none = reward([user, user, user, other, other], texts, [True, True, False, True, True])
    assert unfinished == pytest.approx(min(first, second) - abs(first - second), abs=1e-6)
    assert none == pytest.approx(alone - 1)
    assert reward([user, user], ["nothing", "at all"], [True, True]) == [0.0, 0.0]


def test_a_run_with_rejection_sampling_imitates_the_best_texts(micro_run: Path, micro: Path, tmp_path: Path) -> None:
    controlled(micro_run, micro, tmp_path / "run", ["alignment.method=rejection_sampling", "alignment.epochs=2"])
    adapter = tmp_path / "run" / "round-0" / "adapter"
    best = {row["user_id"] for row in read_parquet(micro_run / "round-0" / "pairs" / "answers.parquet").to_pylist()}
    assert read_json(adapter / "summary.json")["answers"] == len(best)
    losses = steps_of(adapter)
    assert np.mean(losses[len(losses) // 2 :]) < np.mean(losses[: len(losses) // 2])  # the second epoch against the first
    assert (tmp_path / "run" / "round-1" / "samples").is_dir()
