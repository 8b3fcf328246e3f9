"""Forward of the compiled SSD."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..._core.varlen import max_blocks, parse_sequences
from ..._numba.compile import Kernel
from ..._numba.lanes import (
    aligned_empty,
    clear,
    element,
    fma,
    lane_count,
    load,
    read_row,
    set_positions,
    store,
    write_row,
)
from ..._numba.launch import as_array, as_directions, as_dtype, clear_unused, empty_of, memory_of, sequence_table
from ..._numba.products import ROWS, add_product
from ..._numba.threads import run_tiles
from ..arguments import ScanArguments
from . import CHECKPOINT_INTERVAL
from .tiles import (
    CHUNK,
    heads_per_tile,
    input_arrays,
    locate_heads,
    make_decays,
    multiply_rows,
    padded,
    read_matrix,
    read_state,
    read_step_sizes,
    scale,
    transpose,
    write_matrix,
    write_state,
)


def forward(*args) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y, the final states and the checkpoint states. Body of `ssd_numba`.

    Returns:
        y (B, L, H, P) in `out_dtype`; final states (rows, H, P, N); states before each block of CHECKPOINT_INTERVAL
        steps (checkpoints, H, N, P), none without `save_states`.
    """
    *arguments, save_states = args
    arguments = ScanArguments(*arguments)
    x, groups, d_state = arguments.x, *arguments.B.shape[2:]
    batch, length, heads, headdim = x.shape
    compute = torch.promote_types(x.dtype, torch.float32)
    sequences = parse_sequences(batch, length, arguments.cu_seqlens, arguments.seq_idx)
    n_sequences = len(sequences.lengths)
    y = empty_of(x, sequences)(*x.shape, dtype=compute)  # (B, L, H, P)
    final_states = x.new_empty(len(sequences.final_sequences), heads, headdim, d_state, dtype=compute)
    n_saved = max_blocks(x, n_sequences, CHECKPOINT_INTERVAL) if save_states else 0
    checkpoint_states = x.new_empty(n_saved, heads, d_state, headdim, dtype=compute)
    table = sequence_table(sequences, length, CHECKPOINT_INTERVAL)
    if save_states:
        clear_unused(checkpoint_states, sequences, CHECKPOINT_INTERVAL)
    n_heads = heads_per_tile(heads, groups)
    args = (
        *input_arrays(arguments, compute), as_array(arguments.initial_states, compute, 4), table,
        as_directions(arguments.directions, 1), arguments.height,
        *(memory_of(t) for t in (y, final_states, checkpoint_states)), n_heads, arguments.dt_softplus,
        arguments.dt_min, arguments.dt_max,
    )  # fmt: skip
    n_tiles = n_sequences * groups * -(-(heads // groups) // n_heads)
    run_tiles(lambda first, end: scan_tiles(*args, first, end), n_tiles, x.numel() * d_state // 4)
    return as_dtype(y, arguments.out_dtype), final_states, checkpoint_states


@Kernel
def scan_tiles(
    x, B, C, dt, D, A, dt_bias, input_weights, initial_states, sequences, directions, height, y, final_states,
    checkpoint_states, n_heads, dt_softplus, dt_min, dt_max, first, end,
):  # fmt: skip
    """Scan the tiles from `first` to `end` - 1. All arrays have one dtype; those of size 0 are left out.

    x, y (B, L, H, P); B, C (B, L, G, N); dt, input_weights (B, L, H); D (1, H, P); A, dt_bias (1, 1, H);
    initial_states, final_states (rows, H, P, N); checkpoint_states (blocks of steps, H, N, P); `sequences` (S, 6) as
    `sequence_table` makes it; `directions` of equal runs of groups, over a grid of `height` rows.
    """
    grid_length, heads, headdim = x.shape[1:]
    groups, n = B.shape[2:]
    p_size, n_size = padded(x, headdim), padded(x, n)
    states = aligned_empty(x, n_heads * n * p_size)  # (heads, N, P)
    B_tile, C_tile = aligned_empty(x, CHUNK * n_size), aligned_empty(x, CHUNK * n_size)
    B_columns, scores = aligned_empty(x, CHUNK * n), aligned_empty(x, np.int64(CHUNK * CHUNK))
    matrix, masked = aligned_empty(x, np.int64(CHUNK * CHUNK)), aligned_empty(x, np.int64(CHUNK * CHUNK))
    x_tile, dt_x, y_tile = (
        aligned_empty(x, CHUNK * p_size), aligned_empty(x, CHUNK * p_size), aligned_empty(x, CHUNK * p_size),
    )  # fmt: skip
    raw, steps, decays = (
        aligned_empty(x, np.int64(CHUNK)), aligned_empty(x, np.int64(CHUNK)), aligned_empty(x, np.int64(CHUNK)),
    )  # fmt: skip
    from_start, to_end = aligned_empty(x, np.int64(CHUNK)), aligned_empty(x, np.int64(CHUNK))
    weights = aligned_empty(x, np.int64(CHUNK))
    skip = aligned_empty(x, p_size)
    positions = np.empty(CHUNK, np.int64)

    for tile in range(first, end):
        s, group, first_head, end_head = locate_heads(tile, heads, groups, n_heads)
        row, start, length = sequences[s, 0], sequences[s, 1], sequences[s, 2]
        initial, final, saved = sequences[s, 3], sequences[s, 4], sequences[s, 5]
        direction = directions[group * len(directions) // groups]
        for head in range(first_head, end_head):
            state = (head - first_head) * n * p_size
            if initial >= 0 and initial_states.size:
                read_state(initial_states, initial, head, states, state, p_size)
            else:
                clear(states, state, n * p_size)

        for at in range(start, start + length, CHUNK):
            count = min(CHUNK, start + length - at)
            set_positions(positions, at, count, direction, height, grid_length)
            read_matrix(B, row, positions, count, group, B_tile, 0, n_size)
            read_matrix(C, row, positions, count, group, C_tile, 0, n_size)
            transpose(B_tile, 0, n_size, count, n, B_columns, 0)
            clear(scores, 0, CHUNK * CHUNK)
            add_product(scores, 0, CHUNK, C_tile, 0, n_size, 1, B_columns, 0, CHUNK, count, n, CHUNK)
            for head in range(first_head, end_head):
                state = (head - first_head) * n * p_size
                if checkpoint_states.size and (at - start) % CHECKPOINT_INTERVAL == 0:
                    save_state(states, state, p_size, checkpoint_states, saved + (at - start) // CHECKPOINT_INTERVAL,
                               head)  # fmt: skip
                read_step_sizes(dt, row, positions, count, head, A, dt_bias, input_weights, dt_softplus, dt_min,
                                dt_max, raw, steps, decays, weights, 0)  # fmt: skip
                make_decays(decays, 0, count, matrix, from_start, to_end)
                read_matrix(x, row, positions, count, head, x_tile, 0, p_size)
                multiply_rows(x_tile, 0, count, p_size, weights, 0, dt_x, 0)
                # The output of the state before the chunk (listing 1, step 4)
                clear(y_tile, 0, count * p_size)
                add_product(y_tile, 0, p_size, C_tile, 0, n_size, 1, states, state, p_size, count, n, p_size)
                multiply_rows(y_tile, 0, count, p_size, from_start, 0, y_tile, 0)
                # The output of the chunk's own inputs (step 1): L o C B^T is zero above its diagonal.
                for i in range(0, count * CHUNK, lane_count(x)):
                    store(masked, i, load(matrix, i) * load(scores, i))
                for i in range(0, count, ROWS):
                    n_rows = min(ROWS, count - i)
                    add_product(y_tile, i * p_size, p_size, masked, i * CHUNK, CHUNK, 1, dt_x, 0, p_size, n_rows,
                                i + n_rows, p_size)  # fmt: skip
                if D.size:
                    read_row(D, head * (D.strides[1] // D.itemsize), D.strides[2] // D.itemsize, headdim, skip, 0)
                    add_skip(skip, x_tile, y_tile, count, p_size)
                write_matrix(y_tile, 0, p_size, y, row, positions, count, head)
                # The state after the chunk (steps 2 and 3)
                multiply_rows(dt_x, 0, count, p_size, to_end, 0, dt_x, 0)
                scale(states, state, n * p_size, element(from_start, count - 1))
                add_product(states, state, p_size, B_tile, 0, 1, n_size, dt_x, 0, p_size, n, count, p_size)

        if final >= 0:
            for head in range(first_head, end_head):
                write_state(states, (head - first_head) * n * p_size, p_size, final_states, final, head)


@njit
def save_state(states, at, row_size, target, block, head):
    """Copy a state (N, P) to target[block, head]."""
    size = target.itemsize
    offset = block * (target.strides[0] // size) + head * (target.strides[1] // size)
    for i in range(target.shape[2]):
        write_row(states, at + i * row_size, target, offset + i * target.shape[3], 1, target.shape[3])


@njit
def add_skip(skip, x_tile, y_tile, count, row_size):
    """y += D x"""
    for t in range(count):
        for i in range(0, row_size, lane_count(x_tile)):
            at = t * row_size + i
            store(y_tile, at, fma(load(skip, i), load(x_tile, at), load(y_tile, at)))
