"""The kernels of a decoding step of the convolution and their launches."""
# Constexpr arguments and tuples of strides, which stubs of Triton do not know.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import FUSED_MULTIPLY_ADD, launch_grid, on_device
from ..._triton.primitives import and_scalar, compute_type, silu
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


@triton.jit
def _slots_kernel(
    state_ptr, x_ptr, weight_ptr, bias_ptr, y_ptr, dim, state_strides, x_strides, weight_strides,
    sources_ptr,  # (S,) slot that a sequence starts from; -1 where it is skipped
    destinations_ptr,  # (M,) slot that takes the state after a token; -1 where it is not kept
    bounds_ptr,  # (S + 1,) first token of a sequence
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute y of BLOCK channels of the tokens of one sequence, from and to slots of the state.

    Grid: (S, channel tiles). The state is (slots, WIDTH - 1, D); x and y are (M, D). A window of WIDTH inputs is in
    rows 0 to WIDTH - 1 of a tile (ROWS, BLOCK).
    """
    sequence = tl.program_id(0).to(tl.int64)
    channel = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[None, :]  # (1, BLOCK)
    row = tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    mask = channel < dim
    mask_state = mask & (row < WIDTH - 1)
    source = tl.load(sources_ptr + sequence)
    first_token, end_token = tl.load(bounds_ptr + sequence), tl.load(bounds_ptr + sequence + 1)
    end_token = tl.where(source < 0, first_token, end_token)  # a skipped sequence has no token
    taps, bias = load_taps_and_bias(
        weight_ptr, bias_ptr, weight_strides, channel, mask, channel, WIDTH, HAS_BIAS, COMPUTE
    )  # (1, BLOCK) each
    state_offsets = row * state_strides[1] + channel * state_strides[2]
    # Row k of the state is input k of the window; the last one is the token.
    state = tl.load(
        state_ptr + source * state_strides[0] + state_offsets, and_scalar(mask_state, source >= 0), other=0.0
    )  # (ROWS, BLOCK)
    # Row k of the next state is row k + 1 of the window.
    is_next = row[:, :, None] + 1 == tl.arange(0, ROWS)[None, :, None]  # (ROWS, ROWS, 1)

    for token in range(first_token, end_token):
        t = tl.cast(token, tl.int64)
        x = tl.load(x_ptr + t * x_strides[0] + channel * x_strides[1], mask, other=0.0).to(state.dtype)  # (1, BLOCK)
        window = tl.where(row == WIDTH - 1, x, state)  # (ROWS, BLOCK)
        y = bias + taps[WIDTH - 1] * x.to(COMPUTE)  # (1, BLOCK)
        for i in tl.static_range(0, WIDTH - 1):
            # One term of the sum is not zero, so that it is exact; likewise below.
            entry = tl.sum(tl.where(row == i, window.to(COMPUTE), 0.0), axis=0, keep_dims=True)
            y += taps[i] * entry
        y = silu(y) if SILU else y
        tl.store(y_ptr + t * dim + channel, y.to(y_ptr.dtype.element_ty), mask)
        shifted = tl.sum(tl.where(is_next, window[None, :, :].to(COMPUTE), 0.0), axis=1)  # (ROWS, BLOCK)
        state = shifted.to(state.dtype)
        slot = tl.load(destinations_ptr + token)
        tl.store(state_ptr + slot * state_strides[0] + state_offsets, state, and_scalar(mask_state, slot >= 0))


def step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    sources: Tensor | None,
    destinations: Tensor | None,
    bounds: Tensor | None,
) -> Tensor:
    """Run `causal_conv1d_triton_step`: y (M, D); the state (B, K - 1, D), or slots of it, is updated in place."""
    (tokens, dim), width = x.shape, weight.shape[1]
    has_plan = sources is not None
    batch = tokens if sources is None else len(sources)
    y = (torch.zeros if has_plan else torch.empty)(x.shape, dtype=x.dtype, device=x.device)
    if batch and y.numel():
        grid = launch_grid(batch, triton.cdiv(dim, BLOCK), "tiles of channels")
        arguments = (state, x, weight, bias, y, dim, state.stride(), x.stride(), weight.stride())
        constants = {
            "WIDTH": width, "BLOCK": BLOCK, "HAS_BIAS": bias is not None, "SILU": silu,
            "COMPUTE": compute_type(x.dtype), "num_warps": 4,
        }  # fmt: skip
        with on_device(x):
            if has_plan:
                _slots_kernel[grid](
                    *arguments, sources, destinations, bounds, ROWS=triton.next_power_of_2(width), **constants,
                    **FUSED_MULTIPLY_ADD,
                )  # fmt: skip
            else:
                _step_kernel[grid](*arguments, **constants, **FUSED_MULTIPLY_ADD)
    return y
