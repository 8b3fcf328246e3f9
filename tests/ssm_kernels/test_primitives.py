"""Jit functions that kernels share, against NumPy."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from ssm_kernels._triton.primitives import d_softplus, softplus, zero_padding
from ssm_kernels._triton.segment_table import build_segment_table
from ssm_kernels.ssd.triton.chunk import scaled_operand, weighted_operand
from ssm_kernels.testing import is_interpreted

pytestmark = pytest.mark.triton
needs_interpreter = pytest.mark.skipif(not is_interpreted(), reason="the kernels need Triton's interpreter here")


@triton.jit
def softplus_kernel(x_ptr, y_ptr, dy_ptr, BLOCK: tl.constexpr):
    """Write softplus and its derivative of BLOCK elements."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, softplus(x))
    tl.store(dy_ptr + offsets, d_softplus(x))


def evaluate(x, block):
    """Softplus and its derivative in the dtype of x."""
    y, dy = torch.empty_like(x), torch.empty_like(x)
    softplus_kernel[(len(x) // block,)](x, y, dy, BLOCK=block)
    return y, dy


def relative_errors(x, block):
    """Relative errors of softplus and its derivative in the dtype of x, elementwise, against float64."""
    y, dy = evaluate(x, block)
    exact = x.double()
    want = exact.clamp(min=0) + torch.log1p(torch.exp(-exact.abs())), torch.sigmoid(exact)
    return tuple(((got - w) / w).abs() for got, w in zip((y.double(), dy.double()), want, strict=True))


@needs_interpreter
def test_softplus_of_millions_of_numbers():
    """Every number near 0 in steps of 4e-6, and the rest of the range, down to results of 1e-37."""
    x = torch.cat([torch.linspace(-4, 4, 1 << 21), torch.linspace(-85, 100, 1 << 21)])
    error, d_error = relative_errors(x, 1 << 20)
    # 2.1e-7 is the polynomial without fused multiply-adds; then the exponent's rounding, and that of LOG2E in it.
    rounding = 1.25 * 2.0**-24 * x.clamp(max=0).abs()
    assert (error - rounding).max() < 2.4e-7
    assert (d_error - rounding).max() < 4e-7


@needs_interpreter
def test_softplus_in_float64_keeps_its_digits():
    x = torch.linspace(-700, 100, 1 << 18, dtype=torch.float64)
    error, d_error = relative_errors(x, 1 << 18)
    rounding = 1.25 * 2.0**-53 * x.clamp(max=0).abs()
    assert (error - rounding).max() < 5e-16
    assert (d_error - rounding).max() < 1e-14


@needs_interpreter
def test_padding_alone_is_zeroed():
    """In three gaps, an empty one among them, and three tiles of channels."""
    x = torch.ones(2, 40, 3, 100).transpose(1, 2).contiguous().transpose(1, 2)
    gaps = torch.tensor([[3, 5], [9, 9], [37, 80]])
    table = build_segment_table(2, 40, 8, None, None, x.device)._replace(gaps=gaps)
    zero_padding(table, x)
    want = torch.ones(80, 3, 100)
    want[3:5], want[37:] = 0, 0
    assert x.reshape(80, 3, 100).equal(want)


@needs_interpreter
def test_softplus_at_the_ends():
    x = torch.tensor([-torch.inf, -200.0, 0.0, 200.0, torch.inf, torch.nan, -0.0, 1.0])
    y, dy = evaluate(x, block=8)
    torch.testing.assert_close(y[:5], torch.tensor([0.0, 0.0, 0.6931472, 200.0, torch.inf]))
    torch.testing.assert_close(dy[:5], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))
    assert y[5].isnan() and dy[5].isnan()


@triton.jit
def operands_kernel(x_ptr, weights_ptr, scaled_ptr, weighted_ptr, Q: tl.constexpr, P: tl.constexpr):
    """Write a tile and a weighted tile as operands in float16, times their factors."""
    q, p = tl.arange(0, Q), tl.arange(0, P)
    offsets = q[:, None] * P + p[None, :]
    x, weights = tl.load(x_ptr + offsets), tl.load(weights_ptr + q)
    operand, scale = scaled_operand(x * weights[:, None], tl.float16)
    tl.store(scaled_ptr + offsets, operand.to(tl.float32) * scale)
    operand, scale = weighted_operand((x * 0.5).to(tl.float16), weights, tl.float16, tl.float32)
    tl.store(weighted_ptr + offsets, operand.to(tl.float32) * scale)


@needs_interpreter
@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e6, 1e30])
def test_operands_in_float16_have_the_range_of_float32(size):
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).clamp(-4, 4) * 3e4
    weights = torch.linspace(-1, 1, 16) * size
    scaled, weighted = torch.empty_like(x), torch.empty_like(x)
    operands_kernel[(1,)](x, weights, scaled, weighted, Q=16, P=32)
    exact = x * weights[:, None]
    torch.testing.assert_close(scaled, exact, rtol=1e-3, atol=1e-6 * exact.abs().max().item())
    torch.testing.assert_close(weighted, exact / 2, rtol=2e-3, atol=1e-6 * exact.abs().max().item())


@needs_interpreter
def test_an_infinity_stays_alone_in_an_operand_in_float16():
    x, weights = torch.ones(16, 32), torch.ones(16)
    x[3, 5] = float("inf")
    scaled, weighted = torch.empty_like(x), torch.empty_like(x)
    operands_kernel[(1,)](x, weights, scaled, weighted, Q=16, P=32)
    for found, factor in ((scaled, 1), (weighted, 2)):
        assert torch.equal(found * factor, x)
