"""Backward of the compiled convolution."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..._core.varlen import parse_sequences
from ..._numba.compile import Kernel
from ..._numba.functions import sigmoid
from ..._numba.lanes import (
    aligned_empty,
    borrow,
    borrow_from,
    clear,
    fma,
    keep,
    lane_count,
    load,
    locate_tile,
    parts,
    read_rows,
    read_steps,
    set_positions,
    splat,
    store,
    write_rows,
    write_steps,
)
from ..._numba.launch import (
    BLOCK,
    as_array,
    as_directions,
    as_dtype,
    count_tiles,
    empty_steps,
    memory_of,
    sequence_table,
    split_sequences,
)
from ..._numba.sums import sum_parts
from ..._numba.threads import run_tiles
from .tiles import STEPS, convolve_rows, move_rows


def backward(
    x, weight, bias, silu, initial_states, cu_seqlens, seq_idx, directions, height, dy, dfinal_states
) -> tuple[Tensor, ...]:
    """Return the gradients of x, weight, bias and initial_states in their dtypes; empty where there is none."""
    (batch, length, groups, dim), n_taps = x.shape, weight.shape[1]
    compute = torch.promote_types(x.dtype, torch.float32)
    sequences = parse_sequences(batch, length, cu_seqlens, seq_idx)
    n_runs = split_sequences(len(sequences.lengths))
    dx = empty_steps(x, sequences, compute)  # (B, L, G, E)
    # A part for each run of sequences, so that tiles of different threads share no memory.
    dweight, dbias = (x.new_empty(n_runs, n, groups * dim, dtype=compute) for n in (n_taps, 1))  # (runs, K or 1, G * E)
    dinitial = torch.empty(*(0, 0, 0) if initial_states is None else initial_states.shape, dtype=compute)
    inputs = [as_array(m, compute, 4) for m in (x, dy)]
    inputs += [as_array(m, compute, 3) for m in (weight.mT, bias, initial_states, dfinal_states)]
    outputs = [memory_of(m) for m in (dx, dweight, dbias, dinitial)]
    args = (
        *inputs, sequence_table(sequences, length, STEPS), as_directions(directions, groups), height, *outputs, silu,
        n_runs,
    )  # fmt: skip
    n_tiles = n_runs * count_tiles(dim, groups)
    run_tiles(lambda first, end: convolve_tiles_backward(*args, first, end), n_tiles, 3 * x.numel())
    return (
        as_dtype(dx, x.dtype),
        as_dtype(sum_parts(dweight).mT.contiguous(), weight.dtype),  # (D, K)
        x.new_empty(0) if bias is None else as_dtype(sum_parts(dbias)[0], bias.dtype),
        x.new_empty(0) if initial_states is None else as_dtype(dinitial, initial_states.dtype),
    )


@Kernel
def convolve_tiles_backward(
    x, dy, weight, bias, initial_states, dfinal, sequences, directions, height, dx, dweight, dbias, dinitial, silu,
    n_runs, first, end,
):  # fmt: skip
    """Gradients of the tiles from `first` to `end` - 1. A tile takes the sequences of one of `n_runs` runs in turn.

    Inputs are as in `convolve_tiles`, and dy (B, L, G, E), dfinal (rows, K - 1, G * E). dx (B, L, G, E);
    dweight (runs, K, G * E); dbias (runs, 1, G * E); dinitial (rows, K - 1, G * E).
    """
    zero, one = np.int64(0), np.int64(1)  # numba compiles a function again for each literal
    n_taps, (grid_length, groups, dim) = weight.shape[1], x.shape[1:]
    before = n_taps - 1
    size = (before + max(STEPS, before)) * BLOCK
    # `dsum_tile` is the gradient of the sums: its first rows are those before the block, as in `x_tile`.
    memory = aligned_empty(x, 3 * size + (STEPS + 3 * n_taps + 3) * BLOCK)
    x_tile, dsum_tile, dx_tile, sum_tile = parts(memory, size, 4)
    w_tile, reversed_tile, dw_tile, rows = parts(borrow_from(sum_tile, STEPS * BLOCK), n_taps * BLOCK, 4)
    b_tile, db_tile, no_bias = parts(rows, one * BLOCK, 3)
    inputs, dsums = borrow_from(x_tile, before * BLOCK), borrow_from(dsum_tile, before * BLOCK)  # of the block itself
    positions_memory = np.empty(max(STEPS, before), np.int64)
    positions = borrow(positions_memory)
    clear(b_tile, zero, one * BLOCK)
    clear(no_bias, zero, one * BLOCK)
    for tile in range(first, end):
        run, group, offset, width = locate_tile(tile, dim, groups)
        channel = group * dim + offset
        read_rows(weight, zero, zero, n_taps, channel, width, w_tile)
        for k in range(n_taps):
            for i in range(0, BLOCK, lane_count(x)):
                store(reversed_tile, k * BLOCK + i, load(w_tile, (before - k) * BLOCK + i))
        if bias.size:
            read_rows(bias, zero, zero, one, channel, width, b_tile)
        clear(dw_tile, zero, n_taps * BLOCK)
        clear(db_tile, zero, one * BLOCK)
        for s in range(run * len(sequences) // n_runs, (run + 1) * len(sequences) // n_runs):
            row, start, length, initial, final = (
                sequences[s, 0], sequences[s, 1], sequences[s, 2], sequences[s, 3], sequences[s, 4],
            )  # fmt: skip
            initial = initial if dinitial.size else -1
            clear(x_tile, zero, before * BLOCK)
            clear(dsum_tile, zero, before * BLOCK)
            if initial >= 0:
                read_rows(initial_states, initial, zero, before, channel, width, x_tile)
            for t0 in range(0, length, STEPS):
                count = min(STEPS, length - t0)
                set_positions(positions, start + t0, count, directions[group], height, grid_length)
                read_steps(x, row, positions, count, group, offset, width, inputs, BLOCK)
                read_steps(dy, row, positions, count, group, offset, width, dsums, BLOCK)
                if silu:
                    # The sums before silu are computed again rather than saved.
                    convolve_rows(x_tile, w_tile, b_tile, n_taps, count, width, sum_tile)
                    multiply_by_d_silu(sum_tile, dsums, count, width)
                add_weight_gradients(x_tile, dsum_tile, dw_tile, db_tile, n_taps, count, width)
                # dx_{t - K + 1} = sum_k w_{K - 1 - k} dsum_{t - K + 1 + k}: these are complete with step t.
                convolve_rows(dsum_tile, reversed_tile, no_bias, n_taps, count, width, dx_tile)
                write_input_gradients(
                    dx_tile, dx, dinitial, positions, directions[group], height, row, start, t0 - before, initial,
                    count, group, offset, width,
                )  # fmt: skip
                move_rows(x_tile, count, before, width)
                move_rows(dsum_tile, count, before, width)
            # No sums come after the last K - 1 inputs, which are the final state.
            for i in range(before * BLOCK, 2 * before * BLOCK, lane_count(x)):
                store(dsum_tile, i, splat(x, 0.0))
            convolve_rows(dsum_tile, reversed_tile, no_bias, n_taps, before, width, dx_tile)
            if final >= 0 and dfinal.size:
                read_rows(dfinal, final, zero, before, channel, width, x_tile)
                for r in range(before):
                    for i in range(r * BLOCK, r * BLOCK + width, lane_count(x)):
                        store(dx_tile, i, load(dx_tile, i) + load(x_tile, i))
            write_input_gradients(
                dx_tile, dx, dinitial, positions, directions[group], height, row, start, length - before, initial,
                before, group, offset, width,
            )  # fmt: skip
        write_rows(dw_tile, dweight, run, zero, n_taps, channel, width)
        write_rows(db_tile, dbias, run, zero, one, channel, width)
    keep(memory)
    keep(positions_memory)


@njit
def multiply_by_d_silu(sums, gradients, count, width):
    """Multiply gradients by the derivative of silu at the sums: s (1 + x (1 - s)), where s = sigmoid(x)."""
    for t in range(count):
        for i in range(t * BLOCK, t * BLOCK + width, lane_count(sums)):
            x = load(sums, i)
            s = sigmoid(x)
            store(gradients, i, load(gradients, i) * (s * fma(x, 1.0 - s, splat(sums, 1.0))))


@njit
def add_weight_gradients(x_tile, dsum_tile, dw_tile, db_tile, n_taps, count, width):
    """dw_k += sum_t dsum_t x_{t - K + 1 + k} and db += sum_t dsum_t over a block."""
    for i in range(0, width, lane_count(x_tile)):
        for k in range(n_taps):
            # In a register over the block, so that the sum in memory is read and written once.
            result = splat(x_tile, 0.0)
            for t in range(count):
                result = fma(load(dsum_tile, (t + n_taps - 1) * BLOCK + i), load(x_tile, (t + k) * BLOCK + i), result)
            store(dw_tile, k * BLOCK + i, load(dw_tile, k * BLOCK + i) + result)
        result = splat(x_tile, 0.0)
        for t in range(count):
            result = result + load(dsum_tile, (t + n_taps - 1) * BLOCK + i)
        store(db_tile, i, load(db_tile, i) + result)


@njit
def write_input_gradients(
    tile, dx, dinitial, positions, direction, height, row, start, step, initial, count, group, offset, width
):  # fmt: skip
    """Write `count` rows from a step of a sequence on; steps before its start belong to the initial state."""
    n_before = min(max(-step, 0), count)
    if initial >= 0 and n_before:
        channel = group * dx.shape[3] + offset
        write_rows(tile, dinitial, initial, dinitial.shape[1] + step, n_before, channel, width)
    if n_before < count:
        set_positions(positions, start + step + n_before, count - n_before, direction, height, dx.shape[1])
        write_steps(
            borrow_from(tile, n_before * BLOCK), BLOCK, dx, row, positions, count - n_before, group, offset, width
        )
