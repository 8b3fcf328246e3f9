"""Backward of the compiled norms."""

from __future__ import annotations

import numpy as np
from numba import njit
from torch import Tensor

from ..._numba.compile import Kernel
from ..._numba.functions import sigmoid
from ..._numba.lanes import (
    aligned_empty,
    element,
    fill,
    fma,
    lane_count,
    load,
    read_rows,
    splat,
    store,
    total,
    write_rows,
)
from ..._numba.launch import as_array, memory_of, split_sequences
from ..._numba.sums import sum_parts
from ..._numba.threads import run_tiles
from .tiles import ROWS, as_rows, count_tiles, padded_size, stored_dtype


def backward(
    v, weight, z, rstd, dy, dresidual_out, group_size, norm_before_gate, x_dtype, residual_dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of x, the residual (empty where it is that of x), weight and z. Body of
    `norm_numba_backward`."""
    compute, dim = rstd.dtype, v.shape[-1]
    dx = v.new_empty(v.shape, dtype=stored_dtype(x_dtype, compute))
    dresidual = v.new_empty(0 if residual_dtype == x_dtype else v.shape, dtype=stored_dtype(residual_dtype, compute))
    dz = v.new_empty(0 if z is None else v.shape, dtype=stored_dtype((v if z is None else z).dtype, compute))
    n_tiles = count_tiles(len(rstd))
    n_runs = split_sequences(n_tiles)
    dweight = v.new_empty(n_runs, dim, dtype=compute)  # a part for each run of tiles, so that threads share no memory
    args = (
        as_array(weight, compute, 3), *(as_rows(m, v, compute) for m in (v, z, dy, dresidual_out)),
        memory_of(rstd), *(as_array(m.view(-1, dim), m.dtype, 3) for m in (dx, dresidual, dz, dweight)),
        group_size, norm_before_gate, n_tiles,
    )  # fmt: skip
    run_tiles(lambda first, end: differentiate_runs(*args, first, end), n_runs, 3 * v.numel())
    if z is not None:
        dz = dz.to(z.dtype)
    return dx.to(x_dtype), dresidual.to(residual_dtype), sum_parts(dweight).to(weight.dtype), dz


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
    w_tile, v_tile, z_tile = aligned_empty(weight, size), aligned_empty(weight, size), aligned_empty(weight, size)
    dy_tile, dw_tile = aligned_empty(weight, size), aligned_empty(weight, size)
    for tile in (w_tile, v_tile, z_tile, dy_tile):
        fill(tile, 0.0)  # what follows a group's channels stays zero
    for run in range(first, end):
        for group in range(rstd.shape[1]):
            channel = group * group_size
            read_rows(weight, zero, zero, one, channel, group_size, w_tile)
            fill(dw_tile, 0.0)
            for row in range(run * n_tiles // n_runs * ROWS, min((run + 1) * n_tiles // n_runs * ROWS, n_rows)):
                scale = element(rstd, row * rstd.shape[1] + group)
                read_rows(v, zero, row, one, channel, group_size, v_tile)
                read_rows(dy, zero, row, one, channel, group_size, dy_tile)
                if z.size:
                    read_rows(z, zero, row, one, channel, group_size, z_tile)
                differentiate_row(
                    v_tile, z_tile, dy_tile, dw_tile, w_tile, scale, group_size, z.size > 0, norm_before_gate
                )
                if z.size:
                    write_rows(z_tile, dz, zero, row, one, channel, group_size)
                if dtotal.size:
                    read_rows(dtotal, zero, row, one, channel, group_size, v_tile)
                    for i in range(0, size, lanes):
                        store(dy_tile, i, load(dy_tile, i) + load(v_tile, i))
                write_rows(dy_tile, dx, zero, row, one, channel, group_size)
                if dresidual.size:
                    write_rows(dy_tile, dresidual, zero, row, one, channel, group_size)
            write_rows(dw_tile, dweight, zero, run, one, channel, group_size)


@njit
def differentiate_row(v_tile, z_tile, dy_tile, dw_tile, w_tile, scale, group_size, has_z, norm_before_gate):
    """Turn dy into the gradient of v and z into that of z, and add to that of weight. `scale` is 1 / rms."""
    lanes = lane_count(v_tile)
    product = splat(v_tile, 0.0)
    for i in range(0, v_tile.size, lanes):
        x_hat, dy = load(v_tile, i) * scale, load(dy_tile, i)
        if has_z:
            gate = load(z_tile, i) * sigmoid(load(z_tile, i))
            if norm_before_gate:
                dy = dy * gate
            else:
                x_hat = x_hat * gate
        store(dw_tile, i, fma(dy, x_hat, load(dw_tile, i)))
        product = fma(dy * load(w_tile, i), x_hat, product)
    mean = total(product) / group_size
    # d(normalized or gated v) = 1 / rms (w dy - x_hat mean(w dy x_hat)), x_hat = (normalized or gated v) / rms
    for i in range(0, v_tile.size, lanes):
        v, weighted = load(v_tile, i), load(dy_tile, i) * load(w_tile, i)
        if not has_z:
            store(dy_tile, i, (weighted - v * scale * mean) * scale)
            continue
        z = load(z_tile, i)
        s = sigmoid(z)
        gate = z * s
        if norm_before_gate:
            x_hat = v * scale
            dgate = weighted * x_hat
            store(dy_tile, i, (weighted * gate - x_hat * mean) * scale)
        else:
            dgated = (weighted - v * gate * scale * mean) * scale
            dgate = dgated * v
            store(dy_tile, i, dgated * gate)
        store(z_tile, i, dgate * (s * fma(z, 1.0 - s, splat(v_tile, 1.0))))  # silu' = s (1 + z (1 - s))
