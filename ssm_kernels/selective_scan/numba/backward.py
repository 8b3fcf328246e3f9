"""Backward of the compiled selective scan."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numba import njit
from torch import Tensor

from ..._core.varlen import parse_sequences
from ..._numba.compile import Kernel
from ..._numba.functions import MAX_EXPONENT, exp2_product, sigmoid
from ..._numba.lanes import (
    add_totals,
    aligned_empty,
    borrow,
    borrow_from,
    clear,
    element,
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
    empty_of,
    empty_steps,
    memory_of,
    sequence_table,
    split_sequences,
)
from ..._numba.sums import sum_parts
from ..._numba.threads import run_tiles
from ..arguments import ScanArguments, ScanGradients
from . import CHECKPOINT_INTERVAL
from .tiles import (
    coefficients_of_pair,
    padded_states,
    prepare_steps,
    read_coefficients,
    read_exponents,
    write_coefficients,
)

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
    new = empty_of(u, sequences)
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
        return u.new_empty(0) if like is None else as_dtype(sum_parts(parts), like.dtype)

    dB, dC = (
        as_dtype(sum_parts(parts)[0] if m.dim() == 2 else sum_parts(parts), m.dtype) for parts, m in ((dB, B), (dC, C))
    )
    return ScanGradients(
        u=as_dtype(du, u.dtype),
        dt=as_dtype(ddt, dt.dtype),
        A=shared(dA, A).T.contiguous(),
        B=dB,
        C=dC,
        D=shared(dD, D).flatten(),
        z=u.new_empty(0) if z is None else as_dtype(dz, z.dtype),
        dt_bias=shared(ddt_bias, dt_bias).flatten(),
        initial_states=u.new_empty(0) if initial_states is None else as_dtype(dinitial, initial_states.dtype),
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
    n, (grid_length, groups, dim), lanes = A.shape[1], u.shape[1:], lane_count(u)
    size, states, row_size = CHECKPOINT_INTERVAL * lanes, padded_states(n) * BLOCK, one * BLOCK
    coefficients, n_states = padded_states(n) * CHECKPOINT_INTERVAL, padded_states(n)
    # One memory for all tiles of steps: loads seem to wait for stores that are a multiple of 4,096 bytes away.
    memory = aligned_empty(u, 13 * size + 4 * lanes * lanes + 8 * states + 4 * coefficients + 4 * row_size)
    clear(memory, zero, memory.size)
    dt_tile, input_tile, y_tile, dy_tile, dinput_tile, dlog_tile, u_tile, z_tile, slope_tile, history = parts(
        memory, size, 10
    )
    state_tiles = borrow_from(memory, 13 * size + 4 * lanes * lanes)
    a_tile, h_tile, g_tile, dA_tile, B_lanes, C_lanes, dB_lanes, dC_lanes, step_tiles = parts(state_tiles, states, 9)
    B_steps, C_steps, dB_steps, dC_steps, rows = parts(step_tiles, coefficients, 5)
    bias, skip, dbias, dskip = parts(rows, row_size, 4)
    exponents_memory = np.empty(BLOCK // lanes, u.dtype)
    positions_memory, lines_memory = (
        np.empty(2 * CHECKPOINT_INTERVAL, np.int64), np.empty(7 * CHECKPOINT_INTERVAL, np.int64),
    )  # fmt: skip
    exponents, positions, lines = borrow(exponents_memory), borrow(positions_memory), borrow(lines_memory)
    next_positions = borrow_from(positions, CHECKPOINT_INTERVAL)

    for tile in range(first, end):
        run, group, offset, width = locate_tile(tile, dim, groups)
        channel = group * dim + offset
        read_exponents(A, channel, width, a_tile, n_states, exponents)
        if dt_bias.size:
            read_rows(dt_bias, zero, zero, one, channel, width, bias)
        if D.size:
            read_rows(D, zero, zero, one, channel, width, skip)
        for shared in (dA_tile, dB_lanes, dC_lanes):
            clear(shared, zero, states)
        for shared in (dbias, dskip):
            clear(shared, zero, row_size)
        batch_row = offset // BLOCK * u.shape[0]  # of row 0 in this tile's part of dB and dC

        n_sequences = len(sequences)
        for s in range(run * n_sequences // n_runs, (run + 1) * n_sequences // n_runs):
            row, start, length = sequences[s, 0], sequences[s, 1], sequences[s, 2]
            initial, final, saved = sequences[s, 3], sequences[s, 4], sequences[s, 5]
            clear(g_tile, zero, states)
            if final >= 0:
                read_rows(dfinal, final, zero, n, channel, width, g_tile)

            n_blocks = (length + CHECKPOINT_INTERVAL - 1) // CHECKPOINT_INTERVAL
            # Blocks backward in time, each from the state that the forward saved before it.
            for k in range(n_blocks - 1, -1, -1):
                at = start + k * CHECKPOINT_INTERVAL
                count = min(CHECKPOINT_INTERVAL, start + length - at)
                read_rows(checkpoint_states, zero, (saved + k) * n, n, channel, width, h_tile)
                set_positions(positions, at, count, directions[group], height, grid_length)
                ahead = CHECKPOINT_INTERVAL * min(k, 1)  # steps of the block that comes next
                set_positions(next_positions, at - ahead, ahead, directions[group], height, grid_length)
                read_coefficients(B, row, positions, count, group, B_is_constant, channel, width, B_steps, B_lanes)
                read_coefficients(C, row, positions, count, group, C_is_constant, channel, width, C_steps, C_lanes)
                clear(dB_steps, zero, coefficients)
                clear(dC_steps, zero, coefficients)
                n_lines = zero
                for array in (u, dt, dy, z, du, ddt, dz):
                    n_lines = list_lines(
                        array, row, positions, CHECKPOINT_INTERVAL, CHECKPOINT_INTERVAL + ahead, group, offset, lines,
                        n_lines,
                    )  # fmt: skip
                for i in range(0, width, lanes):
                    c, n_channels = offset + i, min(lanes, width - i)
                    read_steps(u, row, positions, count, group, c, n_channels, u_tile, lanes)
                    read_steps(dt, row, positions, count, group, c, n_channels, dt_tile, lanes)
                    read_steps(dy, row, positions, count, group, c, n_channels, dy_tile, lanes)
                    step_size = prepare_steps(
                        count, n_channels, borrow_from(bias, i), dt_softplus, u_tile, dt_tile, input_tile, slope_tile
                    )
                    # d(y before the gate) = dy silu(z); dz = dy silu'(z) y, of which `z_tile` holds all but y.
                    if z.size:
                        read_steps(z, row, positions, count, group, c, n_channels, z_tile, lanes)
                        for t in range(0, count * lanes, lanes):
                            gate, d = load(z_tile, t), load(dy_tile, t)
                            s_gate = sigmoid(gate)
                            store(dy_tile, t, d * (gate * s_gate))
                            store(z_tile, t, d * (s_gate * fma(gate, 1.0 - s_gate, splat(u, 1.0))))
                    for t in range(0, count * lanes, lanes):
                        store(y_tile, t, load(skip, i) * load(u_tile, t))
                        store(dinput_tile, t, splat(u, 0.0))
                        store(dlog_tile, t, splat(u, 0.0))
                    block = (
                        count, i, n_states, a_tile, h_tile, B_lanes, C_lanes, B_steps, C_steps, dt_tile, input_tile,
                        dy_tile, history, g_tile, dA_tile, dB_lanes, dC_lanes, dB_steps, dC_steps, dinput_tile,
                        dlog_tile, y_tile, lines, n_lines, B_is_constant, C_is_constant,
                    )  # fmt: skip
                    if B_is_constant or C_is_constant:
                        _differentiate_constant(*block)
                    elif step_size * exponents[i // lanes] <= MAX_EXPONENT:
                        _differentiate_bounded(*block)
                    else:
                        _differentiate_unbounded(*block)

                    # From here on `input_tile` holds du, `dlog_tile` ddt.
                    # du = dt d(dt u) + D dy, ddt = u d(dt u) + sum_n A dlog (its factor log2(e) taken back), dD += dy u
                    d_skip, d_bias, D_lanes = load(dskip, i), load(dbias, i), load(skip, i)
                    for t in range(0, count * lanes, lanes):
                        x, dinput, d = load(u_tile, t), load(dinput_tile, t), load(dy_tile, t)
                        d_step = fma(dinput, x, LN_2 * load(dlog_tile, t))
                        if dt_softplus:
                            d_step = d_step * load(slope_tile, t)
                        store(input_tile, t, fma(dinput, load(dt_tile, t), d * D_lanes))
                        store(dlog_tile, t, d_step)
                        d_skip = fma(d, x, d_skip)
                        d_bias = d_bias + d_step
                    store(dskip, i, d_skip)
                    store(dbias, i, d_bias)
                    write_steps(input_tile, lanes, du, row, positions, count, group, c, n_channels)
                    write_steps(dlog_tile, lanes, ddt, row, positions, count, group, c, n_channels)
                    if z.size:
                        for t in range(0, count * lanes, lanes):
                            store(z_tile, t, load(z_tile, t) * load(y_tile, t))
                        write_steps(z_tile, lanes, dz, row, positions, count, group, c, n_channels)
                if not B_is_constant:
                    write_coefficients(dB_steps, dB, batch_row + row, positions, count, group)
                if not C_is_constant:
                    write_coefficients(dC_steps, dC, batch_row + row, positions, count, group)

            if initial >= 0 and dinitial.size:
                write_rows(g_tile, dinitial, initial, zero, n, channel, width)

        write_rows(dA_tile, dA, run, zero, n, channel, width)
        write_rows(dskip, dD, run, zero, one, channel, width)
        write_rows(dbias, ddt_bias, run, zero, one, channel, width)
        if B_is_constant:
            write_lanes(dB_lanes, dB, run, channel, width)
        if C_is_constant:
            write_lanes(dC_lanes, dC, run, channel, width)
    keep(memory)
    keep(exponents_memory)
    keep(positions_memory)
    keep(lines_memory)


@njit
def write_lanes(tile, target, run, channel, width):
    """Write a tile (N, BLOCK) to target[run, 0, channel : channel + width] (D, N)."""
    for j in range(target.shape[3]):
        for i in range(width):
            target[run, 0, channel + i, j] = element(tile, j * BLOCK + i)


def _differentiate_steps(may_be_constant: bool, is_bounded: bool) -> Callable:
    """Make the function of the gradients of a block of steps; see `forward._scan_steps`."""

    @njit
    def differentiate_steps(
        count, i, n_states, a_tile, h_tile, B_lanes, C_lanes, B_steps, C_steps, dt_tile, input_tile, dy_tile, history,
        g_tile, dA_tile, dB_lanes, dC_lanes, dB_steps, dC_steps, dinput_tile, dlog_tile, y_tile,
        lines, n_lines, B_is_constant, C_is_constant,
    ):  # fmt: skip
        """Gradients of one vector of channels, from i on, two states at a time.

        h_tile (padded N, BLOCK) holds the states before the block. g_tile holds the gradients of those after it, and
        then of those before it. All other results are added to: dlog_tile is that of dt by way of the decay, times
        log2(e). Meanwhile the memory of the block that comes next is fetched.
        """
        lanes = lane_count(a_tile)
        size = CHECKPOINT_INTERVAL * lanes
        # The history: decays of both states, the states before each step, and shares of dB and dC of a run of steps.
        decays, decays2, before, before2, shares = parts(history, size, 5)
        square = lanes * lanes
        for j in range(0, n_states, 2):
            prefetch_share(lines, n_lines, i * item_size(a_tile), j // 2, n_states // 2)
            p, q = j * BLOCK + i, (j + 1) * BLOCK + i
            k = j * CHECKPOINT_INTERVAL
            k2 = k + CHECKPOINT_INTERVAL
            a, a2, h, h2 = load(a_tile, p), load(a_tile, q), load(h_tile, p), load(h_tile, q)
            # The states h_t and decays of the block again, from the checkpoint; the backward below reads both.
            for t in range(count):
                at = t * lanes
                b, b2 = coefficients_of_pair(a_tile, B_steps, B_lanes, may_be_constant and B_is_constant, k + t, p)
                c, c2 = coefficients_of_pair(a_tile, C_steps, C_lanes, may_be_constant and C_is_constant, k + t, p)
                dt, dt_u = load(dt_tile, at), load(input_tile, at)
                decay, decay2 = exp2_product(dt, a, is_bounded), exp2_product(dt, a2, is_bounded)
                store(decays, at, decay)
                store(decays2, at, decay2)
                store(before, at, h)
                store(before2, at, h2)
                h, h2 = fma(decay, h, dt_u * b), fma(decay2, h2, dt_u * b2)
                store(y_tile, at, fma(c2, h2, fma(c, h, load(y_tile, at))))

            g, g2, dA, dA2 = load(g_tile, p), load(g_tile, q), load(dA_tile, p), load(dA_tile, q)
            # Adjoint of equation 2: dL/dh_t = C_t dy_t + exp(dt_{t+1} A) dL/dh_{t+1}, in runs of as many steps as a
            # vector has lanes.
            for first in range((count - 1) // lanes * lanes, -1, -lanes):
                for t in range(min(first + lanes, count) - 1, first - 1, -1):
                    at, share = t * lanes, (t - first) * lanes
                    b, b2 = coefficients_of_pair(a_tile, B_steps, B_lanes, may_be_constant and B_is_constant, k + t, p)
                    c, c2 = coefficients_of_pair(a_tile, C_steps, C_lanes, may_be_constant and C_is_constant, k + t, p)
                    dy, dt, dt_u = load(dy_tile, at), load(dt_tile, at), load(input_tile, at)
                    decay, decay2, last, last2 = (
                        load(decays, at),
                        load(decays2, at),
                        load(before, at),
                        load(before2, at),
                    )
                    dinput, dlog = load(dinput_tile, at), load(dlog_tile, at)
                    g, g2 = fma(c, dy, g), fma(c2, dy, g2)  # dL/dh_t
                    # dB_t = sum over channels of dL/dh_t dt_t u_t, dC_t = sum over channels of dy_t h_t
                    if may_be_constant:
                        store(dB_lanes, p, fma(g, dt_u, load(dB_lanes, p)))
                        store(dB_lanes, q, fma(g2, dt_u, load(dB_lanes, q)))
                        store(dC_lanes, p, fma(dy, h, load(dC_lanes, p)))
                        store(dC_lanes, q, fma(dy, h2, load(dC_lanes, q)))
                    store(shares, share, g * dt_u)
                    store(shares, square + share, g2 * dt_u)
                    store(shares, 2 * square + share, dy * h)
                    store(shares, 3 * square + share, dy * h2)
                    store(dinput_tile, at, fma(g2, b2, fma(g, b, dinput)))
                    # Gradients of the exponents dt_t A. A growing decay may make g infinite where the state is 0.
                    s, s2 = g * last * decay, g2 * last2 * decay2
                    g, g2, h, h2 = g * decay, g2 * decay2, last, last2
                    store(dlog_tile, at, fma(s2, a2, fma(s, a, dlog)))
                    dA, dA2 = fma(s, dt, dA), fma(s2, dt, dA2)
                # Beyond `count` are steps of another run, which no one reads.
                add_totals(dB_steps, k + first, shares, 0)
                add_totals(dB_steps, k2 + first, shares, square)
                add_totals(dC_steps, k + first, shares, 2 * square)
                add_totals(dC_steps, k2 + first, shares, 3 * square)
            store(g_tile, p, g)
            store(g_tile, q, g2)
            store(dA_tile, p, dA)
            store(dA_tile, q, dA2)

    return differentiate_steps


_differentiate_bounded, _differentiate_unbounded, _differentiate_constant = (
    _differentiate_steps(False, True),
    _differentiate_steps(False, False),
    _differentiate_steps(True, False),
)
