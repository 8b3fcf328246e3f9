"""Parts of a decoding step that both mixers have, for threads that share them block by block."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..._numba.functions import rsqrt, sigmoid
from ..._numba.lanes import (
    BLOCK,
    aligned_empty,
    borrow,
    borrow_from,
    element,
    element_as,
    lane_count,
    load,
    read_row,
    set_element,
    splat,
    store,
    write_row,
)
from ..._numba.stages import await_blocks, finish_block, take_block
from ..._numba.vectors import (
    STREAMS,
    block_rows_of,
    count_blocks,
    dot,
    project,
    rows_of_stream,
    vectors_for,
)
from ...causal_conv1d.numba.tiles import convolve_rows


@njit
def normalize(x, at, width, weight, eps, out, out_at):
    """out = x / sqrt(mean(x^2) + eps) * weight, for `width` elements."""
    scale = rsqrt(dot(x, at, x, at, width) / width + eps)
    for i in range(width):
        value = element(x, at + i) * scale
        set_element(out, out_at + i, value * element_as(x, weight, i) if weight.size else value)


@njit
def project_in(
    counters, stage, batch, tokens, residual, norm, eps, weight, bias, conv_weight, conv_bias, conv_state, conv_first,
    n_taps, projected,
):  # fmt: skip
    """projected = in_proj(norm(residual)); its channels from `conv_first` on are convolved over time, with silu.

    residual (B, D); weight, a matrix (rows, D); conv_weight (channels, K); conv_state (B, K - 1, channels), updated in
    place; projected (B, rows).
    """
    width, rows, channels = residual.size // batch, projected.size // batch, conv_weight.size // n_taps
    zero, block_rows, stride = np.int64(0), block_rows_of(weight, rows), rows_of_stream(rows)
    n_blocks = count_blocks(rows, block_rows)
    block = take_block(counters, stage)
    if block < n_blocks:
        # In each thread: it takes less than to wait for another one.
        normed = aligned_empty(residual, batch * width)
        for b in range(batch):
            normalize(residual, b * width, width, norm, eps, normed, b * width)
        vectors = vectors_for(weight, normed, batch, width, width)
        tiles = aligned_empty(residual, (2 * n_taps + 2) * BLOCK)
        while block < n_blocks:
            for b in range(batch):
                project(weight, bias, block, block_rows, rows, vectors, b, width, projected, b * rows, zero)
            for first in range(block * block_rows, STREAMS * stride, stride):
                # Rows of one stream: those that are channels of the convolution
                end = min(first + block_rows, first - block * block_rows + stride, rows)
                start, stop = max(first, conv_first), min(end, conv_first + channels)
                if start < stop:
                    convolve(
                        batch, tokens, projected, start, stop - start, conv_weight, conv_bias, conv_state,
                        start - conv_first, n_taps, tiles,
                    )  # fmt: skip
            finish_block(counters, stage)
            block = take_block(counters, stage)
    await_blocks(counters, stage, n_blocks)


@njit
def convolve(batch, tokens, projected, at, count, weight, bias, state, channel, n_taps, tiles):
    """Advance the convolution of `count` channels, in place: projected[:, at : at + count].

    The state before a row is that row's own, or the one after the row before where `tokens` rows are one sequence.

    `tiles` has room for 2 K + 2 rows of BLOCK.
    """
    rows, channels, zero, one = projected.size // batch, weight.size // n_taps, np.int64(0), np.int64(1)
    before, row, has_bias = n_taps - 1, n_taps * BLOCK, bias.size > 0
    window, taps = borrow_from(tiles, 0), borrow_from(tiles, row)
    y, bias_tile = borrow_from(tiles, 2 * row), borrow_from(tiles, 2 * row + BLOCK)
    projected, weight, bias, state = borrow(projected), borrow(weight), borrow(bias), borrow(state)
    for i in range(count):
        for k in range(n_taps):
            set_element(taps, k * BLOCK + i, element_as(taps, weight, (channel + i) * n_taps + k))
    if has_bias:
        read_row(bias, channel, one, count, bias_tile, zero)
    else:
        for i in range(0, count, lane_count(y)):
            store(bias_tile, i, splat(y, 0.0))
    for b in range(batch):
        # Rows of the window are (x_{t - K + 1}, ..., x_t); all but the first are the next state.
        first = b * before * channels + channel
        source = first - before * channels if b % tokens else first
        for k in range(before):
            read_row(state, source + k * channels, one, count, window, k * BLOCK)
        read_row(projected, b * rows + at, one, count, window, before * BLOCK)
        for k in range(before):
            write_row(window, (k + 1) * BLOCK, state, first + k * channels, one, count)
        if before:
            # The sum reads the input as the state holds it, rounded to its dtype.
            read_row(state, first + (before - 1) * channels, one, count, window, before * BLOCK)
        convolve_rows(window, taps, bias_tile, n_taps, one, count, y)
        for i in range(0, count, lane_count(y)):
            value = load(y, i)
            store(y, i, value * sigmoid(value))
        write_row(y, zero, projected, b * rows + at, one, count)


@njit
def project_out(counters, stage, batch, y, weight, bias, residual):
    """residual += out_proj(y), with y (B, E), residual (B, D) and the matrix `weight` (D, E)."""
    columns, width, one = y.size // batch, residual.size // batch, np.int64(1)
    block_rows = block_rows_of(weight, width)
    n_blocks = count_blocks(width, block_rows)
    block = take_block(counters, stage)
    if block < n_blocks:
        vectors = vectors_for(weight, y, batch, columns, columns)
        while block < n_blocks:
            for b in range(batch):
                project(weight, bias, block, block_rows, width, vectors, b, columns, residual, b * width, one)
            finish_block(counters, stage)
            block = take_block(counters, stage)
    await_blocks(counters, stage, n_blocks)


@njit
def predict(counters, stage, batch, residual, norm, eps, weight, logits):
    """logits = lm_head(norm(residual)), with residual (B, D), the matrix `weight` (V, D) and logits (B, V)."""
    width, rows, zero = residual.size // batch, logits.size // batch, np.int64(0)
    nothing, block_rows = norm[:0], block_rows_of(weight, rows)
    n_blocks = count_blocks(rows, block_rows)
    block = take_block(counters, stage)
    if block < n_blocks:
        normed = aligned_empty(residual, batch * width)
        for b in range(batch):
            normalize(residual, b * width, width, norm, eps, normed, b * width)
        vectors = vectors_for(weight, normed, batch, width, width)
        while block < n_blocks:
            for b in range(batch):
                project(weight, nothing, block, block_rows, rows, vectors, b, width, logits, b * rows, zero)
            finish_block(counters, stage)
            block = take_block(counters, stage)
    await_blocks(counters, stage, n_blocks)
