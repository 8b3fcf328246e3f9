"""Decoding steps on slots of a pool of states, against single steps of each sequence alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor

from ssm_kernels import (
    Mamba3States,
    StateSlots,
    causal_conv1d_step,
    mamba3_step,
    selective_scan_step,
    ssd_step,
)
from ssm_kernels.testing import is_interpreted

pytestmark = pytest.mark.triton
N_SLOTS = 9


@pytest.fixture(scope="module", params=["triton"] if is_interpreted() else ["torch", "numba", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "numba":
        pytest.importorskip("numba")
    return request.param


class Step(NamedTuple):
    """A step op with the tensors of M tokens and those of the layer."""

    op: Callable[..., Tensor]
    state: Tensor
    tokens: dict[str, Tensor]
    layer: dict

    def run(self, state: Tensor, tokens: dict[str, Tensor], **options) -> Tensor:
        return self.op(state, **tokens, **self.layer, **options)


def make_step(name: str, n_tokens: int, dtype: torch.dtype = torch.float32) -> Step:
    generator = torch.Generator().manual_seed(n_tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    wide = torch.promote_types(dtype, torch.float32)
    m, dim, heads, headdim, n = n_tokens, 70, 2, 5, 13
    if name == "causal_conv1d":
        layer = {"weight": draw(dim, 4), "bias": draw(dim), "activation": "silu"}
        return Step(causal_conv1d_step, draw(N_SLOTS, 3, dim), {"x": draw(m, dim)}, layer)
    if name == "selective_scan":
        tokens = {"u": draw(m, dim), "dt": draw(m, dim), "B": draw(m, 2, n), "z": draw(m, dim)}
        layer = {"A": -draw(dim, n).exp(), "C": draw(dim, n), "D": draw(dim), "dt_bias": draw(dim), "dt_softplus": True}
        return Step(selective_scan_step, draw(N_SLOTS, dim, n).to(wide), tokens, layer)
    if name == "mamba3":
        tokens = {"x": draw(m, heads, headdim), "dt": draw(m, heads).abs(), "A": -draw(m, heads).abs()}
        tokens |= {"B": draw(m, 1, n), "C": draw(m, 1, n), "trap": draw(m, heads), "angles": draw(m, 4)}
        tokens["z"] = draw(m, heads, headdim)
        layer = {"B_bias": draw(heads, n), "C_bias": draw(heads, n), "D": draw(heads)}
        return Step(mamba3_on_rows, draw(N_SLOTS, sum(map(math.prod, MAMBA3_SIZES))).abs().to(wide), tokens, layer)
    tokens = {"x": draw(m, heads, headdim), "dt": draw(m, heads), "B": draw(m, 1, n), "C": draw(m, 1, n)}
    tokens["z"] = draw(m, heads, headdim)
    layer = {"A": -draw(heads).exp(), "D": draw(heads), "dt_bias": draw(heads), "dt_softplus": True}
    return Step(ssd_step, draw(N_SLOTS, heads, headdim, n).to(wide), tokens, layer)


MAMBA3_SIZES = ((2, 4), (2, 5, 13), (1, 2, 13), (2, 5))


def mamba3_on_rows(state: Tensor, **arguments) -> Tensor:
    """Run `mamba3_step` on states whose parts are one row of numbers each: views of a pool with its strides."""
    parts = state.split([math.prod(size) for size in MAMBA3_SIZES], dim=1)
    states = Mamba3States(*(part.unflatten(1, size) for part, size in zip(parts, MAMBA3_SIZES, strict=True)))
    return mamba3_step(states, **arguments)


class Alone(NamedTuple):
    """One sequence of a step: the slot it starts from, its tokens, and the slots after each."""

    source: int
    tokens: Sequence[int]
    destinations: Sequence[int]


def step_alone(step: Step, sequences: Sequence[Alone]) -> tuple[Tensor, Tensor]:
    """Return the outputs (M, ...) and the pool that single steps of the reference leave."""
    pool, y = step.state.clone(), torch.zeros_like(next(iter(step.tokens.values())))
    for source, tokens, destinations in sequences:
        state = step.state[source, None].clone()
        for token, destination in zip(tokens, destinations, strict=True):
            inputs = {name: x[token, None] for name, x in step.tokens.items()}
            y[token] = step.run(state, inputs, backend="reference")[0]
            if destination >= 0:
                pool[destination] = state[0]
    return y, pool


def in_batch(step: Step, *shape: int) -> dict[str, Tensor]:
    return {name: x.unflatten(0, shape) for name, x in step.tokens.items()}


def assert_equal_steps(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    (y, pool), (want_y, want_pool) = actual, expected
    # Mamba-3 adds up the angles of several tokens in another order.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if y.dtype == torch.float32 else {}
    torch.testing.assert_close(y.flatten(0, y.dim() - want_y.dim()), want_y, **tolerance)
    torch.testing.assert_close(pool, want_pool)


OPS = pytest.mark.parametrize("name", ["causal_conv1d", "selective_scan", "ssd", "mamba3"])


@OPS
def test_a_step_reads_and_writes_its_slots(backend, name):
    step = make_step(name, 4)
    step.tokens[next(iter(step.tokens))][2] = torch.nan  # padding may hold anything
    indices, out = torch.tensor([7, 0, -1, 0], dtype=torch.int32), torch.tensor([7, 3, 1, -1], dtype=torch.int32)
    pool = step.state.clone()
    y = step.run(pool, step.tokens, slots=StateSlots(indices, out), backend=backend)
    alone = [Alone(7, [0], [7]), Alone(0, [1], [3]), Alone(0, [3], [-1])]
    assert_equal_steps((y, pool), step_alone(step, alone))
    if backend != "reference":  # to the bit as without slots
        rows, state = [0, 1, 3], step.state[[7, 0, 0]]
        assert torch.equal(step.run(state, {k: x[rows] for k, x in step.tokens.items()}, backend=backend), y[rows])
        assert torch.equal(state[:2], pool[[7, 3]])


@OPS
def test_several_tokens_keep_the_state_after_each(backend, name):
    step = make_step(name, 6)
    out = torch.tensor([[5, 2, 8], [-1, 0, 4]])
    pool = step.state.clone()
    slots = StateSlots(torch.tensor([2, 1]), out)
    y = step.run(pool, in_batch(step, 2, 3), slots=slots, backend=backend)
    alone = [Alone(2, range(3), [5, 2, 8]), Alone(1, range(3, 6), [-1, 0, 4])]
    assert_equal_steps((y, pool), step_alone(step, alone))

    # The next step starts from the state after the accepted tokens, and writes over the same slots.
    before = step._replace(state=pool.clone())
    slots = StateSlots(out, num_accepted_tokens=torch.tensor([1, 2]))
    y = step.run(pool, in_batch(step, 2, 3), slots=slots, backend=backend)
    alone = [Alone(5, range(3), [5, 2, 8]), Alone(0, range(3, 6), [-1, 0, 4])]
    assert_equal_steps((y, pool), step_alone(before, alone))


@OPS
def test_sequences_of_unequal_length_are_packed(backend, name):
    step = make_step(name, 8)
    bounds = torch.tensor([0, 3, 3, 4, 6], dtype=torch.int32)  # the second has no token, two tokens are padding
    for x in step.tokens.values():
        x[6:] = torch.nan
    indices = torch.tensor([6, 1, 2, -1])
    pool = step.state.clone()
    slots = StateSlots(indices, cu_seqlens=bounds)
    y = step.run(pool, in_batch(step, 1, 8), slots=slots, backend=backend)
    alone = [Alone(6, range(3), [-1, -1, 6]), Alone(2, [3], [2])]
    assert_equal_steps((y, pool), step_alone(step, alone))


@OPS
def test_without_slots_each_row_advances_by_its_tokens(backend, name):
    step = make_step(name, 6)
    state = step.state[:2].clone()
    y = step.run(state, in_batch(step, 2, 3), backend=backend)
    alone = [Alone(0, range(3), [-1, -1, 0]), Alone(1, range(3, 6), [-1, -1, 1])]
    want, pool = step_alone(step, alone)
    assert_equal_steps((y, state), (want, pool[:2]))


def test_a_pool_may_have_any_strides_and_half_precision_inputs(backend):
    step = make_step("ssd", 2, torch.bfloat16)
    wide = torch.empty(13, 5, 2, 2 * N_SLOTS).permute(3, 2, 1, 0)
    pool = wide[::2]
    pool.copy_(step.state)
    y = step.run(pool, step.tokens, slots=StateSlots(torch.tensor([8, 3])), backend=backend)
    assert_equal_steps((y, pool), step_alone(step, [Alone(8, [0], [8]), Alone(3, [1], [3])]))


def indices(*values: int) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: StateSlots(cast(Any, [0, 1])),
            TypeError,
            "state_indices must be a tensor of int32 or int64",
        ),
        (lambda: StateSlots(torch.zeros(2)), TypeError, "state_indices must be int32 or int64, got float32"),
        (lambda: StateSlots(indices(0, 1)[None]), ValueError, r"state_indices must have shape \(1,\), got \(1, 2\)"),
        (lambda: StateSlots(indices(0, 9)), ValueError, "slots must be below 9, .* got 9"),
        (lambda: StateSlots(indices(0)), ValueError, "state_indices must have an index for each of 2 sequences, got 1"),
        (lambda: StateSlots(indices(4, 4)), ValueError, "out_state_indices must not name a slot twice, got slot 4"),
        (lambda: StateSlots(indices(4, 5), indices(5, 6)), ValueError, "sequence 0 writes slot 5, .* sequence 1"),
        (lambda: StateSlots(indices(4, 5), indices(5)), ValueError, r"out_state_indices must have shape \(2,\)"),
        (
            lambda: StateSlots(indices(4, 5)[None], num_accepted_tokens=indices(3)),
            ValueError,
            r"num_accepted_tokens must be in \[1, 2\], got values from 3 to 3",
        ),
        (
            lambda: StateSlots(indices(4, 5), cu_seqlens=indices(0, 1, 2)),
            ValueError,
            "cu_seqlens needs a batch of one packed row, got batch 2",
        ),
    ],
)
def test_slots_that_cannot_be_are_refused(make, error, message):
    step = make_step("causal_conv1d", 2)
    with pytest.raises(error, match=message):
        step.run(step.state, step.tokens, slots=make())


def test_a_column_of_slots_for_each_token_is_needed():
    step = make_step("causal_conv1d", 6)
    with pytest.raises(ValueError, match="a column for each of 3 tokens of a sequence, got 2"):
        step.run(step.state, in_batch(step, 2, 3), slots=StateSlots(indices(0, 1), indices(2, 3, 4, 5).view(2, 2)))
