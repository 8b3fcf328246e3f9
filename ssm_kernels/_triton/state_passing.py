"""States carried over the segments of a sequence: the sequential part between two parallel passes."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .device import on_device
from .primitives import and_scalar, compute_type
from .segment_table import SegmentTable


@triton.jit
def _state_passing_kernel(
    segment_states, rate, dt_sum, before, after, first, before_row, after_row,
    size, RATE: tl.constexpr, TIME: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
    HAS_BEFORE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Carry a tile of one sequence's state over its segments. Grid: (sequences, tiles of the state).

    `segment_states` (M, size) holds what each segment adds, and is overwritten by what each segment finds; a segment lets
    `exp(rate[e // RATE] * dt_sum[segment, e // TIME])` of element e pass.
    """
    sequence = tl.program_id(0)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = e < size
    rates = tl.load(rate + e // RATE, mask, other=0.0).to(COMPUTE)
    times = (size + TIME - 1) // TIME
    row = tl.load(before_row + sequence).to(tl.int64)
    h = tl.zeros((BLOCK,), COMPUTE)
    if HAS_BEFORE:
        h = tl.load(before + row * size + e, and_scalar(mask, row >= 0), other=0.0).to(COMPUTE)
    begin, end = tl.load(first + sequence), tl.load(first + sequence + 1)
    for i in range(end - begin):
        segment = (end - 1 - i if REVERSE else begin + i).to(tl.int64)
        arrived = tl.load(segment_states + segment * size + e, mask, other=0.0).to(COMPUTE)
        passed = tl.load(dt_sum + segment * times + e // TIME, mask, other=0.0).to(COMPUTE)
        tl.store(segment_states + segment * size + e, h.to(segment_states.dtype.element_ty), mask)
        h = tl.exp(rates * passed) * h + arrived
    row = tl.load(after_row + sequence).to(tl.int64)
    tl.store(after + row * size + e, h.to(after.dtype.element_ty), and_scalar(mask, row >= 0))


def state_passing(
    segments: SegmentTable,
    segment_states: Tensor,
    rate: Tensor,
    dt_sum: Tensor,
    before: Tensor | None,
    after: Tensor,
    reverse: bool,
) -> None:
    """Turn what each segment adds to a state into what each segment finds, in place, and write what is left at the end.

    Args:
        segment_states: (M, ...) what each segment adds.
        rate, dt_sum: the segment lets `exp(rate * dt_sum)` pass; rate (r,) and time (M, t) are spread over the state.
        before: (rows, ...) where each sequence begins: initial states, or in `reverse` gradients of final states.
        after: (rows, ...) of the other end, written.
        reverse: whether to go from the last segment to the first.
    """
    size = math.prod(after.shape[1:])
    n_sequences = len(segments.initial_state_rows)
    if n_sequences == 0 or size == 0:
        return
    block = min(256, triton.next_power_of_2(size))
    rows = (segments.initial_state_rows, segments.final_state_rows)
    with on_device(after):
        _state_passing_kernel[n_sequences, triton.cdiv(size, block)](
            segment_states, rate, dt_sum, before, after, segments.first_segment, *(reversed(rows) if reverse else rows),
            size, RATE=size // rate.numel(), TIME=size // dt_sum.shape[1], BLOCK=block, REVERSE=reverse,
            HAS_BEFORE=before is not None, COMPUTE=compute_type(segment_states.dtype), num_warps=4,
        )  # fmt: skip
