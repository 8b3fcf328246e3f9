"""Forward of the compiled convolution."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..._core.varlen import parse_sequences
from ..._numba.compile import Kernel
from ..._numba.functions import sigmoid
from ..._numba.lanes import (
    aligned_empty,
    borrow,
    borrow_from,
    clear,
    keep,
    lane_count,
    load,
    locate_tile,
    parts,
    read_rows,
    read_steps,
    set_positions,
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
)
from ..._numba.threads import run_tiles
from .tiles import STEPS, convolve_rows, move_rows


def forward(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx, directions, height) -> tuple[Tensor, Tensor]:
    """Return y (B, L, G, E) and final states (rows, K - 1, G * E) in the dtype of x."""
    (batch, length, groups, dim), n_taps = x.shape, weight.shape[1]
    compute = torch.promote_types(x.dtype, torch.float32)
    sequences = parse_sequences(batch, length, cu_seqlens, seq_idx)
    y = empty_steps(x, sequences, compute)  # (B, L, G, E)
    final_states = x.new_empty(len(sequences.final_sequences), n_taps - 1, groups * dim, dtype=compute)
    # Channels are the last dimension of all arrays: a vector holds neighbouring ones.
    inputs = [as_array(m, compute, 3) for m in (weight.mT, bias, initial_states)]
    args = (
        as_array(x, compute, 4), *inputs, sequence_table(sequences, length, STEPS),
        as_directions(directions, groups), height, memory_of(y), memory_of(final_states), silu,
    )  # fmt: skip
    n_tiles = len(sequences.lengths) * count_tiles(dim, groups)
    run_tiles(lambda first, end: convolve_tiles(*args, first, end), n_tiles, x.numel())
    return as_dtype(y, x.dtype), as_dtype(final_states, x.dtype)


@Kernel
def convolve_tiles(
    x, weight, bias, initial_states, sequences, directions, height, y, final_states, silu, first, end
):  # fmt: skip
    """Convolve the tiles from `first` to `end` - 1. All arrays have one dtype; those of size 0 are left out.

    x, y (B, L, G, E); weight (1, K, G * E); bias (1, 1, G * E); initial_states, final_states (rows, K - 1, G * E);
    `directions` (G,) of a grid of `height` rows.
    """
    zero, one = np.int64(0), np.int64(1)  # numba compiles a function again for each literal
    n_taps, (grid_length, groups, dim) = weight.shape[1], x.shape[1:]
    before = n_taps - 1
    memory = aligned_empty(x, (before + 2 * STEPS + n_taps + 1) * BLOCK)
    y_tile, x_tile = parts(memory, one * STEPS * BLOCK, 2)
    inputs = borrow_from(x_tile, before * BLOCK)
    w_tile = borrow_from(inputs, STEPS * BLOCK)
    b_tile = borrow_from(w_tile, n_taps * BLOCK)
    positions_memory = np.empty(STEPS, np.int64)
    positions = borrow(positions_memory)
    clear(b_tile, zero, one * BLOCK)
    for tile in range(first, end):
        s, group, offset, width = locate_tile(tile, dim, groups)
        channel = group * dim + offset
        row, start, length, initial, final = (
            sequences[s, 0], sequences[s, 1], sequences[s, 2], sequences[s, 3], sequences[s, 4],
        )  # fmt: skip
        read_rows(weight, zero, zero, n_taps, channel, width, w_tile)
        if bias.size:
            read_rows(bias, zero, zero, one, channel, width, b_tile)
        clear(x_tile, zero, before * BLOCK)
        if initial >= 0 and initial_states.size:
            read_rows(initial_states, initial, zero, before, channel, width, x_tile)
        # y_t = silu(bias + sum_k w_k x_{t - K + 1 + k})
        for at in range(start, start + length, STEPS):
            count = min(STEPS, start + length - at)
            set_positions(positions, at, count, directions[group], height, grid_length)
            read_steps(x, row, positions, count, group, offset, width, inputs, BLOCK)
            convolve_rows(x_tile, w_tile, b_tile, n_taps, count, width, y_tile)
            if silu:
                for t in range(count):
                    for i in range(t * BLOCK, t * BLOCK + width, lane_count(x)):
                        value = load(y_tile, i)
                        store(y_tile, i, value * sigmoid(value))
            write_steps(y_tile, BLOCK, y, row, positions, count, group, offset, width)
            move_rows(x_tile, count, before, width)
        # The first rows hold the last K - 1 inputs; in a shorter sequence, the initial state comes before.
        if final >= 0:
            write_rows(x_tile, final_states, final, zero, before, channel, width)
    keep(memory)
    keep(positions_memory)
