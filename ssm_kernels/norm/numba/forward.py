"""Forward of the compiled norms."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..._numba.compile import Kernel
from ..._numba.functions import rsqrt, sigmoid
from ..._numba.lanes import (
    aligned_empty,
    borrow,
    clear,
    element,
    fma,
    item_size,
    keep,
    lane_count,
    load,
    place_of,
    read_rows,
    set_element,
    splat,
    store,
    total,
)
from ..._numba.launch import as_array, as_dtype, memory_of
from ..._numba.threads import run_tiles
from .tiles import (
    ROWS,
    UNROLL,
    as_rows,
    count_tiles,
    has_dense_rows,
    padded_size,
    read_at,
    stored_dtype,
    write_at,
)


def forward(x, residual, weight, z, eps, group_size, norm_before_gate, residual_out_dtype) -> tuple[Tensor, ...]:
    """Compute y, x + residual (empty without a residual), and 1 / rms (rows, groups). Body of `norm_numba`."""
    compute = torch.promote_types(torch.promote_types(x.dtype, residual_out_dtype), torch.float32)
    shape = x.shape
    n_rows, dim = x.numel() // shape[-1], shape[-1]
    y = x.new_empty(*shape, dtype=stored_dtype(x.dtype, compute))
    if residual is None:
        residual_out = x.new_empty(0, dtype=residual_out_dtype)
    else:
        residual_out = x.new_empty(*shape, dtype=stored_dtype(residual_out_dtype, compute))
    rstd = x.new_empty(n_rows, dim // group_size, dtype=compute)
    rows = 1, n_rows, dim
    args = (
        as_array(weight, compute, 3), as_rows(x, rows, compute), as_rows(residual, rows, compute),
        as_rows(z, rows, compute), as_rows(y, rows, compute),
        as_rows(None if residual is None else residual_out, rows, compute), memory_of(rstd), float(eps), group_size,
        norm_before_gate,
    )  # fmt: skip
    run_tiles(lambda first, end: normalize_tiles(*args, first, end), count_tiles(n_rows), n_rows * dim)
    return as_dtype(y, x.dtype), as_dtype(residual_out, residual_out_dtype), rstd


@Kernel
def normalize_tiles(weight, x, residual, z, y, residual_out, rstd, eps, group_size, norm_before_gate, first, end):
    """Normalize the rows of the tiles from `first` to `end` - 1.

    weight (1, 1, D) and rstd (rows, groups) have the dtype of the arithmetic; x, residual, z, y, residual_out
    (1, rows, D) each have their own. Those of size 0 are left out.
    """
    zero, one = np.int64(0), np.int64(1)  # numba compiles a function again for each literal
    lanes, size = lane_count(weight), padded_size(weight, group_size)
    w_tile, v_tile, gates = aligned_empty(weight, size), aligned_empty(weight, size), aligned_empty(weight, size)
    scratch = aligned_empty(weight, one * lanes)
    for tile in (w_tile, v_tile):
        clear(tile, zero, size)  # what follows a group's channels stays zero
    w, v, g, vector = borrow(w_tile), borrow(v_tile), borrow(gates), borrow(scratch)
    is_dense = has_dense_rows(x) and has_dense_rows(residual) and has_dense_rows(z)
    is_dense = is_dense and has_dense_rows(residual_out) and has_dense_rows(y)
    n_whole = group_size // lanes * lanes if is_dense else zero
    for group in range(rstd.shape[1]):
        channel = group * group_size
        read_rows(weight, zero, zero, one, channel, group_size, w_tile)
        for row in range(first * ROWS, min(end * ROWS, rstd.shape[0])):
            values = x, residual, z, residual_out, norm_before_gate, row, channel, v, g, vector
            read_values(*values, zero, n_whole, True)
            read_values(*values, n_whole, group_size, False)
            # 1 / sqrt(mean(v^2) + eps), rounded to the dtype of the arithmetic
            set_element(rstd, row * rstd.shape[1] + group, sum_of_squares(v, size) / group_size + eps)
            scale = rsqrt(element(rstd, row * rstd.shape[1] + group))
            set_element(rstd, row * rstd.shape[1] + group, scale)
            # The first-level cache holds the row now.
            results = v, scale, w, z.size > 0 and norm_before_gate, g, y, row, channel, vector
            write_results(*results, zero, n_whole, True)
            write_results(*results, n_whole, group_size, False)
    keep(w_tile)
    keep(v_tile)
    keep(gates)
    keep(scratch)


@njit(forceinline=True)
def read_values(
    x, residual, z, residual_out, norm_before_gate, row, channel, v_tile, gates, scratch, start, stop, is_whole
):  # fmt: skip
    """Read what is normalized to `v_tile`, and the gate that follows the norm to `gates`; write the sum."""
    zero = np.int64(0)
    x_at, residual_at = place_of(x, zero, row, channel), place_of(residual, zero, row, channel)
    z_at, out_at = place_of(z, zero, row, channel), place_of(residual_out, zero, row, channel)
    for i in range(start, stop, lane_count(scratch)):
        left = stop - i
        v = read_at(x, x_at, i, left, is_whole, scratch)
        if residual.size:
            v = v + read_at(residual, residual_at, i, left, is_whole, scratch)
            write_at(v, residual_out, out_at, i, left, is_whole, scratch)
            if item_size(residual_out) < item_size(scratch):
                # The norm is that of the rounded sum, which the backward reads.
                v = read_at(residual_out, out_at, i, left, is_whole, scratch)
        if z.size:
            gate = read_at(z, z_at, i, left, is_whole, scratch)
            gate = gate * sigmoid(gate)
            if norm_before_gate:
                store(gates, i, gate)
            else:
                v = v * gate
        store(v_tile, i, v)


@njit(forceinline=True)
def write_results(v_tile, scale, w_tile, has_gates, gates, y, row, channel, scratch, start, stop, is_whole):
    """Write y = v scale w, gated by what `gates` holds."""
    y_at = place_of(y, np.int64(0), row, channel)
    for i in range(start, stop, lane_count(scratch)):
        result = load(v_tile, i) * scale * load(w_tile, i)
        if has_gates:
            result = result * load(gates, i)
        write_at(result, y, y_at, i, stop - i, is_whole, scratch)


@njit
def sum_of_squares(tile, size):
    """The sum over a tile, by four vectors."""
    n = lane_count(tile)
    a, b, c, d = splat(tile, 0.0), splat(tile, 0.0), splat(tile, 0.0), splat(tile, 0.0)
    for i in range(0, size, UNROLL * n):
        v, w, x, y = load(tile, i), load(tile, i + n), load(tile, i + 2 * n), load(tile, i + 3 * n)
        a, b, c, d = fma(v, v, a), fma(w, w, b), fma(x, x, c), fma(y, y, d)
    return total((a + b) + (c + d))
