"""Steps of the compiled convolution, for decoding."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..._numba.compile import Kernel
from ..._numba.functions import sigmoid
from ..._numba.lanes import aligned_empty, clear, lane_count, load, locate_tile, read_rows, store, write_rows
from ..._numba.launch import BLOCK, as_array, as_dtype, count_tiles, memory_of, plan_arrays
from ..._numba.threads import run_tiles
from .tiles import convolve_rows


def step(state, x, weight, bias, silu, sources, destinations, bounds) -> Tensor:
    """Return y (M, D) in the dtype of x. `state` (B, K - 1, D), or a pool of slots, is updated in place."""
    tokens, dim = x.shape
    compute = torch.promote_types(x.dtype, torch.float32)
    # Zero where no sequence has the token
    y = (x.new_empty if sources is None else x.new_zeros)(tokens, dim, dtype=compute)
    plan = plan_arrays(sources, destinations, bounds, tokens, 1)
    # The state takes x in its own dtype, and the sum reads it from there.
    inputs = [as_array(m, compute, 3) for m in (as_dtype(x, state.dtype), weight.mT, bias)]
    args = (memory_of(state), *inputs, as_array(y, compute, 3), *plan, silu)
    n_sequences = tokens if sources is None else len(sources)
    run_tiles(lambda first, end: step_tiles(*args, first, end), n_sequences * count_tiles(dim), tokens * dim)
    return as_dtype(y, x.dtype)


@Kernel
def step_tiles(state, x, weight, bias, y, sources, destinations, bounds, silu, first, end):
    """Advance the tiles from `first` to `end` - 1: a sequence and BLOCK channels each.

    state (slots, K - 1, D); x, y (1, M, D); weight (1, K, D); bias (1, 1, D); sources (S,); destinations (M,);
    bounds (S + 1,).
    """
    zero, one = np.int64(0), np.int64(1)  # numba compiles a function again for each literal
    n_taps, dim = weight.shape[1:]
    x_tile, w_tile = aligned_empty(x, n_taps * BLOCK), aligned_empty(x, n_taps * BLOCK)
    b_tile, y_tile = aligned_empty(x, one * BLOCK), aligned_empty(x, one * BLOCK)
    clear(b_tile, zero, one * BLOCK)
    for tile in range(first, end):
        row, _, channel, width = locate_tile(tile, dim, one)
        if sources[row] < 0:
            continue
        read_rows(weight, zero, zero, n_taps, channel, width, w_tile)
        if bias.size:
            read_rows(bias, zero, zero, one, channel, width, b_tile)
        # Rows of `x_tile` are the window (x_{t - K + 1}, ..., x_t); all but the first are the next state.
        read_rows(state, sources[row], zero, n_taps - 1, channel, width, x_tile)
        for token in range(bounds[row], bounds[row + 1]):
            if token > bounds[row]:
                x_tile[: (n_taps - 1) * BLOCK] = x_tile[BLOCK:]
            read_rows(x, zero, token, one, channel, width, x_tile[(n_taps - 1) * BLOCK :])
            convolve_rows(x_tile, w_tile, b_tile, n_taps, one, width, y_tile)
            if silu:
                for i in range(0, width, lane_count(x)):
                    value = load(y_tile, i)
                    store(y_tile, i, value * sigmoid(value))
            if destinations[token] >= 0:
                write_rows(x_tile[BLOCK:], state, destinations[token], zero, n_taps - 1, channel, width)
            write_rows(y_tile, y, zero, token, one, channel, width)
