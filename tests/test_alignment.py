"""DPO on a table of preference pairs: a tiny Llama in a folder, one process."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import load_dataset
from peft import get_peft_model_state_dict
from pydantic import ValidationError
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments
from trl import DPOConfig, DPOTrainer

from dpo4rec.alignment.align import align
from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.alignment.pairs import read_preferences
from dpo4rec.alignment.policy import load_policy
from dpo4rec.alignment.schedule import cut, schedule, training_steps
from dpo4rec.errors import InputError
from dpo4rec.files import stable_seed, write_parquet

LOG_2 = 0.693147
SETTINGS: dict[str, Any] = {"pairs_per_step": 8, "tokens_per_batch": 128, "learning_rate": 5e-3, "checkpoint_every_steps": 3}


def make_model(folder: Path) -> Path:
    words = ["<unk>", "<pad>", "</s>", *(f"w{i}" for i in range(97))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**shape, **special, max_position_embeddings=128, attention_dropout=0.1)).save_pretrained(folder)
    return folder


def make_rows(count: int) -> dict[str, list[Any]]:
    """Chosen texts are of low ids, rejected ones of high ids: something to learn."""
    draw = np.random.default_rng(1)
    ranges = {"prompt": (3, 100, 4, 12), "chosen": (3, 63, 2, 9), "rejected": (40, 100, 2, 9)}
    rows: dict[str, list[Any]] = {name: [] for name in (*ranges, *(f"{name}_ids" for name in ranges))}
    for _ in range(count):
        for name, (low, high, shortest, longest) in ranges.items():
            ids = draw.integers(low, high, draw.integers(shortest, longest)).tolist()
            text = " ".join(f"w{i - 3}" for i in ids)
            rows[name].append(text if name == "prompt" else f" {text}")
            rows[f"{name}_ids"].append(ids if name == "prompt" else [*ids, 2])
    return rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(make_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    write_parquet(pa.table(make_rows(45)), path)  # 45 is no multiple of 8: the last step is filled up
    return path


def steps_of(folder: Path, key: str = "loss") -> list[float]:
    return [json.loads(line)[key] for line in (folder / "training_log.jsonl").read_text().splitlines()]


def run(model: str, pairs: Path, out: Path, initial: Path | None = None, **changes: Any) -> Path:
    align(AlignmentConfig(**{**SETTINGS, **changes}), model, pairs, initial, 0, out)
    return out


@pytest.fixture(scope="module")
def plain(model: str, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of LoRA, alone and uninterrupted: what the others are compared with."""
    return run(model, pairs, tmp_path_factory.mktemp("plain") / "adapter", epochs=2)


def test_one_process_trains_on_one_device(model: str, pairs: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a process sees several GPUs the Trainer would cut each batch among them."""

    alone = TrainingArguments.__dict__["_setup_devices"].func

    def see_four(arguments: TrainingArguments) -> torch.device:
        device: torch.device = alone(arguments)
        arguments._n_gpu = 4
        return device

    seen = cached_property(see_four)
    seen.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", seen)
    out = run(model, pairs, tmp_path / "adapter", epochs=2)
    assert (out / "adapter_model.safetensors").read_bytes() == (plain / "adapter_model.safetensors").read_bytes()


TRL: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "robust": {"noise": "epsilon", "epsilon": 0.2},
    "ipo": {},
    "hinge": {},
}


@pytest.mark.parametrize("objective", TRL)
def test_losses_and_adapter_are_those_of_trl(model: str, tmp_path: Path, objective: str) -> None:
    """TRL loads the same file unchanged and sees the same rows in the same order: 21 steps, no loss and no weight differs."""
    write_parquet(pa.table(make_rows(56)), tmp_path / "pairs.parquet")
    settings = {**SETTINGS, "epochs": 3, "learning_rate": 1e-3, "objective": objective, **TRL[objective]}
    torch.manual_seed(stable_seed(0, "adapter"))
    policy = load_policy(AlignmentConfig(**settings), model, None, torch.device("cpu"))
    rows = load_dataset("parquet", data_files=str(tmp_path / "pairs.parquet"), split="train", cache_dir=str(tmp_path / "cache"))
    order = training_steps(read(tmp_path / "pairs.parquet", **settings)[0], AlignmentConfig(**settings), seed=0)
    rows = rows.select([row for step in order for bin_ in step for row in bin_]).select_columns(["prompt", "chosen", "rejected"])
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"), beta=0.1, per_device_train_batch_size=8, num_train_epochs=1, loss_type=objective,
        learning_rate=1e-3, warmup_steps=2, max_length=128, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=True, bf16=False, gradient_checkpointing=False, train_sampling_strategy="sequential", weight_decay=0.0,
        label_smoothing=settings.get("epsilon", 0.0),
    )  # fmt: skip
    trainer = DPOTrainer(model=policy, args=arguments, train_dataset=rows, processing_class=PreTrainedTokenizerFast.from_pretrained(model))
    trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "grad_norm" in line]
    ours = run(model, tmp_path / "pairs.parquet", tmp_path / "adapter", **settings)
    np.testing.assert_allclose(steps_of(ours), theirs, atol=1e-4)
    weights = load_file(ours / "adapter_model.safetensors")
    for name, tensor in get_peft_model_state_dict(policy).items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-4, rtol=0)


def test_the_example_of_the_docs_runs(model: str, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "alignment.md").read_text()
    shutil.copytree(model, tmp_path / "models" / "small")
    shutil.copy(pairs, tmp_path / "pairs.parquet")
    monkeypatch.chdir(tmp_path)
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], {})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_it_learns_from_log_2_and_says_what_it_wrote(plain: Path) -> None:
    assert steps_of(plain, "preference_loss")[0] == pytest.approx(LOG_2, abs=1e-5)
    assert steps_of(plain)[-1] < 0.67
    assert steps_of(plain, "accuracy")[-1] > 0.8
    summary = json.loads((plain / "summary.json").read_text())
    assert (summary["pairs"], summary["steps"], summary["dropped"]) == (45, 12, {})
    assert {path.name for path in plain.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "summary.json",
        "training_log.jsonl",
    }
    assert sorted(path.name for path in plain.parent.iterdir()) == [".reference", "adapter"]  # the checkpoints are gone


@pytest.mark.parametrize("tokens", [40, 4096])
def test_batch_and_accumulation_do_not_matter(model: str, pairs: Path, plain: Path, tmp_path: Path, tokens: int) -> None:
    out = run(model, pairs, tmp_path / "a", epochs=2, tokens_per_batch=tokens)
    np.testing.assert_allclose(steps_of(out), steps_of(plain), atol=1e-5)


def test_likelihood_term_is_added(model: str, pairs: Path, tmp_path: Path) -> None:
    out = run(model, pairs, tmp_path / "a", nll_weight=0.5)
    expected = np.array(steps_of(out, "preference_loss")) + 0.5 * np.array(steps_of(out, "nll"))
    np.testing.assert_allclose(steps_of(out), expected, rtol=1e-6)
    assert steps_of(out, "nll")[-1] < steps_of(out, "nll")[0]


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"gradient_checkpointing": True}], ids=str)
def test_variants_train_alike(model: str, pairs: Path, plain: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    out = run(model, pairs, tmp_path / "a", epochs=2, **changes)
    np.testing.assert_allclose(steps_of(out), steps_of(plain), atol=5e-3 if "precision" in changes else 1e-5)


def test_full_weights_are_a_model_folder(model: str, pairs: Path, tmp_path: Path) -> None:
    out = run(model, pairs, tmp_path / "a", weights="full")
    assert steps_of(out)[0] == pytest.approx(LOG_2, abs=1e-5)
    before, after = AutoModelForCausalLM.from_pretrained(model), AutoModelForCausalLM.from_pretrained(out)
    assert not torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)
    assert PreTrainedTokenizerFast.from_pretrained(out).eos_token == "</s>"


def test_4_bit_gradients_are_those_of_the_same_weights_unpacked(model: str, pairs: Path, tmp_path: Path) -> None:
    """In evaluation mode, bitsandbytes on CPU repacks its layers into a form through which no gradient passes, with only a warning."""
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    unpacked = AutoModelForCausalLM.from_pretrained(model, quantization_config=quantized, dtype=torch.float32, device_map={"": "cpu"})
    unpacked.dequantize().save_pretrained(tmp_path / "unpacked")
    four_bit = run(model, pairs, tmp_path / "a", quantization="nf4")
    same = run(str(tmp_path / "unpacked"), pairs, tmp_path / "b")
    np.testing.assert_allclose(steps_of(four_bit, "grad_norm"), steps_of(same, "grad_norm"), rtol=1e-2)
    np.testing.assert_allclose(steps_of(four_bit), steps_of(same), atol=1e-4)


def test_a_later_round_starts_at_its_own_reference(model: str, pairs: Path, plain: Path, tmp_path: Path) -> None:
    out = run(model, pairs, tmp_path / "a", plain)
    assert steps_of(out)[0] == pytest.approx(LOG_2, abs=1e-5)
    assert steps_of(out, "nll")[0] != pytest.approx(steps_of(plain, "nll")[0], abs=1e-3)  # it is not the base model
    before, after = load_file(plain / "adapter_model.safetensors"), load_file(out / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)


KILLED = """
import os, sys
from dpo4rec.alignment import trainer
from dpo4rec.alignment.__main__ import main
write_line = trainer.PreferenceTrainer.log
def log(self, logs, start_time=None):
    write_line(self, logs, start_time)
    if self.state.global_step == 8: os._exit(9)
trainer.PreferenceTrainer.log = log
sys.exit(main())
"""


class Touches:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


@contextmanager
def poisoned(checkpoints: Path, name: str) -> Iterator[None]:
    """For a while, files of this name unpickle to code, which must not run."""
    shutil.copytree(checkpoints, checkpoints.with_suffix(".clean"))
    evil = Touches(checkpoints / "ran")
    for path in checkpoints.rglob(name):
        torch.save({"evil": evil}, path)
    code, arguments = evil.__reduce__()
    code(*arguments)  # what loading without a check would do
    (checkpoints / "ran").unlink()
    yield
    assert not (checkpoints / "ran").exists()
    shutil.rmtree(checkpoints)
    checkpoints.with_suffix(".clean").rename(checkpoints)


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(model: str, pairs: Path, tmp_path: Path, weights: str) -> None:
    from dpo4rec.alignment.job import read_job, write_job

    config = AlignmentConfig(**{**SETTINGS, "epochs": 2, "weights": weights})
    write_job(tmp_path, config, model, pairs, None, seed=0, threads=1)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    assert not (tmp_path / "adapter").exists()
    (tmp_path / ".adapter.checkpoints" / "checkpoint-9").mkdir()  # one that was not finished
    with (tmp_path / ".adapter.checkpoints" / "training_log.jsonl").open("a") as log:
        log.write('{"step": 7, "lo')  # a full disk's doing
    with poisoned(tmp_path / ".adapter.checkpoints", "optimizer.pt"), pytest.raises(InputError, match=r"remove .*anew"):
        read_job(tmp_path).run(tmp_path / "adapter")
    read_job(tmp_path).run(tmp_path / "adapter")
    whole = run(model, pairs, tmp_path / "whole", epochs=2, weights=weights)
    assert (tmp_path / "adapter" / "training_log.jsonl").read_text() == (whole / "training_log.jsonl").read_text()
    name = "adapter_model.safetensors" if weights == "lora" else "model.safetensors"
    assert (tmp_path / "adapter" / name).read_bytes() == (whole / name).read_bytes()


def test_what_another_job_left_is_not_resumed(model: str, pairs: Path, plain: Path, tmp_path: Path) -> None:
    left = tmp_path / ".adapter.checkpoints"
    (left / "checkpoint-3").mkdir(parents=True)
    (left / "checkpoint-3" / "complete").touch()
    (left / "job.json").write_text("{}")
    out = run(model, pairs, tmp_path / "adapter", epochs=2)
    assert (out / "adapter_model.safetensors").read_bytes() == (plain / "adapter_model.safetensors").read_bytes()


def read(path: Path, tokenizer: PreTrainedTokenizerFast | None = None, max_tokens: int = 128, **settings: Any) -> Any:
    return read_preferences(path, tokenizer, 100, max_tokens, AlignmentConfig(**settings))


def test_a_file_without_ids_is_tokenized(model: str, pairs: Path, tmp_path: Path) -> None:
    rows = make_rows(45)
    write_parquet(pa.table({name: rows[name] for name in ("prompt", "chosen", "rejected")}), tmp_path / "texts.parquet")
    assert read(tmp_path / "texts.parquet", PreTrainedTokenizerFast.from_pretrained(model)) == read(pairs)


def test_unusable_pairs_are_counted_by_reason(tmp_path: Path) -> None:
    ids = {
        "prompt_ids": [[5], [5], [5], [], [5]],
        "chosen_ids": [[6, 2], [6, 2], [], [6], [6] * 9],
        "rejected_ids": [[7, 2], [6, 2], [7], [7], [7]],
    }
    write_parquet(pa.table(ids), tmp_path / "pairs.parquet")
    kept, dropped = read(tmp_path / "pairs.parquet", max_tokens=8)
    assert len(kept.comparisons) == 1
    assert dropped == {"empty": 2, "identical": 1, "too_long": 1}


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"prompt_ids": [[5]], "chosen_ids": [[6]], "rejected_ids": [[6]]}, "no pair is left"),
        ({"prompt_ids": [[5]], "chosen_ids": [[6]], "rejected_ids": [[100]]}, "row 0"),
        ({"prompt_ids": [[5]], "chosen_ids": [[6]], "rejected_ids": [None]}, "null"),
        ({"prompt_ids": [[5]], "chosen_ids": [[6]]}, "rejected_ids is missing"),
        ({"prompt_ids": ["a"], "chosen_ids": [[6]], "rejected_ids": [[7]]}, "column prompt_ids"),
        ({"prompt": ["a"]}, "chosen, rejected"),
        ({"prompt": ["w1"], "chosen": [None], "rejected": ["w2"]}, "row 0"),
    ],
)
def test_bad_pairs_are_refused_with_their_place(model: str, tmp_path: Path, columns: dict[str, Any], says: str) -> None:
    write_parquet(pa.table(columns), tmp_path / "pairs.parquet")
    with pytest.raises(InputError, match=says):
        run(model, tmp_path / "pairs.parquet", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_damaged_and_missing_files_are_named(model: str, pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.parquet").write_bytes(pairs.read_bytes()[:100])
    for path, says in ((tmp_path / "damaged.parquet", "damaged"), (tmp_path / "none.parquet", "no such file")):
        with pytest.raises(InputError, match=says):
            run(model, path, tmp_path / "a")
    with pytest.raises(InputError, match="model"):
        run(str(tmp_path / "nothing"), pairs, tmp_path / "a")


def test_an_adapter_of_another_rank_is_refused(model: str, pairs: Path, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rank"):
        run(model, pairs, tmp_path / "a", plain, lora_rank=4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pairs_per_step": 2, "workers": 3}, "workers"),
        ({"weights": "full", "quantization": "nf4"}, "4-bit"),
        ({"weights": "full", "lora_rank": 4}, "lora_rank"),
        ({"offload": True, "zero_stage": 1}, "offload"),
        ({"lora_targets": ()}, "lora_targets"),
        ({"bata": 0.1}, "bata"),
    ],
)
def test_combinations_that_cannot_work_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        AlignmentConfig(**{**SETTINGS, **changes})


def test_processes_must_be_those_configured(model: str, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="workers"):
        run(model, pairs, tmp_path / "a", workers=2)
    with pytest.raises(InputError, match=r"launchers/align\.sh"):
        run(model, pairs, tmp_path / "a", zero_stage=2)


@pytest.mark.parametrize("epochs", [1, 3])
def test_every_pair_is_seen_in_every_epoch(epochs: int) -> None:
    order = schedule(range(45), 8, epochs, seed=3)
    assert order.shape == (epochs, 48)
    assert all(set(row) == set(range(45)) for row in order.tolist())
    assert np.array_equal(order, schedule(range(45), 8, epochs, seed=3))
    assert not np.array_equal(order, schedule(range(45), 8, epochs, seed=4))


def test_a_step_is_cut_into_equal_bins_that_keep_prompts_together() -> None:
    prompts = [row // 3 for row in range(48)]
    steps = schedule(prompts, 12, 1, seed=0).reshape(-1, 12)
    dealt = cut(steps, prompts, lambda rows: 10 * len({prompts[row] for row in rows}) + len(rows), budget=30, workers=2)
    assert all(sorted(row for bin_ in bins for row in bin_) == sorted(step) for bins, step in zip(dealt, steps.tolist(), strict=True))
    assert {len(bins) for bins in dealt} == {2}
    assert all(len({prompts[row] for row in bin_}) == 2 for bins in dealt for bin_ in bins)
    assert {len(bins) for bins in cut(steps, prompts, lambda rows: 100 * len(rows), budget=1, workers=5)} == {10}  # of 12: over the budget
