"""Forward of the compiled selective scan."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..._core.varlen import max_blocks, parse_sequences
from ..._numba.compile import Kernel
from ..._numba.functions import MAX_EXPONENT, exp2_product, sigmoid
from ..._numba.lanes import (
    aligned_empty,
    borrow,
    borrow_from,
    clear,
    fma,
    item_size,
    keep,
    lane_count,
    list_lines,
    load,
    locate_tile,
    parts,
    prefetch_share,
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
    clear_unused,
    count_tiles,
    empty_steps,
    memory_of,
    sequence_table,
)
from ..._numba.threads import run_tiles
from ..arguments import ScanArguments
from . import CHECKPOINT_INTERVAL
from .tiles import coefficients_of_pair, padded_states, prepare_steps, read_coefficients, read_exponents


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
        clear_unused(checkpoint_states, sequences, CHECKPOINT_INTERVAL)
    directions = as_directions(arguments.directions, groups)
    args = (
        *inputs, table, directions, arguments.height, *outputs, B.dim() == 2, C.dim() == 2, arguments.dt_softplus
    )  # fmt: skip
    n_tiles = n_sequences * count_tiles(dim, groups)
    run_tiles(lambda first, end: scan_tiles(*args, first, end), n_tiles, u.numel() * n)
    return as_dtype(y, u.dtype), final_states, checkpoint_states


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
    n, (grid_length, groups, dim), lanes = A.shape[1], u.shape[1:], lane_count(u)
    size, states, row_size = CHECKPOINT_INTERVAL * lanes, padded_states(n) * BLOCK, one * BLOCK
    coefficients, n_states = padded_states(n) * CHECKPOINT_INTERVAL, padded_states(n)
    # In one memory, so that in the first-level cache no tile that is read lies a few lines after one that is written:
    # a CPU takes such a load for one of what was just stored, and waits.
    memory = aligned_empty(u, 5 * size + 4 * states + 2 * coefficients + 2 * row_size)
    clear(memory, zero, memory.size)
    dt_tile, input_tile, y_tile, u_tile, z_tile, state_tiles = parts(memory, size, 6)
    a_tile, h_tile, B_lanes, C_lanes, step_tiles = parts(state_tiles, states, 5)
    B_steps, C_steps, rows = parts(step_tiles, coefficients, 3)
    bias, skip = parts(rows, row_size, 2)
    exponents_memory = np.empty(BLOCK // lanes, u.dtype)
    positions_memory, lines_memory = (
        np.empty(2 * CHECKPOINT_INTERVAL, np.int64), np.empty(4 * CHECKPOINT_INTERVAL, np.int64),
    )  # fmt: skip
    exponents, positions, lines = borrow(exponents_memory), borrow(positions_memory), borrow(lines_memory)

    for tile in range(first, end):
        s, group, offset, width = locate_tile(tile, dim, groups)
        channel = group * dim + offset
        row, start, length = sequences[s, 0], sequences[s, 1], sequences[s, 2]
        initial, final, saved = sequences[s, 3], sequences[s, 4], sequences[s, 5]
        read_exponents(A, channel, width, a_tile, n_states, exponents)
        clear(h_tile, zero, states)
        if initial >= 0 and initial_states.size:
            read_rows(initial_states, initial, zero, n, channel, width, h_tile)
        if dt_bias.size:
            read_rows(dt_bias, zero, zero, one, channel, width, bias)
        if D.size:
            read_rows(D, zero, zero, one, channel, width, skip)

        for at in range(start, start + length, CHECKPOINT_INTERVAL):
            count = min(CHECKPOINT_INTERVAL, start + length - at)
            ahead = min(2 * CHECKPOINT_INTERVAL, start + length - at)  # steps of this block and the next
            if checkpoint_states.size:
                first_row = (saved + (at - start) // CHECKPOINT_INTERVAL) * n
                write_rows(h_tile, checkpoint_states, zero, first_row, n, channel, width)
            set_positions(positions, at, ahead, directions[group], height, grid_length)
            read_coefficients(B, row, positions, count, group, B_is_constant, channel, width, B_steps, B_lanes)
            read_coefficients(C, row, positions, count, group, C_is_constant, channel, width, C_steps, C_lanes)
            n_lines = zero
            for array in (u, dt, z, y):
                n_lines = list_lines(array, row, positions, CHECKPOINT_INTERVAL, ahead, group, offset, lines, n_lines)
            for i in range(0, width, lanes):
                k, n_channels = offset + i, min(lanes, width - i)
                read_steps(u, row, positions, count, group, k, n_channels, u_tile, lanes)
                read_steps(dt, row, positions, count, group, k, n_channels, dt_tile, lanes)
                step_size = prepare_steps(
                    count, n_channels, borrow_from(bias, i), dt_softplus, u_tile, dt_tile, input_tile
                )
                # y_t = C_t h_t + D u_t starts with its second term.
                for t in range(0, count * lanes, lanes):
                    store(y_tile, t, load(skip, i) * load(u_tile, t))
                block = (
                    count, i, n_states, a_tile, h_tile, B_lanes, C_lanes, B_steps, C_steps, dt_tile, input_tile, y_tile,
                    lines, n_lines, B_is_constant, C_is_constant,
                )  # fmt: skip
                if B_is_constant or C_is_constant:
                    _scan_constant(*block)
                elif step_size * exponents[i // lanes] <= MAX_EXPONENT:
                    _scan_bounded(*block)
                else:
                    _scan_unbounded(*block)
                if z.size:
                    read_steps(z, row, positions, count, group, k, n_channels, z_tile, lanes)
                    for t in range(0, count * lanes, lanes):
                        gate = load(z_tile, t)
                        store(y_tile, t, load(y_tile, t) * (gate * sigmoid(gate)))
                write_steps(y_tile, lanes, y, row, positions, count, group, k, n_channels)

        if final >= 0:
            write_rows(h_tile, final_states, final, zero, n, channel, width)
    keep(memory)
    keep(exponents_memory)
    keep(positions_memory)
    keep(lines_memory)


def _scan_steps(may_be_constant: bool, is_bounded: bool) -> Callable:
    """Make the function that scans a block of steps. Its loop is without branches unless B or C `may_be_constant`."""

    @njit
    def scan_steps(
        count, i, n_states, a_tile, h_tile, B_lanes, C_lanes, B_steps, C_steps, dt_tile, input_tile, y_tile, lines,
        n_lines, B_is_constant, C_is_constant,
    ):  # fmt: skip
        """Advance the states (padded N, BLOCK) of the channels from i on, as many as a vector holds.

        Their outputs are added to y (CHECKPOINT_INTERVAL, lanes). Meanwhile the memory of the next block is fetched.
        """
        lanes = lane_count(a_tile)
        # Two states over all steps of the block at a time: each stays in a register, and they share the other loads.
        for j in range(0, n_states, 2):
            prefetch_share(lines, n_lines, i * item_size(a_tile), j // 2, n_states // 2)
            p, q = j * BLOCK + i, (j + 1) * BLOCK + i
            a, a2, h, h2 = load(a_tile, p), load(a_tile, q), load(h_tile, p), load(h_tile, q)
            for t in range(count):
                at, k = t * lanes, j * CHECKPOINT_INTERVAL + t
                b, b2 = coefficients_of_pair(a_tile, B_steps, B_lanes, may_be_constant and B_is_constant, k, p)
                c, c2 = coefficients_of_pair(a_tile, C_steps, C_lanes, may_be_constant and C_is_constant, k, p)
                dt, dt_u = load(dt_tile, at), load(input_tile, at)
                # h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t (equation 2)
                h = fma(exp2_product(dt, a, is_bounded), h, dt_u * b)
                h2 = fma(exp2_product(dt, a2, is_bounded), h2, dt_u * b2)
                # y_t += C_t h_t, state by state
                store(y_tile, at, fma(c2, h2, fma(c, h, load(y_tile, at))))
            store(h_tile, p, h)
            store(h_tile, q, h2)

    return scan_steps


_scan_bounded, _scan_unbounded, _scan_constant = (
    _scan_steps(False, True),
    _scan_steps(False, False),
    _scan_steps(True, False),
)
