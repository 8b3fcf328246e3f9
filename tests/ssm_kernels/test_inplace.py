"""Outputs changed in place, with gradients: every output of every op, in every dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_kernels import (
    add_rms_norm,
    causal_conv1d,
    causal_conv1d_step,
    cross_causal_conv1d,
    cross_merge,
    cross_scan,
    cross_selective_scan,
    cross_ssd,
    rms_norm,
    selective_scan,
    selective_scan_step,
    ssd,
    ssd_step,
)
from ssm_kernels.compat import mamba_ssm as compat
from ssm_kernels.testing import is_interpreted

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("default_or_reference")]
# The interpreter takes seconds for a call; whether an output is a view does not depend on how it is changed.
DTYPES = [torch.float32] if is_interpreted() else [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def half(x: Tensor) -> None:
    x[:, :2] = 0


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "*=": lambda x: x.mul_(2),
    "part": half,
    "masked_fill_": lambda x: x.masked_fill_(x > 0.5, 0.25),
    "relu": lambda x: F.relu(x, inplace=True),
}
if is_interpreted():
    CHANGES = {"*=": CHANGES["*="]}


def calls(dtype: torch.dtype) -> dict[str, tuple[Callable, list[Tensor]]]:
    """Each op, with gradients asked of its inputs."""
    g = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g, dtype=torch.float64).to(dtype)

    time_first = rand(2, 4, 5).transpose(1, 2)  # (B, L, D), with contiguous steps
    heads = rand(2, 5, 2, 4), rand(2, 5, 2), -rand(2), rand(2, 5, 1, 3), rand(2, 5, 1, 3), rand(2)
    grid = rand(2, 3, 2, 4)
    return {
        "selective_scan": (
            selective_scan,
            [rand(2, 5, 4), rand(2, 5, 4), -rand(4, 3), rand(2, 5, 2, 3), rand(2, 5, 1, 3)],
        ),
        "selective_scan, all": (
            selective_scan,
            [time_first, rand(2, 5, 4), -rand(4, 3), rand(2, 5, 3), rand(2, 5, 3), rand(4), rand(2, 5, 4), rand(4)],
        ),
        "ssd": (ssd, [*heads[:5]]),
        "ssd, all": (ssd, [*heads, rand(2, 5, 2, 4), rand(2)]),
        "causal_conv1d": (causal_conv1d, [rand(2, 5, 4), rand(4, 3)]),
        "causal_conv1d, all": (lambda *t: causal_conv1d(*t, "silu"), [time_first, rand(4, 3), rand(4)]),
        "rms_norm": (rms_norm, [rand(2, 8), rand(8)]),
        "rms_norm, all": (
            lambda x, w, z: rms_norm(x, w, z=z, group_size=4, norm_before_gate=True), [rand(2, 8), rand(8), rand(2, 8)],
        ),
        "cross_scan": (cross_scan, [grid]),
        "cross_scan, one direction": (lambda x: cross_scan(x, ("rows",)), [grid]),
        "cross_merge": (lambda y: cross_merge(y, 3, 2), [rand(2, 4, 6, 4)]),
        "cross_merge, one direction": (lambda y: cross_merge(y, 3, 2, ("rows",)), [rand(2, 1, 6, 4)]),
        "cross_causal_conv1d": (cross_causal_conv1d, [grid, rand(4, 4, 3)]),
        "cross_selective_scan": (
            cross_selective_scan,
            [grid, rand(2, 3, 2, 4, 4), -rand(4, 4, 3), rand(2, 3, 2, 4, 3), rand(2, 3, 2, 4, 3)],
        ),
        "cross_ssd": (
            cross_ssd,
            [rand(2, 3, 2, 4, 2, 4), rand(2, 3, 2, 4, 2), -rand(4, 2), *(rand(2, 3, 2, 4, 1, 3) for _ in range(2))],
        ),
        "compat.causal_conv1d_fn": (
            lambda x, w: compat.causal_conv1d_fn(x, w, return_final_states=True), [rand(2, 4, 5), rand(4, 3)],
        ),
        "compat.selective_scan_fn": (
            lambda *t: compat.selective_scan_fn(*t, return_last_state=True),
            [rand(2, 4, 5), rand(2, 4, 5), -rand(4, 3), rand(2, 3, 5), rand(2, 3, 5)],
        ),
        "compat.mamba_chunk_scan_combined": (
            lambda *t: compat.mamba_chunk_scan_combined(*t, 16, return_final_states=True), [*heads[:5]],
        ),
    }  # fmt: skip


NAMES = list(calls(torch.float32))


def run(name: str, dtype: torch.dtype, change: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
    """The changed outputs, and the gradients of a sum over them."""
    op, tensors = calls(dtype)[name]
    inputs = [t.requires_grad_() for t in tensors]
    out = op(*inputs)
    outputs = [change(i, t) for i, t in enumerate(out if isinstance(out, tuple) else (out,))]
    total = sum((t.double() * torch.cos(torch.arange(t.numel())).view(t.shape)).sum() for t in outputs)
    return [*outputs, *torch.autograd.grad(total, inputs)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_changed_in_place_have_the_gradients_of_changed_copies(name, dtype):
    n_outputs = {True: 2, False: 1}[name.split(",")[0] in ("selective_scan", "ssd", "causal_conv1d") or "." in name]
    for target in range(n_outputs):
        for change in CHANGES.values():

            def in_place(i: int, t: Tensor, target=target, change=change) -> Tensor:
                if i == target:
                    change(t)
                return t

            def of_a_copy(i: int, t: Tensor, target=target, change=change) -> Tensor:
                if i != target:
                    return t
                copy = t.clone()
                change(copy)
                return copy

            for got, want in zip(run(name, dtype, in_place), run(name, dtype, of_a_copy), strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_of_a_sum_may_be_changed_and_the_sum_is_kept_for_the_backward(dtype):
    """Autograd refuses a change of a sum that the backward reads, rather than compute a wrong gradient."""
    g = torch.Generator().manual_seed(0)
    x, residual, weight = (torch.rand(s, generator=g).to(dtype).requires_grad_() for s in ((2, 8), (2, 8), (8,)))
    inputs = [x, residual, weight]
    for change in CHANGES.values():
        want = add_rms_norm(*(x, weight, residual))
        y = want.y.clone()
        change(y)
        expected = torch.autograd.grad(y.sum() + want.residual.square().sum(), inputs)
        out = add_rms_norm(x, weight, residual)
        change(out.y)
        assert torch.equal(out.y, y)
        got = torch.autograd.grad(out.y.sum() + out.residual.square().sum(), inputs)
        assert all(map(torch.equal, got, expected))
    total = add_rms_norm(x, weight, residual)
    expected = torch.autograd.grad(total.y.sum() + (total.residual * 2).sum(), inputs)
    total = add_rms_norm(x, weight, residual)
    total.residual.mul_(2)
    try:
        got = torch.autograd.grad(total.y.sum() + total.residual.sum(), inputs)
    except RuntimeError as e:
        assert "modified by an inplace operation" in str(e)
    else:
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_share_no_memory_with_inputs(dtype):
    for name, (op, tensors) in calls(dtype).items():
        out = op(*tensors)
        inputs = {t.untyped_storage().data_ptr() for t in tensors}
        for t in out if isinstance(out, tuple) else (out,):
            assert t.untyped_storage().data_ptr() not in inputs, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_of_steps_may_be_changed(dtype):
    ones = torch.ones
    state = torch.promote_types(dtype, torch.float32)

    def given(*shape: int) -> Tensor:
        return ones(shape, dtype=dtype, requires_grad=True)

    outputs = [
        selective_scan_step(
            ones(2, 4, 3, dtype=state), *(given(2, 4), given(2, 4), given(4, 3)), *[given(2, 1, 3)] * 2
        ),
        ssd_step(ones(2, 2, 4, 3, dtype=state), given(2, 2, 4), given(2, 2), given(2), *[given(2, 1, 3)] * 2),
        causal_conv1d_step(ones(2, 2, 4, dtype=dtype), given(2, 4), given(4, 3)),
    ]
    for y in outputs:
        for change in CHANGES.values():
            change(y)
