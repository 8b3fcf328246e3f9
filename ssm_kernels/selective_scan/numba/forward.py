"""Forward of the compiled selective scan."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..._core.varlen import parse_sequences
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
    splat,
    store,
    write_rows,
)
from ..._numba.launch import BLOCK, as_array, as_row, count_tiles, memory_of, sequence_table
from ..._numba.threads import run_tiles
from . import INTERVAL, n_checkpoints
from .tiles import n_groups, prepare_steps, read_coefficients, with_four_dims


def forward(
    u, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, seq_idx, dt_softplus, keep
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, D) in the dtype of u, final states (rows, D, N), and the states before each block of steps."""
    (batch, length, dim), n = u.shape, A.shape[1]
    compute = torch.promote_types(u.dtype, torch.float32)
    sequences = parse_sequences(batch, length, cu_seqlens, seq_idx)
    groups, n_sequences = n_groups(B, C), len(sequences.lengths)
    new = u.new_zeros if sequences.padding_runs(batch * length) else u.new_empty
    y = new(u.shape, dtype=compute)  # (B, L, D)
    final_states = u.new_empty(len(sequences.final_sequences), dim, n, dtype=compute)
    n_saved = n_checkpoints(batch * length, n_sequences) if keep else 0
    checkpoints = u.new_zeros(n_saved, n, dim, dtype=compute)  # zero, since a few of them are not used

    # States and A with channels last, (rows, N, D) and (1, N, D): a vector holds neighbouring channels.
    inputs = [as_array(x, compute, 3) for x in (u, dt, A.T[None])]
    inputs += [as_array(with_four_dims(m), compute, 4) for m in (B, C)]
    initial = None if initial_states is None else initial_states.transpose(1, 2)
    inputs += [as_array(x, compute, 3) for x in (as_row(D), z, as_row(dt_bias), initial)]
    outputs = [memory_of(y), memory_of(final_states.transpose(1, 2)), memory_of(checkpoints.flatten(0, 1)[None])]
    args = (
        *inputs, sequence_table(sequences, length, INTERVAL), *outputs, groups, B.dim() == 2, C.dim() == 2, dt_softplus
    )  # fmt: skip
    n_tiles = n_sequences * count_tiles(dim, groups)
    run_tiles(lambda first, end: scan_tiles(*args, first, end), n_tiles, u.numel() * n)
    return y.to(u.dtype), final_states, checkpoints


@Kernel
def scan_tiles(
    u, dt, A, B, C, D, z, dt_bias, initial_states, sequences, y, final_states, checkpoints,
    groups, B_is_constant, C_is_constant, dt_softplus, first, end,
):  # fmt: skip
    """Scan the tiles from `first` to `end` - 1. All arrays have one dtype; those of size 0 are left out.

    u, dt, z, y (B, L, D); A (1, N, D); B, C (B, L, G, N), or (B, L, D, N) where constant in time; D, dt_bias (1, 1, D);
    initial_states, final_states (rows, N, D); checkpoints (1, blocks of steps * N, D); `sequences` (S, 6) as
    `sequence_table` makes it.
    """
    zero, one = np.int64(0), np.int64(1)  # numba compiles a function again for each literal
    n, dim = A.shape[1:]
    size, states, row_size = one * INTERVAL * BLOCK, n * BLOCK, one * BLOCK
    u_tile, dt_tile, input_tile = aligned_empty(u, size), aligned_empty(u, size), aligned_empty(u, size)
    y_tile, z_tile = aligned_empty(u, size), aligned_empty(u, size)
    a_tile, h_tile, B_lanes, C_lanes = (
        aligned_empty(u, states), aligned_empty(u, states), aligned_empty(u, states), aligned_empty(u, states),
    )  # fmt: skip
    B_steps, C_steps = aligned_empty(u, n * INTERVAL), aligned_empty(u, n * INTERVAL)
    bias, skip = aligned_empty(u, row_size), aligned_empty(u, row_size)
    fill(bias, 0.0)
    fill(skip, 0.0)

    for tile in range(first, end):
        s, channel, width = locate_tile(tile, dim, groups)
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
        B_group, C_group = channel // (dim // B.shape[2]), channel // (dim // C.shape[2])

        for at in range(start, start + length, INTERVAL):
            count = min(INTERVAL, start + length - at)
            if checkpoints.size:
                write_rows(h_tile, checkpoints, zero, (saved + (at - start) // INTERVAL) * n, n, channel, width)
            read_rows(u, row, at, count, channel, width, u_tile)
            read_rows(dt, row, at, count, channel, width, dt_tile)
            prepare_steps(count, width, bias, dt_softplus, u_tile, dt_tile, input_tile)
            read_coefficients(B, row, at, count, B_group, B_is_constant, channel, width, B_steps, B_lanes)
            read_coefficients(C, row, at, count, C_group, C_is_constant, channel, width, C_steps, C_lanes)

            # y_t = C_t h_t + D u_t starts with its second term.
            for t in range(count):
                for i in range(0, width, lane_count(u)):
                    store(y_tile, t * BLOCK + i, load(skip, i) * load(u_tile, t * BLOCK + i))
            scan_steps(
                count, width, a_tile, h_tile, B_lanes, C_lanes, B_steps, C_steps, dt_tile, input_tile, y_tile,
                B_is_constant, C_is_constant,
            )  # fmt: skip
            if z.size:
                read_rows(z, row, at, count, channel, width, z_tile)
                for t in range(count):
                    for i in range(t * BLOCK, t * BLOCK + width, lane_count(u)):
                        gate = load(z_tile, i)
                        store(y_tile, i, load(y_tile, i) * (gate * sigmoid(gate)))
            write_rows(y_tile, y, row, at, count, channel, width)

        if final >= 0:
            write_rows(h_tile, final_states, final, zero, n, channel, width)


@njit
def scan_steps(
    count, width, a_tile, h_tile, B_lanes, C_lanes, B_steps, C_steps, dt_tile, input_tile, y_tile,
    B_is_constant, C_is_constant,
):  # fmt: skip
    """Advance the states (N, BLOCK) by a block of steps, and add their outputs to y (INTERVAL, BLOCK)."""
    for i in range(0, width, lane_count(a_tile)):
        # One state over all steps of the block at a time: h stays in a register.
        for j in range(h_tile.size // BLOCK):
            a, h = load(a_tile, j * BLOCK + i), load(h_tile, j * BLOCK + i)
            b, c = load(B_lanes, j * BLOCK + i), load(C_lanes, j * BLOCK + i)
            for t in range(count):
                if not B_is_constant:
                    b = splat(a_tile, element(B_steps, j * INTERVAL + t))
                if not C_is_constant:
                    c = splat(a_tile, element(C_steps, j * INTERVAL + t))
                at = t * BLOCK + i
                # h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t (equation 2)
                h = fma(exp2(load(dt_tile, at) * a), h, load(input_tile, at) * b)
                # y_t += C_t h_t, state by state
                store(y_tile, at, fma(c, h, load(y_tile, at)))
            store(h_tile, j * BLOCK + i, h)
