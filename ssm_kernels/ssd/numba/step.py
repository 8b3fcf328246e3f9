"""Steps of the compiled SSD, for decoding."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..._core.state_format import compute_dtype
from ..._numba.compile import Kernel
from ..._numba.functions import LOG2_E, exp2, sigmoid, softplus
from ..._numba.lanes import (
    aligned_empty,
    element,
    fma,
    lane_count,
    load,
    read_lanes,
    read_row,
    set_element,
    splat,
    store,
    total,
    write_lanes,
    write_row,
)
from ..._numba.launch import as_array, as_dtype, memory_of, plan_arrays
from ..._numba.state_format import keep_state, open_state, random_scratch, state_rows
from ..._numba.threads import run_tiles
from .tiles import padded


def step(
    state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, input_weights, sources, destinations, bounds,
    state_scale, seeds,
) -> Tensor:  # fmt: skip
    """Return y (B, T, H, P) in the dtype of x. `state` (B, H, P, N), or a pool of slots, is updated in place."""
    compute, (batch, tokens, heads, headdim) = compute_dtype(state), x.shape
    plan = plan_arrays(sources, destinations, bounds, batch, tokens)
    y = x.new_zeros(*x.shape, dtype=compute)  # zero where no sequence has the token
    x, dt, B, C = (t.flatten(0, 1) for t in (x, dt, B, C))  # (M, ...)
    z, input_weights = (None if t is None else t.flatten(0, 1) for t in (z, input_weights))
    D = None if D is None else D.expand(heads, headdim)
    args = (
        memory_of(state), as_array(state_scale, torch.float32, 3), *(as_array(t, compute, 3) for t in (x, B, C, z)),
        *(as_array(t, compute, 2) for t in (dt, input_weights, D)), *(as_array(t, compute, 1) for t in (A, dt_bias)),
        memory_of(y.flatten(0, 1)), *plan, as_array(seeds, torch.int64, 1), dt_softplus, dt_min, dt_max,
    )  # fmt: skip
    n_tiles = (batch if sources is None else len(sources)) * heads
    run_tiles(lambda first, end: step_tiles(*args, first, end), n_tiles, x.numel() * B.shape[2])
    return as_dtype(y, x.dtype)


@Kernel
def step_tiles(
    state, scale, x, B, C, z, dt, weights, D, A, dt_bias, y, sources, destinations, bounds, seeds, dt_softplus, dt_min,
    dt_max, first, end,
):  # fmt: skip
    """Advance the states of the tiles from `first` to `end` - 1: a sequence and a head each.

    state (slots, H, P, N); scale (slots, H, P); x, z, y (M, H, P); B, C (M, G, N); dt, weights (M, H); D (H, P); A,
    dt_bias (H,); sources (S,); destinations, seeds (M,); bounds (S + 1,). Lanes hold states.
    """
    heads, headdim, n = state.shape[1:]
    one = np.int64(1)  # numba compiles a function again for each literal
    row_size = padded(x, headdim)
    y_row, other = aligned_empty(x, row_size), aligned_empty(x, row_size)
    B_row, C_row = aligned_empty(x, padded(x, n)), aligned_empty(x, padded(x, n))
    scratch = aligned_empty(x, one * lane_count(x))
    kept = aligned_empty(x, headdim * n).reshape(one, headdim, n)  # a state that no slot takes, or in another format
    values, bits = aligned_empty(x, padded(x, n)), random_scratch(n)
    for tile in range(first, end):
        s, head = tile // heads, tile % heads
        if sources[s] < 0:
            continue
        group = head // (heads // B.shape[1])
        slot = sources[s]
        before = open_state(state[slot : slot + 1, head], scale[slot : slot + 1, head], kept)  # (1, P, N)
        # Rows of complete vectors, one after the other
        is_dense = before.strides[2] == x.itemsize and before.strides[1] == n * x.itemsize and n % lane_count(x) == 0
        for t in range(bounds[s], bounds[s + 1]):
            slot = destinations[t]
            after = state_rows(state[slot : slot + 1, head], kept) if slot >= 0 else kept  # (1, P, N)
            set_element(scratch, 0, dt[t, head] + (dt_bias[head] if dt_bias.size else 0.0))
            if dt_softplus:
                store(scratch, 0, softplus(load(scratch, 0)))
            step_size = min(max(element(scratch, 0), dt_min), dt_max)
            set_element(scratch, 0, step_size * A[head] * LOG2_E)
            store(scratch, 0, exp2(load(scratch, 0)))
            decay = element(scratch, 0)
            weight = weights[t, head] if weights.size else step_size
            for matrix, row in ((B, B_row), (C, C_row)):
                offset = t * (matrix.strides[0] // matrix.itemsize) + group * (matrix.strides[1] // matrix.itemsize)
                read_row(matrix, offset, matrix.strides[2] // matrix.itemsize, n, row, 0)
            for p in range(headdim):
                set_element(scratch, 0, x[t, head, p] * weight)
                dt_x = element(scratch, 0)
                result = splat(x, 0.0)
                # S_t = exp(dt A) S_{t-1} + dt x B^T, y_t = S_t C_t (equation 2)
                for j in range(0, n, lane_count(x)):
                    at = p * n + j
                    h = load(before, at) if is_dense else read_lanes(before, 0, p, j, scratch)
                    h = fma(h, decay, load(B_row, j) * dt_x)
                    result = fma(load(C_row, j), h, result)
                    if is_dense:
                        store(after, at, h)
                    else:
                        write_lanes(h, after, 0, p, j, scratch)
                set_element(y_row, p, total(result))
            if D.size:
                for p in range(headdim):
                    set_element(y_row, p, element(y_row, p) + D[head, p] * x[t, head, p])
            if z.size:
                gates = z[t]  # (H, P)
                stride = gates.strides[1] // gates.itemsize
                read_row(gates, head * (gates.strides[0] // gates.itemsize), stride, headdim, other, 0)
                for i in range(0, row_size, lane_count(x)):
                    gate = load(other, i)
                    store(y_row, i, load(y_row, i) * (gate * sigmoid(gate)))
            write_row(y_row, 0, y, (t * heads + head) * headdim, 1, headdim)
            if slot >= 0:
                seed = seeds[t] if seeds.size else 0
                stored, scales = state[slot : slot + 1, head], scale[slot : slot + 1, head]
                keep_state(after, stored, scales, seed, seeds.size > 0, head * headdim, values, bits)
            before = after
