"""The kernel of a decoding step of the convolution and its launch."""
# Constexpr arguments and tuples of strides, which stubs of Triton do not know.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import FUSED_MULTIPLY_ADD, launch_grid, on_device
from ..._triton.primitives import compute_type, silu
from .tile import load_taps_and_bias

BLOCK = 256
"""Channels of a program."""


@triton.jit
def _step_kernel(
    state_ptr, x_ptr, weight_ptr, bias_ptr, y_ptr, dim, state_strides, x_strides, weight_strides,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute y of BLOCK channels of a batch row, and shift their state by one step in place.

    Grid: (B, channel tiles). Tiles are (BLOCK,). The state is (B, WIDTH - 1, D); x and y are (B, D).
    """
    state_batch, state_step, state_channel = state_strides
    x_batch, x_channel = x_strides
    row = tl.program_id(0).to(tl.int64)
    channel = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)  # (BLOCK,)
    mask = channel < dim
    taps, acc = load_taps_and_bias(
        weight_ptr, bias_ptr, weight_strides, channel, mask, channel, WIDTH, HAS_BIAS, COMPUTE
    )
    state_ptr += row * state_batch + channel * state_channel

    x = tl.load(x_ptr + row * x_batch + channel * x_channel, mask, other=0.0).to(state_ptr.dtype.element_ty)
    acc += taps[WIDTH - 1] * x.to(COMPUTE)
    for i in tl.static_range(1, WIDTH):
        entry = tl.load(state_ptr + (i - 1) * state_step, mask, other=0.0)
        acc += taps[i - 1] * entry.to(COMPUTE)
        if i > 1:
            tl.store(state_ptr + (i - 2) * state_step, entry, mask)
    if WIDTH > 1:
        tl.store(state_ptr + (WIDTH - 2) * state_step, x, mask)

    out = silu(acc) if SILU else acc
    tl.store(y_ptr + row * dim + channel, out.to(y_ptr.dtype.element_ty), mask)


def step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Run `causal_conv1d_triton_step`: y (B, D); the state (B, K - 1, D) is updated in place."""
    batch, dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if batch and dim:
        with on_device(x):
            _step_kernel[launch_grid(batch, triton.cdiv(dim, BLOCK), "tiles of channels")](
                state, x, weight, bias, y, dim, state.stride(), x.stride(), weight.stride(),
                WIDTH=weight.shape[1], BLOCK=BLOCK, HAS_BIAS=bias is not None, SILU=silu,
                COMPUTE=compute_type(x.dtype), num_warps=4,
                **FUSED_MULTIPLY_ADD,
            )  # fmt: skip
    return y
