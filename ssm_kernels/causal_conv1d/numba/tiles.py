"""The tiles of the compiled convolution: one sequence, and up to 64 channels.

A program walks the time of its tile in blocks of `STEPS`. Inputs are copied to a tile of (K - 1 + STEPS, BLOCK), whose
first rows are the last K - 1 inputs before the block.
"""

from __future__ import annotations

from numba import njit

from ..._numba.lanes import fma, lane_count, load, store
from ..._numba.launch import BLOCK

STEPS = 32
"""Steps of a block: its tiles stay in the first-level cache."""


@njit
def convolve_rows(x_tile, w_tile, bias, n_taps, count, width, out_tile):
    """out_t = bias + sum_k w_k x_{t + k}, where row t + K - 1 of the inputs is step t."""
    lanes = lane_count(x_tile)
    for i in range(0, width, lanes):
        b = load(bias, i)
        if n_taps == 4:  # of all published models: weights stay in registers
            w0, w1, w2, w3 = (
                load(w_tile, i), load(w_tile, BLOCK + i), load(w_tile, 2 * BLOCK + i), load(w_tile, 3 * BLOCK + i),
            )  # fmt: skip
            x0, x1, x2 = load(x_tile, i), load(x_tile, BLOCK + i), load(x_tile, 2 * BLOCK + i)
            # Each input is loaded once: the window of K inputs moves along in registers.
            for t in range(count):
                x3 = load(x_tile, (t + 3) * BLOCK + i)
                store(out_tile, t * BLOCK + i, fma(w3, x3, fma(w2, x2, fma(w1, x1, fma(w0, x0, b)))))
                x0, x1, x2 = x1, x2, x3
        else:
            for t in range(count):
                result = b
                for k in range(n_taps):
                    result = fma(load(w_tile, k * BLOCK + i), load(x_tile, (t + k) * BLOCK + i), result)
                store(out_tile, t * BLOCK + i, result)


@njit
def move_rows(tile, source, count, width):
    """Copy `count` rows from row `source` on to the first rows of a tile."""
    # In ascending order, since the two runs of rows may overlap where a block is shorter than K - 1.
    for r in range(count):
        for i in range(r * BLOCK, r * BLOCK + width, lane_count(tile)):
            store(tile, i, load(tile, source * BLOCK + i))
