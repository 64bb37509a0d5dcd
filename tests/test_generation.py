import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import LlamaConfig, LlamaForCausalLM

from dpo4rec.knowledge.config import Decoding
from dpo4rec.knowledge.generation import draw, generate

VOCABULARY = 13


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    return LlamaForCausalLM(config).eval()


def test_a_sample_depends_on_its_own_seed_and_prompt_alone(model: LlamaForCausalLM) -> None:
    prompts = [[3, 4, 5], [6, 7, 8, 9, 10, 11], [3]]
    seeds = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    together = generate(model, prompts, seeds, Decoding(max_new_tokens=8), {0}, 1)
    alone = [generate(model, [p], [s], Decoding(max_new_tokens=8), {0}, 1)[0] for p, s in zip(prompts, seeds, strict=True)]
    assert together == alone
    other = generate(model, prompts[:1], [[1, 99, 3]], Decoding(max_new_tokens=8), {0}, 1)[0]
    assert other[0] == together[0][0]
    assert other[2] == together[0][2]


def test_greedy_limit_equals_transformers_generate(model: LlamaForCausalLM) -> None:
    prompts = [[3, 4, 5], [6, 7, 8, 9, 10, 11]]
    ours = generate(model, prompts, [[0], [1]], Decoding(top_k=1, max_new_tokens=10), {0}, 1)
    for prompt, samples in zip(prompts, ours, strict=True):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=0, pad_token_id=1)
        assert samples[0].token_ids == theirs[0, len(prompt) :].tolist()


def test_end_tokens_finish_a_sample(model: LlamaForCausalLM) -> None:
    samples = list(
        itertools.chain(*generate(model, [[3, 4]] * 4, [[i * 8 + j for j in range(8)] for i in range(4)], Decoding(), {0, 2}, 1))
    )
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
