"""What the Triton kernels of several ops share. Imports Triton; imported by the `kernels` modules alone."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._pieces import Pieces
from ._triton import interpreting, on_device


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """What sums and states are computed in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_type(*dtypes: torch.dtype) -> tl.dtype:
    """What the operands of matrix products are rounded to: the widest of the inputs.

    In the interpreter float32 at least, since it computes products of bfloat16 wrongly.
    """
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    if interpreting():
        widest = torch.promote_types(widest, torch.float32)
    return {
        torch.float64: tl.float64,
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }[widest]


@triton.jit
def load_piece(table, piece):
    """Batch row (int64), first step, the step after the last, and the sequence (-1: a piece to spare)."""
    entry = table + piece.to(tl.int64) * 4
    return tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def place(step, route, length, height):
    """Where in a row-major grid of `length` places a step of a route is.

    route: 0 rows, 1 columns, 2 rows reversed, 3 columns reversed, as in `cross_scan.CROSS`.
    """
    forth = tl.where((route & 2) != 0, length - 1 - step, step)
    return tl.where((route & 1) != 0, forth % height * (length // height) + forth // height, forth)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), accurate in the smallest results too, where 1 + exp(x) rounds: what was lost is added again."""
    e = tl.exp(-tl.abs(x))
    w = 1 + e
    return tl.maximum(x, 0) + (tl.log(w) + (e - (w - 1)))


@triton.jit
def and_scalar(mask, flag):
    """`mask & flag` of a tile and a scalar.

    In the interpreter of Triton 3.9, the result of comparing scalars has the type of its operands once it is spread
    over a tile, and a mask must be boolean. The compiler sees no difference.
    """
    return mask & (tl.broadcast_to(flag, mask.shape) != 0)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without the division, which takes more instructions than all the rest."""
    root = tl.rsqrt(1 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def _carry_kernel(
    arrivals, rate, time, before, after, first, before_row, after_row,
    size, RATE: tl.constexpr, TIME: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
    HAS_BEFORE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Carry a tile of one sequence's state over its pieces. Grid: (sequences, tiles of the state).

    `arrivals` (M, size) holds what each piece adds, and is overwritten by what each piece finds; a piece lets
    `exp(rate[e // RATE] * time[piece, e // TIME])` of element e pass.
    """
    sequence = tl.program_id(0)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = e < size
    rates = tl.load(rate + e // RATE, mask, other=0.0).to(COMPUTE)
    times = (size + TIME - 1) // TIME
    row = tl.load(before_row + sequence).to(tl.int64)
    carry = tl.zeros((BLOCK,), COMPUTE)
    if HAS_BEFORE:
        carry = tl.load(before + row * size + e, and_scalar(mask, row >= 0), other=0.0).to(COMPUTE)
    begin, end = tl.load(first + sequence), tl.load(first + sequence + 1)
    for i in range(end - begin):
        piece = (end - 1 - i if REVERSE else begin + i).to(tl.int64)
        arrived = tl.load(arrivals + piece * size + e, mask, other=0.0).to(COMPUTE)
        passed = tl.load(time + piece * times + e // TIME, mask, other=0.0).to(COMPUTE)
        tl.store(arrivals + piece * size + e, carry.to(arrivals.dtype.element_ty), mask)
        carry = tl.exp(rates * passed) * carry + arrived
    row = tl.load(after_row + sequence).to(tl.int64)
    tl.store(after + row * size + e, carry.to(after.dtype.element_ty), and_scalar(mask, row >= 0))


@triton.jit
def _clear_gaps_kernel(
    x, gaps, length, width, n_channels, x_row, x_step, x_group, x_channel, STEPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Zero BLOCK channels of one gap, STEPS steps at a time. Grid: (gaps, programs of a gap, tiles of channels)."""
    gap = gaps + 2 * tl.program_id(0)
    first, end = tl.load(gap), tl.load(gap + 1)
    channel = (tl.program_id(2) * BLOCK + tl.arange(0, BLOCK))[None, :].to(tl.int64)
    x += channel // width * x_group + channel % width * x_channel
    zeros = tl.zeros((STEPS, BLOCK), x.dtype.element_ty)
    for tile in range(tl.program_id(1), tl.cdiv(end - first, STEPS), tl.num_programs(1)):
        position = first + tile * STEPS + tl.arange(0, STEPS)[:, None]
        at = position // length * x_row + position % length * x_step
        tl.store(x + at, zeros, (position < end) & (channel < n_channels))


def clear_gaps(pieces: Pieces, *tensors: Tensor) -> None:
    """Zero what belongs to no sequence in tensors (B, L, H) or (B, L, G, E) of any strides, which no piece writes."""
    for x in tensors:
        x = x.unsqueeze(3) if x.dim() == 3 else x
        batch, length, groups, width = x.shape
        if not (len(pieces.gaps) and x.numel()):
            continue
        steps, block = 16, min(128, triton.next_power_of_2(groups * width))
        programs = min(32, triton.cdiv(batch * length, steps))
        with on_device(x):
            _clear_gaps_kernel[len(pieces.gaps), programs, triton.cdiv(groups * width, block)](
                x, pieces.gaps, length, width, groups * width, *x.stride(), STEPS=steps, BLOCK=block, num_warps=4
            )


def carry(
    pieces: Pieces, arrivals: Tensor, rate: Tensor, time: Tensor, before: Tensor | None, after: Tensor, reverse: bool
) -> None:
    """Turn what each piece adds to a state into what each piece finds, in place, and write what is left at the end.

    Args:
        arrivals: (M, ...) what each piece adds.
        rate, time: the piece lets `exp(rate * time)` pass; rate (r,) and time (M, t) are spread over the state.
        before: (rows, ...) where each sequence begins: initial states, or in `reverse` gradients of final states.
        after: (rows, ...) of the other end, written.
        reverse: whether to go from the last piece to the first.
    """
    size = math.prod(after.shape[1:])
    n_sequences = len(pieces.initial_row)
    if n_sequences == 0 or size == 0:
        return
    block = min(256, triton.next_power_of_2(size))
    rows = (pieces.initial_row, pieces.final_row)
    with on_device(after):
        _carry_kernel[n_sequences, triton.cdiv(size, block)](
            arrivals, rate, time, before, after, pieces.first, *(reversed(rows) if reverse else rows),
            size, RATE=size // rate.numel(), TIME=size // time.shape[1], BLOCK=block, REVERSE=reverse,
            HAS_BEFORE=before is not None, COMPUTE=compute_type(arrivals.dtype), num_warps=4,
        )  # fmt: skip
