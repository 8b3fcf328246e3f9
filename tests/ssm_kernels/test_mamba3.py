"""Mamba-3: the fast path on every backend compared with the step-by-step reference."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ssm_kernels import Mamba3States, mamba3, mamba3_step, ssd
from ssm_kernels._core.sharding import use_sharding
from ssm_kernels.testing import assert_agrees, is_interpreted

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def backend(compiled_or_not):
    return compiled_or_not


PER_STEP = ("x", "dt", "A", "B", "C", "trap", "angles", "z")
"""Arguments with a length."""
RANKS = [pytest.param(None, id="siso"), pytest.param(3, id="mimo")]
NONE, PACKED, WITH_IDX = {}, {"cu_seqlens": torch.tensor([0, 0, 5, 6, 26, 26])}, {"seq_idx": torch.full((2, 9), -1)}
WITH_IDX["seq_idx"][0, 2:8] = torch.tensor([0, 0, 0, 3, 3, 4])  # the other row is padding alone


class FlatOutput(NamedTuple):
    """Result of `mamba3` with its states apart, and angles by their cosine and sine, which do not jump."""

    y: Tensor
    cos: Tensor
    sin: Tensor
    ssm: Tensor
    B: Tensor
    x: Tensor


def flat_mamba3(*, state_angles=None, state_ssm=None, state_B=None, state_x=None, **arguments) -> FlatOutput:
    states = None if state_angles is None else Mamba3States(state_angles, state_ssm, state_B, state_x)
    y, (angles, *others) = mamba3(initial_states=states, **arguments)
    return FlatOutput(y, angles.cos(), angles.sin(), *others)


def make_inputs(
    batch=2, length=7, heads=4, headdim=3, d_state=6, groups=2, pairs=2, rank=None, rows=None, dtype=torch.float64
):
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    ranks = () if rank is None else (rank,)
    rows = batch if rows is None else rows
    inputs = {
        "x": draw(batch, length, heads, headdim), "z": draw(batch, length, heads, headdim),
        "dt": draw(batch, length, heads).abs(), "A": -draw(batch, length, heads).abs(),
        "B": draw(batch, length, *ranks, groups, d_state), "C": draw(batch, length, *ranks, groups, d_state),
        "trap": draw(batch, length, heads), "angles": draw(batch, length, pairs), "D": draw(heads),
        "B_bias": draw(heads, *ranks, d_state), "C_bias": draw(heads, *ranks, d_state),
        "state_angles": draw(rows, heads, pairs), "state_ssm": draw(rows, heads, headdim, d_state),
        "state_B": draw(rows, rank or 1, heads, d_state), "state_x": draw(rows, heads, headdim),
    }  # fmt: skip
    if rank:
        inputs |= {name: draw(heads, rank, headdim) for name in ("mimo_x", "mimo_z", "mimo_o")}
    return inputs


def split_states(inputs):
    """Take the initial states out of `inputs`, and return them."""
    return Mamba3States(*(inputs.pop(f"state_{name}") for name in Mamba3States._fields))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 1, 37])
def test_agrees_with_the_reference(backend, rank, dtype, length):
    if is_interpreted() and (dtype == torch.bfloat16 or length == 0):
        pytest.skip("rounds B and C to bfloat16, as tensor cores need them, which only compiled kernels may")
    assert_agrees(flat_mamba3, make_inputs(length=length, rank=rank, dtype=dtype), {"chunk_size": 16}, backend=backend)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("packing", "batch", "length", "rows"), [(PACKED, 1, 30, 5), (WITH_IDX, 2, 9, 2)])
def test_packed_sequences_agree_with_the_reference(backend, rank, packing, batch, length, rows):
    inputs = make_inputs(batch, length, rank=rank, rows=rows)
    for name in PER_STEP:  # padding must not matter, whatever it holds
        inputs[name][:, 26:] = torch.nan
    assert_agrees(flat_mamba3, inputs | packing, {"chunk_size": 16}, backend=backend)


def test_an_empty_sequence_keeps_its_state_whatever_its_last_input_was(backend):
    inputs = make_inputs(1, 30, rows=5) | PACKED
    inputs["state_B"][0] = torch.inf  # the first of the packed sequences has no steps
    ssm = flat_mamba3(**inputs, backend=backend).ssm
    assert ssm.isfinite().all() and torch.equal(ssm[0], inputs["state_ssm"][0])


@pytest.mark.parametrize("rank", RANKS)
def test_agrees_without_what_is_optional(backend, rank):
    inputs = make_inputs(rank=rank)
    for name in ("D", "z", "B_bias", "C_bias", "mimo_z", "mimo_o", "state_angles"):
        inputs.pop(name, None)  # without angles there is no initial state
    assert_agrees(flat_mamba3, inputs, backend=backend)


@pytest.mark.parametrize("rank", [None, 4])
def test_coinciding_sizes_agree_with_the_reference(backend, rank):
    inputs = make_inputs(4, 4, 4, 4, 4, 4, 2, rank)
    inputs["x"], inputs["B"] = inputs["x"].transpose(1, 2), inputs["B"].transpose(0, 1)  # and strides
    assert_agrees(flat_mamba3, inputs, backend=backend)


@pytest.mark.parametrize("rank", RANKS)
def test_two_halves_and_steps_equal_one_scan(backend, rank):
    inputs = make_inputs(length=6, rank=rank)
    states = split_states(inputs)
    y, final = mamba3(**inputs, initial_states=states, backend=backend)

    def part(steps):
        return {k: v[:, steps] if k in PER_STEP else v for k, v in inputs.items()}

    first, states = mamba3(**part(slice(0, 4)), initial_states=states, backend=backend)
    torch.testing.assert_close(first, y[:, :4])
    for t in (4, 5):
        torch.testing.assert_close(mamba3_step(states, **part(t), backend=backend), y[:, t])
    torch.testing.assert_close(states, final)


def test_without_trapezoid_and_rotation_is_ssd(backend):
    inputs = make_inputs()
    split_states(inputs)
    B, C = (inputs.pop(name) for name in ("B", "C"))
    inputs |= {"trap": torch.full_like(inputs["trap"], 1000.0), "angles": torch.zeros_like(inputs["angles"])}
    inputs |= {"A": -torch.ones_like(inputs["A"]), "B_bias": None, "C_bias": None}
    y, final = mamba3(**inputs, B=B, C=C, backend=backend)
    expected = ssd(inputs["x"], inputs["dt"], -torch.ones(4).double(), B, C, inputs["D"], inputs["z"], backend=backend)
    torch.testing.assert_close(y, expected.y)
    torch.testing.assert_close(final.ssm, expected.final_states)


def test_many_turns_lose_no_precision(backend):
    # Sums of angles of some 10,000 turns, of which float32 would keep three digits of a turn.
    inputs = make_inputs(1, 40, dtype=torch.float32)
    inputs["dt"] = inputs["dt"] * 1e3
    inputs["A"] = inputs["A"] * 1e-3
    inputs["angles"] = torch.atanh(torch.tensor(0.5)).expand_as(inputs["angles"])  # a fourth of a turn
    inputs["dt"] = inputs["dt"].round()
    for name in ("state_angles", "z"):
        inputs.pop(name)
    assert_agrees(flat_mamba3, inputs, backend=backend, gradients=False)


def test_autocast_changes_nothing(backend):
    inputs = make_inputs(dtype=torch.float32)
    states = split_states(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mamba3(**inputs, initial_states=states, backend=backend).y
    assert torch.equal(inside, mamba3(**inputs, initial_states=states, backend=backend).y)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"A": torch.ones(2, 7, 4).double()}, "A must not be positive, got 1"),
        ({"dt": -torch.ones(2, 7, 4).double()}, "dt must not be negative, got -1"),
        ({"angles": torch.ones(2, 7, 4).double()}, "angles must have at most N / 2 = 3 entries a step, got 4"),
        ({"mimo_o": torch.ones(4, 3, 3).double()}, "mimo_o needs mimo_x"),
        ({"initial_states": (torch.ones(1),)}, "initial_states must be a Mamba3States, got 1 parts"),
        ({"trap": torch.ones(2, 7, 3).double()}, "trap"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    inputs = make_inputs()
    split_states(inputs)
    with pytest.raises(ValueError, match=message):
        mamba3(**(inputs | changes))


def test_context_parallel_is_refused():
    inputs = make_inputs()
    split_states(inputs)
    with use_sharding(object()), pytest.raises(RuntimeError, match="does not run within context_parallel"):
        mamba3(**inputs)
