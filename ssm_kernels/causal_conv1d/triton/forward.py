"""The forward kernel of the convolution and its launch."""
# Constexpr arguments and tuples of strides, which stubs of Triton do not know.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._core.memory_layout import empty_like
from ..._triton.device import FUSED_MULTIPLY_ADD, launch_grid, on_device
from ..._triton.primitives import and_scalar, load_segment, silu, unpack_direction, zero_padding
from .tile import (
    load_run,
    load_sequence,
    load_taps_and_bias,
    load_window,
    optional_strides,
    shared_arguments,
    store_run,
    tile_channels,
    tile_runs,
)

TILE_BYTES = 2048
"""16 bytes a lane of 4 warps. From the compiler's register counts; not measured on a GPU."""


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, initial_states_ptr, y_ptr, final_states_ptr,
    segments_ptr, first_segment_ptr, sequence_starts_ptr, initial_state_rows_ptr, final_state_rows_ptr,
    n_segments, length, height, directions, dim, n_channels,
    x_strides, y_strides, weight_strides, initial_states_strides,
    WIDTH: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK_E: tl.constexpr, TIME_FIRST: tl.constexpr,
    ALIGNED: tl.constexpr, HAS_DIRECTIONS: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    HAS_INITIAL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute RUNS runs of y in one segment, or the final state of one sequence.

    Grid: (n_segments + sequences, channel tiles). Tiles are (RUNS, BLOCK_E), or (BLOCK_E, RUNS) with TIME_FIRST; those
    of the final state have one run. x and y are (B, L, G, E), the states (rows, WIDTH - 1, G * E).
    """
    x_batch, x_step, x_group, x_channel = x_strides
    y_batch, y_step, y_group, y_channel = y_strides
    group, e, channel_mask, channel = tile_channels(dim, BLOCK_E, TIME_FIRST)
    grid = (unpack_direction(directions, group), length, height) if HAS_DIRECTIONS else None
    x_ptr += group * x_group + e * x_channel
    if HAS_INITIAL:
        initial_states_ptr += channel * initial_states_strides[2]

    if tl.program_id(0) < n_segments:
        row, start, end, sequence = load_segment(segments_ptr, tl.program_id(0))
        if ALIGNED:  # true already; the compiler learns it
            start, end = start // RUN * RUN, end // RUN * RUN
        sequence = tl.maximum(sequence, 0)  # an unused entry has no steps
        step = start + tile_runs(RUNS, TIME_FIRST) * RUN  # first of each run

        window = load_window(
            x_ptr + row * x_batch, x_step, initial_states_ptr, initial_states_strides, step,
            tl.load(sequence_starts_ptr + sequence), end, tl.load(initial_state_rows_ptr + sequence), channel_mask,
            grid, WIDTH, HAS_INITIAL, COMPUTE,
        )  # fmt: skip
        window += load_run(x_ptr + row * x_batch, x_step, step, end, channel_mask, grid, RUN, TIME_FIRST, COMPUTE)
        lanes = channel if TIME_FIRST else step
        taps, bias = load_taps_and_bias(
            weight_ptr, bias_ptr, weight_strides, channel, channel_mask, lanes, WIDTH, HAS_BIAS, COMPUTE
        )

        # y_t = silu(bias + sum_k weight_k x_{t - WIDTH + 1 + k})
        out = ()
        for i in tl.static_range(RUN):
            acc = bias
            for k in tl.static_range(WIDTH):
                acc += taps[k] * window[i + k]
            out += (silu(acc) if SILU else acc,)

        y_row_ptr = y_ptr + row * y_batch + group * y_group + e * y_channel
        store_run(y_row_ptr, y_step, out, step, end, channel_mask, grid, RUN, TIME_FIRST)
    else:
        sequence = tl.program_id(0) - n_segments
        row, start, end = load_sequence(segments_ptr, first_segment_ptr, sequence_starts_ptr, sequence)
        # The final state is the window of the step after the last.
        final_window = load_window(
            x_ptr + row * x_batch, x_step, initial_states_ptr, initial_states_strides, end + tile_runs(1, TIME_FIRST),
            start, end, tl.load(initial_state_rows_ptr + sequence), channel_mask, grid, WIDTH, HAS_INITIAL, COMPUTE,
        )  # fmt: skip
        final_state_row = tl.load(final_state_rows_ptr + sequence).to(tl.int64)
        for i in tl.static_range(WIDTH - 1):
            offset = (final_state_row * (WIDTH - 1) + i) * n_channels + channel
            mask = and_scalar(channel_mask, final_state_row >= 0)
            tl.store(final_states_ptr + offset, final_window[i].to(final_states_ptr.dtype.element_ty), mask)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    directions: Sequence[int],
    height: int,
) -> tuple[Tensor, Tensor]:
    """Run `causal_conv1d_triton`: y (B, L, G, E) and the final states (rows, K - 1, G * E)."""
    shared = shared_arguments(x, weight, bias, silu, cu_seqlens, seq_idx, directions, height, TILE_BYTES)
    n_channels, width = weight.shape
    y = empty_like(x)
    rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    final_states = torch.empty((rows, width - 1, n_channels), dtype=x.dtype, device=x.device)
    segments = shared.segments
    n_segments = len(segments.entries)
    n_sequences = len(segments.sequence_starts) if width > 1 else 0
    if n_channels and n_segments + n_sequences:
        grid = launch_grid(n_segments + n_sequences, shared.channel_tiles, "tiles of channels")
        with on_device(x):
            _forward_kernel[grid](
                x, weight, bias, initial_states, y, final_states, *segments.tables, n_segments, *shared.sizes,
                x.stride(), y.stride(), weight.stride(), optional_strides(initial_states),
                HAS_INITIAL=initial_states is not None, **shared.options, **shared.run_options,
                **FUSED_MULTIPLY_ADD,
            )  # fmt: skip
    zero_padding(segments, y)
    return y, final_states
