"""Steps of the compiled SSD, for decoding."""

from __future__ import annotations

import numpy as np
from torch import Tensor

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
from ..._numba.launch import as_array, memory_of
from ..._numba.threads import run_tiles
from .tiles import padded


def step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max) -> Tensor:
    """Advance `state` (B, H, P, N) by T tokens, in place; return y (B, T, H, P) in the dtype of x."""
    compute, (batch, _, heads, headdim) = state.dtype, x.shape
    y = x.new_empty(x.shape, dtype=compute)
    D = None if D is None else D.expand(heads, headdim)[None]
    args = (
        *(as_array(t, compute, 4) for t in (state, x, B, C, z)), *(as_array(t, compute, 3) for t in (dt, D)),
        *(as_array(t, compute, 1) for t in (A, dt_bias)), memory_of(y), dt_softplus, dt_min, dt_max,
    )  # fmt: skip
    run_tiles(lambda first, end: step_tiles(*args, first, end), batch * heads, x.numel() * B.shape[3])
    return y.to(x.dtype)


@Kernel
def step_tiles(state, x, B, C, z, dt, D, A, dt_bias, y, dt_softplus, dt_min, dt_max, first, end):
    """Advance the states of the tiles from `first` to `end` - 1: a sequence and a head each.

    state (B, H, P, N); x, z, y (B, T, H, P); B, C (B, T, G, N); dt (B, T, H); D (1, H, P); A, dt_bias (H,). Lanes hold
    states.
    """
    heads, headdim, n = state.shape[1:]
    one = np.int64(1)  # numba compiles a function again for each literal
    row_size = padded(x, headdim)
    y_row, other = aligned_empty(x, row_size), aligned_empty(x, row_size)
    B_row, C_row = aligned_empty(x, padded(x, n)), aligned_empty(x, padded(x, n))
    scratch = aligned_empty(x, one * lane_count(x))
    for tile in range(first, end):
        b, head = tile // heads, tile % heads
        group = head // (heads // B.shape[2])
        states, Bs, Cs = state[b : b + 1, head], B[b], C[b]  # (1, P, N), (T, G, N) twice
        # Rows of complete vectors, one after the other
        is_dense = states.strides[2] == x.itemsize and states.strides[1] == n * x.itemsize and n % lane_count(x) == 0
        for t in range(x.shape[1]):
            set_element(scratch, 0, dt[b, t, head] + (dt_bias[head] if dt_bias.size else 0.0))
            if dt_softplus:
                store(scratch, 0, softplus(load(scratch, 0)))
            step_size = min(max(element(scratch, 0), dt_min), dt_max)
            set_element(scratch, 0, step_size * A[head] * LOG2_E)
            store(scratch, 0, exp2(load(scratch, 0)))
            decay = element(scratch, 0)
            for source, target in ((Bs, B_row), (Cs, C_row)):
                offset = t * (source.strides[0] // source.itemsize) + group * (source.strides[1] // source.itemsize)
                read_row(source, offset, source.strides[2] // source.itemsize, n, target, 0)
            for p in range(headdim):
                set_element(scratch, 0, x[b, t, head, p] * step_size)
                dt_x = element(scratch, 0)
                result = splat(x, 0.0)
                # S_t = exp(dt A) S_{t-1} + dt x B^T, y_t = S_t C_t (equation 2)
                for j in range(0, n, lane_count(x)):
                    at = p * n + j
                    h = load(states, at) if is_dense else read_lanes(states, 0, p, j, scratch)
                    h = fma(h, decay, load(B_row, j) * dt_x)
                    result = fma(load(C_row, j), h, result)
                    if is_dense:
                        store(states, at, h)
                    else:
                        write_lanes(h, states, 0, p, j, scratch)
                set_element(y_row, p, total(result))
            if D.size:
                for p in range(headdim):
                    set_element(y_row, p, element(y_row, p) + D[0, head, p] * x[b, t, head, p])
            if z.size:
                gates = z[b, t]  # (H, P)
                stride = gates.strides[1] // gates.itemsize
                read_row(gates, head * (gates.strides[0] // gates.itemsize), stride, headdim, other, 0)
                for i in range(0, row_size, lane_count(x)):
                    gate = load(other, i)
                    store(y_row, i, load(y_row, i) * (gate * sigmoid(gate)))
            write_row(y_row, 0, y, ((b * x.shape[1] + t) * heads + head) * headdim, 1, headdim)
