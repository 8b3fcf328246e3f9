"""A tile of the convolution: BLOCK_E channels, and RUNS runs of RUN consecutive steps each.

A program takes a tile of one segment. Each lane of the tile walks its own run with the window in registers, so that an
input is loaded once, and again only where runs meet. A tile is (RUNS, BLOCK_E) where channels are contiguous in memory.
Where steps are (TIME_FIRST) it is (BLOCK_E, RUNS), and a run is loaded and stored as one block.

Values of consecutive steps are tuples of tiles: `window` starts WIDTH - 1 steps before the first step computed. `grid`
is (direction, length, height) of a scan direction, or None where steps are positions.
"""
# Constexpr arguments and tuples of strides, which stubs of Triton do not know.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..._core.memory_layout import has_contiguous_steps
from ..._triton.device import pack_directions
from ..._triton.primitives import and_scalar, compute_type, grid_offset
from ..._triton.segment_table import SegmentTable, build_segment_table

# --- jit functions ------------------------------------------------------------------------------------------------


@triton.jit
def tile_channels(dim, BLOCK_E: tl.constexpr, TIME_FIRST: tl.constexpr):
    """This program's group, its channels in the group, their mask, and their numbers among all channels.

    Shapes: (BLOCK_E, 1) with TIME_FIRST, else (1, BLOCK_E).
    """
    tiles = tl.cdiv(dim, BLOCK_E)
    group = (tl.program_id(1) // tiles).to(tl.int64)
    e = tl.program_id(1) % tiles * BLOCK_E + tl.expand_dims(tl.arange(0, BLOCK_E), 1 if TIME_FIRST else 0)
    return group, e.to(tl.int64), e < dim, group * dim + e


@triton.jit
def tile_runs(RUNS: tl.constexpr, TIME_FIRST: tl.constexpr):
    """The numbers of a tile's runs: (1, RUNS) with TIME_FIRST, else (RUNS, 1)."""
    return tl.expand_dims(tl.arange(0, RUNS), 0 if TIME_FIRST else 1)


@triton.jit
def load_taps_and_bias(
    weight_ptr, bias_ptr, weight_strides, channel, channel_mask, lanes,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """WIDTH taps of each channel, and the bias (zero without one).

    As unsplit tiles, broadcast with `lanes`, in the layout of the inputs: the compiler would otherwise convert the
    inputs to the layout of the taps.
    """
    stride_channel, stride_tap = weight_strides
    channel = channel + tl.zeros_like(lanes)
    taps = ()
    for k in tl.static_range(WIDTH):
        tap = tl.load(weight_ptr + channel * stride_channel + k * stride_tap, channel_mask, other=0.0)
        taps += (tap.to(COMPUTE),)
    if HAS_BIAS:
        return taps, tl.load(bias_ptr + channel, channel_mask, other=0.0).to(COMPUTE)
    else:
        return taps, tl.zeros(channel.shape, COMPUTE)


@triton.jit
def load_sequence(segments_ptr, first_segment_ptr, sequence_starts_ptr, sequence):
    """Batch row (int64), first step, and the step after the last of a sequence, which may have none."""
    first = tl.load(first_segment_ptr + sequence).to(tl.int64)
    after = tl.load(first_segment_ptr + sequence + 1).to(tl.int64)
    start = tl.load(sequence_starts_ptr + sequence)
    row = tl.load(segments_ptr + first * 4, after > first, other=0).to(tl.int64)
    end = tl.load(segments_ptr + after * 4 - 2, after > first, other=start)  # of its last segment
    return row, start, end


@triton.jit
def step_offset(step, stride_step, grid):
    """Offset of a step from the start of its batch row."""
    if grid is not None:
        step = grid_offset(step, *grid)
    return step.to(tl.int64) * stride_step


@triton.jit
def load_steps(
    row_ptr, stride_step, step, end, channel_mask, grid, COUNT: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """COUNT tiles: `step` and the steps after it, zero from `end` on."""
    values = ()
    for i in tl.static_range(COUNT):
        mask = channel_mask & (step + i < end)
        values += (tl.load(row_ptr + step_offset(step + i, stride_step, grid), mask, other=0.0).to(COMPUTE),)
    return values


@triton.jit
def load_window(
    row_ptr, stride_step, initial_states_ptr, initial_states_strides, step, start, end, initial_state_row, channel_mask,
    grid, WIDTH: tl.constexpr, HAS_INITIAL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """WIDTH - 1 tiles: the steps before `step`. Those before `start` come from the initial state, or are zero."""
    values = ()
    for i in tl.static_range(WIDTH - 1):
        earlier = step + (i - (WIDTH - 1))
        mask = channel_mask & (earlier >= start) & (earlier < end)
        value = tl.load(row_ptr + step_offset(earlier, stride_step, grid), mask, other=0.0).to(COMPUTE)
        if HAS_INITIAL:
            state_step = (earlier - start + (WIDTH - 1)).to(tl.int64)
            offset = initial_state_row.to(tl.int64) * initial_states_strides[0] + state_step * initial_states_strides[1]
            mask = and_scalar(channel_mask & (earlier < start), initial_state_row >= 0)
            value += tl.load(initial_states_ptr + offset, mask, other=0.0).to(COMPUTE)
        values += (value,)
    return values


@triton.jit
def load_run(
    row_ptr, stride_step, step, end, channel_mask, grid,
    RUN: tl.constexpr, TIME_FIRST: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """RUN tiles: the run that starts at `step`, zero from `end` on."""
    if TIME_FIRST:
        steps = tl.expand_dims(step, 2) + tl.arange(0, RUN)[None, None, :]  # (1, RUNS, RUN)
        mask = tl.expand_dims(channel_mask, 2) & (steps < end)  # (BLOCK_E, RUNS, RUN)
        block_ptr = tl.expand_dims(row_ptr, 2) + step_offset(steps, stride_step, grid)
        return unstack(tl.load(block_ptr, mask, other=0.0).to(COMPUTE), RUN)
    else:
        return load_steps(row_ptr, stride_step, step, end, channel_mask, grid, RUN, COMPUTE)


@triton.jit
def store_run(
    row_ptr, stride_step, values, step, end, channel_mask, grid, RUN: tl.constexpr, TIME_FIRST: tl.constexpr
):  # fmt: skip
    """Write RUN tiles to the run that starts at `step`, up to `end`."""
    if TIME_FIRST:
        steps = tl.expand_dims(step, 2) + tl.arange(0, RUN)[None, None, :]  # (1, RUNS, RUN)
        mask = tl.expand_dims(channel_mask, 2) & (steps < end)  # (BLOCK_E, RUNS, RUN)
        block = stack(values, RUN).to(row_ptr.dtype.element_ty)
        tl.store(tl.expand_dims(row_ptr, 2) + step_offset(steps, stride_step, grid), block, mask)
    else:
        for i in tl.static_range(RUN):
            mask = channel_mask & (step + i < end)
            at_ptr = row_ptr + step_offset(step + i, stride_step, grid)
            tl.store(at_ptr, values[i].to(row_ptr.dtype.element_ty), mask)


@triton.jit
def unstack(block, RUN: tl.constexpr):
    """(BLOCK_E, RUNS, RUN) -> RUN tiles (BLOCK_E, RUNS), by splitting evens from odds until each is alone."""
    parts = (block,)
    for level in tl.static_range(4):
        if RUN >> level > 1:
            evens, odds = (), ()
            for i in tl.static_range(1 << level):
                pairs = tl.reshape(parts[i], (block.shape[0], block.shape[1], RUN >> (level + 1), 2))
                even, odd = tl.split(pairs)  # (BLOCK_E, RUNS, RUN >> (level + 1)) each
                evens += (even,)
                odds += (odd,)
            parts = evens + odds
    tiles = ()
    for i in tl.static_range(RUN):
        tiles += (tl.reshape(parts[i], (block.shape[0], block.shape[1])),)
    return tiles


@triton.jit
def stack(tiles, RUN: tl.constexpr):
    """The inverse of `unstack`."""
    parts = tiles
    for level in tl.static_range(4):
        if RUN >> level > 1:
            joined = ()
            for i in tl.static_range(RUN >> (level + 1)):
                joined += (tl.join(parts[i], parts[i + (RUN >> (level + 1))]),)
            parts = joined
    return tl.reshape(parts[0], (tiles[0].shape[0], tiles[0].shape[1], RUN))


# --- launches -----------------------------------------------------------------------------------------------------


class SharedArguments(NamedTuple):
    """Arguments that all kernels of one call take."""

    segments: SegmentTable
    channel_tiles: int
    """Tiles that cover the channels of all groups."""
    sizes: tuple[int, int, int, int, int]
    """Length, height of the grid, packed directions, channels of a group, channels of all groups."""
    options: dict[str, Any]
    """Compile-time arguments of every kernel."""
    run_options: dict[str, Any]
    """Compile-time arguments of kernels that walk runs."""


def shared_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    directions: Sequence[int],
    height: int,
    tile_bytes: int,
) -> SharedArguments:
    """Cut the sequences of a call in segments of one tile, and the channels in tiles.

    Args:
        x: (B, L, G, E).
        weight: (G * E, K).
        tile_bytes: size of a tile in bytes, at K of at most 4.
    """
    batch, length, groups, dim = x.shape
    n_channels, width = weight.shape
    time_first = has_contiguous_steps(x)
    # A wider window takes the registers of a wider tile; 128 elements are one a lane.
    size = max(128, tile_bytes // x.element_size() * 4 // max(4, triton.next_power_of_2(width)))
    if dim % 16:  # loads of single elements take more registers for addresses and masks
        size = max(128, size // 2)
    block = min(triton.next_power_of_2(dim), size // 32 if time_first else 128)
    run = 16 // x.element_size() if time_first else 8  # 16 bytes are the most that one load takes
    runs = size // block
    is_dense = cu_seqlens is None and seq_idx is None
    options = {
        "WIDTH": width,
        "BLOCK_E": block,
        "HAS_DIRECTIONS": len(directions) > 0,
        "HAS_BIAS": bias is not None,
        "SILU": silu,
        "COMPUTE": compute_type(x.dtype),
        "num_warps": 4,
    }
    run_options = {
        "RUN": run,
        "RUNS": runs,
        "TIME_FIRST": time_first,
        "ALIGNED": time_first and is_dense and length % run == 0,
    }
    segments = build_segment_table(batch, length, run * runs, cu_seqlens, seq_idx, x.device)
    sizes = (length, height, pack_directions(directions), dim, n_channels)
    return SharedArguments(segments, groups * triton.cdiv(dim, block), sizes, options, run_options)


def optional_strides(states: Tensor | None) -> tuple[int, ...]:
    """Strides of (rows, K - 1, D) states, or zeros."""
    return (0, 0, 0) if states is None else states.stride()
