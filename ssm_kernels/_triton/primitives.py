"""Jit functions and kernels shared by the ops. Imports Triton; only modules that hold kernels import it."""
# Constexpr arguments and tuples of strides, which stubs of Triton do not know.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import FUSED_MULTIPLY_ADD, is_interpreted, on_device
from .segment_table import SegmentTable


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """The type of sums and states: float64 for float64, float32 for all others."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_type(*dtypes: torch.dtype) -> tl.dtype:
    """The type of the operands of matrix products: the widest of the inputs.

    At least float32 in the interpreter, which computes products of bfloat16 wrongly.
    """
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    if is_interpreted():
        widest = torch.promote_types(widest, torch.float32)
    return {
        torch.float64: tl.float64,
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }[widest]


LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
"""log2(e): `exp(x) = exp2(x * LOG2E)`. The hardware has exp2 alone."""
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
"""ln(2) = 1 / LOG2E."""


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) as a squared reciprocal root: a division takes more instructions than all the rest."""
    root = tl.rsqrt(1 + tl.exp2(x * -LOG2E))
    return root * root


@triton.jit
def silu(x):
    """x * sigmoid(x)."""
    return x * sigmoid(x)


@triton.jit
def d_silu(x):
    """Derivative of `silu` at x."""
    s = sigmoid(x)
    return s * (1 + x * (1 - s))


@triton.jit
def silu_backward(dy, x):
    """dy times the derivative of `silu` at x; dy meets the sigmoid first, in that order of rounding."""
    s = sigmoid(x)
    return dy * s * (1 + x * (1 - s))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log(1 + e) with e = exp(-|x|), accurate for small results too.

    In float32, log(1 + e) is e times a polynomial: one exponential and nine multiply-adds, where a logarithm takes
    twenty instructions. The polynomial is the minimax one of degree 8, by Remez's algorithm, of log(1 + e) / e on
    [0, 1] among those that are 1 at 0; it is within 3.3e-8 of it, and 1.8e-7 with the rounding of float32.
    """
    if x.dtype == tl.float64:
        e = tl.exp(-tl.abs(x))
        w = 1 + e
        return tl.maximum(x, 0) + (tl.log(w) + (e - (w - 1)))  # what rounding takes from 1 + e is added back
    else:
        e = tl.exp2(tl.abs(x) * -LOG2E)
        p = 0.005364826414734125
        p = p * e - 0.03006580099463463
        p = p * e + 0.07920455187559128
        p = p * e - 0.13753803074359894
        p = p * e + 0.1915365606546402
        p = p * e - 0.24857163429260254
        p = p * e + 0.3332132399082184
        p = p * e - 0.49999648332595825
        p = p * e + 1
        return tl.maximum(x, 0) + p * e


@triton.jit
def d_softplus(x):
    """Derivative of `softplus` at x."""
    return sigmoid(x)


@triton.jit
def and_scalar(mask, flag):
    """`mask & flag` of a tile and a scalar.

    In the interpreter of Triton 3.9 a comparison of scalars takes the type of its operands when it is broadcast to a
    tile, and a mask must be boolean. The compiled code is the same.
    """
    return mask & (tl.broadcast_to(flag, mask.shape) != 0)


@triton.jit
def load_segment(segments_ptr, segment):
    """Read entry `segment` of `SegmentTable.entries`.

    Returns:
        The batch row (int64), the first step, the step after the last, and the sequence (-1 for an unused entry, which
        has no steps).
    """
    entry_ptr = segments_ptr + segment.to(tl.int64) * 4
    return tl.load(entry_ptr).to(tl.int64), tl.load(entry_ptr + 1), tl.load(entry_ptr + 2), tl.load(entry_ptr + 3)


@triton.jit
def unpack_direction(directions, k):
    """The code of scan direction k in what `device.pack_directions` packed."""
    return (directions >> (2 * k)) & 3


@triton.jit
def grid_offset(step, direction, length, height):
    """The row-major position, in a grid of `length` positions, of a step along a scan direction.

    direction: 0 rows, 1 columns, 2 rows reversed, 3 columns reversed, as in `cross_scan.CROSS`.
    """
    forward_step = tl.where((direction & 2) != 0, length - 1 - step, step)
    by_columns = forward_step % height * (length // height) + forward_step // height
    return tl.where((direction & 1) != 0, by_columns, forward_step)


@triton.jit
def _zero_padding_kernel(
    x_ptr, gaps_ptr, length, channels, n_channels, x_strides, STEPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Zero BLOCK channels of one gap, STEPS positions at a time.

    Grid: (gaps x channel tiles, programs of a gap): the first dimension alone has room for any number of tiles. Tiles
    are (STEPS, BLOCK). x is (B, L, G, E).
    """
    x_batch, x_step, x_group, x_channel = x_strides
    n_tiles = tl.cdiv(n_channels, BLOCK)
    gap_ptr = gaps_ptr + 2 * (tl.program_id(0) // n_tiles).to(tl.int64)
    start, end = tl.load(gap_ptr), tl.load(gap_ptr + 1)
    channel = (tl.program_id(0) % n_tiles * BLOCK + tl.arange(0, BLOCK))[None, :].to(tl.int64)  # (1, BLOCK)
    x_ptr += channel // channels * x_group + channel % channels * x_channel
    zeros = tl.zeros((STEPS, BLOCK), x_ptr.dtype.element_ty)
    for tile in range(tl.program_id(1), tl.cdiv(end - start, STEPS), tl.num_programs(1)):
        position = start + tile * STEPS + tl.arange(0, STEPS)[:, None]  # (STEPS, 1)
        offset = position // length * x_batch + position % length * x_step
        tl.store(x_ptr + offset, zeros, (position < end) & (channel < n_channels))


def zero_padding(segments: SegmentTable, *tensors: Tensor) -> None:
    """Zero the padding of tensors (B, L, H) or (B, L, G, E) of any strides; no segment writes it."""
    for x in tensors:
        x = x.unsqueeze(3) if x.dim() == 3 else x
        batch, length, groups, channels = x.shape
        if not (len(segments.gaps) and x.numel()):
            continue
        steps, block = 16, min(128, triton.next_power_of_2(groups * channels))
        tiles = len(segments.gaps) * triton.cdiv(groups * channels, block)
        with on_device(x):
            _zero_padding_kernel[(tiles, min(32, triton.cdiv(batch * length, steps)))](
                x, segments.gaps, length, channels, groups * channels, x.stride(),
                STEPS=steps, BLOCK=block, num_warps=4,
                **FUSED_MULTIPLY_ADD,
            )  # fmt: skip
