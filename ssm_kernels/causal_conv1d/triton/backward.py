"""The backward kernels of the convolution and their launches."""
# Constexpr arguments and tuples of strides, which stubs of Triton do not know.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._core.memory_layout import empty_like
from ..._triton.device import FUSED_MULTIPLY_ADD, capability, launch_grid, maxnreg_option, num_sms, on_device
from ..._triton.primitives import and_scalar, load_segment, silu_backward, unpack_direction, zero_padding
from .tile import (
    load_run,
    load_sequence,
    load_steps,
    load_taps_and_bias,
    load_window,
    optional_strides,
    shared_arguments,
    store_run,
    tile_channels,
    tile_runs,
)

TILE_BYTES = 1024
"""Half of the forward's: more stays in registers. From the compiler's register counts; not measured on a GPU."""


@triton.jit
def _backward_kernel(
    x_ptr, weight_ptr, bias_ptr, initial_states_ptr, dy_ptr, dfinal_states_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    segments_ptr, first_segment_ptr, sequence_starts_ptr, initial_state_rows_ptr, final_state_rows_ptr,
    n_segments, length, height, directions, dim, n_channels,
    x_strides, dy_strides, dx_strides, weight_strides, initial_states_strides, dfinal_states_strides,
    WIDTH: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK_E: tl.constexpr, TIME_FIRST: tl.constexpr,
    ALIGNED: tl.constexpr, HAS_DIRECTIONS: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_DFINAL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute RUNS runs of dx in each of several segments, and one row of partial sums of dweight and dbias.

    Grid: (programs, channel tiles); a program takes every `programs`-th segment. Tiles are (RUNS, BLOCK_E), or
    (BLOCK_E, RUNS) with TIME_FIRST. The gradient of an output reaches WIDTH - 1 steps back, so each lane computes that
    of as many steps after its run too. Partial sums are (programs, G * E, WIDTH) and (programs, G * E).
    """
    x_batch, x_step, x_group, x_channel = x_strides
    dy_batch, dy_step, dy_group, dy_channel = dy_strides
    dx_batch, dx_step, dx_group, dx_channel = dx_strides
    group, e, channel_mask, channel = tile_channels(dim, BLOCK_E, TIME_FIRST)
    grid = (unpack_direction(directions, group), length, height) if HAS_DIRECTIONS else None
    x_ptr += group * x_group + e * x_channel
    dy_ptr += group * dy_group + e * dy_channel
    dx_ptr += group * dx_group + e * dx_channel
    if HAS_INITIAL:
        initial_states_ptr += channel * initial_states_strides[2]
    if HAS_DFINAL:
        dfinal_states_ptr += channel * dfinal_states_strides[2]

    runs = tile_runs(RUNS, TIME_FIRST)
    lanes = channel if TIME_FIRST else runs
    taps, bias = load_taps_and_bias(
        weight_ptr, bias_ptr, weight_strides, channel, channel_mask, lanes, WIDTH, HAS_BIAS, COMPUTE
    )
    zeros = tl.zeros((BLOCK_E, RUNS) if TIME_FIRST else (RUNS, BLOCK_E), COMPUTE)
    dtaps, dbias = (), zeros
    for _tap in tl.static_range(WIDTH):
        dtaps += (zeros,)

    for segment in range(tl.program_id(0), n_segments, tl.num_programs(0)):
        _, start, end, sequence = load_segment(segments_ptr, tl.cast(segment, tl.int64))
        if ALIGNED:  # true already; the compiler learns it
            start, end = start // RUN * RUN, end // RUN * RUN
        sequence = tl.maximum(sequence, 0)  # an unused entry has no steps
        row, sequence_start, sequence_end = load_sequence(
            segments_ptr, first_segment_ptr, sequence_starts_ptr, sequence
        )
        step = start + runs * RUN  # first of each run
        final_state_row = tl.load(final_state_rows_ptr + sequence)
        x_row_ptr, dy_row_ptr = x_ptr + row * x_batch, dy_ptr + row * dy_batch

        window = load_window(
            x_row_ptr, x_step, initial_states_ptr, initial_states_strides, step, sequence_start, end,
            tl.load(initial_state_rows_ptr + sequence), channel_mask, grid, WIDTH, HAS_INITIAL, COMPUTE,
        )  # fmt: skip
        window += load_run(x_row_ptr, x_step, step, end, channel_mask, grid, RUN, TIME_FIRST, COMPUTE)
        # Gradients of the sums before the activation, of the run and the WIDTH - 1 steps after it.
        dacc = load_run(dy_row_ptr, dy_step, step, end, channel_mask, grid, RUN, TIME_FIRST, COMPUTE)
        dacc += load_steps(dy_row_ptr, dy_step, step + RUN, sequence_end, channel_mask, grid, WIDTH - 1, COMPUTE)
        if SILU:
            window += load_steps(x_row_ptr, x_step, step + RUN, sequence_end, channel_mask, grid, WIDTH - 1, COMPUTE)
            dacc = _activation_backward(dacc, window, taps, bias, WIDTH)

        # dx_t = sum_k weight_k dacc_{t + WIDTH - 1 - k}
        out = ()
        for i in tl.static_range(RUN):
            acc = zeros
            for k in tl.static_range(WIDTH):
                acc += taps[k] * dacc[i + (WIDTH - 1 - k)]
            if HAS_DFINAL:
                acc += _load_dfinal(
                    dfinal_states_ptr, dfinal_states_strides, step + i, sequence_end, final_state_row, channel_mask,
                    WIDTH, COMPUTE,
                )  # fmt: skip
            out += (acc,)
            dbias += dacc[i]
        store_run(dx_ptr + row * dx_batch, dx_step, out, step, end, channel_mask, grid, RUN, TIME_FIRST)

        # dweight_k = sum_t dacc_t x_{t - WIDTH + 1 + k}
        sums = ()
        for k in tl.static_range(WIDTH):
            acc = dtaps[k]
            for i in tl.static_range(RUN):
                acc += dacc[i] * window[i + k]
            sums += (acc,)
        dtaps = sums

    run_axis: tl.constexpr = 1 if TIME_FIRST else 0
    partial = tl.program_id(0).to(tl.int64) * n_channels + channel
    for k in tl.static_range(WIDTH):
        tl.store(dweight_ptr + partial * WIDTH + k, tl.sum(dtaps[k], axis=run_axis, keep_dims=True), channel_mask)
    if HAS_BIAS:
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=run_axis, keep_dims=True), channel_mask)


@triton.jit
def _initial_states_kernel(
    x_ptr, weight_ptr, bias_ptr, initial_states_ptr, dy_ptr, dfinal_states_ptr, dinitial_states_ptr,
    segments_ptr, first_segment_ptr, sequence_starts_ptr, initial_state_rows_ptr, final_state_rows_ptr,
    length, height, directions, dim, n_channels,
    x_strides, dy_strides, weight_strides, initial_states_strides, dfinal_states_strides,
    WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, HAS_DIRECTIONS: tl.constexpr, HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr, HAS_DFINAL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of one sequence's initial state.

    Grid: (sequences, channel tiles). Tiles are (1, BLOCK_E).
    """
    x_batch, x_step, x_group, x_channel = x_strides
    dy_batch, dy_step, dy_group, dy_channel = dy_strides
    group, e, channel_mask, channel = tile_channels(dim, BLOCK_E, False)
    grid = (unpack_direction(directions, group), length, height) if HAS_DIRECTIONS else None
    sequence = tl.program_id(0)
    row, start, end = load_sequence(segments_ptr, first_segment_ptr, sequence_starts_ptr, sequence)
    initial_state_row = tl.load(initial_state_rows_ptr + sequence)
    x_ptr += row * x_batch + group * x_group + e * x_channel
    dy_ptr += row * dy_batch + group * dy_group + e * dy_channel
    initial_states_ptr += channel * initial_states_strides[2]
    if HAS_DFINAL:
        dfinal_states_ptr += channel * dfinal_states_strides[2]

    step = start + tile_runs(1, False)
    taps, bias = load_taps_and_bias(
        weight_ptr, bias_ptr, weight_strides, channel, channel_mask, step, WIDTH, HAS_BIAS, COMPUTE
    )
    # Only the first WIDTH - 1 outputs see the initial state.
    dacc = load_steps(dy_ptr, dy_step, step, end, channel_mask, grid, WIDTH - 1, COMPUTE)
    if SILU:
        window = load_window(
            x_ptr, x_step, initial_states_ptr, initial_states_strides, step, start, end, initial_state_row,
            channel_mask, grid, WIDTH, True, COMPUTE,
        )  # fmt: skip
        window += load_steps(x_ptr, x_step, step, end, channel_mask, grid, WIDTH - 1, COMPUTE)
        dacc = _activation_backward(dacc, window, taps, bias, WIDTH)

    for i in tl.static_range(WIDTH - 1):
        acc = tl.zeros((1, BLOCK_E), COMPUTE)
        for k in tl.static_range(i + 1):
            acc += taps[k] * dacc[i - k]
        if HAS_DFINAL:  # a sequence shorter than the window ends with a part of its initial state
            acc += _load_dfinal(
                dfinal_states_ptr, dfinal_states_strides, step + (i - (WIDTH - 1)), end,
                tl.load(final_state_rows_ptr + sequence), channel_mask, WIDTH, COMPUTE,
            )  # fmt: skip
        offset = (initial_state_row.to(tl.int64) * (WIDTH - 1) + i) * n_channels + channel
        mask = and_scalar(channel_mask, initial_state_row >= 0)
        tl.store(dinitial_states_ptr + offset, acc.to(dinitial_states_ptr.dtype.element_ty), mask)


@triton.jit
def _activation_backward(dy, window, taps, bias, WIDTH: tl.constexpr):
    """Gradients of the sums before SiLU from those after it. The sums are computed again from the window."""
    dacc = ()
    for i in tl.static_range(len(dy)):
        acc = bias
        for k in tl.static_range(WIDTH):
            acc += taps[k] * window[i + k]
        dacc += (silu_backward(dy[i], acc),)
    return dacc


@triton.jit
def _load_dfinal(
    dfinal_states_ptr, dfinal_states_strides, step, sequence_end, final_state_row, channel_mask,
    WIDTH: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Gradient of the input at `step` as an entry of the final state; zero where it is none."""
    i = step - sequence_end + (WIDTH - 1)
    mask = and_scalar(channel_mask & (i >= 0) & (step < sequence_end), final_state_row >= 0)
    offset = final_state_row.to(tl.int64) * dfinal_states_strides[0] + i.to(tl.int64) * dfinal_states_strides[1]
    return tl.load(dfinal_states_ptr + offset, mask, other=0.0).to(COMPUTE)


def backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    directions: Sequence[int],
    height: int,
    dy: Tensor,
    dfinal_states: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run `causal_conv1d_triton_backward`: dx, dweight, dbias and dinitial_states.

    Gradients of arguments that are None are empty.
    """
    shared = shared_arguments(x, weight, bias, silu, cu_seqlens, seq_idx, directions, height, TILE_BYTES)
    segments = shared.segments
    n_segments = len(segments.entries)
    n_channels, width = weight.shape
    n_sequences = len(segments.sequence_starts) if width > 1 else 0
    # Eight programs a multiprocessor hide each other's latency; more would only be more partial sums.
    programs = min(n_segments, max(1, 8 * num_sms(x.device) // max(1, shared.channel_tiles)))

    compute = torch.promote_types(x.dtype, torch.float32)
    dx = empty_like(x)
    dweight = torch.empty((programs, n_channels, width), dtype=compute, device=x.device)
    dbias = torch.empty((programs, 0 if bias is None else n_channels), dtype=compute, device=x.device)
    shape, dtype = ((0,), x.dtype) if initial_states is None else (initial_states.shape, initial_states.dtype)
    dinitial_states = torch.empty(shape, dtype=dtype, device=x.device)
    weight_and_state_strides = (weight.stride(), optional_strides(initial_states), optional_strides(dfinal_states))
    with on_device(x):
        if programs and n_channels:
            _backward_kernel[launch_grid(programs, shared.channel_tiles, "tiles of channels")](
                x, weight, bias, initial_states, dy, dfinal_states, dx, dweight, dbias, *segments.tables, n_segments,
                *shared.sizes, x.stride(), dy.stride(), dx.stride(), *weight_and_state_strides,
                HAS_INITIAL=initial_states is not None, HAS_DFINAL=dfinal_states is not None, **shared.options,
                **shared.run_options, **_register_limit(x.device),
                **FUSED_MULTIPLY_ADD,
            )  # fmt: skip
        if initial_states is not None and n_sequences and n_channels:
            _initial_states_kernel[launch_grid(n_sequences, shared.channel_tiles, "tiles of channels")](
                x, weight, bias, initial_states, dy, dfinal_states, dinitial_states, *segments.tables, *shared.sizes,
                x.stride(), dy.stride(), *weight_and_state_strides, HAS_DFINAL=dfinal_states is not None,
                **shared.options,
                **FUSED_MULTIPLY_ADD,
            )  # fmt: skip
    zero_padding(segments, dx)
    dbias = dbias.sum(0) if bias is None else dbias.sum(0).to(bias.dtype)
    return dx, dweight.sum(0).to(weight.dtype), dbias, dinitial_states


def _register_limit(device: torch.device) -> dict[str, int]:
    """On consumer Blackwell, a limit that keeps ptxas from spilling to fit three blocks on a multiprocessor."""
    vendor, version = capability(device)
    return maxnreg_option(168, device) if vendor == "cuda" and int(version) >= 120 else {}
