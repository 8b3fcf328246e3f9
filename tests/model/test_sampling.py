"""Sampling: the distribution of draws, filters, and rows that do not depend on one another."""

from __future__ import annotations

import itertools

import pytest
import torch

from vlmamba.model import GenerationConfig
from vlmamba.model.generation.sampling import SequenceSampling, choose_tokens, draw, token_probabilities

CPU = torch.device("cpu")


def test_draws_follow_the_probabilities():
    p = torch.tensor([0.0, 0.5, 0.3, 0.0, 0.15, 0.05, 0.0])
    n = 4000
    sequences = [SequenceSampling(GenerationConfig(temperature=1.0, seed=4), [], 7, CPU)]
    counts = torch.bincount(torch.cat([choose_tokens(p.log()[None], sequences, 7) for _ in range(n)]), minlength=7)
    sigma = (n * p * (1 - p)).sqrt()
    assert ((counts - n * p).abs() <= 4 * sigma).all()


def test_no_draw_is_a_token_without_probability():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]])
    for uniform in (0.0, 1 / 3 - 1e-12, 1 / 3 + 1e-12, 1 - 2**-53):
        want = [1 if uniform < 1 / 3 else 3, 0]
        assert draw(p, torch.tensor([uniform], dtype=torch.float64)).tolist() == want
    assert draw(torch.full((1, 3), torch.nan), torch.tensor([0.5])).tolist() == [2]  # in the vocabulary


def test_truncation_keeps_the_likeliest():
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()

    def kept(**settings):
        return token_probabilities(logits, [GenerationConfig(temperature=1.0, **settings)])[0].gt(0).tolist()

    assert kept(top_k=1) == kept(top_p=0.4) == [True, False, False, False]
    assert kept(top_p=0.6) == [True, True, False, False]
    assert kept(top_k=2) == [True, True, True, False]  # equal ones stay
    assert kept() == kept(top_k=4) == kept(top_p=1.0) == [True] * 4
    assert kept(top_k=2, top_p=0.5) == [True, False, False, False]


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e30])
def test_extreme_temperatures_have_probabilities(temperature):
    logits = torch.tensor([[-80.0, 90.0, 90.0, 3.0]])
    p = token_probabilities(logits, [GenerationConfig(temperature=temperature)])[0]
    assert p.tolist() == ([0, 0.5, 0.5, 0] if temperature < 1 else [0.25] * 4)


@pytest.mark.parametrize("vocab_size", [7, 303])
def test_a_choice_is_the_same_to_the_bit_whatever_rows_are_beside_it(vocab_size):
    """All settings mixed, with equal logits among them, and rows that leave."""
    generator = torch.Generator().manual_seed(0)
    configs = [
        GenerationConfig(seed=i, temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
        for i, (temperature, top_k, top_p, penalty) in enumerate(
            itertools.product((0.0, 0.7, 2.0), (0, 3, 40), (1.0, 0.6), (1.0, 1.4))
        )
    ]
    prompts = [[i % vocab_size, -200, 400] for i in range(len(configs))]
    together, alone = (
        [SequenceSampling(c, p, vocab_size, CPU) for c, p in zip(configs, prompts, strict=True)] for _ in range(2)
    )
    rows, chosen = list(range(len(configs))), [[] for _ in configs]
    for step in range(30):
        logits = (4 * torch.randn(len(configs), vocab_size + 9, generator=generator)).round(decimals=step % 3)
        got = choose_tokens(logits[rows], [together[i] for i in rows], vocab_size).tolist()
        for i, token in zip(rows, got, strict=True):
            assert choose_tokens(logits[i : i + 1], [alone[i]], vocab_size).tolist() == [token]
            chosen[i].append(token)
        rows = [i for i in rows if i != step]
    assert max(max(tokens) for tokens in chosen) < vocab_size
    assert len({tuple(tokens) for tokens in chosen[-5:]}) == 5
