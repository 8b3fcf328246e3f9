"""Stored states in kernels: reading, and rounding as `_core.state_format` defines it."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._core.state_format import BITS_PER_CALL, NARROW_DTYPES
from .primitives import and_scalar

LEAST_ROW: tl.constexpr = tl.constexpr(2.0**-100)
"""`_core.state_format.LEAST_ROW`."""
SMALLEST_NORMAL: tl.constexpr = tl.constexpr(2.0**-14)
"""The least normal number of float16."""
PER_UNIT: tl.constexpr = tl.constexpr(127 * 65536.0)
TO_SCALE: tl.constexpr = tl.constexpr(1 / 127)


def block_of_state(state: Tensor, d_state: int) -> int:
    """Return the columns of a tile of a state: for a narrow one at least those of a call of Philox."""
    return max(triton.next_power_of_2(d_state), BITS_PER_CALL if state.dtype in NARROW_DTYPES else 1)


@triton.jit
def load_state(ptrs, scale_ptrs, mask, row_mask, HAS_SCALE: tl.constexpr, COMPUTE: tl.constexpr):
    """Read a tile (rows, BLOCK_N) of a stored state; scale_ptrs and row_mask are (rows, 1)."""
    h = tl.load(ptrs, mask, other=0.0).to(COMPUTE)
    if HAS_SCALE:
        h *= tl.load(scale_ptrs, row_mask, other=0.0)
    return h


@triton.jit
def store_state(
    ptrs, scale_ptrs, h, mask, row_mask, seeds_ptr, token, row,
    HAS_SCALE: tl.constexpr, HAS_SEED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write a tile (rows, BLOCK_N) of a state in its format, and return it as it is stored, in the dtype of h.

    row and row_mask are (rows, 1); row counts the rows of the state. h is zero where it has no element.
    """
    dtype: tl.constexpr = ptrs.dtype.element_ty
    noise = 32768  # half a unit of int8
    if HAS_SEED:
        noise = random_bits(tl.load(seeds_ptr + token), row, BLOCK_N)
    if HAS_SCALE:
        # As integers, magnitudes have the order of the numbers, with NaN above all.
        largest = tl.max(h.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True).to(tl.float32, bitcast=True)
        is_zero = largest < LEAST_ROW
        per_unit = tl.where(
            is_zero, 0.0, tl.div_rn(tl.full(largest.shape, PER_UNIT, tl.float32), tl.where(is_zero, 1.0, largest))
        )
        scale = tl.where(is_zero, 0.0, largest * TO_SCALE)
        magnitude = ((tl.abs(h) * per_unit).to(tl.int32) + noise) >> 16
        narrow = tl.where(h < 0, -magnitude, magnitude).to(dtype)
        tl.store(scale_ptrs, scale, row_mask)
        stored = narrow.to(h.dtype) * scale
    else:
        rounded = h
        if HAS_SEED:
            rounded = _round_to_bfloat16(h, noise) if dtype == tl.bfloat16 else _round_to_float16(h, noise)
            rounded = tl.where(h == h, rounded, h)
        narrow = rounded.to(dtype)
        stored = narrow.to(h.dtype)
    tl.store(ptrs, narrow, mask)
    return stored


@triton.jit
def store_slot(
    slot, state_ptr, state_stride, state_offsets, scale_ptr, scale_stride, scale_offsets, h, mask, row_mask, seeds_ptr,
    token, row, HAS_SCALE: tl.constexpr, HAS_SEED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write a tile to a slot of a pool as `store_state` does, and return it as stored; below 0 no slot takes it."""
    scale_ptrs = scale_ptr
    if HAS_SCALE:
        scale_ptrs = scale_ptr + slot * scale_stride + scale_offsets
    is_kept = and_scalar(mask, slot >= 0)
    stored = store_state(
        state_ptr + slot * state_stride + state_offsets, scale_ptrs, h, is_kept, and_scalar(row_mask, slot >= 0),
        seeds_ptr, token, row, HAS_SCALE, HAS_SEED, BLOCK_N,
    )  # fmt: skip
    return tl.where(is_kept, stored, h)


@triton.jit
def _round_to_bfloat16(h, noise):
    bits = h.to(tl.int32, bitcast=True) + noise
    return (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _round_to_float16(h, noise):
    size = tl.abs(h)
    is_small = size < SMALLEST_NORMAL
    shifted = tl.where(is_small, size + SMALLEST_NORMAL, size)
    cut = ((shifted.to(tl.int32, bitcast=True) + (noise >> 3)) & -8192).to(tl.float32, bitcast=True)
    cut = tl.where(is_small, cut - SMALLEST_NORMAL, cut)
    return tl.where(h < 0, -cut, cut)


@triton.jit
def random_bits(seed, row, BLOCK_N: tl.constexpr):
    """The 16 random bits of each element of a tile: seed a scalar, row (rows, 1) -> (rows, BLOCK_N) int32."""
    calls = tl.arange(0, BLOCK_N // 8)[None, :].to(tl.uint32)
    row = row.to(tl.uint32)
    c0, c1 = calls + row * 0, row + calls * 0  # (rows, BLOCK_N // 8)
    zero = c0 * 0
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero, zero)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # word w of call c at 4 c + w
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32)
