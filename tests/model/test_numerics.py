"""The promises that docs/numerics.md makes of the language models; its table names the test of each."""

from __future__ import annotations

import pytest
import torch

from ssm_kernels.modules import MixerState
from tests.makers import random_prompts
from vlmamba.model import GenerationConfig, LMConfig, MambaLM
from vlmamba.model.generation.generate import generate_tokens
from vlmamba.model.generation.prefill import packed_tokens, prefill

LENGTHS = (64, 5, 23, 130, 4, 31, 100, 17)
PROMPTS = random_prompts(LENGTHS)
BOUND = {torch.float32: 1e-5, torch.bfloat16: 0.02}
"""Share of the largest logit that a language model's logits may differ by, as docs/numerics.md says."""


@pytest.fixture(params=["mamba", "mamba2"])
def lm(request):
    torch.manual_seed(0)
    sizes = {"headdim": 16} if request.param == "mamba2" else {}
    return MambaLM(LMConfig(64, 3, 300, request.param, d_state=16, **sizes)).eval()


def run(lm, prompts, size=10_000):
    """Logits after each prompt, and the states."""
    state = lm.new_state(len(prompts))
    with torch.no_grad():
        return prefill(lm, *packed_tokens(lm, prompts), state, size), state


def assert_states_same(state, rows, want):
    for layer, expected in zip(state, want, strict=True):
        for part, other in zip(layer, expected, strict=True):
            assert part[rows].equal(other)


@pytest.mark.parametrize("dtype", BOUND)
def test_a_prompt_is_the_same_alone_and_among_others(lm, dtype):
    """Prompts of at least 16 tokens: states to the bit, logits to the bound, in any order of the pack."""
    lm = lm.to(dtype)
    logits, state = run(lm, PROMPTS)
    order = [3, 0, 6, 2, 7, 1, 5, 4]
    shuffled, shuffled_state = run(lm, [PROMPTS[i] for i in order])
    for i, prompt in enumerate(PROMPTS):
        alone, alone_state = run(lm, [prompt])
        assert (alone[0] - logits[i]).abs().max() <= BOUND[dtype] * logits[i].abs().max()
        assert shuffled[order.index(i)].equal(logits[i])
        if dtype == torch.float32 and len(prompt) >= 16:
            assert_states_same(state, slice(i, i + 1), alone_state)
            assert_states_same(shuffled_state, slice(order.index(i), order.index(i) + 1), alone_state)


@pytest.mark.parametrize("size", [64, 192])
def test_prefill_in_chunks_is_prefill_at_once(lm, size):
    """Cut at multiples of 64 of one prompt: states to the bit, logits to the bound."""
    prompt = [PROMPTS[3] * 3 + PROMPTS[0][:30]]
    whole, state = run(lm, prompt)
    cut, cut_state = run(lm, prompt, size)
    assert_states_same(cut_state, slice(None), state)
    assert (cut - whole).abs().max() <= BOUND[torch.float32] * whole.abs().max()


def test_16_sequences_decode_as_among_32(lm):
    """Batches of at least 16 give the same to the bit, one alone the same to the bound."""
    _, state = run(lm, PROMPTS * 4)
    tokens = torch.arange(1, 33).unsqueeze(1)

    def step(rows):
        mine = [MixerState(*(part[rows].clone() for part in layer)) for layer in state]
        with torch.no_grad():
            return lm(tokens[rows], state=mine).logits

    every = step(slice(0, 32))
    for rows in (slice(0, 16), slice(16, 32), slice(3, 20)):
        assert step(rows).equal(every[rows])
    for i in range(32):
        assert (step(slice(i, i + 1)) - every[i]).abs().max() <= BOUND[torch.float32] * every.abs().max()


def test_generated_tokens_are_the_same_alone_and_among_others(lm):
    """Greedy tokens, where no two logits are closer than the bound."""

    def tokens(prompts):
        packed = packed_tokens(lm, prompts)
        config = GenerationConfig(max_new_tokens=12)
        return torch.tensor([row for row, _ in generate_tokens(lm, *packed, prompts, config, 300)]).T

    together = tokens(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        assert tokens([prompt])[0].equal(together[i])


def test_two_runs_of_a_training_step_are_equal(lm):
    lm.train()
    ids = torch.tensor([PROMPTS[3]])

    def gradients():
        lm.zero_grad()
        lm(ids).logits.square().mean().backward()
        return [p.grad.clone() for p in lm.parameters()]

    assert all(a.equal(b) for a, b in zip(gradients(), gradients(), strict=True))
