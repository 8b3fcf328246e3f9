"""Parts of a decoding step that both mixers have, for threads that share them block by block."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..._numba.functions import rsqrt, sigmoid
from ..._numba.lanes import (
    BLOCK,
    aligned_empty,
    element,
    element_as,
    fill,
    lane_count,
    load,
    read_row,
    set_element,
    store,
    write_row,
)
from ..._numba.stages import await_blocks, finish_block, take_block
from ..._numba.vectors import STREAMS, count_blocks, dot, project, rows_of_stream
from ...causal_conv1d.numba.tiles import convolve_rows

ROWS = 16
"""Rows of each stream in a block: some 10 microseconds, and few enough that threads finish together."""


@njit
def normalize(x, at, width, weight, eps, out, out_at):
    """out = x / sqrt(mean(x^2) + eps) * weight, for `width` elements."""
    scale = rsqrt(dot(x, at, x, at, width) / width + eps)
    for i in range(width):
        value = element(x, at + i) * scale
        set_element(out, out_at + i, value * element_as(x, weight, i) if weight.size else value)


@njit
def project_in(
    counters, stage, batch, residual, norm, eps, weight, bias, conv_weight, conv_bias, conv_state, conv_first, n_taps,
    projected,
):  # fmt: skip
    """projected = in_proj(norm(residual)); its channels from `conv_first` on are convolved over time, with silu.

    residual (B, D); weight, a matrix (rows, D); conv_weight (channels, K); conv_state (B, K - 1, channels), updated in
    place; projected (B, rows).
    """
    width, rows = residual.size // batch, projected.size // batch
    channels, block_rows, zero = conv_weight.size // n_taps, np.int64(ROWS), np.int64(0)
    normed = aligned_empty(residual, batch * width)
    window, taps = aligned_empty(residual, n_taps * BLOCK), aligned_empty(residual, n_taps * BLOCK)
    n_blocks, stride = count_blocks(rows, block_rows), rows_of_stream(rows)
    is_ready = False
    block = take_block(counters, stage)
    while block < n_blocks:
        if not is_ready:  # in each thread: it takes less than to wait for another one
            is_ready = True
            for b in range(batch):
                normalize(residual, b * width, width, norm, eps, normed, b * width)
        for b in range(batch):
            project(weight, bias, block, block_rows, rows, normed, b * width, width, projected, b * rows, zero)
        for first in range(block * ROWS, STREAMS * stride, stride):
            # Rows of one stream: those that are channels of the convolution
            end = min(first + ROWS, first - block * ROWS + stride, rows)
            start, stop = max(first, conv_first), min(end, conv_first + channels)
            if start < stop:
                convolve(
                    batch, projected, start, stop - start, conv_weight, conv_bias, conv_state, start - conv_first,
                    n_taps, window, taps,
                )  # fmt: skip
        finish_block(counters, stage)
        block = take_block(counters, stage)
    await_blocks(counters, stage, n_blocks)


@njit
def convolve(batch, projected, at, count, weight, bias, state, channel, n_taps, window, taps):
    """Advance the convolution of `count` channels by a step, in place: projected[:, at : at + count]."""
    rows, channels, zero, one = projected.size // batch, weight.size // n_taps, np.int64(0), np.int64(1)
    before = n_taps - 1
    y, bias_tile = aligned_empty(projected, one * BLOCK), aligned_empty(projected, one * BLOCK)
    fill(bias_tile, 0.0)
    for i in range(count):
        for k in range(n_taps):
            set_element(taps, k * BLOCK + i, element_as(taps, weight, (channel + i) * n_taps + k))
    if bias.size:
        read_row(bias, channel, one, count, bias_tile, zero)
    for b in range(batch):
        # Rows of the window are (x_{t - K + 1}, ..., x_t); all but the first are the next state.
        first = b * before * channels + channel
        for k in range(before):
            read_row(state, first + k * channels, one, count, window, k * BLOCK)
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
    columns, width, block_rows, one = y.size // batch, residual.size // batch, np.int64(ROWS), np.int64(1)
    n_blocks = count_blocks(width, block_rows)
    block = take_block(counters, stage)
    while block < n_blocks:
        for b in range(batch):
            project(weight, bias, block, block_rows, width, y, b * columns, columns, residual, b * width, one)
        finish_block(counters, stage)
        block = take_block(counters, stage)
    await_blocks(counters, stage, n_blocks)


@njit
def predict(counters, stage, batch, residual, norm, eps, weight, logits):
    """logits = lm_head(norm(residual)), with residual (B, D), the matrix `weight` (V, D) and logits (B, V)."""
    width, rows, block_rows, zero = residual.size // batch, logits.size // batch, np.int64(ROWS), np.int64(0)
    nothing = norm[:0]
    normed = aligned_empty(residual, batch * width)
    n_blocks = count_blocks(rows, block_rows)
    is_ready = False
    block = take_block(counters, stage)
    while block < n_blocks:
        if not is_ready:
            is_ready = True
            for b in range(batch):
                normalize(residual, b * width, width, norm, eps, normed, b * width)
        for b in range(batch):
            project(weight, nothing, block, block_rows, rows, normed, b * width, width, logits, b * rows, zero)
        finish_block(counters, stage)
        block = take_block(counters, stage)
    await_blocks(counters, stage, n_blocks)
