"""Kernel of a decoding step through Mamba-2 layers."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..._numba.compile import Kernel
from ..._numba.functions import LOG2_E, exp2, sigmoid, softplus
from ..._numba.lanes import (
    aligned_empty,
    element,
    element_as,
    fma,
    lane_count,
    load,
    read_row,
    set_element,
    splat,
    store,
    total,
    write_row,
)
from ..._numba.stages import array_at, await_blocks, finish_block, take_block
from ..._numba.vectors import matrix_at
from .parts import normalize, predict, project_in, project_out
from .tensors import (
    A_LOG,
    CONV_BIAS,
    CONV_STATE,
    CONV_WEIGHT,
    DT_BIAS,
    IN_BIAS,
    IN_PROJ,
    IN_SCALE,
    MIXER_NORM,
    NORM,
    OUT_BIAS,
    OUT_PROJ,
    OUT_SCALE,
    SCAN_STATE,
    SKIP,
)

STAGES = 4
"""Stages of a layer: in_proj with the convolution, the scan, the gated norm, out_proj."""


@Kernel
def step_layers(
    compute, stored, precise, scales, in_kind, out_kind, head_kind, layers, counters, norm_at, head_at, head_scale_at,
    residual_at, projected_at, y_at, logits_at, batch, tokens, width,
    inner, vocabulary, n_taps, n_states, headdim, groups, eps, mixer_eps, norm_before_gate, has_skip_of_channels,
    dt_min, dt_max,
):  # fmt: skip
    """Advance all layers, and predict the next token after each row: the share of one thread.

    Of B rows, `tokens` successive ones are tokens of one sequence, whose state is in its first row before the step.

    compute, stored, precise, scales and the kinds (0,) have the dtypes of the arithmetic, of weights, of A_log, D and
    the bias of dt, of scales, and of the elements of matrices; layers (n, N_COLUMNS) holds addresses, as the arguments
    `_at` are. residual (B, D) holds the embeddings at first; projected (B, H P + channels + H) z,
    (x, B, C) and dt; y (B, H P); logits (B, V). `mixer_eps` is that of the gated norm, or negative without one.
    """
    heads, channels = inner // headdim, inner + 2 * groups * n_states
    rows = inner + channels + heads
    residual, logits = array_at(compute, residual_at, batch * width), array_at(compute, logits_at, batch * vocabulary)
    projected, y = array_at(compute, projected_at, batch * rows), array_at(compute, y_at, batch * inner)
    for layer in range(layers.shape[0]):
        p, stage = layers[layer], layer * STAGES
        project_in(
            counters, stage, batch, tokens, residual, array_at(stored, p[NORM], width), eps,
            matrix_at(in_kind, scales, p[IN_PROJ], p[IN_SCALE], rows, width), array_at(stored, p[IN_BIAS], rows),
            array_at(stored, p[CONV_WEIGHT], channels * n_taps), array_at(stored, p[CONV_BIAS], channels),
            array_at(stored, p[CONV_STATE], batch * (n_taps - 1) * channels), inner, n_taps, projected,
        )  # fmt: skip
        scan(
            counters, stage + 1, batch, tokens, projected, array_at(precise, p[A_LOG], heads),
            array_at(precise, p[DT_BIAS], heads), array_at(precise, p[SKIP], inner if has_skip_of_channels else heads),
            array_at(compute, p[SCAN_STATE], batch * inner * n_states), n_states, headdim, groups, dt_min, dt_max, y,
        )  # fmt: skip
        gate(
            counters, stage + 2, batch, projected, array_at(stored, p[MIXER_NORM], inner), inner // groups, mixer_eps,
            norm_before_gate, y,
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
def scan(
    counters, stage, batch, tokens, projected, A_log, dt_bias, D, state, n, headdim, groups, dt_min, dt_max, y
):  # fmt: skip
    """Advance the states (B, H, P, N) of a layer; y (B, H P) = C S + D x. A block is a head."""
    rows, inner, lanes, zero, one = (
        projected.size // batch, y.size // batch, lane_count(y), np.int64(0), np.int64(1),
    )  # fmt: skip
    heads = inner // headdim
    padded = (n + lanes - 1) // lanes * lanes
    B, C, h_row, scratch = (
        aligned_empty(y, padded), aligned_empty(y, padded), aligned_empty(y, padded), aligned_empty(y, lanes),
    )  # fmt: skip
    head = take_block(counters, stage)
    while head < heads:
        group = head // (heads // groups)
        for b in range(batch):
            # z (H P), x (H P), B (G N), C (G N), dt (H)
            x_at = b * rows + inner
            B_at = x_at + inner + group * n
            read_row(projected, B_at, one, n, B, zero)
            read_row(projected, B_at + groups * n, one, n, C, zero)
            dt = element(projected, b * rows + rows - heads + head) + element_as(y, dt_bias, head)
            store(scratch, 0, softplus(splat(y, dt)))
            dt = min(max(element(scratch, 0), dt_min), dt_max)
            # A = -exp(A_log)
            store(scratch, 0, exp2(splat(y, element_as(y, A_log, head) * LOG2_E)))
            store(scratch, 0, exp2(splat(y, element(scratch, 0) * -dt * LOG2_E)))
            decay = element(scratch, 0)
            for i in range(head * headdim, (head + 1) * headdim):
                x, at = element(projected, x_at + i), (b * inner + i) * n
                dt_x, result = x * dt, splat(y, 0.0)
                read_row(state, at - inner * n if b % tokens else at, one, n, h_row, zero)
                for j in range(0, n, lanes):
                    # S_t = exp(dt A) S_{t-1} + dt x B^T, y_t = S_t C_t (arXiv 2405.21060, equation 2)
                    h = fma(load(h_row, j), decay, load(B, j) * dt_x)
                    result = fma(load(C, j), h, result)
                    store(h_row, j, h)
                write_row(h_row, zero, state, at, one, n)
                skip = element_as(y, D, i if D.size == inner else head)  # (H P,) or (H,)
                set_element(y, b * inner + i, total(result) + skip * x)
        finish_block(counters, stage)
        head = take_block(counters, stage)
    await_blocks(counters, stage, heads)


@njit
def gate(counters, stage, batch, projected, weight, group_size, eps, norm_before_gate, y):
    """y (B, H P) = norm(y silu(z)), or norm(y) silu(z); y silu(z) where eps is negative. A block is a group."""
    rows, inner, lanes, zero, one = (
        projected.size // batch, y.size // batch, lane_count(y), np.int64(0), np.int64(1),
    )  # fmt: skip
    n_groups = inner // group_size
    gates = aligned_empty(y, (group_size + lanes - 1) // lanes * lanes)
    group = take_block(counters, stage)
    while group < n_groups:
        at, weights = group * group_size, weight[group * group_size :]
        for b in range(batch):
            read_row(projected, b * rows + at, one, group_size, gates, zero)
            for i in range(0, group_size, lanes):
                z = load(gates, i)
                store(gates, i, z * sigmoid(z))
            if eps >= 0 and norm_before_gate:
                normalize(y, b * inner + at, group_size, weights, eps, y, b * inner + at)
            for i in range(group_size):
                set_element(y, b * inner + at + i, element(y, b * inner + at + i) * element(gates, i))
            if eps >= 0 and not norm_before_gate:
                normalize(y, b * inner + at, group_size, weights, eps, y, b * inner + at)
        finish_block(counters, stage)
        group = take_block(counters, stage)
    await_blocks(counters, stage, n_groups)
