"""Forward of the compiled selective scan."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..._core.varlen import max_blocks, parse_sequences
from ..._numba.compile import Kernel
from ..._numba.functions import LOG2_E, exp2, sigmoid
from ..._numba.lanes import (
    aligned_empty,
    element,
    fill,
    fma,
    lane_count,
    load,
    locate_tile,
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
    clear_unused,
    count_tiles,
    empty_steps,
    memory_of,
    sequence_table,
)
from ..._numba.threads import run_tiles
from ..arguments import ScanArguments
from . import CHECKPOINT_INTERVAL
from .tiles import prepare_steps, read_coefficients


def forward(*args) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y, the final states and the checkpoint states. Body of `selective_scan_numba`.

    Returns:
        y (B, L, G, E) in the dtype of u; final states (rows, G * E, N); states before each block of
        CHECKPOINT_INTERVAL steps (checkpoints, N, G * E), none without `save_states`.
    """
    *arguments, save_states = args
    arguments = ScanArguments(*arguments)
    u, A, B, C = arguments.u, arguments.A, arguments.B, arguments.C
    (batch, length, groups, dim), n = u.shape, A.shape[1]
    compute = torch.promote_types(u.dtype, torch.float32)
    sequences = parse_sequences(batch, length, arguments.cu_seqlens, arguments.seq_idx)
    n_sequences = len(sequences.lengths)
    y = empty_steps(u, sequences, compute)  # (B, L, G, E)
    final_states = u.new_empty(len(sequences.final_sequences), groups * dim, n, dtype=compute)
    n_saved = max_blocks(u, n_sequences, CHECKPOINT_INTERVAL) if save_states else 0
    checkpoint_states = u.new_empty(n_saved, n, groups * dim, dtype=compute)

    # States and A with channels last, (rows, N, D) and (1, N, D): a vector holds neighbouring channels.
    inputs = [as_array(x, compute, 4) for x in (u, arguments.dt, B, C, arguments.z)]
    initial = None if arguments.initial_states is None else arguments.initial_states.transpose(1, 2)
    inputs += [as_array(x, compute, 3) for x in (A.T, arguments.D, arguments.dt_bias, initial)]
    outputs = [memory_of(m) for m in (y, final_states.transpose(1, 2), checkpoint_states.view(1, -1, groups * dim))]
    table = sequence_table(sequences, length, CHECKPOINT_INTERVAL)
    if save_states:
        clear_unused(checkpoint_states, table, CHECKPOINT_INTERVAL)
    directions = as_directions(arguments.directions, groups)
    args = (
        *inputs, table, directions, arguments.height, *outputs, B.dim() == 2, C.dim() == 2, arguments.dt_softplus
    )  # fmt: skip
    n_tiles = n_sequences * count_tiles(dim, groups)
    run_tiles(lambda first, end: scan_tiles(*args, first, end), n_tiles, u.numel() * n)
    return y.to(u.dtype), final_states, checkpoint_states


@Kernel
def scan_tiles(
    u, dt, B, C, z, A, D, dt_bias, initial_states, sequences, directions, height, y, final_states, checkpoint_states,
    B_is_constant, C_is_constant, dt_softplus, first, end,
):  # fmt: skip
    """Scan the tiles from `first` to `end` - 1. All arrays have one dtype; those of size 0 are left out.

    u, dt, z, y (B, L, G, E); A (1, N, G * E); B, C (B, L, G, N), or (1, 1, G * E, N) where constant in time; D, dt_bias
    (1, 1, G * E); initial_states, final_states (rows, N, G * E); checkpoint_states (1, blocks of steps * N, G * E);
    `sequences` (S, 6) as `sequence_table` makes it; `directions` (G,) of a grid of `height` rows.
    """
    zero, one = np.int64(0), np.int64(1)  # numba compiles a function again for each literal
    n, (grid_length, groups, dim) = A.shape[1], u.shape[1:]
    size, states, row_size = one * CHECKPOINT_INTERVAL * BLOCK, n * BLOCK, one * BLOCK
    u_tile, dt_tile, input_tile = aligned_empty(u, size), aligned_empty(u, size), aligned_empty(u, size)
    y_tile, z_tile = aligned_empty(u, size), aligned_empty(u, size)
    a_tile, h_tile, B_lanes, C_lanes = (
        aligned_empty(u, states), aligned_empty(u, states), aligned_empty(u, states), aligned_empty(u, states),
    )  # fmt: skip
    B_steps, C_steps = aligned_empty(u, n * CHECKPOINT_INTERVAL), aligned_empty(u, n * CHECKPOINT_INTERVAL)
    bias, skip = aligned_empty(u, row_size), aligned_empty(u, row_size)
    positions = np.empty(CHECKPOINT_INTERVAL, np.int64)
    fill(bias, 0.0)
    fill(skip, 0.0)

    for tile in range(first, end):
        s, group, offset, width = locate_tile(tile, dim, groups)
        channel = group * dim + offset
        row, start, length = sequences[s, 0], sequences[s, 1], sequences[s, 2]
        initial, final, saved = sequences[s, 3], sequences[s, 4], sequences[s, 5]
        read_rows(A, zero, zero, n, channel, width, a_tile)
        # exp(dt A) = 2^(dt A log2(e)): the factor once a tile
        for i in range(0, states, lane_count(u)):
            store(a_tile, i, LOG2_E * load(a_tile, i))
        fill(h_tile, 0.0)
        if initial >= 0 and initial_states.size:
            read_rows(initial_states, initial, zero, n, channel, width, h_tile)
        if dt_bias.size:
            read_rows(dt_bias, zero, zero, one, channel, width, bias)
        if D.size:
            read_rows(D, zero, zero, one, channel, width, skip)

        for at in range(start, start + length, CHECKPOINT_INTERVAL):
            count = min(CHECKPOINT_INTERVAL, start + length - at)
            if checkpoint_states.size:
                block = saved + (at - start) // CHECKPOINT_INTERVAL
                write_rows(h_tile, checkpoint_states, zero, block * n, n, channel, width)
            set_positions(positions, at, count, directions[group], height, grid_length)
            read_steps(u, row, positions, count, group, offset, width, u_tile)
            read_steps(dt, row, positions, count, group, offset, width, dt_tile)
            prepare_steps(count, width, bias, dt_softplus, u_tile, dt_tile, input_tile)
            read_coefficients(B, row, positions, count, group, B_is_constant, channel, width, B_steps, B_lanes)
            read_coefficients(C, row, positions, count, group, C_is_constant, channel, width, C_steps, C_lanes)

            # y_t = C_t h_t + D u_t starts with its second term.
            for t in range(count):
                for i in range(0, width, lane_count(u)):
                    store(y_tile, t * BLOCK + i, load(skip, i) * load(u_tile, t * BLOCK + i))
            scan_steps(
                count, width, a_tile, h_tile, B_lanes, C_lanes, B_steps, C_steps, dt_tile, input_tile, y_tile,
                B_is_constant, C_is_constant,
            )  # fmt: skip
            if z.size:
                read_steps(z, row, positions, count, group, offset, width, z_tile)
                for t in range(count):
                    for i in range(t * BLOCK, t * BLOCK + width, lane_count(u)):
                        gate = load(z_tile, i)
                        store(y_tile, i, load(y_tile, i) * (gate * sigmoid(gate)))
            write_steps(y_tile, y, row, positions, count, group, offset, width)

        if final >= 0:
            write_rows(h_tile, final_states, final, zero, n, channel, width)


@njit
def scan_steps(
    count, width, a_tile, h_tile, B_lanes, C_lanes, B_steps, C_steps, dt_tile, input_tile, y_tile,
    B_is_constant, C_is_constant,
):  # fmt: skip
    """Advance the states (N, BLOCK) by a block of steps, and add their outputs to y (CHECKPOINT_INTERVAL, BLOCK)."""
    for i in range(0, width, lane_count(a_tile)):
        # One state over all steps of the block at a time: h stays in a register.
        for j in range(h_tile.size // BLOCK):
            a, h = load(a_tile, j * BLOCK + i), load(h_tile, j * BLOCK + i)
            b, c = load(B_lanes, j * BLOCK + i), load(C_lanes, j * BLOCK + i)
            for t in range(count):
                if not B_is_constant:
                    b = splat(a_tile, element(B_steps, j * CHECKPOINT_INTERVAL + t))
                if not C_is_constant:
                    c = splat(a_tile, element(C_steps, j * CHECKPOINT_INTERVAL + t))
                at = t * BLOCK + i
                # h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t (equation 2)
                h = fma(exp2(load(dt_tile, at) * a), h, load(input_tile, at) * b)
                # y_t += C_t h_t, state by state
                store(y_tile, at, fma(c, h, load(y_tile, at)))
            store(h_tile, j * BLOCK + i, h)
