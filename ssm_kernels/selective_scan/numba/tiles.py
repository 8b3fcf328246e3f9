"""The tiles of the compiled scan: one sequence, and up to 64 channels of one group.

A program walks the time of its tile in blocks of `CHECKPOINT_INTERVAL` steps. It copies their inputs, of any strides,
to contiguous tiles of (steps, BLOCK) that stay in the first-level cache. States are tiles of (N, BLOCK).
"""

from __future__ import annotations

from numba import njit

from ..._numba.functions import softplus
from ..._numba.lanes import BLOCK, element, lane_count, load, set_element, store
from . import CHECKPOINT_INTERVAL


@njit
def read_coefficients(source, i, positions, count, group, is_constant, channel, width, steps_tile, lanes_tile):
    """Read a block of steps of B or C (B, L, G, N) as (N, CHECKPOINT_INTERVAL); where constant in time, (N, BLOCK)."""
    size = source.itemsize
    batch, step, row, column = (
        source.strides[0] // size, source.strides[1] // size, source.strides[2] // size, source.strides[3] // size,
    )  # fmt: skip
    if is_constant:  # a row a channel
        for j in range(source.shape[3]):
            for k in range(BLOCK):
                value = element(source, (channel + k) * row + j * column) if k < width else 0.0
                set_element(lanes_tile, j * BLOCK + k, value)
        return
    # Transposed, so that the steps of one state are neighbours.
    offset = i * batch + group * row
    for t in range(count):
        for j in range(source.shape[3]):
            value = element(source, offset + positions[t] * step + j * column)
            set_element(steps_tile, j * CHECKPOINT_INTERVAL + t, value)


@njit
def prepare_steps(count, width, bias, dt_softplus, u, dt, dt_input):
    """Apply bias and softplus to dt, and compute dt u; tiles (CHECKPOINT_INTERVAL, BLOCK)."""
    for t in range(count):
        for i in range(0, width, lane_count(u)):
            at = t * BLOCK + i
            # dt_t = softplus(dt + dt_bias) (algorithm 2)
            step = load(dt, at) + load(bias, i)
            if dt_softplus:
                step = softplus(step)
            store(dt, at, step)
            store(dt_input, at, step * load(u, at))


@njit
def write_coefficients(steps_tile, which, target, i, positions, count, group):
    """Write one of the two matrices in (N, CHECKPOINT_INTERVAL, 2) to steps of dB or dC (B, L, G, N)."""
    for t in range(count):
        for j in range(target.shape[3]):
            target[i, positions[t], group, j] = element(steps_tile, 2 * (j * CHECKPOINT_INTERVAL + t) + which)
