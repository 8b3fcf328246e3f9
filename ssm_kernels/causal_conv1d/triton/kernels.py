"""The causal convolution: one kernel forward, two backward, one for a step.

A program takes a tile of channels and some consecutive steps of one sequence, cut in runs of RUN steps. Each lane of
the tile walks its own run with the window in registers, so that an input is loaded once, and again only where runs
meet. A tile is (RUNS, BLOCK_E) where channels lie side by side in memory. Where steps do (TIME_FIRST) it is
(BLOCK_E, RUNS), and a run is loaded and stored as one block.

Values of consecutive steps are tuples of tiles: `window` begins WIDTH - 1 steps before the first step computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import capability, maxnreg_option, num_sms, on_device, pack_directions
from ..._triton.primitives import (
    and_scalar,
    compute_type,
    grid_offset,
    load_segment,
    silu,
    silu_backward,
    unpack_direction,
    zero_padding,
)
from ..._triton.segment_table import SegmentTable, build_segment_table
from . import is_time_first, like

# Elements of a tile, by the bytes of one: 16 bytes a lane of 4 warps forward, 8 backward, where more is kept.
# Chosen from the compiler's register counts; not measured on a GPU.
FORWARD_BYTES, BACKWARD_BYTES = 2048, 1024


@triton.jit
def _forward_kernel(
    x, weight, bias, initial, y, final, table, first_segment, begins, initial_rows, final_rows,
    n_segments, length, height, codes, dim, n_channels,
    x_row, x_time, x_group, x_channel, y_row, y_time, y_group, y_channel, weight_channel, weight_tap,
    initial_row, initial_time, initial_channel,
    WIDTH: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK_E: tl.constexpr, TIME_FIRST: tl.constexpr,
    ALIGNED: tl.constexpr, ROUTED: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    HAS_INITIAL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """RUNS runs of y, or the final window of a sequence. Grid: (segments and then sequences, channel tiles)."""
    group, e, inside, channel = _channels(dim, BLOCK_E, TIME_FIRST)
    grid = (unpack_direction(codes, group), length, height)
    x += group * x_group + e * x_channel
    if HAS_INITIAL:
        initial += channel * initial_channel
    if tl.program_id(0) < n_segments:
        row, first, last, sequence = load_segment(table, tl.program_id(0))
        if ALIGNED:
            first, last = first // RUN * RUN, last // RUN * RUN  # tells the compiler
        sequence = tl.maximum(sequence, 0)  # a segment to spare has no steps
        x_here = x + row * x_row
        step = first + _lanes(RUNS, TIME_FIRST) * RUN
        window = _load_window(
            x_here, x_time, initial, initial_row, initial_time, step, tl.load(begins + sequence), last,
            tl.load(initial_rows + sequence), inside, grid, WIDTH, ROUTED, HAS_INITIAL, COMPUTE,
        )  # fmt: skip
        window += _load_run(x_here, x_time, step, last, inside, grid, RUN, TIME_FIRST, ROUTED, COMPUTE)
        taps, start = _parameters(
            weight,
            weight_channel,
            weight_tap,
            bias,
            channel,
            inside,
            channel if TIME_FIRST else step,
            WIDTH,
            HAS_BIAS,
            COMPUTE,
        )
        out = ()
        for i in tl.static_range(RUN):
            total = start
            for k in tl.static_range(WIDTH):
                total += taps[k] * window[i + k]
            if SILU:
                total = silu(total)
            out += (total,)
        y_here = y + row * y_row + group * y_group + e * y_channel
        _store_run(y_here, y_time, out, step, last, inside, grid, RUN, TIME_FIRST, ROUTED)
    else:
        sequence = tl.program_id(0) - n_segments
        row, begin, end = _load_sequence(table, first_segment, begins, sequence)
        ends = _load_window(
            x + row * x_row, x_time, initial, initial_row, initial_time, end + _lanes(1, TIME_FIRST), begin, end,
            tl.load(initial_rows + sequence), inside, grid, WIDTH, ROUTED, HAS_INITIAL, COMPUTE,
        )  # fmt: skip
        final_at = tl.load(final_rows + sequence).to(tl.int64)
        for i in tl.static_range(WIDTH - 1):
            offset = (final_at * (WIDTH - 1) + i) * n_channels + channel
            tl.store(final + offset, ends[i].to(final.dtype.element_ty), and_scalar(inside, final_at >= 0))


@triton.jit
def _backward_kernel(
    x, weight, bias, initial, dy, dfinal, dx, dweight, dbias, table, first_segment, begins, initial_rows, final_rows,
    n_segments, length, height, codes, dim, n_channels,
    x_row, x_time, x_group, x_channel, dy_row, dy_time, dy_group, dy_channel, dx_row, dx_time, dx_group, dx_channel,
    weight_channel, weight_tap, initial_row, initial_time, initial_channel, dfinal_row, dfinal_time, dfinal_channel,
    WIDTH: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK_E: tl.constexpr, TIME_FIRST: tl.constexpr,
    ALIGNED: tl.constexpr, ROUTED: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_DFINAL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """RUNS runs of dx in each of several segments, and one row of partial sums of dweight and dbias.

    Grid: (programs, channel tiles). The gradient of an output reaches WIDTH - 1 steps back, so each lane computes that
    of as many steps after its run too.
    """
    group, e, inside, channel = _channels(dim, BLOCK_E, TIME_FIRST)
    grid = (unpack_direction(codes, group), length, height)
    x += group * x_group + e * x_channel
    dy += group * dy_group + e * dy_channel
    dx += group * dx_group + e * dx_channel
    if HAS_INITIAL:
        initial += channel * initial_channel
    if HAS_DFINAL:
        dfinal += channel * dfinal_channel
    lanes = _lanes(RUNS, TIME_FIRST)
    taps, start = _parameters(
        weight,
        weight_channel,
        weight_tap,
        bias,
        channel,
        inside,
        channel if TIME_FIRST else lanes,
        WIDTH,
        HAS_BIAS,
        COMPUTE,
    )
    nothing = tl.zeros((BLOCK_E, RUNS) if TIME_FIRST else (RUNS, BLOCK_E), COMPUTE)
    dtaps, dstart = (), nothing
    for _tap in tl.static_range(WIDTH):
        dtaps += (nothing,)
    for segment in range(tl.program_id(0), n_segments, tl.num_programs(0)):
        row, first, last, sequence = load_segment(table, tl.cast(segment, tl.int64))
        if ALIGNED:
            first, last = first // RUN * RUN, last // RUN * RUN  # tells the compiler
        sequence = tl.maximum(sequence, 0)
        row, begin, end = _load_sequence(table, first_segment, begins, sequence)
        step = first + lanes * RUN
        final_at = tl.load(final_rows + sequence)
        x_here, dy_here = x + row * x_row, dy + row * dy_row
        window = _load_window(
            x_here, x_time, initial, initial_row, initial_time, step, begin, last,
            tl.load(initial_rows + sequence), inside, grid, WIDTH, ROUTED, HAS_INITIAL, COMPUTE,
        )  # fmt: skip
        window += _load_run(x_here, x_time, step, last, inside, grid, RUN, TIME_FIRST, ROUTED, COMPUTE)
        dtotal = _load_run(dy_here, dy_time, step, last, inside, grid, RUN, TIME_FIRST, ROUTED, COMPUTE)
        dtotal += _load_steps(dy_here, dy_time, step + RUN, end, inside, grid, WIDTH - 1, ROUTED, COMPUTE)
        if SILU:
            window += _load_steps(x_here, x_time, step + RUN, end, inside, grid, WIDTH - 1, ROUTED, COMPUTE)
            dtotal = _through_silu(dtotal, window, taps, start, WIDTH)
        out = ()
        for i in tl.static_range(RUN):
            total = nothing
            for k in tl.static_range(WIDTH):
                total += taps[k] * dtotal[i + (WIDTH - 1 - k)]
            if HAS_DFINAL:
                total += _load_dfinal(dfinal, dfinal_row, dfinal_time, step + i, end, final_at, inside, WIDTH, COMPUTE)
            out += (total,)
            dstart += dtotal[i]
        _store_run(dx + row * dx_row, dx_time, out, step, last, inside, grid, RUN, TIME_FIRST, ROUTED)
        sums = ()
        for k in tl.static_range(WIDTH):
            total = dtaps[k]
            for i in tl.static_range(RUN):
                total += dtotal[i] * window[i + k]
            sums += (total,)
        dtaps = sums
    lanes_axis: tl.constexpr = 1 if TIME_FIRST else 0
    partial = tl.program_id(0).to(tl.int64) * n_channels + channel
    for k in tl.static_range(WIDTH):
        tl.store(dweight + partial * WIDTH + k, tl.sum(dtaps[k], axis=lanes_axis, keep_dims=True), inside)
    if HAS_BIAS:
        tl.store(dbias + partial, tl.sum(dstart, axis=lanes_axis, keep_dims=True), inside)


@triton.jit
def _initial_kernel(
    x, weight, bias, initial, dy, dfinal, dinitial, table, first_segment, begins, initial_rows, final_rows,
    length, height, codes, dim, n_channels,
    x_row, x_time, x_group, x_channel, dy_row, dy_time, dy_group, dy_channel,
    weight_channel, weight_tap, initial_row, initial_time, initial_channel, dfinal_row, dfinal_time, dfinal_channel,
    WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, ROUTED: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    HAS_DFINAL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The gradient of one sequence's initial window. Tiles are (1, BLOCK_E). Grid: (sequences, channel tiles)."""
    group, e, inside, channel = _channels(dim, BLOCK_E, False)
    grid = (unpack_direction(codes, group), length, height)
    sequence = tl.program_id(0)
    row, begin, end = _load_sequence(table, first_segment, begins, sequence)
    x += row * x_row + group * x_group + e * x_channel
    dy += row * dy_row + group * dy_group + e * dy_channel
    initial += channel * initial_channel
    if HAS_DFINAL:
        dfinal += channel * dfinal_channel
    initial_at = tl.load(initial_rows + sequence)
    step = begin + _lanes(1, False)
    taps, start = _parameters(weight, weight_channel, weight_tap, bias, channel, inside, step, WIDTH, HAS_BIAS, COMPUTE)
    dtotal = _load_steps(dy, dy_time, step, end, inside, grid, WIDTH - 1, ROUTED, COMPUTE)
    if SILU:
        window = _load_window(
            x, x_time, initial, initial_row, initial_time, step, begin, end, initial_at, inside, grid,
            WIDTH, ROUTED, True, COMPUTE,
        )  # fmt: skip
        window += _load_steps(x, x_time, step, end, inside, grid, WIDTH - 1, ROUTED, COMPUTE)
        dtotal = _through_silu(dtotal, window, taps, start, WIDTH)
    for i in tl.static_range(WIDTH - 1):
        total = tl.zeros((1, BLOCK_E), COMPUTE)
        for k in tl.static_range(i + 1):
            total += taps[k] * dtotal[i - k]
        if HAS_DFINAL:
            total += _load_dfinal(
                dfinal, dfinal_row, dfinal_time, step + (i - (WIDTH - 1)), end, tl.load(final_rows + sequence), inside,
                WIDTH, COMPUTE,
            )  # fmt: skip
        offset = (initial_at.to(tl.int64) * (WIDTH - 1) + i) * n_channels + channel
        tl.store(dinitial + offset, total.to(dinitial.dtype.element_ty), and_scalar(inside, initial_at >= 0))


@triton.jit
def _channels(dim, BLOCK_E: tl.constexpr, TIME_FIRST: tl.constexpr):
    """This program's group, its channels in the group, whether they exist, and their numbers among all."""
    tiles = tl.cdiv(dim, BLOCK_E)
    group = (tl.program_id(1) // tiles).to(tl.int64)
    e = tl.program_id(1) % tiles * BLOCK_E + tl.expand_dims(tl.arange(0, BLOCK_E), 1 if TIME_FIRST else 0)
    return group, e.to(tl.int64), e < dim, group * dim + e


@triton.jit
def _lanes(RUNS: tl.constexpr, TIME_FIRST: tl.constexpr):
    return tl.expand_dims(tl.arange(0, RUNS), 0 if TIME_FIRST else 1)


@triton.jit
def _parameters(
    weight, weight_channel, weight_tap, bias, channel, inside, lanes,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The taps of each channel, and where its sums start.

    As whole tiles, in the layout of the inputs: the compiler would otherwise convert the inputs to that of the taps.
    """
    channel = channel + tl.zeros_like(lanes)
    taps = ()
    for k in tl.static_range(WIDTH):
        tap = tl.load(weight + channel * weight_channel + k * weight_tap, inside, other=0.0)
        taps += (tap.to(COMPUTE),)
    if HAS_BIAS:
        return taps, tl.load(bias + channel, inside, other=0.0).to(COMPUTE)
    else:
        return taps, tl.zeros(channel.shape, COMPUTE)


@triton.jit
def _load_sequence(table, first_segment, begins, sequence):
    """Batch row, first step and the step after the last."""
    segment, next_segment = (
        tl.load(first_segment + sequence).to(tl.int64),
        tl.load(first_segment + sequence + 1).to(tl.int64),
    )
    begin = tl.load(begins + sequence)
    row = tl.load(table + segment * 4, next_segment > segment, other=0).to(tl.int64)
    return row, begin, tl.load(table + next_segment * 4 - 2, next_segment > segment, other=begin)


@triton.jit
def _offset(step, time, grid, ROUTED: tl.constexpr):
    """Where a step lies behind its batch row."""
    if ROUTED:
        step = grid_offset(step, *grid)
    return step.to(tl.int64) * time


@triton.jit
def _load_steps(
    x, time, step, end, inside, grid, COUNT: tl.constexpr, ROUTED: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """Tiles at `step` and the COUNT - 1 steps after it, zero from `end` on."""
    values = ()
    for i in tl.static_range(COUNT):
        here = inside & (step + i < end)
        values += (tl.load(x + _offset(step + i, time, grid, ROUTED), here, other=0.0).to(COMPUTE),)
    return values


@triton.jit
def _load_window(
    x, time, initial, initial_row, initial_time, step, begin, end, initial_at, inside, grid,
    WIDTH: tl.constexpr, ROUTED: tl.constexpr, HAS_INITIAL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Tiles at the WIDTH - 1 steps before `step`: before `begin` from row `initial_at` of the initial windows."""
    values = ()
    for i in tl.static_range(WIDTH - 1):
        early = step + (i - (WIDTH - 1))
        here = inside & (early >= begin) & (early < end)
        value = tl.load(x + _offset(early, time, grid, ROUTED), here, other=0.0).to(COMPUTE)
        if HAS_INITIAL:
            at = initial_at.to(tl.int64) * initial_row + (early - begin + (WIDTH - 1)).to(tl.int64) * initial_time
            before = and_scalar(inside & (early < begin), initial_at >= 0)
            value += tl.load(initial + at, before, other=0.0).to(COMPUTE)
        values += (value,)
    return values


@triton.jit
def _load_run(
    x, time, step, end, inside, grid, RUN: tl.constexpr, TIME_FIRST: tl.constexpr, ROUTED: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """As `_load_steps`, of a run."""
    if TIME_FIRST:
        steps = tl.expand_dims(step, 2) + tl.arange(0, RUN)[None, None, :]  # (1, RUNS, RUN)
        here = tl.expand_dims(inside, 2) & (steps < end)
        block = tl.load(tl.expand_dims(x, 2) + _offset(steps, time, grid, ROUTED), here, other=0.0).to(COMPUTE)
        return _unstack(block, RUN)
    else:
        return _load_steps(x, time, step, end, inside, grid, RUN, ROUTED, COMPUTE)


@triton.jit
def _store_run(
    y, time, values, step, end, inside, grid, RUN: tl.constexpr, TIME_FIRST: tl.constexpr, ROUTED: tl.constexpr
):  # fmt: skip
    if TIME_FIRST:
        steps = tl.expand_dims(step, 2) + tl.arange(0, RUN)[None, None, :]
        here = tl.expand_dims(inside, 2) & (steps < end)
        block = _stack(values, RUN).to(y.dtype.element_ty)
        tl.store(tl.expand_dims(y, 2) + _offset(steps, time, grid, ROUTED), block, here)
    else:
        for i in tl.static_range(RUN):
            here = inside & (step + i < end)
            tl.store(y + _offset(step + i, time, grid, ROUTED), values[i].to(y.dtype.element_ty), here)


@triton.jit
def _unstack(block, RUN: tl.constexpr):
    """(BLOCK_E, RUNS, RUN) -> a tuple of RUN tiles. Split in evens and odds until alone, they end up in order."""
    parts = (block,)
    for level in tl.static_range(4):
        if RUN >> level > 1:
            evens, odds = (), ()
            for i in tl.static_range(1 << level):
                pairs = tl.reshape(parts[i], (block.shape[0], block.shape[1], RUN >> (level + 1), 2))
                even, odd = tl.split(pairs)
                evens += (even,)
                odds += (odd,)
            parts = evens + odds
    tiles = ()
    for i in tl.static_range(RUN):
        tiles += (tl.reshape(parts[i], (block.shape[0], block.shape[1])),)
    return tiles


@triton.jit
def _stack(tiles, RUN: tl.constexpr):
    """The inverse of `_unstack`."""
    parts = tiles
    for level in tl.static_range(4):
        if RUN >> level > 1:
            joined = ()
            for i in tl.static_range(RUN >> (level + 1)):
                joined += (tl.join(parts[i], parts[i + (RUN >> (level + 1))]),)
            parts = joined
    return tl.reshape(parts[0], (tiles[0].shape[0], tiles[0].shape[1], RUN))


@triton.jit
def _through_silu(dy, window, taps, start, WIDTH: tl.constexpr):
    """Gradients of the sums from those of their SiLU; the sums are computed again."""
    dtotal = ()
    for i in tl.static_range(len(dy)):
        total = start
        for k in tl.static_range(WIDTH):
            total += taps[k] * window[i + k]
        dtotal += (silu_backward(dy[i], total),)
    return dtotal


@triton.jit
def _load_dfinal(
    dfinal, dfinal_row, dfinal_time, step, end, final_at, inside, WIDTH: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """What reaches the input at `step` through row `final_at` of the final windows."""
    i = step - end + (WIDTH - 1)
    here = and_scalar(inside & (i >= 0) & (step < end), final_at >= 0)
    at = final_at.to(tl.int64) * dfinal_row + i.to(tl.int64) * dfinal_time
    return tl.load(dfinal + at, here, other=0.0).to(COMPUTE)


@triton.jit
def _step_kernel(
    state, x, weight, bias, y,
    dim, state_row, state_time, state_channel, x_row, x_channel, weight_channel, weight_tap,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """BLOCK channels of a batch row: y, and the state moved on by one. Grid: (B, channel tiles)."""
    row = tl.program_id(0).to(tl.int64)
    channel = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = channel < dim
    taps, total = _parameters(
        weight, weight_channel, weight_tap, bias, channel, inside, channel, WIDTH, HAS_BIAS, COMPUTE
    )
    state += row * state_row + channel * state_channel
    now = tl.load(x + row * x_row + channel * x_channel, inside, other=0.0).to(state.dtype.element_ty)
    total += taps[WIDTH - 1] * now.to(COMPUTE)
    for i in tl.static_range(1, WIDTH):
        entry = tl.load(state + (i - 1) * state_time, inside, other=0.0)
        total += taps[i - 1] * entry.to(COMPUTE)
        if i > 1:
            tl.store(state + (i - 2) * state_time, entry, inside)
    if WIDTH > 1:
        tl.store(state + (WIDTH - 2) * state_time, now, inside)
    if SILU:
        total = silu(total)
    tl.store(y + row * dim + channel, total.to(y.dtype.element_ty), inside)


class _Plan(NamedTuple):
    """What the launches of an op share."""

    segments: SegmentTable
    tiles: int
    """How many tiles cover the channels of all groups."""
    sizes: tuple[int, ...]
    tile: dict[str, object]
    options: dict[str, object]

    @property
    def tables(self) -> tuple[Tensor, ...]:
        return self.segments[2:]


def _plan(x, weight, bias, silu, cu_seqlens, seq_idx, directions, height, tile_bytes) -> _Plan:
    batch, length, groups, dim = x.shape
    n_channels, width = weight.shape
    time_first = is_time_first(x)
    # A wider window takes the registers of a wider tile; 128 elements are one a lane.
    size = max(128, tile_bytes // x.element_size() * 4 // max(4, triton.next_power_of_2(width)))
    if dim % 16:  # loads of one element each take more registers for addresses and masks
        size = max(128, size // 2)
    block = min(triton.next_power_of_2(dim), size // 32 if time_first else 128)
    run, runs = 16 // x.element_size() if time_first else 8, size // block  # 16 bytes are the most that one load takes
    is_dense = cu_seqlens is None and seq_idx is None
    tile = {
        "RUN": run,
        "RUNS": runs,
        "TIME_FIRST": time_first,
        "ALIGNED": time_first and is_dense and length % run == 0,
    }
    options = {
        "WIDTH": width,
        "BLOCK_E": block,
        "ROUTED": len(directions) > 0,
        "HAS_BIAS": bias is not None,
        "SILU": silu,
        "COMPUTE": compute_type(x.dtype),
        "num_warps": 4,
    }
    segments = build_segment_table(batch, length, run * runs, cu_seqlens, seq_idx, x.device)
    sizes = (length, height, pack_directions(directions), dim, n_channels)
    return _Plan(segments, groups * triton.cdiv(dim, block), sizes, tile, options)


def forward(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx, directions, height):
    """As `causal_conv1d_triton`: y and the final windows."""
    plan = _plan(x, weight, bias, silu, cu_seqlens, seq_idx, directions, height, FORWARD_BYTES)
    n_channels, width = weight.shape
    y = like(x, lambda shape: torch.empty(shape, dtype=x.dtype, device=x.device))
    rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    final = torch.empty((rows, width - 1, n_channels), dtype=x.dtype, device=x.device)
    n_segments, n_sequences = len(plan.segments.entries), len(plan.segments.sequence_starts) if width > 1 else 0
    if n_channels and n_segments + n_sequences:
        with on_device(x):
            _forward_kernel[n_segments + n_sequences, plan.tiles](
                x, weight, bias, initial_states, y, final, *plan.tables, n_segments, *plan.sizes,
                *x.stride(), *y.stride(), *weight.stride(), *_strides(initial_states),
                HAS_INITIAL=initial_states is not None, **plan.tile, **plan.options,
            )  # fmt: skip
    zero_padding(plan.segments, y)
    return y, final


def backward(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx, directions, height, dy, dfinal):
    """As `causal_conv1d_triton_backward`: gradients of x, weight, bias and initial windows, empty if not there."""
    plan = _plan(x, weight, bias, silu, cu_seqlens, seq_idx, directions, height, BACKWARD_BYTES)
    n_channels, width = weight.shape
    compute = torch.promote_types(x.dtype, torch.float32)
    dx = like(x, lambda shape: torch.empty(shape, dtype=x.dtype, device=x.device))
    # Eight a processor hide each other's waiting; more would only be more partial sums.
    n_segments, n_sequences = len(plan.segments.entries), len(plan.segments.sequence_starts) if width > 1 else 0
    programs = min(n_segments, max(1, 8 * num_sms(x.device) // max(1, plan.tiles)))
    dweight = torch.empty((programs, n_channels, width), dtype=compute, device=x.device)
    dbias = torch.empty((programs, 0 if bias is None else n_channels), dtype=compute, device=x.device)
    shape, dtype = ((0,), x.dtype) if initial_states is None else (initial_states.shape, initial_states.dtype)
    dinitial = torch.empty(shape, dtype=dtype, device=x.device)
    strides = (*weight.stride(), *_strides(initial_states), *_strides(dfinal))
    with on_device(x):
        if programs and n_channels:
            _backward_kernel[programs, plan.tiles](
                x, weight, bias, initial_states, dy, dfinal, dx, dweight, dbias, *plan.tables, n_segments, *plan.sizes,
                *x.stride(), *dy.stride(), *dx.stride(), *strides, HAS_INITIAL=initial_states is not None,
                HAS_DFINAL=dfinal is not None, **plan.tile, **plan.options, **_registers(x.device),
            )  # fmt: skip
        if initial_states is not None and n_sequences and n_channels:
            _initial_kernel[n_sequences, plan.tiles](
                x, weight, bias, initial_states, dy, dfinal, dinitial, *plan.tables, *plan.sizes,
                *x.stride(), *dy.stride(), *strides, HAS_DFINAL=dfinal is not None, **plan.options,
            )  # fmt: skip
    zero_padding(plan.segments, dx)
    dbias = dbias.sum(0) if bias is None else dbias.sum(0).to(bias.dtype)
    return dx, dweight.sum(0).to(weight.dtype), dbias, dinitial


def step(state, x, weight, bias, silu):
    """As `causal_conv1d_triton_step`: y, and `state` moved on in place."""
    batch, dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if batch and dim:
        with on_device(x):
            _step_kernel[batch, triton.cdiv(dim, 256)](
                state, x, weight, bias, y, dim, *state.stride(), *x.stride(), *weight.stride(),
                WIDTH=weight.shape[1], BLOCK=256, HAS_BIAS=bias is not None, SILU=silu,
                COMPUTE=compute_type(x.dtype), num_warps=4,
            )  # fmt: skip
    return y


def _registers(device: torch.device) -> dict[str, int]:
    """For the backward on consumer Blackwell, whose compiler spills to have three blocks on a processor unless told."""
    vendor, version = capability(device)
    return maxnreg_option(168, device) if vendor == "cuda" and version >= 120 else {}


def _strides(windows: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if windows is None else windows.stride()
