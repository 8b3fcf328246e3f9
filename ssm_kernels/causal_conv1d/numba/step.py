"""One step of the compiled convolution, for decoding."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..._numba.compile import Kernel
from ..._numba.functions import sigmoid
from ..._numba.lanes import aligned_empty, fill, lane_count, load, locate_tile, read_rows, store, write_rows
from ..._numba.launch import BLOCK, as_array, as_row, count_tiles, memory_of
from ..._numba.threads import run_tiles
from .tiles import convolve_rows


def step(state, x, weight, bias, silu) -> Tensor:
    """Return y (B, D) in the dtype of x. `state` (B, K - 1, D) is updated in place."""
    batch, dim = x.shape
    compute = torch.promote_types(x.dtype, torch.float32)
    y = x.new_empty(1, batch, dim, dtype=compute)  # (1, B, D)
    new_state = state.to(compute)  # the state itself where it has this dtype
    # The state takes x in its own dtype, and the sum reads it from there.
    inputs = (as_array(m, compute, 3) for m in (new_state, x.to(state.dtype)[None], weight.T[None], as_row(bias)))
    args = (*inputs, memory_of(y), silu)
    run_tiles(lambda first, end: step_tiles(*args, first, end), batch * count_tiles(dim), x.numel())
    if new_state is not state:
        state.copy_(new_state)
    return y[0].to(x.dtype)


@Kernel
def step_tiles(state, x, weight, bias, y, silu, first, end):
    """Advance the tiles from `first` to `end` - 1: a sequence and BLOCK channels each.

    state (B, K - 1, D); x, y (1, B, D); weight (1, K, D); bias (1, 1, D).
    """
    zero, one = np.int64(0), np.int64(1)  # numba compiles a function again for each literal
    n_taps, dim = weight.shape[1:]
    x_tile, w_tile = aligned_empty(x, n_taps * BLOCK), aligned_empty(x, n_taps * BLOCK)
    b_tile, y_tile = aligned_empty(x, one * BLOCK), aligned_empty(x, one * BLOCK)
    fill(b_tile, 0.0)
    for tile in range(first, end):
        row, _, channel, width = locate_tile(tile, dim, one)
        read_rows(weight, zero, zero, n_taps, channel, width, w_tile)
        if bias.size:
            read_rows(bias, zero, zero, one, channel, width, b_tile)
        # Rows of `x_tile` are the window (x_{t - K + 1}, ..., x_t); all but the first are the next state.
        read_rows(state, row, zero, n_taps - 1, channel, width, x_tile)
        read_rows(x, zero, row, one, channel, width, x_tile[(n_taps - 1) * BLOCK :])
        convolve_rows(x_tile, w_tile, b_tile, n_taps, one, width, y_tile)
        if silu:
            for i in range(0, width, lane_count(x)):
                value = load(y_tile, i)
                store(y_tile, i, value * sigmoid(value))
        write_rows(x_tile[BLOCK:], state, row, zero, n_taps - 1, channel, width)
        write_rows(y_tile, y, zero, row, one, channel, width)
