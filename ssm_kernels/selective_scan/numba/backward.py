"""Backward of the compiled selective scan."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from torch import Tensor

from ..._core.varlen import parse_sequences
from ..._numba.compile import Kernel
from ..._numba.functions import LOG2_E, exp2, sigmoid
from ..._numba.lanes import (
    add_totals,
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
    count_tiles,
    empty_steps,
    memory_of,
    sequence_table,
    split_sequences,
)
from ..._numba.sums import sum_parts
from ..._numba.threads import run_tiles
from ..arguments import ScanArguments, ScanGradients
from . import CHECKPOINT_INTERVAL
from .tiles import prepare_steps, read_coefficients, write_coefficients

LN_2 = math.log(2)


def backward(*args) -> ScanGradients:
    """Compute the gradients of the differentiable arguments. Body of `selective_scan_numba_backward`."""
    *arguments, checkpoint_states, dy, dfinal_states = args
    arguments = ScanArguments(*arguments)
    u, dt, A, B, C, z = arguments.u, arguments.dt, arguments.A, arguments.B, arguments.C, arguments.z
    D, dt_bias, initial_states = arguments.D, arguments.dt_bias, arguments.initial_states
    (batch, length, groups, dim), n = u.shape, A.shape[1]
    compute = checkpoint_states.dtype
    sequences = parse_sequences(batch, length, arguments.cu_seqlens, arguments.seq_idx)
    n_runs = split_sequences(len(sequences.lengths))
    new = u.new_zeros if sequences.padding_runs(batch * length) else u.new_empty
    nothing = u.new_empty(0, 0, 0, dtype=compute)

    du, ddt = (empty_steps(x, sequences, compute) for x in (u, dt))  # (B, L, G, E) each
    dz = nothing[None] if z is None else empty_steps(z, sequences, compute)  # (B, L, G, E)
    # Gradients of inputs that sequences share have a part for each run of them, so that threads share no memory.
    dA = u.new_empty(n_runs, n, groups * dim, dtype=compute)  # (runs, N, G * E)
    dD, ddt_bias = (u.new_empty(n_runs, 1, groups * dim, dtype=compute) for _ in range(2))  # (runs, 1, G * E) each
    dinitial = nothing if initial_states is None else u.new_empty(dfinal_states.shape, dtype=compute)
    dB, dC = (
        u.new_empty(n_runs, 1, groups * dim, n, dtype=compute)
        if m.dim() == 2
        # A part for each tile of a group, (tiles, B, L, G, N)
        else new(count_tiles(dim), *m.shape, dtype=compute)
        for m in (B, C)
    )
    # The order of `scan_tiles_backward`'s arguments; states have channels last, (rows, N, G * E).
    inputs = [as_array(x, compute, 4) for x in (u, dt, B, C, z, dy)]
    rows = (A.T, D, dt_bias, checkpoint_states.flatten(0, 1), dfinal_states.transpose(1, 2))
    inputs += [as_array(x, compute, 3) for x in rows]
    dB_rows, dC_rows = (m if m.dim() == 4 else m.flatten(0, 1) for m in (dB, dC))
    outputs = (du, ddt, dB_rows, dC_rows, dz, dA, dD, ddt_bias, dinitial.transpose(1, 2))
    args = (
        *inputs, sequence_table(sequences, length, CHECKPOINT_INTERVAL), as_directions(arguments.directions, groups),
        arguments.height, *(memory_of(x) for x in outputs), n_runs, B.dim() == 2, C.dim() == 2, arguments.dt_softplus,
    )  # fmt: skip
    n_tiles = n_runs * count_tiles(dim, groups)
    run_tiles(lambda first, end: scan_tiles_backward(*args, first, end), n_tiles, 3 * u.numel() * n)

    def shared(parts: Tensor, like: Tensor | None) -> Tensor:
        return u.new_empty(0) if like is None else sum_parts(parts).to(like.dtype)

    dB, dC = (
        (sum_parts(parts)[0] if m.dim() == 2 else sum_parts(parts)).to(m.dtype) for parts, m in ((dB, B), (dC, C))
    )
    return ScanGradients(
        u=du.to(u.dtype),
        dt=ddt.to(dt.dtype),
        A=shared(dA, A).T.contiguous(),
        B=dB,
        C=dC,
        D=shared(dD, D).flatten(),
        z=u.new_empty(0) if z is None else dz.to(z.dtype),
        dt_bias=shared(ddt_bias, dt_bias).flatten(),
        initial_states=u.new_empty(0) if initial_states is None else dinitial.to(initial_states.dtype),
    )


@Kernel
def scan_tiles_backward(
    u, dt, B, C, z, dy, A, D, dt_bias, checkpoint_states, dfinal, sequences, directions, height,
    du, ddt, dB, dC, dz, dA, dD, ddt_bias, dinitial, n_runs, B_is_constant, C_is_constant, dt_softplus, first, end,
):  # fmt: skip
    """Gradients of the tiles from `first` to `end` - 1. A tile takes the sequences of one of `n_runs` runs in turn.

    Inputs are as in `scan_tiles`, and dy (B, L, G, E), dfinal (rows, N, G * E). Results that tiles share have a row for
    each that writes them: dA, dD, ddt_bias (runs, N or 1, G * E); dB, dC (tiles of a group * B, L, G, N), or
    (runs, 1, G * E, N) where constant in time. du, ddt, dz (B, L, G, E); dinitial (rows, N, G * E).
    """
    zero, one = np.int64(0), np.int64(1)  # numba compiles a function again for each literal
    n, (grid_length, groups, dim) = A.shape[1], u.shape[1:]
    size, states, row_size = one * CHECKPOINT_INTERVAL * BLOCK, n * BLOCK, one * BLOCK
    u_tile, dt_tile, input_tile = aligned_empty(u, size), aligned_empty(u, size), aligned_empty(u, size)
    y_tile, z_tile, dy_tile = aligned_empty(u, size), aligned_empty(u, size), aligned_empty(u, size)
    dinput_tile, dlog_tile = aligned_empty(u, size), aligned_empty(u, size)
    a_tile, h_tile, B_lanes, C_lanes = (
        aligned_empty(u, states), aligned_empty(u, states), aligned_empty(u, states), aligned_empty(u, states),
    )  # fmt: skip
    g_tile, dA_tile, dB_lanes, dC_lanes = (
        aligned_empty(u, states), aligned_empty(u, states), aligned_empty(u, states), aligned_empty(u, states),
    )  # fmt: skip
    steps = n * CHECKPOINT_INTERVAL
    B_steps, C_steps, dBC_steps = aligned_empty(u, steps), aligned_empty(u, steps), aligned_empty(u, 2 * steps)
    history = aligned_empty(u, 2 * (CHECKPOINT_INTERVAL + 1) * lane_count(u))
    bias, skip = aligned_empty(u, row_size), aligned_empty(u, row_size)
    dbias, dskip = aligned_empty(u, row_size), aligned_empty(u, row_size)
    positions = np.empty(CHECKPOINT_INTERVAL, np.int64)
    fill(bias, 0.0)
    fill(skip, 0.0)

    for tile in range(first, end):
        run, group, offset, width = locate_tile(tile, dim, groups)
        channel = group * dim + offset
        read_rows(A, zero, zero, n, channel, width, a_tile)
        for i in range(0, states, lane_count(u)):
            store(a_tile, i, LOG2_E * load(a_tile, i))
        if dt_bias.size:
            read_rows(dt_bias, zero, zero, one, channel, width, bias)
        if D.size:
            read_rows(D, zero, zero, one, channel, width, skip)
        for shared in (dA_tile, dB_lanes, dC_lanes, dbias, dskip):
            fill(shared, 0.0)
        batch_row = offset // BLOCK * u.shape[0]  # of row 0 in this tile's part of dB and dC

        n_sequences = len(sequences)
        for s in range(run * n_sequences // n_runs, (run + 1) * n_sequences // n_runs):
            row, start, length = sequences[s, 0], sequences[s, 1], sequences[s, 2]
            initial, final, saved = sequences[s, 3], sequences[s, 4], sequences[s, 5]
            fill(g_tile, 0.0)
            if final >= 0:
                read_rows(dfinal, final, zero, n, channel, width, g_tile)

            n_blocks = (length + CHECKPOINT_INTERVAL - 1) // CHECKPOINT_INTERVAL
            # Blocks backward in time, each from the state that the forward saved before it.
            for k in range(n_blocks - 1, -1, -1):
                at = start + k * CHECKPOINT_INTERVAL
                count = min(CHECKPOINT_INTERVAL, start + length - at)
                read_rows(checkpoint_states, zero, (saved + k) * n, n, channel, width, h_tile)
                set_positions(positions, at, count, directions[group], height, grid_length)
                read_steps(u, row, positions, count, group, offset, width, u_tile)
                read_steps(dt, row, positions, count, group, offset, width, dt_tile)
                read_steps(dy, row, positions, count, group, offset, width, dy_tile)
                prepare_steps(count, width, bias, dt_softplus, u_tile, dt_tile, input_tile)
                read_coefficients(B, row, positions, count, group, B_is_constant, channel, width, B_steps, B_lanes)
                read_coefficients(C, row, positions, count, group, C_is_constant, channel, width, C_steps, C_lanes)
                # d(y before the gate) = dy silu(z)
                if z.size:
                    read_steps(z, row, positions, count, group, offset, width, z_tile)
                    for t in range(count):
                        for i in range(t * BLOCK, t * BLOCK + width, lane_count(u)):
                            gate = load(z_tile, i)
                            store(dy_tile, i, load(dy_tile, i) * (gate * sigmoid(gate)))
                for t in range(count):
                    for i in range(t * BLOCK, t * BLOCK + width, lane_count(u)):
                        store(y_tile, i, load(skip, i - t * BLOCK) * load(u_tile, i))
                        store(dinput_tile, i, splat(u, 0.0))
                        store(dlog_tile, i, splat(u, 0.0))
                fill(dBC_steps, 0.0)

                differentiate_steps(
                    count, width, z.size > 0, a_tile, h_tile, B_lanes, C_lanes, B_steps, C_steps, dt_tile, input_tile,
                    dy_tile, history, g_tile, dA_tile, dB_lanes, dC_lanes, dBC_steps, dinput_tile, dlog_tile,
                    y_tile, B_is_constant, C_is_constant,
                )  # fmt: skip
                if not B_is_constant:
                    write_coefficients(dBC_steps, zero, dB, batch_row + row, positions, count, group)
                if not C_is_constant:
                    write_coefficients(dBC_steps, one, dC, batch_row + row, positions, count, group)

                # From here on `input_tile` holds du, `dlog_tile` ddt.
                # du = dt d(dt u) + D dy, ddt = u d(dt u) + sum_n A dlog (its factor log2(e) taken back), dD += dy u
                for t in range(count):
                    for i in range(0, width, lane_count(u)):
                        j = t * BLOCK + i
                        x, dinput, d = load(u_tile, j), load(dinput_tile, j), load(dy_tile, j)
                        store(input_tile, j, fma(dinput, load(dt_tile, j), d * load(skip, i)))
                        store(dlog_tile, j, fma(dinput, x, LN_2 * load(dlog_tile, j)))
                        store(dskip, i, fma(d, x, load(dskip, i)))
                # softplus' = sigmoid, of the raw step: `dt_tile` holds the step after softplus, so it is read again.
                if dt_softplus:
                    read_steps(dt, row, positions, count, group, offset, width, dt_tile)
                    for t in range(count):
                        for i in range(0, width, lane_count(u)):
                            j = t * BLOCK + i
                            store(dlog_tile, j, load(dlog_tile, j) * sigmoid(load(dt_tile, j) + load(bias, i)))
                for t in range(count):
                    for i in range(0, width, lane_count(u)):
                        store(dbias, i, load(dbias, i) + load(dlog_tile, t * BLOCK + i))
                write_steps(input_tile, du, row, positions, count, group, offset, width)
                write_steps(dlog_tile, ddt, row, positions, count, group, offset, width)
                # dz = dy y silu'(z), of the dy that the gate has not multiplied
                if z.size:
                    read_steps(dy, row, positions, count, group, offset, width, dy_tile)
                    for t in range(count):
                        for i in range(t * BLOCK, t * BLOCK + width, lane_count(u)):
                            gate = load(z_tile, i)
                            s_gate = sigmoid(gate)
                            d_silu = s_gate * fma(gate, 1.0 - s_gate, splat(u, 1.0))
                            store(dy_tile, i, load(dy_tile, i) * load(y_tile, i) * d_silu)
                    write_steps(dy_tile, dz, row, positions, count, group, offset, width)

            if initial >= 0 and dinitial.size:
                write_rows(g_tile, dinitial, initial, zero, n, channel, width)

        write_rows(dA_tile, dA, run, zero, n, channel, width)
        write_rows(dskip, dD, run, zero, one, channel, width)
        write_rows(dbias, ddt_bias, run, zero, one, channel, width)
        if B_is_constant:
            write_lanes(dB_lanes, dB, run, channel, width)
        if C_is_constant:
            write_lanes(dC_lanes, dC, run, channel, width)


@njit
def write_lanes(tile, target, run, channel, width):
    """Write a tile (N, BLOCK) to target[run, 0, channel : channel + width] (D, N)."""
    for j in range(target.shape[3]):
        for i in range(width):
            target[run, 0, channel + i, j] = element(tile, j * BLOCK + i)


@njit
def differentiate_steps(
    count, width, has_gate, a_tile, h_tile, B_lanes, C_lanes, B_steps, C_steps, dt_tile, input_tile, dy_tile, history,
    g_tile, dA_tile, dB_lanes, dC_lanes, dBC_steps, dinput_tile, dlog_tile, y_tile,
    B_is_constant, C_is_constant,
):  # fmt: skip
    """Gradients of a block of steps, one state of one vector of channels at a time.

    h_tile (N, BLOCK) holds the states before the block. g_tile holds the gradients of those after it, and then of
    those before it. All other results are added to: dlog_tile is that of dt by way of the decay, times log2(e).
    """
    lanes = lane_count(a_tile)
    decays = (CHECKPOINT_INTERVAL + 1) * lanes  # where the decays of the history start; its states come first
    for i in range(0, width, lanes):
        for j in range(h_tile.size // BLOCK):
            at_state = j * BLOCK + i
            a, h = load(a_tile, at_state), load(h_tile, at_state)
            b, c = load(B_lanes, at_state), load(C_lanes, at_state)
            # The states h_t and decays of the block again, from the checkpoint; the backward below reads both.
            store(history, 0, h)
            for t in range(count):
                if not B_is_constant:
                    b = splat(a_tile, element(B_steps, j * CHECKPOINT_INTERVAL + t))
                decay = exp2(load(dt_tile, t * BLOCK + i) * a)
                h = fma(decay, h, load(input_tile, t * BLOCK + i) * b)
                store(history, decays + t * lanes, decay)
                store(history, (t + 1) * lanes, h)
                if has_gate:
                    if not C_is_constant:
                        c = splat(a_tile, element(C_steps, j * CHECKPOINT_INTERVAL + t))
                    store(y_tile, t * BLOCK + i, fma(c, h, load(y_tile, t * BLOCK + i)))

            g, dA = load(g_tile, at_state), load(dA_tile, at_state)
            dB, dC = load(dB_lanes, at_state), load(dC_lanes, at_state)
            # Adjoint of equation 2: dL/dh_t = C_t dy_t + exp(dt_{t+1} A) dL/dh_{t+1}
            for t in range(count - 1, -1, -1):
                if not B_is_constant:
                    b = splat(a_tile, element(B_steps, j * CHECKPOINT_INTERVAL + t))
                if not C_is_constant:
                    c = splat(a_tile, element(C_steps, j * CHECKPOINT_INTERVAL + t))
                at = t * BLOCK + i
                dy = load(dy_tile, at)
                g = fma(c, dy, g)  # dL/dh_t
                # dB_t = sum over channels of dL/dh_t dt_t u_t, dC_t = sum over channels of dy_t h_t
                if B_is_constant or C_is_constant:
                    dB = fma(g, load(input_tile, at), dB)
                    dC = fma(dy, load(history, (t + 1) * lanes), dC)
                dBC = 2 * (j * CHECKPOINT_INTERVAL + t)
                add_totals(dBC_steps, dBC, g * load(input_tile, at), dy * load(history, (t + 1) * lanes))
                store(dinput_tile, at, fma(g, b, load(dinput_tile, at)))
                g = g * load(history, decays + t * lanes)
                dlog = g * load(history, t * lanes)  # of the exponent dt_t A
                store(dlog_tile, at, fma(dlog, a, load(dlog_tile, at)))
                dA = fma(dlog, load(dt_tile, at), dA)
            store(g_tile, at_state, g)
            store(dA_tile, at_state, dA)
            store(dB_lanes, at_state, dB)
            store(dC_lanes, at_state, dC)
