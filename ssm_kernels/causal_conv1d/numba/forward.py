"""Forward of the compiled convolution."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..._core.varlen import parse_sequences
from ..._numba.compile import Kernel
from ..._numba.functions import sigmoid
from ..._numba.lanes import aligned_empty, fill, lane_count, load, locate_tile, read_rows, store, write_rows
from ..._numba.launch import BLOCK, as_array, as_row, count_tiles, memory_of, sequence_table
from ..._numba.threads import run_tiles
from .tiles import STEPS, convolve_rows, move_rows


def forward(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx) -> tuple[Tensor, Tensor]:
    """Return y (B, L, D) and final states (rows, K - 1, D) in the dtype of x."""
    (batch, length, dim), n_taps = x.shape, weight.shape[1]
    compute = torch.promote_types(x.dtype, torch.float32)
    sequences = parse_sequences(batch, length, cu_seqlens, seq_idx)
    new = x.new_zeros if sequences.padding_runs(batch * length) else x.new_empty
    y = new(x.shape, dtype=compute)  # (B, L, D)
    final_states = x.new_empty(len(sequences.final_sequences), n_taps - 1, dim, dtype=compute)
    # Channels are the last dimension of all arrays: a vector holds neighbouring ones.
    inputs = (as_array(m, compute, 3) for m in (x, weight.T[None], as_row(bias), initial_states))
    args = (*inputs, sequence_table(sequences, length, STEPS), memory_of(y), memory_of(final_states), silu)
    n_tiles = len(sequences.lengths) * count_tiles(dim)
    run_tiles(lambda first, end: convolve_tiles(*args, first, end), n_tiles, x.numel())
    return y.to(x.dtype), final_states.to(x.dtype)


@Kernel
def convolve_tiles(x, weight, bias, initial_states, sequences, y, final_states, silu, first, end):
    """Convolve the tiles from `first` to `end` - 1. All arrays have one dtype; those of size 0 are left out.

    x, y (B, L, D); weight (1, K, D); bias (1, 1, D); initial_states, final_states (rows, K - 1, D).
    """
    zero, one = np.int64(0), np.int64(1)  # numba compiles a function again for each literal
    n_taps, dim = weight.shape[1:]
    before = n_taps - 1
    x_tile, y_tile = aligned_empty(x, (before + STEPS) * BLOCK), aligned_empty(x, one * STEPS * BLOCK)
    w_tile, b_tile = aligned_empty(x, n_taps * BLOCK), aligned_empty(x, one * BLOCK)
    fill(b_tile, 0.0)
    for tile in range(first, end):
        s, channel, width = locate_tile(tile, dim, one)
        row, start, length, initial, final = (
            sequences[s, 0], sequences[s, 1], sequences[s, 2], sequences[s, 3], sequences[s, 4],
        )  # fmt: skip
        read_rows(weight, zero, zero, n_taps, channel, width, w_tile)
        if bias.size:
            read_rows(bias, zero, zero, one, channel, width, b_tile)
        fill(x_tile, 0.0)
        if initial >= 0 and initial_states.size:
            read_rows(initial_states, initial, zero, before, channel, width, x_tile)
        # y_t = silu(bias + sum_k w_k x_{t - K + 1 + k})
        for at in range(start, start + length, STEPS):
            count = min(STEPS, start + length - at)
            read_rows(x, row, at, count, channel, width, x_tile[before * BLOCK :])
            convolve_rows(x_tile, w_tile, b_tile, n_taps, count, width, y_tile)
            if silu:
                for t in range(count):
                    for i in range(t * BLOCK, t * BLOCK + width, lane_count(x)):
                        value = load(y_tile, i)
                        store(y_tile, i, value * sigmoid(value))
            write_rows(y_tile, y, row, at, count, channel, width)
            move_rows(x_tile, count, before, width)
        # The first rows hold the last K - 1 inputs; in a shorter sequence, the initial state comes before.
        if final >= 0:
            write_rows(x_tile, final_states, final, zero, before, channel, width)
