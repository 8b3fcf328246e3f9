"""Backward of the compiled norms."""

from __future__ import annotations

import numpy as np
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
    place_of,
    read_rows,
    read_vector,
    splat,
    store,
    total,
    write_rows,
    write_vector,
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
    w_tile, dw_tile, sigmoids = aligned_empty(weight, size), aligned_empty(weight, size), aligned_empty(weight, size)
    scratch = aligned_empty(weight, one * lanes)
    for run in range(first, end):
        for group in range(rstd.shape[1]):
            channel = group * group_size
            read_rows(weight, zero, zero, one, channel, group_size, w_tile)
            fill(dw_tile, 0.0)
            for row in range(run * n_tiles // n_runs * ROWS, min((run + 1) * n_tiles // n_runs * ROWS, n_rows)):
                scale = element(rstd, row * rstd.shape[1] + group)
                (v_at, v_stride), (dy_at, dy_stride) = place_of(v, zero, row, channel), place_of(dy, zero, row, channel)
                z_at, z_stride = place_of(z, zero, row, channel)
                product = splat(weight, 0.0)
                # Twice over the row, which the first-level cache holds the second time.
                for i in range(0, group_size, lanes):
                    left = group_size - i
                    x_hat = read_vector(v, v_at + i * v_stride, v_stride, left, scratch) * scale
                    d = read_vector(dy, dy_at + i * dy_stride, dy_stride, left, scratch)
                    if z.size:
                        gate = read_vector(z, z_at + i * z_stride, z_stride, left, scratch)
                        s = sigmoid(gate)
                        store(sigmoids, i, s)
                        if norm_before_gate:
                            d = d * (gate * s)
                        else:
                            x_hat = x_hat * (gate * s)
                    store(dw_tile, i, fma(d, x_hat, load(dw_tile, i)))
                    product = fma(d * load(w_tile, i), x_hat, product)
                mean = total(product) / group_size

                (dx_at, dx_stride), (dz_at, dz_stride) = (
                    place_of(dx, zero, row, channel),
                    place_of(dz, zero, row, channel),
                )
                total_at, total_stride = place_of(dtotal, zero, row, channel)
                residual_at, residual_stride = place_of(dresidual, zero, row, channel)
                # d(normalized or gated v) = 1 / rms (w dy - x_hat mean(w dy x_hat)),
                # x_hat = (normalized or gated v) / rms
                for i in range(0, group_size, lanes):
                    left = group_size - i
                    value = read_vector(v, v_at + i * v_stride, v_stride, left, scratch)
                    weighted = read_vector(dy, dy_at + i * dy_stride, dy_stride, left, scratch) * load(w_tile, i)
                    if not z.size:
                        result = (weighted - value * scale * mean) * scale
                    else:
                        s, gate = load(sigmoids, i), read_vector(z, z_at + i * z_stride, z_stride, left, scratch)
                        if norm_before_gate:
                            x_hat = value * scale
                            result = (weighted * (gate * s) - x_hat * mean) * scale
                            dgate = weighted * x_hat
                        else:
                            dgated = (weighted - value * (gate * s) * scale * mean) * scale
                            result = dgated * (gate * s)
                            dgate = dgated * value
                        dgate = dgate * (s * fma(gate, 1.0 - s, splat(weight, 1.0)))  # silu' = s (1 + z (1 - s))
                        write_vector(dgate, dz, dz_at + i * dz_stride, dz_stride, left, scratch)
                    if dtotal.size:
                        result = result + read_vector(dtotal, total_at + i * total_stride, total_stride, left, scratch)
                    write_vector(result, dx, dx_at + i * dx_stride, dx_stride, left, scratch)
                    if dresidual.size:
                        write_vector(
                            result, dresidual, residual_at + i * residual_stride, residual_stride, left, scratch
                        )
            write_rows(dw_tile, dweight, zero, run, one, channel, group_size)
