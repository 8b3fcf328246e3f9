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
    element,
    fill,
    fma,
    lane_count,
    load,
    place_of,
    read_rows,
    read_vector,
    set_element,
    splat,
    store,
    total,
    write_vector,
)
from ..._numba.launch import as_array, memory_of
from ..._numba.threads import run_tiles
from .tiles import ROWS, UNROLL, as_rows, count_tiles, padded_size, stored_dtype


def forward(x, residual, weight, z, eps, group_size, norm_before_gate, residual_out_dtype) -> tuple[Tensor, ...]:
    """Compute y, x + residual (empty without a residual), and 1 / rms (rows, groups). Body of `norm_numba`."""
    compute = torch.promote_types(torch.promote_types(x.dtype, residual_out_dtype), torch.float32)
    dim = x.shape[-1]
    y = x.new_empty(x.shape, dtype=stored_dtype(x.dtype, compute))
    out_dtype = stored_dtype(x.dtype if residual is None else residual_out_dtype, compute)
    residual_out = x.new_empty(0 if residual is None else x.shape, dtype=out_dtype)
    rstd = x.new_empty(x.numel() // dim, dim // group_size, dtype=compute)
    args = (
        as_array(weight, compute, 3), *(as_rows(m, x, compute) for m in (x, residual, z)),
        *(as_array(m.view(-1, dim), m.dtype, 3) for m in (y, residual_out)), memory_of(rstd),
        float(eps), group_size, norm_before_gate,
    )  # fmt: skip
    run_tiles(lambda first, end: normalize_tiles(*args, first, end), count_tiles(len(rstd)), x.numel())
    return y.to(x.dtype), residual_out.to(residual_out_dtype), rstd


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
        fill(tile, 0.0)  # what follows a group's channels stays zero
    for group in range(rstd.shape[1]):
        channel = group * group_size
        read_rows(weight, zero, zero, one, channel, group_size, w_tile)
        for row in range(first * ROWS, min(end * ROWS, rstd.shape[0])):
            (x_at, x_stride), (y_at, y_stride) = place_of(x, zero, row, channel), place_of(y, zero, row, channel)
            z_at, z_stride = place_of(z, zero, row, channel)
            added_at, added_stride = place_of(residual, zero, row, channel)
            out_at, out_stride = place_of(residual_out, zero, row, channel)
            # Twice over the row, which the first-level cache holds the second time.
            for i in range(0, group_size, lanes):
                left = group_size - i
                v = read_vector(x, x_at + i * x_stride, x_stride, left, scratch)
                if residual.size:
                    v = v + read_vector(residual, added_at + i * added_stride, added_stride, left, scratch)
                    write_vector(v, residual_out, out_at + i * out_stride, out_stride, left, scratch)
                    if residual_out.itemsize < weight.itemsize:
                        # The norm is that of the rounded sum, which the backward reads.
                        v = read_vector(residual_out, out_at + i * out_stride, out_stride, left, scratch)
                if z.size:
                    gate = read_vector(z, z_at + i * z_stride, z_stride, left, scratch)
                    gate = gate * sigmoid(gate)
                    if norm_before_gate:
                        store(gates, i, gate)
                    else:
                        v = v * gate
                store(v_tile, i, v)
            # 1 / sqrt(mean(v^2) + eps), rounded to the dtype of the arithmetic
            set_element(rstd, row * rstd.shape[1] + group, sum_of_squares(v_tile) / group_size + eps)
            scale = rsqrt(element(rstd, row * rstd.shape[1] + group))
            set_element(rstd, row * rstd.shape[1] + group, scale)
            for i in range(0, group_size, lanes):
                result = load(v_tile, i) * scale * load(w_tile, i)
                if z.size and norm_before_gate:
                    result = result * load(gates, i)
                write_vector(result, y, y_at + i * y_stride, y_stride, group_size - i, scratch)


@njit
def sum_of_squares(tile):
    """The sum over a tile, by four vectors."""
    n = lane_count(tile)
    a, b, c, d = splat(tile, 0.0), splat(tile, 0.0), splat(tile, 0.0), splat(tile, 0.0)
    for i in range(0, tile.size, UNROLL * n):
        v, w, x, y = load(tile, i), load(tile, i + n), load(tile, i + 2 * n), load(tile, i + 3 * n)
        a, b, c, d = fma(v, v, a), fma(w, w, b), fma(x, x, c), fma(y, y, d)
    return total((a + b) + (c + d))
