"""Padding in packed tensors: steps of no sequence, by a negative `seq_idx` or after the last of `cu_seqlens`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssm_kernels import causal_conv1d, selective_scan, ssd

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("default_or_reference")]


def arguments(op, batch: int, length: int, rows: int, dtype=torch.float64) -> tuple[dict[str, Tensor], dict]:
    """Tensors with time in dimension 1 by name, and the rest; every optional argument is there."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    if op is causal_conv1d:
        return {"x": randn(batch, length, 4)}, {
            "weight": randn(4, 3), "bias": randn(4), "initial_states": randn(rows, 2, 4), "activation": "silu",
        }  # fmt: skip
    if op is selective_scan:
        in_time = {"u": randn(batch, length, 4), "dt": randn(batch, length, 4), "z": randn(batch, length, 4)}
        matrices = {"B": randn(batch, length, 2, 3), "C": randn(batch, length, 2, 3)}
        return in_time | matrices, {
            "A": -randn(4, 3).abs(), "D": randn(4), "dt_bias": randn(4), "initial_states": randn(rows, 4, 3),
            "dt_softplus": True,
        }  # fmt: skip
    in_time = {"x": randn(batch, length, 2, 4), "dt": randn(batch, length, 2), "z": randn(batch, length, 2, 4)}
    matrices = {"B": randn(batch, length, 1, 3), "C": randn(batch, length, 1, 3)}
    return in_time | matrices, {
        "A": -randn(2).abs(), "D": randn(2), "dt_bias": randn(2), "initial_states": randn(rows, 2, 4, 3),
        "dt_softplus": True, "chunk_size": 16,
    }  # fmt: skip


zeros = torch.zeros_like


def run(op, in_time, others, **packing) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """y, final states, and the gradients of a sum over both that tells positions apart."""
    given = {k: v.clone().requires_grad_() for k, v in (in_time | others).items() if isinstance(v, Tensor)}
    options = {k: v for k, v in others.items() if not isinstance(v, Tensor)}
    y, final = op(**given, **options, **packing)
    total = (y * torch.cos(torch.arange(y.numel())).view_as(y)).sum() + final.square().sum()
    # Where all is padding, the reference computes nothing that a gradient could flow through.
    wanted = list(given.values())
    grads = torch.autograd.grad(total, wanted, materialize_grads=True) if total.requires_grad else map(zeros, wanted)
    return y.detach(), final.detach(), dict(zip(given, grads, strict=True))


def check(op, packing, real: Tensor, rows: int, garbage: float = torch.nan):
    """Hold a padded call against the same call where padding is a sequence of zeros, `real` (B, L) telling which is."""
    in_time, others = arguments(op, *real.shape, rows)
    is_real = {k: real.view(*real.shape, *[1] * (v.dim() - 2)) for k, v in in_time.items()}
    zeroed = {k: v.where(is_real[k], 0) for k, v in in_time.items()}
    corrupted = {k: v.where(is_real[k], garbage) for k, v in in_time.items()}
    y, final, grads = run(op, corrupted, others, **packing)
    want_y, want_final, want_grads = run(op, zeroed, others, **packing)
    assert (y[~real] == 0).all() and (want_y[~real] == 0).all()
    torch.testing.assert_close(y, want_y)
    torch.testing.assert_close(final, want_final)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[name], msg=f"gradient of {name}")
        if name in in_time:
            assert (grad[~real] == 0).all(), name
    return y, final


@pytest.mark.parametrize("op", [causal_conv1d, selective_scan, ssd])
def test_negative_seq_idx_is_padding(op):
    """A tail, a head, a run in the middle, one between two parts of one number, and a row of nothing else."""
    seq_idx = torch.tensor(
        [[0, 0, 0, 1, 1, -1, -1], [-1, 4, 4, -1, -2, 4, 4], [-1, -1, -1, -1, -1, -1, -1], [3, 3, -1, 5, 5, 5, 5]]
    )
    real = seq_idx >= 0
    y, final = check(op, {"seq_idx": seq_idx}, real, 4)
    in_time, others = arguments(op, 4, 7, 4)
    first_of_row, last_of_row = {(0, 0), (1, 1), (3, 0)}, {(0, 3), (1, 5), (3, 3)}
    for row, start, end in [(0, 0, 3), (0, 3, 5), (1, 1, 3), (1, 5, 7), (3, 0, 2), (3, 3, 7)]:
        alone = {k: v[row : row + 1, start:end] for k, v in in_time.items()}
        is_first = (row, start) in first_of_row
        initial = others["initial_states"][row : row + 1] * is_first
        want = op(**alone, **(others | {"initial_states": initial}), backend="reference")
        torch.testing.assert_close(y[row : row + 1, start:end], want.y)
        if (row, start) in last_of_row:
            torch.testing.assert_close(final[row : row + 1], want.final_states)
    torch.testing.assert_close(final[2], others["initial_states"][2])


@pytest.mark.parametrize("op", [causal_conv1d, selective_scan, ssd])
@pytest.mark.parametrize("bounds", [[0, 3, 3, 5], [0, 0], [0]])
def test_steps_after_the_last_bound_are_padding(op, bounds):
    cu_seqlens = torch.tensor(bounds)
    real = (torch.arange(8) < bounds[-1])[None]
    y, final = check(op, {"cu_seqlens": cu_seqlens}, real, len(bounds) - 1)
    in_time, others = arguments(op, 1, 8, len(bounds) - 1)
    without = {k: v[:, : bounds[-1]] for k, v in in_time.items()}
    want = op(**without, **others, cu_seqlens=cu_seqlens, backend="reference")
    torch.testing.assert_close(y[:, : bounds[-1]], want.y)
    torch.testing.assert_close(final, want.final_states)


@pytest.mark.parametrize("op", [causal_conv1d, selective_scan, ssd])
def test_many_steps_of_padding(op):
    """More than one program clears, in time-first layouts too."""
    seq_idx = torch.full((2, 200), -1)
    seq_idx[0, 3:5], seq_idx[1, :2], seq_idx[1, 199] = 0, 1, 2
    in_time, others = arguments(op, 2, 200, 2, torch.float32)
    if op is not ssd:
        in_time = {k: v.transpose(1, 2).contiguous().transpose(1, 2) if v.dim() == 3 else v for k, v in in_time.items()}
    y, _, grads = run(op, in_time, others, seq_idx=seq_idx)
    assert (y[seq_idx < 0] == 0).all() and y[seq_idx >= 0].abs().amin(-1).gt(0).all()
    assert all((grads[name][seq_idx < 0] == 0).all() for name in in_time)


def test_bounds_beyond_the_length_are_refused():
    in_time, others = arguments(causal_conv1d, 1, 4, 1)
    with pytest.raises(ValueError, match=r"cu_seqlens must run from 0 to L = 4 at most, got 0 to 5"):
        causal_conv1d(**in_time, **others, cu_seqlens=torch.tensor([0, 5]))
