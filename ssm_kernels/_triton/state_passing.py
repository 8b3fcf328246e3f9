"""State passing: the sequential pass between two parallel passes over the segments of a sequence.

A parallel pass computes the contribution of each segment to the state, from a state of zero. State passing
(arXiv 2405.21060, section 6, step 3) combines these to the state before each segment,

    h_{m+1} = exp(A dt_sum_m) h_m + S_m,

with S_m the contribution and dt_sum_m the sum of dt of segment m; a second parallel pass starts from h_m. In the
backward the same recurrence runs from the last segment to the first, over gradients.
"""
# Constexpr arguments and tuples of strides, which stubs of Triton do not know.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .device import FUSED_MULTIPLY_ADD, on_device
from .primitives import and_scalar, compute_type
from .segment_table import SegmentTable


@triton.jit
def _state_passing_kernel(
    segment_states_ptr, A_ptr, dt_sum_ptr, incoming_ptr, outgoing_ptr,
    first_segment_ptr, incoming_rows_ptr, outgoing_rows_ptr, size,
    ELEMENTS_PER_A: tl.constexpr, ELEMENTS_PER_DT: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
    HAS_INCOMING: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Pass BLOCK elements of one sequence's state through its segments.

    Grid: sequences x tiles of the state, in one dimension, since the others end at 65,535. Tiles are (BLOCK,).

    Replaces `segment_states` (M, size), the contribution of each segment, by the state before it. Element e decays by
    `exp(A[e // ELEMENTS_PER_A] * dt_sum[m, e // ELEMENTS_PER_DT])` in segment m.
    """
    tiles = (size + BLOCK - 1) // BLOCK
    sequence, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    e = tile * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    mask = e < size
    a = tl.load(A_ptr + e // ELEMENTS_PER_A, mask, other=0.0).to(COMPUTE)
    dt_size = (size + ELEMENTS_PER_DT - 1) // ELEMENTS_PER_DT

    row = tl.load(incoming_rows_ptr + sequence).to(tl.int64)
    h = tl.zeros((BLOCK,), COMPUTE)
    if HAS_INCOMING:
        h = tl.load(incoming_ptr + row * size + e, and_scalar(mask, row >= 0), other=0.0).to(COMPUTE)

    first, after = tl.load(first_segment_ptr + sequence), tl.load(first_segment_ptr + sequence + 1)
    e_dt = e // ELEMENTS_PER_DT
    # Each segment is loaded while the one before it is summed: the loop would wait for memory at every step.
    segment = (after - 1 if REVERSE else first).to(tl.int64)
    mask_next = and_scalar(mask, first < after)
    contribution = tl.load(segment_states_ptr + segment * size + e, mask_next, other=0.0)
    dt_sum = tl.load(dt_sum_ptr + segment * dt_size + e_dt, mask_next, other=0.0)
    for i in range(after - first):
        next_segment = segment - 1 if REVERSE else segment + 1
        mask_next = and_scalar(mask, i + 1 < after - first)
        next_contribution = tl.load(segment_states_ptr + next_segment * size + e, mask_next, other=0.0)
        next_dt_sum = tl.load(dt_sum_ptr + next_segment * dt_size + e_dt, mask_next, other=0.0)
        tl.store(segment_states_ptr + segment * size + e, h.to(segment_states_ptr.dtype.element_ty), mask)
        # A state of 0 stays 0, also where the growing decays of a segment multiply to infinity.
        h = tl.where(h == 0.0, 0.0, tl.exp(a * dt_sum.to(COMPUTE)) * h) + contribution.to(COMPUTE)
        segment, contribution, dt_sum = next_segment, next_contribution, next_dt_sum

    row = tl.load(outgoing_rows_ptr + sequence).to(tl.int64)
    tl.store(outgoing_ptr + row * size + e, h.to(outgoing_ptr.dtype.element_ty), and_scalar(mask, row >= 0))


def state_passing(
    segments: SegmentTable,
    segment_states: Tensor,
    A: Tensor,
    dt_sum: Tensor,
    incoming: Tensor | None,
    outgoing: Tensor,
    reverse: bool,
) -> None:
    """Replace the contribution of each segment by the state before it, in place, and write the states at the other end.

    Args:
        segments: the segments of all sequences.
        segment_states: (M, ...) the contribution of each segment; overwritten.
        A: (a,) decay rates, each of as many consecutive elements of a state.
        dt_sum: (M, t) sums of dt over each segment, each for as many consecutive elements of a state.
        incoming: (rows, ...) states before the first segment: initial states; gradients of final states in `reverse`.
        outgoing: (rows, ...) states after the last segment: final states, or gradients of initial states; written.
        reverse: visit the segments from last to first.
    """
    size = math.prod(outgoing.shape[1:])
    n_sequences = len(segments.initial_state_rows)
    if n_sequences == 0 or size == 0:
        return
    block = min(256, triton.next_power_of_2(size))
    rows = (segments.initial_state_rows, segments.final_state_rows)
    with on_device(outgoing):
        _state_passing_kernel[(n_sequences * triton.cdiv(size, block),)](
            segment_states, A, dt_sum, incoming, outgoing,
            segments.first_segment, *(reversed(rows) if reverse else rows), size,
            ELEMENTS_PER_A=size // A.numel(), ELEMENTS_PER_DT=size // dt_sum.shape[1], BLOCK=block, REVERSE=reverse,
            HAS_INCOMING=incoming is not None, COMPUTE=compute_type(segment_states.dtype), num_warps=4,
            **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
