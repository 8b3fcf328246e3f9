"""Backward of the compiled norms."""

from __future__ import annotations

import numpy as np
from numba import njit
from torch import Tensor

from ..._numba.compile import Kernel
from ..._numba.functions import sigmoid
from ..._numba.lanes import (
    aligned_empty,
    borrow,
    clear,
    element,
    fma,
    keep,
    lane_count,
    load,
    place_of,
    read_rows,
    splat,
    store,
    total,
    write_rows,
)
from ..._numba.launch import as_array, as_dtype, memory_of, split_sequences
from ..._numba.sums import sum_parts
from ..._numba.threads import run_tiles
from .tiles import ROWS, as_rows, count_tiles, has_dense_rows, padded_size, read_at, stored_dtype, write_at


def backward(
    v, weight, z, rstd, dy, dresidual_out, group_size, norm_before_gate, x_dtype, residual_dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of x, the residual (empty where it is that of x), weight and z. Body of
    `norm_numba_backward`."""
    compute, shape = rstd.dtype, v.shape
    dx = v.new_empty(*shape, dtype=stored_dtype(x_dtype, compute))
    has_other_dtype = residual_dtype != x_dtype
    dresidual = v.new_empty(*shape if has_other_dtype else (0,), dtype=stored_dtype(residual_dtype, compute))
    dz = v.new_empty(0) if z is None else z.new_empty(*shape, dtype=stored_dtype(z.dtype, compute))
    dim, n_rows = shape[-1], len(rstd)
    n_tiles = count_tiles(n_rows)
    n_runs = split_sequences(n_tiles)
    dweight = v.new_empty(n_runs, dim, dtype=compute)  # a part for each run of tiles, so that threads share no memory
    rows = 1, n_rows, dim
    args = (
        as_array(weight, compute, 3), as_rows(v, rows, compute), as_rows(z, rows, compute), as_rows(dy, rows, compute),
        as_rows(dresidual_out, rows, compute), memory_of(rstd), as_rows(dx, rows, compute),
        as_rows(dresidual if has_other_dtype else None, rows, compute),
        as_rows(None if z is None else dz, rows, compute), as_array(dweight, compute, 3), group_size, norm_before_gate,
        n_tiles,
    )  # fmt: skip
    run_tiles(lambda first, end: differentiate_runs(*args, first, end), n_runs, 3 * n_rows * dim)
    return (
        as_dtype(dx, x_dtype),
        as_dtype(dresidual, residual_dtype),
        as_dtype(sum_parts(dweight), weight.dtype),
        dz if z is None else as_dtype(dz, z.dtype),
    )


@Kernel
def differentiate_runs(
    weight, v, z, dy, dtotal, rstd, dx, dresidual, dz, dweight, group_size, norm_before_gate, n_tiles, first, end
):  # fmt: skip
    """Gradients of the rows of the runs of tiles from `first` to `end` - 1.

    Arrays are as in `normalize_tiles`; v is what was normalized or gated, dtotal the gradient of x + residual beside
    that of the norm. dweight (1, runs, D) has the dtype of the arithmetic.
    """
    n_runs, n_rows = dweight.shape[1], rstd.shape[0]
    zero, one = np.int64(0), np.int64(1)  # numba compiles a function again for each literal
    lanes, size = lane_count(weight), padded_size(weight, group_size)
    w_tile, dw_tile, sigmoids = aligned_empty(weight, size), aligned_empty(weight, size), aligned_empty(weight, size)
    scratch = aligned_empty(weight, one * lanes)
    w, dw, s, vector = borrow(w_tile), borrow(dw_tile), borrow(sigmoids), borrow(scratch)
    is_dense = has_dense_rows(v) and has_dense_rows(z) and has_dense_rows(dy) and has_dense_rows(dtotal)
    n_whole = group_size // lanes * lanes if is_dense else zero  # dx, dresidual and dz are dense
    for run in range(first, end):
        for group in range(rstd.shape[1]):
            channel = group * group_size
            read_rows(weight, zero, zero, one, channel, group_size, w_tile)
            clear(dw_tile, zero, size)
            for row in range(run * n_tiles // n_runs * ROWS, min((run + 1) * n_tiles // n_runs * ROWS, n_rows)):
                scale = element(rstd, row * rstd.shape[1] + group)
                values = v, z, dy, norm_before_gate, row, channel, scale, w, s, dw, vector
                product = add_products(*values, zero, n_whole, True) + add_products(*values, n_whole, group_size, False)
                # The first-level cache holds the row now.
                values = v, z, dy, dtotal, dx, dresidual, dz, norm_before_gate, row, channel, scale, w, s, vector
                mean = total(product) / group_size
                write_gradients(*values, mean, zero, n_whole, True)
                write_gradients(*values, mean, n_whole, group_size, False)
            write_rows(dw_tile, dweight, zero, run, one, channel, group_size)
    keep(w_tile)
    keep(dw_tile)
    keep(sigmoids)
    keep(scratch)


@njit(forceinline=True)
def add_products(v, z, dy, norm_before_gate, row, channel, scale, w, sigmoids, dw, scratch, start, stop, is_whole):
    """Add dy x_hat to `dw`, and return the sum of w dy x_hat in lanes; x_hat = (normalized or gated v) / rms."""
    zero = np.int64(0)
    v_at, z_at, dy_at = (
        place_of(v, zero, row, channel), place_of(z, zero, row, channel), place_of(dy, zero, row, channel),
    )  # fmt: skip
    product = splat(scratch, 0.0)
    for i in range(start, stop, lane_count(scratch)):
        left = stop - i
        x_hat = read_at(v, v_at, i, left, is_whole, scratch) * scale
        d = read_at(dy, dy_at, i, left, is_whole, scratch)
        if z.size:
            gate = read_at(z, z_at, i, left, is_whole, scratch)
            s = sigmoid(gate)
            store(sigmoids, i, s)
            if norm_before_gate:
                d = d * (gate * s)
            else:
                x_hat = x_hat * (gate * s)
        store(dw, i, fma(d, x_hat, load(dw, i)))
        product = fma(d * load(w, i), x_hat, product)
    return product


@njit(forceinline=True)
def write_gradients(
    v, z, dy, dtotal, dx, dresidual, dz, norm_before_gate, row, channel, scale, w, sigmoids, scratch, mean, start, stop,
    is_whole,
):  # fmt: skip
    """Write d(normalized or gated v) = 1 / rms (w dy - x_hat mean(w dy x_hat)), and the gradient of the gate."""
    zero = np.int64(0)
    v_at, z_at, dy_at = (
        place_of(v, zero, row, channel), place_of(z, zero, row, channel), place_of(dy, zero, row, channel),
    )  # fmt: skip
    dx_at, dz_at = place_of(dx, zero, row, channel), place_of(dz, zero, row, channel)
    total_at, residual_at = place_of(dtotal, zero, row, channel), place_of(dresidual, zero, row, channel)
    for i in range(start, stop, lane_count(scratch)):
        left = stop - i
        value = read_at(v, v_at, i, left, is_whole, scratch)
        weighted = read_at(dy, dy_at, i, left, is_whole, scratch) * load(w, i)
        if not z.size:
            result = (weighted - value * scale * mean) * scale
        else:
            s, gate = load(sigmoids, i), read_at(z, z_at, i, left, is_whole, scratch)
            if norm_before_gate:
                x_hat = value * scale
                result = (weighted * (gate * s) - x_hat * mean) * scale
                dgate = weighted * x_hat
            else:
                dgated = (weighted - value * (gate * s) * scale * mean) * scale
                result = dgated * (gate * s)
                dgate = dgated * value
            dgate = dgate * (s * fma(gate, 1.0 - s, splat(scratch, 1.0)))  # silu' = s (1 + z (1 - s))
            write_at(dgate, dz, dz_at, i, left, is_whole, scratch)
        if dtotal.size:
            result = result + read_at(dtotal, total_at, i, left, is_whole, scratch)
        write_at(result, dx, dx_at, i, left, is_whole, scratch)
        if dresidual.size:
            write_at(result, dresidual, residual_at, i, left, is_whole, scratch)
