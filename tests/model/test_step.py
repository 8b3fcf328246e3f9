"""Decoding steps of a language model on slots of a pool of states: sequences join and leave, and tokens are undone."""

from __future__ import annotations

import pytest
import torch

from ssm_kernels import StateSlots, states
from tests.makers import language_config, random_prompts, sharpened_lm

pytestmark = pytest.mark.usefixtures("default_backend")


@pytest.fixture(params=["mamba", "mamba2"])
def lm(request):
    return sharpened_lm(language_config(request.param))


@torch.no_grad()
def test_sequences_join_and_leave_a_batch_without_a_copy(lm):
    prompts = [torch.tensor(p) for p in random_prompts([5, 6, 7])]
    alone = [lm(p[None]).logits[0] for p in prompts]  # (L, V) each
    pool = lm.new_state(4)

    def step(position: dict[int, int]) -> None:
        """Run the token at a position of each sequence; sequence s has slot 3 - s."""
        ids = torch.tensor([prompts[s][at] for s, at in position.items()] + [0])  # the last row is padding
        slots = StateSlots(torch.tensor([3 - s for s in position] + [-1]))
        logits = lm(ids[:, None], state=pool, slots=slots).logits[:, 0]
        for row, (s, at) in enumerate(position.items()):
            torch.testing.assert_close(logits[row], alone[s][at], rtol=1e-3, atol=1e-3)

    for s, length in ((0, 2), (1, 3)):  # prompts of two sequences
        lm(prompts[s][None, :length], state=states.select(pool, slice(3 - s, 4 - s)))
    step({0: 2, 1: 3})
    lm(prompts[2][None, :4], state=states.select(pool, slice(1, 2)))
    step({2: 4, 0: 3, 1: 4})  # a third joins
    step({2: 5, 1: 5})  # the first leaves


@torch.no_grad()
def test_rejected_tokens_are_undone(lm):
    (prompt,) = random_prompts([9])
    want = lm(torch.tensor([prompt])).logits[0]
    pool, after_each = lm.new_state(4), torch.tensor([[1, 2, 3]])
    draft = torch.tensor([[prompt[0], prompt[1], 299]])  # the third is wrong
    logits = lm(draft, state=pool, slots=StateSlots(torch.tensor([0]), after_each)).logits[0]
    torch.testing.assert_close(logits[:2], want[:2], rtol=1e-3, atol=1e-3)
    slots = StateSlots(after_each, num_accepted_tokens=torch.tensor([2]))
    logits = lm(torch.tensor([prompt[2:5]]), state=pool, slots=slots).logits[0]
    torch.testing.assert_close(logits, want[2:5], rtol=1e-3, atol=1e-3)
    # Packed: all that remains, in one row.
    slots = StateSlots(torch.tensor([3]), cu_seqlens=torch.tensor([0, 4]))
    logits = lm(torch.tensor([prompt[5:9]]), state=pool, slots=slots).logits[0]
    torch.testing.assert_close(logits, want[5:9], rtol=1e-3, atol=1e-3)


def test_slots_are_for_inference_on_a_pool(lm):
    ids, slots = torch.tensor([[1], [2]]), StateSlots(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="slots are for decoding, without gradients"):
        lm(ids, state=lm.new_state(2), slots=slots)
    with torch.no_grad():
        with pytest.raises(ValueError, match="slots need a pool as the state, .* got no state"):
            lm(ids, slots=slots)
        with pytest.raises(ValueError, match="return_state must be False with slots"):
            lm(ids, state=lm.new_state(2), slots=slots, return_state=True)
        with pytest.raises(ValueError, match="slots must be below 1, the number of slots of the state; got 1"):
            lm(ids, state=lm.new_state(1), slots=slots)
