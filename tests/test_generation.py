import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen2Config, Qwen3Config

from dpo4rec.knowledge.config import Decoding
from dpo4rec.knowledge.drawing import draw
from dpo4rec.knowledge.generation import BuiltinEngine, Sample

VOCABULARY = 13


def small_model(kind: type[Any], **more: Any) -> Any:
    """A model of a small shape whose probabilities are far from uniform."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return AutoModelForCausalLM.from_config(kind(vocab_size=VOCABULARY, initializer_range=0.5, **shape, **more)).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return small_model(LlamaConfig)


def generate(
    model: Any, prompts: list[list[int]], seeds: list[list[int]], decoding: Decoding, ends: set[int], rows: int = 8, shared: bool = True
) -> list[list[Sample]]:
    """By an engine of its own: it replaces its model's attention, and warns where it cannot."""
    engine = BuiltinEngine(copy.deepcopy(model), ends, 1, rows)
    assert ("not shared" in engine.warning) != shared
    return engine.generate(prompts, seeds, decoding)


def test_a_sample_depends_on_its_own_seed_and_prompt_alone(model: LlamaForCausalLM) -> None:
    prompts = [[3, 4, 5], [6, 7, 8, 9, 10, 11], [3]]
    seeds = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    together = generate(model, prompts, seeds, Decoding(max_new_tokens=8), {0})
    alone = [generate(model, [p], [s], Decoding(max_new_tokens=8), {0})[0] for p, s in zip(prompts, seeds, strict=True)]
    assert together == alone
    other = generate(model, prompts[:1], [[1, 99, 3]], Decoding(max_new_tokens=8), {0})[0]
    assert other[0] == together[0][0]
    assert other[2] == together[0][2]


@pytest.mark.parametrize(
    ("config", "more", "shared"),
    [
        (LlamaConfig, {}, True),
        (Qwen2Config, {}, True),
        (Qwen3Config, {"head_dim": 8}, True),
        (MistralConfig, {"sliding_window": None}, True),
        (MistralConfig, {"sliding_window": 4}, False),  # sees the last four tokens alone
        (GPT2Config, {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}, True),
    ],
)
def test_the_most_probable_tokens_are_those_of_transformers(config: type[Any], more: dict[str, Any], shared: bool) -> None:
    model = small_model(config, **more)
    prompts = [[3, 4, 5, 5, 2, 4, 3], [6, 7, 8, 9, 10, 11]]
    ours = generate(model, prompts, [[0, 1], [1, 2]], Decoding(top_k=1, max_new_tokens=10), {0}, shared=shared)
    for prompt, samples in zip(prompts, ours, strict=True):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=0, pad_token_id=1)
        assert [sample.token_ids for sample in samples] == [theirs[0, len(prompt) :].tolist()] * 2


def test_how_many_rows_run_at_once_changes_no_text(model: LlamaForCausalLM) -> None:
    prompts = [[2 + (user * 7 + at) % 11 for at in range(1 + user % 6)] for user in range(12)]
    seeds = [[user, 100 + user] for user in range(12)]
    one_by_one = generate(model, prompts, seeds, Decoding(max_new_tokens=12), {0, 5}, rows=1)
    assert generate(model, prompts, seeds, Decoding(max_new_tokens=12), {0, 5}, rows=9) == one_by_one
    assert generate(model, prompts, seeds, Decoding(max_new_tokens=12), {0, 5}, rows=100) == one_by_one
    assert len({len(sample.token_ids) for user in one_by_one for sample in user}) > 3  # some end early, and others take their place


@pytest.mark.parametrize(
    "decoding", [Decoding(max_new_tokens=2), Decoding(max_new_tokens=2, top_p=0.8), Decoding(max_new_tokens=2, top_k=3)]
)
def test_texts_are_as_frequent_as_those_of_transformers(model: LlamaForCausalLM, decoding: Decoding) -> None:
    draws, prompt = 20_000, [3, 4, 5]
    ours = generate(model, [prompt], [list(range(draws))], decoding, set(), rows=draws)[0]
    torch.manual_seed(0)
    theirs = model.generate(
        torch.tensor([prompt]),
        do_sample=True,
        num_return_sequences=draws,
        min_new_tokens=2,
        max_new_tokens=2,
        eos_token_id=VOCABULARY,
        pad_token_id=1,
        top_p=decoding.top_p,
        top_k=decoding.top_k,
    )[:, len(prompt) :]
    texts = torch.tensor([sample.token_ids for sample in ours])
    counts = np.stack([np.bincount(ids[:, 0] * VOCABULARY + ids[:, 1], minlength=VOCABULARY**2) for ids in (texts, theirs)])
    usual = counts.sum(0) >= 20
    rare = counts[:, ~usual].sum(1, keepdims=True)
    table = np.concatenate([counts[:, usual], rare if rare.sum() else rare[:, :0]], 1)
    assert table.shape[1] > 5
    assert chi2_contingency(table).pvalue > 0.001


def test_end_tokens_finish_a_sample(model: LlamaForCausalLM) -> None:
    samples = list(itertools.chain(*generate(model, [[3, 4]] * 4, [[i * 8 + j for j in range(8)] for i in range(4)], Decoding(), {0, 2})))
    assert any(sample.finished for sample in samples)
    for sample in samples:
        assert sample.finished == (sample.token_ids[-1] in {0, 2})
        assert not {0, 2} & set(sample.token_ids[:-1])


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(temperature=0.5), Decoding(top_k=4), Decoding(top_p=0.7)])
def test_tokens_are_drawn_from_the_distribution(decoding: Decoding) -> None:
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1))
    draws = 20_000
    uniforms = torch.from_numpy(np.random.default_rng(0).random(draws))
    counts = torch.bincount(draw(logits.expand(draws, -1), uniforms, decoding), minlength=VOCABULARY).double()
    expected = (logits[0].double() / decoding.temperature).softmax(-1)
    order = expected.argsort(descending=True)
    if decoding.top_k:
        expected[order[decoding.top_k :]] = 0
    if decoding.top_p < 1:
        before = expected[order].cumsum(0) - expected[order]
        expected[order[before >= decoding.top_p]] = 0
    expected /= expected.sum()
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert chisquare(counts[kept].numpy(), (expected[kept] * draws).numpy()).pvalue > 0.001
