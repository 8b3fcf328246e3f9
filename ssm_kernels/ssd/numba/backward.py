"""Backward of the compiled SSD."""

from __future__ import annotations

import numpy as np
from numba import njit
from torch import Tensor

from ..._core.varlen import parse_sequences
from ..._numba.compile import Kernel
from ..._numba.functions import sigmoid, softplus
from ..._numba.lanes import (
    aligned_empty,
    clear,
    element,
    fma,
    lane_count,
    load,
    read_row,
    set_element,
    set_positions,
    splat,
    store,
)
from ..._numba.launch import as_array, as_directions, as_dtype, empty_of, memory_of, sequence_table, split_sequences
from ..._numba.products import ROWS, add_product
from ..._numba.sums import sum_parts
from ..._numba.threads import run_tiles
from ..arguments import ScanArguments, ScanGradients
from . import CHECKPOINT_INTERVAL
from .tiles import (
    CHUNK,
    dot,
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

CHUNKS = CHECKPOINT_INTERVAL // CHUNK
"""Chunks between two checkpoints, whose states are computed again."""


def backward(dy, dfinal_states, checkpoint_states, *args) -> ScanGradients:
    """Compute the gradients of the differentiable arguments. Body of `ssd_numba_backward`."""
    arguments = ScanArguments(*args)
    x, B, D, initial_states = arguments.x, arguments.B, arguments.D, arguments.initial_states
    (batch, length, heads, headdim), groups = x.shape, B.shape[2]
    compute = checkpoint_states.dtype
    sequences = parse_sequences(batch, length, arguments.cu_seqlens, arguments.seq_idx)
    n_runs, n_heads = split_sequences(len(sequences.lengths)), heads_per_tile(heads, groups)
    n_blocks = -(-(heads // groups) // n_heads)
    new = empty_of(x, sequences)
    dx, ddt = (new(*t.shape, dtype=compute) for t in (x, arguments.dt))  # (B, L, H, P), (B, L, H)
    input_weights = arguments.input_weights
    dweights = (
        x.new_empty(0, 0, 0, dtype=compute) if input_weights is None else new(*input_weights.shape, dtype=compute)
    )
    # A part for each tile of a group, so that tiles of different threads share no memory
    dB, dC = (new(n_blocks, *B.shape, dtype=compute) for _ in range(2))  # (tiles, B, L, G, N)
    # A part for each run of sequences
    dA, ddt_bias = (x.new_zeros(n_runs, 1, heads, dtype=compute) for _ in range(2))  # (runs, 1, H)
    dD = x.new_zeros(n_runs, heads, headdim, dtype=compute)  # (runs, H, P)
    dinitial = x.new_empty((0,) * 4 if initial_states is None else initial_states.shape, dtype=compute)
    args = (
        *input_arrays(arguments, compute), *(as_array(t, compute, 4) for t in (checkpoint_states, dy, dfinal_states)),
        sequence_table(sequences, length, CHECKPOINT_INTERVAL), as_directions(arguments.directions, 1),
        arguments.height,
        *(memory_of(t) for t in (dx, dB.flatten(0, 1), dC.flatten(0, 1), ddt, dD, dA, ddt_bias, dinitial, dweights)),
        n_heads, n_runs, arguments.dt_softplus, arguments.dt_min, arguments.dt_max,
    )  # fmt: skip
    n_tiles = n_runs * groups * n_blocks
    run_tiles(lambda first, end: scan_tiles_backward(*args, first, end), n_tiles, x.numel() * B.shape[3])

    def in_dtype(gradient: Tensor, like: Tensor | None) -> Tensor:
        return x.new_empty(0) if like is None else as_dtype(gradient, like.dtype)

    dD = sum_parts(dD)  # (H, P)
    return ScanGradients(
        x=as_dtype(dx, x.dtype),
        dt=as_dtype(ddt, arguments.dt.dtype),
        A=in_dtype(sum_parts(dA)[0], arguments.A),
        B=in_dtype(sum_parts(dB), B),
        C=in_dtype(sum_parts(dC), arguments.C),
        D=in_dtype(dD if D is None else dD.sum_to_size(D.shape), D),
        dt_bias=in_dtype(sum_parts(ddt_bias)[0], arguments.dt_bias),
        initial_states=in_dtype(dinitial, initial_states),
        input_weights=in_dtype(dweights, input_weights),
    )


@Kernel
def scan_tiles_backward(
    x, B, C, dt, D, A, dt_bias, input_weights, checkpoint_states, dy, dfinal, sequences, directions, height,
    dx, dB, dC, ddt, dD, dA, ddt_bias, dinitial, dweights, n_heads, n_runs, dt_softplus, dt_min, dt_max, first, end,
):  # fmt: skip
    """Gradients of the tiles from `first` to `end` - 1. A tile takes the sequences of one of `n_runs` runs in turn.

    Inputs are as in `scan_tiles`, and dy (B, L, H, P), dfinal (rows, H, P, N). dx (B, L, H, P); dB, dC (tiles of a
    group * B, L, G, N); ddt, dweights (B, L, H); dD (runs, H, P); dA, ddt_bias (runs, 1, H); dinitial (rows, H, P, N).
    """
    grid_length, heads, headdim = x.shape[1:]
    groups, n = B.shape[2:]
    p_size, n_size = padded(x, headdim), padded(x, n)
    per_group = heads // groups
    square, steps_size = np.int64(CHUNK * CHUNK), np.int64(CHUNK)
    # Of all chunks between two checkpoints: what heads share, and what a head computes again
    B_tiles, C_tiles = aligned_empty(x, CHUNKS * CHUNK * n_size), aligned_empty(x, CHUNKS * CHUNK * n_size)
    B_columns, C_columns = aligned_empty(x, CHUNKS * CHUNK * n), aligned_empty(x, CHUNKS * CHUNK * n)
    dB_columns, dC_columns = aligned_empty(x, CHUNKS * CHUNK * n), aligned_empty(x, CHUNKS * CHUNK * n)
    scores, dscores = aligned_empty(x, CHUNKS * square), aligned_empty(x, CHUNKS * square)
    states, dstates = aligned_empty(x, CHUNKS * n * p_size), aligned_empty(x, n_heads * n * p_size)
    x_tiles, dt_x_tiles = aligned_empty(x, CHUNKS * CHUNK * p_size), aligned_empty(x, CHUNKS * CHUNK * p_size)
    raw, steps, decays = (
        aligned_empty(x, CHUNKS * steps_size), aligned_empty(x, CHUNKS * steps_size),
        aligned_empty(x, CHUNKS * steps_size),
    )  # fmt: skip
    weights = aligned_empty(x, CHUNKS * steps_size)
    # Of one chunk of one head
    matrix, masked, dmasked = aligned_empty(x, square), aligned_empty(x, square), aligned_empty(x, square)
    dy_tile, decayed, ddt_x = (
        aligned_empty(x, CHUNK * p_size), aligned_empty(x, CHUNK * p_size), aligned_empty(x, CHUNK * p_size),
    )  # fmt: skip
    dy_columns, dt_x_columns = aligned_empty(x, CHUNK * headdim), aligned_empty(x, CHUNK * headdim)
    columns = aligned_empty(x, CHUNK * n)
    from_start, to_end, sums = aligned_empty(x, steps_size), aligned_empty(x, steps_size), aligned_empty(x, steps_size)
    dlog, row_sums, strict = aligned_empty(x, steps_size), aligned_empty(x, steps_size), aligned_empty(x, square)
    skip, dskip = aligned_empty(x, p_size), aligned_empty(x, p_size)
    positions = np.empty((CHUNKS, CHUNK), np.int64)
    clear(strict, 0, square)
    for i in range(CHUNK):
        for j in range(i):
            set_element(strict, i * CHUNK + j, 1.0)
    clear(skip, 0, p_size)

    for tile in range(first, end):
        run, group, first_head, end_head = locate_heads(tile, heads, groups, n_heads)
        direction = directions[group * len(directions) // groups]
        batch_row = (first_head - group * per_group) // n_heads * x.shape[0]  # of row 0 in this tile's part of dB
        for s in range(run * len(sequences) // n_runs, (run + 1) * len(sequences) // n_runs):
            row, start, length = sequences[s, 0], sequences[s, 1], sequences[s, 2]
            initial, final, saved = sequences[s, 3], sequences[s, 4], sequences[s, 5]
            for head in range(first_head, end_head):
                dstate = (head - first_head) * n * p_size
                if final >= 0:
                    read_state(dfinal, final, head, dstates, dstate, p_size)
                else:
                    clear(dstates, dstate, n * p_size)

            # Blocks backward in time, each from the state that the forward saved before it
            for block in range((length + CHECKPOINT_INTERVAL - 1) // CHECKPOINT_INTERVAL - 1, -1, -1):
                at = start + block * CHECKPOINT_INTERVAL
                n_steps = min(CHECKPOINT_INTERVAL, start + length - at)
                n_chunks = (n_steps + CHUNK - 1) // CHUNK
                for c in range(n_chunks):
                    count = min(CHUNK, n_steps - c * CHUNK)
                    set_positions(positions[c], at + c * CHUNK, count, direction, height, grid_length)
                    read_matrix(B, row, positions[c], count, group, B_tiles, c * CHUNK * n_size, n_size)
                    read_matrix(C, row, positions[c], count, group, C_tiles, c * CHUNK * n_size, n_size)
                    transpose(B_tiles, c * CHUNK * n_size, n_size, count, n, B_columns, c * CHUNK * n)
                    transpose(C_tiles, c * CHUNK * n_size, n_size, count, n, C_columns, c * CHUNK * n)
                    clear(scores, c * CHUNK * CHUNK, CHUNK * CHUNK)
                    add_product(scores, c * CHUNK * CHUNK, CHUNK, C_tiles, c * CHUNK * n_size, n_size, 1,
                                B_columns, c * CHUNK * n, CHUNK, count, n, CHUNK)  # fmt: skip
                clear(dscores, 0, CHUNKS * square)
                clear(dB_columns, 0, CHUNKS * CHUNK * n)
                clear(dC_columns, 0, CHUNKS * CHUNK * n)

                for head in range(first_head, end_head):
                    dstate = (head - first_head) * n * p_size
                    load_state(checkpoint_states, saved + block, head, states, p_size)
                    if D.size:
                        read_row(D, head * (D.strides[1] // D.itemsize), D.strides[2] // D.itemsize, headdim, skip, 0)
                    clear(dskip, 0, p_size)
                    dA_sum, dt_bias_sum = 0.0, 0.0
                    # The states before all chunks again
                    for c in range(n_chunks):
                        count = min(CHUNK, n_steps - c * CHUNK)
                        here = c * CHUNK * p_size
                        read_step_sizes(dt, row, positions[c], count, head, A, dt_bias, input_weights, dt_softplus,
                                        dt_min, dt_max, raw, steps, decays, weights, c * CHUNK)  # fmt: skip
                        read_matrix(x, row, positions[c], count, head, x_tiles, here, p_size)
                        multiply_rows(x_tiles, here, count, p_size, weights, c * CHUNK, dt_x_tiles, here)
                        if c + 1 < n_chunks:
                            make_decays(decays, c * CHUNK, count, matrix, from_start, to_end)
                            multiply_rows(dt_x_tiles, here, count, p_size, to_end, 0, decayed, 0)
                            advance_state(states, c * n * p_size, n * p_size, element(from_start, count - 1))
                            add_product(states, (c + 1) * n * p_size, p_size, B_tiles, c * CHUNK * n_size, 1, n_size,
                                        decayed, 0, p_size, n, count, p_size)  # fmt: skip

                    for c in range(n_chunks - 1, -1, -1):
                        count = min(CHUNK, n_steps - c * CHUNK)
                        here, state, cell = c * CHUNK * p_size, c * n * p_size, c * CHUNK * CHUNK
                        rows, cols = c * CHUNK * n_size, c * CHUNK * n
                        make_decays(decays, c * CHUNK, count, matrix, from_start, to_end)
                        read_matrix(dy, row, positions[c], count, head, dy_tile, 0, p_size)
                        transpose(dy_tile, 0, p_size, count, headdim, dy_columns, 0)
                        transpose(dt_x_tiles, here, p_size, count, headdim, dt_x_columns, 0)

                        # Scores: d(L o C B^T) = dy (dt x)^T
                        clear(dmasked, 0, CHUNK * CHUNK)
                        add_product(dmasked, 0, CHUNK, dy_tile, 0, p_size, 1, dt_x_columns, 0, CHUNK, count, headdim,
                                    CHUNK)  # fmt: skip
                        differentiate_scores(matrix, scores, dscores, cell, masked, dmasked, strict, row_sums, dlog,
                                             count)  # fmt: skip

                        # d(dt x): by way of the state after the chunk, and of the chunk's own outputs
                        clear(ddt_x, 0, count * p_size)
                        add_product(ddt_x, 0, p_size, B_tiles, rows, n_size, 1, dstates, dstate, p_size, count, n,
                                    p_size)  # fmt: skip
                        multiply_rows(ddt_x, 0, count, p_size, to_end, 0, ddt_x, 0)
                        for j in range(0, count, ROWS):
                            add_product(ddt_x, j * p_size, p_size, masked, j * CHUNK + j, 1, CHUNK, dy_tile, j * p_size,
                                        p_size, min(ROWS, count - j), count - j, p_size)  # fmt: skip

                        # dC by way of the state before the chunk; dlog of step k is that of all outputs from k on.
                        multiply_columns(dy_columns, headdim, from_start)
                        clear(columns, 0, CHUNK * n)
                        add_product(columns, 0, CHUNK, states, state, p_size, 1, dy_columns, 0, CHUNK, n, headdim,
                                    CHUNK)  # fmt: skip
                        add_columns(columns, C_columns, dC_columns, cols, n, sums)
                        so_far = 0.0
                        for t in range(count - 1, -1, -1):
                            so_far = so_far + element(sums, t)
                            set_element(dlog, t, element(dlog, t) + so_far)
                        # dB by way of the state after the chunk; dlog of step k is that of all inputs before k.
                        multiply_columns(dt_x_columns, headdim, to_end)
                        clear(columns, 0, CHUNK * n)
                        add_product(columns, 0, CHUNK, dstates, dstate, p_size, 1, dt_x_columns, 0, CHUNK, n, headdim,
                                    CHUNK)  # fmt: skip
                        add_columns(columns, B_columns, dB_columns, cols, n, sums)
                        chunk_decay = element(from_start, count - 1)
                        so_far = chunk_decay * dot(states, state, dstates, dstate, n * p_size)
                        for t in range(count):
                            set_element(dlog, t, element(dlog, t) + so_far)
                            so_far = so_far + element(sums, t)

                        # dx = dt d(dt x) + D dy, and the sums of a step: ddt and, over time, dA, dD and ddt_bias
                        for t in range(count):
                            step, weight = element(steps, c * CHUNK + t), element(weights, c * CHUNK + t)
                            ddt_input = dot(ddt_x, t * p_size, x_tiles, here + t * p_size, p_size)
                            for i in range(0, p_size, lane_count(x)):
                                j = t * p_size + i
                                d = load(dy_tile, j)
                                store(dskip, i, fma(d, load(x_tiles, here + j), load(dskip, i)))
                                store(ddt_x, j, fma(d, load(skip, i), load(ddt_x, j) * weight))
                            dA_sum += element(dlog, t) * step
                            ddt_step = element(dlog, t) * A[0, 0, head]
                            if dweights.size:
                                dweights[row, positions[c, t], head] = ddt_input
                            else:
                                ddt_step = ddt_input + ddt_step
                            set_element(sums, t, ddt_step)
                        write_matrix(ddt_x, 0, p_size, dx, row, positions[c], count, head)
                        differentiate_step_sizes(raw, c * CHUNK, dt_softplus, dt_min, dt_max, sums)
                        for t in range(count):
                            ddt[row, positions[c, t], head] = element(sums, t)
                            dt_bias_sum += element(sums, t)

                        # The gradient of the state before the chunk
                        multiply_rows(dy_tile, 0, count, p_size, from_start, 0, decayed, 0)
                        scale(dstates, dstate, n * p_size, chunk_decay)
                        add_product(dstates, dstate, p_size, C_tiles, rows, 1, n_size, decayed, 0, p_size, n, count,
                                    p_size)  # fmt: skip
                    dA[run, 0, head] += dA_sum
                    ddt_bias[run, 0, head] += dt_bias_sum
                    for p in range(headdim):
                        dD[run, head, p] += element(dskip, p)

                # dB and dC by way of the scores, for all heads of the tile at once
                for c in range(n_chunks):
                    count = min(CHUNK, n_steps - c * CHUNK)
                    cell, rows, cols = c * CHUNK * CHUNK, c * CHUNK * n_size, c * CHUNK * n
                    add_product(dB_columns, cols, CHUNK, C_tiles, rows, 1, n_size, dscores, cell, CHUNK, n, count,
                                CHUNK)  # fmt: skip
                    transpose(dscores, cell, CHUNK, count, count, matrix, 0)
                    add_product(dC_columns, cols, CHUNK, B_tiles, rows, 1, n_size, matrix, 0, CHUNK, n, count, CHUNK)
                    write_columns(dB_columns, cols, dB, batch_row + row, positions[c], count, group)
                    write_columns(dC_columns, cols, dC, batch_row + row, positions[c], count, group)

            if initial >= 0 and dinitial.size:
                for head in range(first_head, end_head):
                    write_state(dstates, (head - first_head) * n * p_size, p_size, dinitial, initial, head)


@njit
def load_state(source, block, head, states, row_size):
    """Read source[block, head] (N, P) to the first state."""
    size = source.itemsize
    offset = block * (source.strides[0] // size) + head * (source.strides[1] // size)
    for i in range(source.shape[2]):
        read_row(source, offset + i * source.shape[3], 1, source.shape[3], states, i * row_size)


@njit
def advance_state(states, at, size, decay):
    """Write the decayed state after the one at an offset."""
    for i in range(at, at + size, lane_count(states)):
        store(states, i + size, load(states, i) * decay)


@njit
def differentiate_scores(matrix, scores, dscores, cell, masked, dmasked, strict, row_sums, dlog, count):
    """Compute L o C B^T, add to d(C B^T) that of this head, and set dlog to the part of inputs to outputs.

    The log decay of step k acts on what passes from an input before k to an output at k or later.
    """
    n = lane_count(matrix)
    clear(row_sums, 0, CHUNK)
    for i in range(count - 1, -1, -1):
        for j in range(0, CHUNK, n):
            at = i * CHUNK + j
            decay, d = load(matrix, at), load(dmasked, at)
            score = decay * load(scores, cell + at)
            store(masked, at, score)
            store(dscores, cell + at, fma(decay, d, load(dscores, cell + at)))
            store(row_sums, j, fma(score, d, load(row_sums, j)))
        set_element(dlog, i, dot(row_sums, 0, strict, i * CHUNK, CHUNK))


@njit
def multiply_columns(tile, n_rows, factors):
    """Multiply each column of a tile (n_rows, CHUNK) by a number of its own."""
    for j in range(0, CHUNK, lane_count(tile)):
        factor = load(factors, j)
        for r in range(n_rows):
            store(tile, r * CHUNK + j, load(tile, r * CHUNK + j) * factor)


@njit
def add_columns(columns, matrix, gradient, at, n_rows, sums):
    """Add (N, CHUNK) to the gradient of B or C, and set `sums` to its products with B or C summed over states."""
    for j in range(0, CHUNK, lane_count(columns)):
        result = splat(columns, 0.0)
        for i in range(n_rows):
            value = load(columns, i * CHUNK + j)
            result = fma(value, load(matrix, at + i * CHUNK + j), result)
            store(gradient, at + i * CHUNK + j, load(gradient, at + i * CHUNK + j) + value)
        store(sums, j, result)


@njit
def differentiate_step_sizes(raw, at, dt_softplus, dt_min, dt_max, gradients):
    """Multiply gradients of step sizes by the derivative of softplus, and of the limits. `raw` is used up."""
    for i in range(0, CHUNK, lane_count(raw)):
        if dt_softplus:
            value = load(raw, at + i)
            store(gradients, i, load(gradients, i) * sigmoid(value))
            store(raw, at + i, softplus(value))
    for t in range(CHUNK):
        if element(raw, at + t) < dt_min or element(raw, at + t) > dt_max:
            set_element(gradients, t, 0.0)


@njit
def write_columns(columns, at, target, i, positions, count, group):
    """Write a tile (N, CHUNK) to target[i, positions, group] (steps, N)."""
    for t in range(count):
        for j in range(target.shape[3]):
            target[i, positions[t], group, j] = element(columns, at + j * CHUNK + t)
