"""Kernel of a decoding step through Mamba-1 layers."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..._numba.compile import Kernel
from ..._numba.functions import LOG2_E, exp2, sigmoid
from ..._numba.lanes import (
    BLOCK,
    aligned_empty,
    borrow,
    borrow_from,
    element,
    element_as,
    fma,
    keep,
    lane_count,
    load,
    load_as,
    prefetch_ahead,
    read_row,
    set_element,
    splat,
    store,
    total,
    write_row,
)
from ..._numba.stages import array_at, await_blocks, finish_block, take_block
from ..._numba.vectors import block_rows_of, count_blocks, dot, four_dots, matrix_at, project, vectors_for
from ...selective_scan.numba.tiles import prepare_steps
from .parts import normalize, predict, project_in, project_out
from .tensors import (
    A_LOG,
    CONV_BIAS,
    CONV_STATE,
    CONV_WEIGHT,
    DT_BIAS,
    DT_PROJ,
    IN_BIAS,
    IN_PROJ,
    IN_SCALE,
    NORM,
    OUT_BIAS,
    OUT_PROJ,
    OUT_SCALE,
    SCAN_STATE,
    SKIP,
    X_PROJ,
    X_SCALE,
)

STAGES = 4
"""Stages of a layer: in_proj with the convolution, x_proj, the scan with dt_proj and the gate, out_proj."""


@Kernel
def step_layers(
    compute, stored, precise, scales, in_kind, x_kind, out_kind, head_kind, layers, counters, norm_at, head_at,
    head_scale_at, residual_at, projected_at, y_at, logits_at, low_rank_at, batch, tokens, width, inner, vocabulary,
    n_taps, n_states, rank, eps, mixer_eps,
):  # fmt: skip
    """Advance all layers, and predict the next token after each row: the share of one thread.

    Of B rows, `tokens` successive ones are tokens of one sequence, whose state is in its first row before the step.

    compute, stored, precise, scales and the kinds (0,) have the dtypes of the arithmetic, of weights, of A_log, D and
    the bias of dt, of scales, and of the elements of matrices; layers (n, N_COLUMNS) holds addresses, as the arguments
    `_at` are. residual (B, D) holds the embeddings at first; projected (B, 2 E) x and z; low_rank
    (B, R + 2 N) dt, B and C; y (B, E); logits (B, V). `mixer_eps` is that of the norms of dt, B and C, or negative
    without these.
    """
    rows, n_low_rank = 2 * inner, rank + 2 * n_states
    residual, logits = array_at(compute, residual_at, batch * width), array_at(compute, logits_at, batch * vocabulary)
    projected, y = array_at(compute, projected_at, batch * rows), array_at(compute, y_at, batch * inner)
    low_rank = array_at(compute, low_rank_at, batch * n_low_rank)
    for layer in range(layers.shape[0]):
        p, stage = layers[layer], layer * STAGES
        project_in(
            counters, stage, batch, tokens, residual, array_at(stored, p[NORM], width), eps,
            matrix_at(in_kind, scales, p[IN_PROJ], p[IN_SCALE], rows, width), array_at(stored, p[IN_BIAS], rows),
            array_at(stored, p[CONV_WEIGHT], inner * n_taps), array_at(stored, p[CONV_BIAS], inner),
            array_at(stored, p[CONV_STATE], batch * (n_taps - 1) * inner), 0, n_taps, projected,
        )  # fmt: skip
        project_x(
            counters, stage + 1, batch, projected,
            matrix_at(x_kind, scales, p[X_PROJ], p[X_SCALE], n_low_rank, inner), low_rank, inner,
        )  # fmt: skip
        scan(
            counters, stage + 2, batch, tokens, projected, low_rank, array_at(stored, p[DT_PROJ], inner * rank),
            array_at(precise, p[DT_BIAS], inner), array_at(precise, p[A_LOG], inner * n_states),
            array_at(precise, p[SKIP], inner), array_at(compute, p[SCAN_STATE], batch * inner * n_states),
            n_states, mixer_eps, y,
        )  # fmt: skip
        project_out(
            counters, stage + 3, batch, y, matrix_at(out_kind, scales, p[OUT_PROJ], p[OUT_SCALE], width, inner),
            array_at(stored, p[OUT_BIAS], width), residual,
        )  # fmt: skip
    predict(
        counters, layers.shape[0] * STAGES, batch, residual, array_at(stored, norm_at, width), eps,
        matrix_at(head_kind, scales, head_at, head_scale_at, vocabulary, width), logits,
    )  # fmt: skip


@njit
def project_x(counters, stage, batch, projected, weight, low_rank, inner):
    """low_rank (B, R + 2 N) = x_proj(x), with x the first channels of `projected`."""
    rows, n_low_rank, zero = projected.size // batch, low_rank.size // batch, np.int64(0)
    nothing, block_rows = projected[:0], block_rows_of(weight, n_low_rank)
    n_blocks = count_blocks(n_low_rank, block_rows)
    block = take_block(counters, stage)
    if block < n_blocks:
        vectors = vectors_for(weight, projected, batch, rows, inner)
        while block < n_blocks:
            for b in range(batch):
                project(
                    weight, nothing, block, block_rows, n_low_rank, vectors, b, inner, low_rank, b * n_low_rank, zero
                )  # fmt: skip
            finish_block(counters, stage)
            block = take_block(counters, stage)
    await_blocks(counters, stage, n_blocks)


@njit
def scan(counters, stage, batch, tokens, projected, low_rank, dt_proj, dt_bias, A_log, D, state, n, mixer_eps, y):
    """Advance the states (B, E, N) of a layer; y (B, E) = (C h + D x) silu(z). A block is BLOCK channels."""
    rows, inner, n_low_rank = projected.size // batch, y.size // batch, low_rank.size // batch
    rank, lanes, zero, one = n_low_rank - 2 * n, lane_count(y), np.int64(0), np.int64(1)
    n_whole, padded = n - n % lanes, (n + lanes - 1) // lanes * lanes
    nothing = dt_proj[:0]
    tiles = aligned_empty(y, 5 * BLOCK + 2 * lanes + 2 * padded)
    x, dt, dt_x, bias, gates = (
        borrow_from(tiles, 0), borrow_from(tiles, BLOCK), borrow_from(tiles, 2 * BLOCK), borrow_from(tiles, 3 * BLOCK),
        borrow_from(tiles, 4 * BLOCK),
    )  # fmt: skip
    a_row, h_row = borrow_from(tiles, 5 * BLOCK), borrow_from(tiles, 5 * BLOCK + lanes)
    B = borrow_from(tiles, 5 * BLOCK + 2 * lanes)
    C = borrow_from(tiles, 5 * BLOCK + 2 * lanes + padded)
    parts = aligned_empty(y, n_low_rank)
    dt_rank, dt_proj, projected, A_log, state = (
        borrow(parts), borrow(dt_proj), borrow(projected), borrow(A_log), borrow(state)
    )  # fmt: skip
    n_blocks = (inner + BLOCK - 1) // BLOCK
    block = take_block(counters, stage)
    while block < n_blocks:
        channel = block * BLOCK
        width = min(BLOCK, inner - channel)
        for b in range(batch):
            for i in range(n_low_rank):
                set_element(parts, i, element(low_rank, b * n_low_rank + i))
            if mixer_eps >= 0:
                normalize(parts, zero, rank, nothing, mixer_eps, parts, zero)
                normalize(parts, rank, n, nothing, mixer_eps, parts, rank)
                normalize(parts, rank + n, n, nothing, mixer_eps, parts, rank + n)
            read_row(parts, rank, one, n, B, zero)
            read_row(parts, rank + n, one, n, C, zero)
            read_row(projected, b * rows + channel, one, width, x, zero)
            read_row(dt_bias, channel, one, width, bias, zero)
            whole = width - width % 4
            for i in range(0, whole, 4):
                first = (channel + i) * rank
                p, q, r, s = four_dots(dt_rank, zero, dt_proj, first, rank, rank)
                set_element(dt, i, p)
                set_element(dt, i + 1, q)
                set_element(dt, i + 2, r)
                set_element(dt, i + 3, s)
            for i in range(whole, width):
                set_element(dt, i, dot(dt_rank, zero, dt_proj, (channel + i) * rank, rank))
            prepare_steps(one, width, bias, True, x, dt, dt_x)
            for i in range(width):
                at = (channel + i) * n
                h_at = b * inner * n + at
                h_from = h_at - inner * n if b % tokens else h_at
                result, step, input_ = splat(y, 0.0), element(dt, i) * -LOG2_E, element(dt_x, i)
                for j in range(0, n_whole, lanes):
                    prefetch_ahead(A_log, at + j)
                    prefetch_ahead(state, h_from + j)
                    h = advance(load_as(y, A_log, at + j), step, load(state, h_from + j), load(B, j) * input_)
                    result = fma(load(C, j), h, result)
                    store(state, h_at + j, h)
                if n_whole < n:
                    read_row(A_log, at + n_whole, one, n - n_whole, a_row, zero)
                    read_row(state, h_from + n_whole, one, n - n_whole, h_row, zero)
                    h = advance(load(a_row, 0), step, load(h_row, 0), load(B, n_whole) * input_)
                    result = fma(load(C, n_whole), h, result)
                    store(h_row, 0, h)
                    write_row(h_row, zero, state, h_at + n_whole, one, n - n_whole)
                # `dt` is free: it holds y from here on.
                set_element(dt, i, total(result) + element_as(y, D, channel + i) * element(x, i))
            read_row(projected, b * rows + inner + channel, one, width, gates, zero)
            for i in range(0, width, lanes):
                gate = load(gates, i)
                store(dt, i, load(dt, i) * (gate * sigmoid(gate)))
            write_row(dt, zero, y, b * inner + channel, one, width)
        finish_block(counters, stage)
        block = take_block(counters, stage)
    keep(tiles)
    keep(parts)
    await_blocks(counters, stage, n_blocks)


@njit(forceinline=True)
def advance(A_log, step, h, input_):
    """h = exp(dt A) h + dt B x, with A = -exp(A_log) and dt as -log2(e) dt (arXiv 2312.00752, equation 2)."""
    return fma(exp2(exp2(A_log * LOG2_E) * step), h, input_)
