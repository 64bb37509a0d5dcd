"""Packed = padded, a shared prompt = its copies; what a model cannot do exactly is padded, and said."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from test_alignment import SETTINGS, make_model, make_rows, steps_of
from torch.nn.attention.flex_attention import create_mask
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaForCausalLM, MistralConfig, Qwen3Config

from dpo4rec.alignment import scoring
from dpo4rec.alignment.align import align
from dpo4rec.alignment.attention import answer_masks, block_mask
from dpo4rec.alignment.batches import Collator
from dpo4rec.alignment.config import AlignmentConfig
from dpo4rec.alignment.pairs import Comparison, Preferences
from dpo4rec.alignment.scoring import Scorer
from dpo4rec.files import read_tensors, write_parquet

SMALL: dict[str, Any] = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and 45 pairs of which every three share a prompt."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("packing")
    make_model(folder / "model")
    rows = make_rows(45)
    rows["prompt_ids"] = [rows["prompt_ids"][row // 3] for row in range(45)]
    write_parquet(pa.table(rows), folder / "pairs.parquet")
    return folder


def run(folder: Path, out: Path, **changes: Any) -> Path:
    align(AlignmentConfig(**{**SETTINGS, "epochs": 2, **changes}), str(folder / "model"), folder / "pairs.parquet", None, 0, out)
    return out


def preferences() -> Preferences:
    """A prompt with four answers in three comparisons, and one with two."""
    draw = np.random.default_rng(0)
    prompts = [tuple(draw.integers(100, size=length).tolist()) for length in (20, 11)]
    answers = [(at, tuple(draw.integers(100, size=length).tolist())) for at, length in ((0, 5), (0, 9), (0, 1), (1, 4), (1, 6), (0, 7))]
    rows = [Comparison(0, (1, 2), 0, 1), Comparison(3, (4,), 0, 1), Comparison(1, (2,), 0, 1), Comparison(5, (0,), 0, 1)]
    return Preferences(prompts, answers, rows)


def both_ways(model: Any, vocabulary: int) -> tuple[Scorer, list[torch.Tensor], list[list[torch.Tensor]]]:
    """Log-probabilities and gradients of the same comparisons padded, then packed."""
    scorer, values, gradients = Scorer(model.train()), [], []
    for packed in (False, True):
        if packed:
            assert scorer.allow_packing(model, torch.device("cpu"), 40, 1e-5) is None
        found = scorer(model, Collator(preferences(), packed, multiple=16)([[0, 1, 2, 3]]))
        gradients.append(list(torch.autograd.grad(found.sin().sum(), list(model.parameters()))))
        values.append(found.detach())
    return scorer, values, gradients


@pytest.mark.parametrize("heads", [4, 2])
def test_log_probs_and_gradients_are_those_of_padded_rows(folder: Path, heads: int) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SMALL, num_key_value_heads=heads, head_dim=8, tie_word_embeddings=True))
    _, values, gradients = both_ways(model, 100)
    torch.testing.assert_close(values[0], values[1], atol=1e-5, rtol=0)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"weights": "full", "learning_rate": 1e-3}, {"gradient_checkpointing": True}], ids=str)
def test_training_is_that_of_padded_rows(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    packed, padded = run(folder, tmp_path / "a", **changes), run(folder, tmp_path / "b", packing="none", **changes)
    assert json.loads((packed / "summary.json").read_text())["packed"]
    assert not json.loads((padded / "summary.json").read_text())["packed"]
    np.testing.assert_allclose(steps_of(packed), steps_of(padded), atol=1e-5)
    for file in packed.glob("*.safetensors"):
        for name, tensor in read_tensors(file).items():
            torch.testing.assert_close(tensor, read_tensors(padded / file.name)[name], atol=1e-4, rtol=0)


def test_chunks_of_logits_do_not_matter(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(folder, tmp_path / "a", weights="full", learning_rate=1e-3)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 700)  # 7 tokens
    chunks = run(folder, tmp_path / "b", weights="full", learning_rate=1e-3)
    np.testing.assert_allclose(steps_of(chunks), steps_of(whole), atol=1e-5)


def test_the_masks_of_both_devices_are_one() -> None:
    spans = ((5, (3, 2)), (4, ()), (7, (1, 6, 2)))
    block = block_mask(spans, torch.device("cpu"))
    length = sum(prompt + sum(answers) for prompt, answers in spans)
    seen = create_mask(block.mask_mod, None, None, length, length, device="cpu")[0, 0]
    start = 0
    for prompt, answers in spans:
        end = start + prompt + sum(answers)
        answers_at = start + prompt
        assert torch.equal(seen[start:answers_at, start:answers_at], torch.ones(prompt, prompt).bool().tril())
        assert torch.equal(seen[answers_at:end, start:end], answer_masks(spans, torch.device("cpu"))[prompt, answers])
        assert not seen[start:end, :start].any()
        assert not seen[start:end, end:].any()
        start = end


def gemma() -> Any:
    return AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, pad_token_id=1, sliding_window=4096))


def gpt2() -> Any:
    return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def short_window() -> Any:
    return AutoModelForCausalLM.from_config(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=16))


def test_other_architectures_pack_where_it_is_exact() -> None:
    """GPT-2 has learned positions. Gemma-2 caps its logits, which packing does not know: it must not be packed unnoticed."""
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    model = gpt2().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert Scorer(model).allow_packing(model, cpu, 40, 1e-4) is None
    window = short_window()
    assert "window of 16 tokens" in str(Scorer(window).allow_packing(window, cpu, 40, 1e-4))
    capped = gemma()
    with torch.no_grad():
        capped.lm_head.weight.mul_(500)
    scorer = Scorer(capped)
    before = scorer(capped, Collator(preferences(), False)([[0, 1]]))
    assert "off by" in str(scorer.allow_packing(capped, cpu, 40, 1e-4))
    torch.testing.assert_close(scorer(capped, Collator(preferences(), False)([[0, 1]])), before)


def test_what_cannot_be_packed_is_padded_and_said_once(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    window = tmp_path / "model"
    make_model(window)  # its tokenizer
    short_window().save_pretrained(window)
    with caplog.at_level(logging.WARNING):
        align(AlignmentConfig(**SETTINGS), str(window), folder / "pairs.parquet", None, 0, tmp_path / "a")
    assert sum("Batches are padded" in record.message for record in caplog.records) == 1
    assert not json.loads((tmp_path / "a" / "summary.json").read_text())["packed"]


def test_a_model_can_still_speak(folder: Path) -> None:
    """What teaches a model to score packed rows leaves its plain forward pass as it was."""
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    ids = torch.arange(3, 20)[None]
    before = model(input_ids=ids).logits
    Scorer(model).allow_packing(model, torch.device("cpu"), 40, 1e-4)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(input_ids=ids).logits, before)
