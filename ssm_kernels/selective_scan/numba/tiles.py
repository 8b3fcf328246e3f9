"""The tiles of the compiled scan: one sequence, and up to 64 channels of one group.

A program walks the time of its tile in blocks of `CHECKPOINT_INTERVAL` steps, and in each block takes one vector of
channels after the other. It copies their inputs, of any strides, to contiguous tiles of (steps, lanes) that stay in the
first-level cache. States are tiles of (padded N, BLOCK): they are advanced two at a time, the last one of an odd number
beside zeros.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ..._numba.functions import LOG2_E, softplus_and_slope
from ..._numba.lanes import (
    BLOCK,
    element,
    lane_count,
    larger_sizes,
    largest,
    load,
    read_rows,
    set_element,
    splat,
    store,
)
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
def coefficients_of_pair(like, steps_tile, lanes_tile, is_constant, k, p):
    """B or C of two successive states in a step: vectors where it is constant, else one number each for all lanes.

    k is the place of the step in the first state's steps, p the place of its vector.
    """
    if is_constant:
        return load(lanes_tile, p), load(lanes_tile, p + BLOCK)
    return splat(like, element(steps_tile, k)), splat(like, element(steps_tile, k + CHECKPOINT_INTERVAL))


@njit
def padded_states(n):
    """States of a tile: an even number."""
    return n + n % 2


@njit
def prepare_steps(count, width, bias, dt_softplus, u, dt, dt_input, slopes=None):
    """Apply bias and softplus to dt, and compute dt u; tiles (count, width in whole vectors).

    `slopes` gets the derivative of softplus.

    Returns:
        the largest |dt|.
    """
    lanes = lane_count(u)
    row = (width + lanes - 1) // lanes * lanes
    size = splat(u, 0.0)
    for t in range(count):
        for i in range(0, row, lanes):
            at = t * row + i
            # dt_t = softplus(dt + dt_bias) (algorithm 2)
            step = load(dt, at) + load(bias, i)
            if dt_softplus:
                step, slope = softplus_and_slope(step)
                if slopes is not None:
                    store(slopes, at, slope)
            size = larger_sizes(step, size)
            store(dt, at, step)
            store(dt_input, at, step * load(u, at))
    return largest(size)


@njit
def read_exponents(A, channel, width, a_tile, n_states, largest_sizes):
    """Read A (1, N, G * E) times log2(e), for exp(dt A) = 2^(dt A log2(e)), and the largest |a| of each vector."""
    zero, lanes = np.int64(0), lane_count(a_tile)
    read_rows(A, zero, zero, A.shape[1], channel, width, a_tile)
    for i in range(0, BLOCK, lanes):
        size = splat(a_tile, 0.0)
        for j in range(0, n_states * BLOCK, BLOCK):
            store(a_tile, j + i, LOG2_E * load(a_tile, j + i))
            size = larger_sizes(load(a_tile, j + i), size)
        largest_sizes[i // lanes] = largest(size)


@njit
def write_coefficients(steps_tile, target, i, positions, count, group):
    """Write a matrix (N, CHECKPOINT_INTERVAL) to steps of dB or dC (B, L, G, N)."""
    for t in range(count):
        for j in range(target.shape[3]):
            target[i, positions[t], group, j] = element(steps_tile, j * CHECKPOINT_INTERVAL + t)
