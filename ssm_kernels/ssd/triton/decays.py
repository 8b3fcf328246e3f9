"""Decays of all chunks of SSD, computed once by a kernel of their own, before the kernels that scan the chunks.

They depend on dt and A alone, but take exponentials, cumulative sums over a chunk and their barriers: in a kernel that
scans, these would come before the first matrix product of each chunk, with nothing to overlap them, and once a tile of
P. Here many chunks are computed at once, and the scan reads four numbers a step and head, a chunk ahead.

The backward has a table of its own, which its state kernel writes: dt and both sums, from a checkpoint on. That kernel
waits for memory, not for its barriers, so a launch more would save no time; and of the numbers here, which are products
with dt, the gradients of dt and A could not be computed.
"""

# The stubs know neither launches nor what jit functions return.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import FUSED_MULTIPLY_ADD, on_device
from ..._triton.primitives import load_segment
from ..._triton.segment_table import SegmentTable
from .chunk import ScanInputs, Tiles, group_direction, load_dt, load_head, step_positions, sum_log_decays

BLOCK_H = 16
"""Heads of a program: adjacent in memory, so that loads of dt are wide."""
MAX_PARALLEL_CHUNKS = 32
"""Most programs that share the chunks of a segment."""


class ChunkDecays(NamedTuple):
    """Decays of the chunks of all segments, Q steps each; steps beyond the end of a segment have a dt of 0.

    Chunk c of segment m is row `chunk_row(...) + c`; some rows are unused.
    """

    steps: Tensor
    """(rows, H, 4, Q): for each step the coarse and the fine part of the cumulative log2 decay, as `sum_log_decays`
    returns them, and the weights of its input in an output of the chunk, dt exp2(-fine), and in the state after the
    chunk, dt exp2(total - coarse - fine); with `input_weights` those in place of dt."""
    totals: Tensor
    """(rows, H, 2): the decay across the chunk, and the sum of its dt."""
    segment_rows: int
    """Rows of a segment where sequences are not packed."""


def compute_chunk_decays(inputs: ScanInputs, tiles: Tiles, segments: SegmentTable) -> ChunkDecays:
    """Compute the decays of the chunks of all segments."""
    num_segments, Q = len(segments.entries), tiles.chunk_size
    segment_rows = triton.cdiv(min(segments.size, inputs.length), Q)
    rows = inputs.batch * inputs.length // Q + num_segments if inputs.is_packed else num_segments * segment_rows
    decays = ChunkDecays(inputs.empty(rows, inputs.heads, 4, Q), inputs.empty(rows, inputs.heads, 2), segment_rows)
    parallel_chunks = min(MAX_PARALLEL_CHUNKS, segment_rows)
    names = ("H", "G", "NUM_DIRECTIONS", "HAS_DT_BIAS", "DT_SOFTPLUS", "HAS_DT_LIMIT", "DT_MIN", "DT_MAX", "COMPUTE")
    num_programs = num_segments * parallel_chunks * triton.cdiv(inputs.heads, BLOCK_H)
    if num_programs:
        with on_device(inputs.x):
            _chunk_decays_kernel[(num_programs,)](
                inputs.dt, inputs.A, inputs.dt_bias, inputs.input_weights, decays.steps, decays.totals,
                segments.entries, inputs.length, segment_rows, inputs.height, inputs.directions, inputs.dt.stride(),
                inputs.weight_strides,
                Q=Q, BLOCK_H=BLOCK_H, PARALLEL_CHUNKS=parallel_chunks, IS_PACKED=inputs.is_packed, num_warps=4,
                **{name: inputs.constants[name] for name in names},
                **FUSED_MULTIPLY_ADD,
            )  # fmt: skip
    return decays


@triton.jit
def chunk_row(batch, start, segment, length, segment_rows, IS_PACKED: tl.constexpr, Q: tl.constexpr):
    """Row of `ChunkDecays` of the first chunk of a segment, int64.

    Packed sequences have segments of very different lengths. One that starts at position s of the flattened (B * L)
    steps gets the rows from s // Q + segment on: enough for its chunks, and none of the segment before.
    """
    if IS_PACKED:
        return (batch * length + start) // Q + segment
    return segment.to(tl.int64) * segment_rows


@triton.jit
def _chunk_decays_kernel(
    dt_ptr,  # (B, L, H)
    A_ptr,  # (H,)
    dt_bias_ptr,  # (H,)
    weights_ptr,  # (B, L, H), or None
    steps_ptr,  # (rows, H, 4, Q), written
    totals_ptr,  # (rows, H, 2), written
    segments_ptr,  # (M, 4)
    length, segment_rows, height, directions, dt_strides, weight_strides,
    H: tl.constexpr, G: tl.constexpr, NUM_DIRECTIONS: tl.constexpr, Q: tl.constexpr, BLOCK_H: tl.constexpr,
    PARALLEL_CHUNKS: tl.constexpr, IS_PACKED: tl.constexpr, HAS_DT_BIAS: tl.constexpr, DT_SOFTPLUS: tl.constexpr,
    HAS_DT_LIMIT: tl.constexpr, DT_MIN: tl.constexpr, DT_MAX: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute the decays of every PARALLEL_CHUNKS-th chunk of one segment, for BLOCK_H heads.

    Grid: segments x PARALLEL_CHUNKS x tiles of H. Tiles are (Q, BLOCK_H).
    """
    HEAD_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    program = tl.program_id(0)
    segment, head_tile = program // (PARALLEL_CHUNKS * HEAD_TILES), program % HEAD_TILES
    batch, start, end, sequence = load_segment(segments_ptr, segment)
    row = chunk_row(batch, start, segment, length, segment_rows, IS_PACKED, Q)
    head = (head_tile * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]  # (1, BLOCK_H)
    mask_h = head < H
    head = tl.minimum(head, H - 1)
    q = tl.arange(0, Q)[:, None]  # (Q, 1)
    direction = group_direction(directions, head // (H // G), G, NUM_DIRECTIONS)
    a, dt_bias = load_head(A_ptr, dt_bias_ptr, head, HAS_DT_BIAS, COMPUTE)
    dt_ptr += batch * dt_strides[0] + head.to(tl.int64) * dt_strides[2]
    if weights_ptr is not None:
        weights_ptr += batch * weight_strides[0] + head.to(tl.int64) * weight_strides[2]

    # An unused entry has no steps.
    for chunk in range(program // HEAD_TILES % PARALLEL_CHUNKS, tl.cdiv(end - start, Q), PARALLEL_CHUNKS):
        steps = start + chunk * Q + q
        positions = step_positions(steps, direction, length, height, NUM_DIRECTIONS)
        dt_ptrs, mask = dt_ptr + positions * dt_strides[1], (steps < end) & mask_h
        dt, _ = load_dt(dt_ptrs, mask, dt_bias, DT_SOFTPLUS, HAS_DT_LIMIT, DT_MIN, DT_MAX, COMPUTE)  # (Q, BLOCK_H)
        coarse, fine, coarse_total, fine_total = sum_log_decays(dt, a, Q, COMPUTE)
        chunk_head = (row + chunk) * H + head  # (1, BLOCK_H)
        # First, so that the totals take no registers beside the weights.
        total_ptrs = totals_ptr + chunk_head * 2
        tl.store(total_ptrs, tl.exp2(coarse_total + fine_total)[None, :], mask_h)
        tl.store(total_ptrs + 1, tl.sum(dt, axis=0)[None, :], mask_h)
        decay_to_end = tl.exp2((coarse_total[None, :] - coarse) + (fine_total[None, :] - fine))

        weights = dt
        if weights_ptr is not None:
            weights = tl.load(weights_ptr + positions * weight_strides[1], mask, other=0.0).to(COMPUTE)

        step_ptrs = steps_ptr + chunk_head * (4 * Q) + q
        tl.store(step_ptrs, coarse, mask_h)
        tl.store(step_ptrs + Q, fine, mask_h)
        tl.store(step_ptrs + 2 * Q, weights * tl.exp2(-fine), mask_h)
        tl.store(step_ptrs + 3 * Q, weights * decay_to_end, mask_h)
