"""The tiles of the compiled scan: one sequence, and up to 64 channels of one group.

A program walks the time of its tile in blocks of `INTERVAL` steps. It copies their inputs, of any strides, to
contiguous tiles of (steps, BLOCK) that stay in the first-level cache. States are tiles of (N, BLOCK).
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..._core.varlen import Sequences
from ..._numba.functions import softplus
from ..._numba.lanes import BLOCK, element, lane_count, load, set_element, store
from . import INTERVAL


def as_array(x: Tensor | None, dtype: torch.dtype, n_dims: int) -> np.ndarray:
    """The tensor's memory where it has the dtype; without a tensor, an array of no elements."""
    return torch.empty((0,) * n_dims, dtype=dtype).numpy() if x is None else x.detach().to(dtype).numpy()


def as_row(x: Tensor | None) -> Tensor | None:
    """(D,) -> (1, 1, D)"""
    return None if x is None else x[None, None]


def with_four_dims(m: Tensor) -> Tensor:
    """B or C as (B, L, G, N), or as (1, 1, D, N) where constant in time."""
    return m[None, None] if m.dim() == 2 else m


def n_groups(B: Tensor, C: Tensor) -> int:
    """Groups of channels that read the same B and the same C."""
    return max(m.shape[2] if m.dim() == 4 else 1 for m in (B, C))


def count_tiles(dim: int, groups: int) -> int:
    """Tiles of a sequence with so many channels."""
    return groups * -(-(dim // groups) // BLOCK)


def sequence_table(sequences: Sequences, length: int) -> np.ndarray:
    """(S, 6) int64: row of the batch, first step, steps, rows of initial and final states or -1, first checkpoint."""
    n = len(sequences.lengths)
    table = np.full((n, 6), -1, np.int64)
    starts = np.array(sequences.starts, np.int64)
    table[:, 0], table[:, 1] = np.divmod(starts, max(length, 1))
    table[:, 2] = sequences.lengths
    for column, rows in ((3, sequences.initial_sequences), (4, sequences.final_sequences)):
        table[list(rows), column] = np.arange(len(rows))
    table[:, 5] = starts // INTERVAL + np.arange(n)
    return table


# --- compiled -------------------------------------------------------------------------------------------------------


@njit
def locate_tile(tile, dim, groups):
    """The sequence of a tile, its first channel, and how many channels it has."""
    per_group = dim // groups
    blocks = (per_group + BLOCK - 1) // BLOCK
    sequence, block = tile // (groups * blocks), tile % (groups * blocks)
    group, block = block // blocks, block % blocks
    channel = group * per_group + block * BLOCK
    return sequence, channel, min(BLOCK, (group + 1) * per_group - channel)


@njit
def locate_part(channel, dim, groups, matrix_groups):
    """The group of B or C that a tile's channels read, and the number of the tile among those that read it."""
    per_group, per_matrix = dim // groups, dim // matrix_groups
    blocks = (per_group + BLOCK - 1) // BLOCK
    matrix_group, offset = channel // per_matrix, channel % per_matrix
    return matrix_group, offset // per_group * blocks + offset % per_group // BLOCK


@njit
def read_coefficients(source, i, first, count, group, is_constant, channel, width, steps_tile, lanes_tile):
    """Read B or C (B, L, G, N) of a block of steps as (N, INTERVAL), or, where constant in time, as (N, BLOCK)."""
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
    offset = i * batch + first * step + group * row
    for t in range(count):
        for j in range(source.shape[3]):
            set_element(steps_tile, j * INTERVAL + t, element(source, offset + t * step + j * column))


@njit
def prepare_steps(count, width, bias, dt_softplus, u, dt, dt_input):
    """Apply bias and softplus to dt, and compute dt u; tiles (INTERVAL, BLOCK)."""
    for t in range(count):
        for i in range(0, width, lane_count(u)):
            at = t * BLOCK + i
            step = load(dt, at) + load(bias, i)
            if dt_softplus:
                step = softplus(step)
            store(dt, at, step)
            store(dt_input, at, step * load(u, at))


@njit
def write_coefficients(steps_tile, which, target, i, first, count, group):
    """Write one of the two matrices in (N, INTERVAL, 2) to steps of dB or dC (B, L, G, N)."""
    for t in range(count):
        for j in range(target.shape[3]):
            target[i, first + t, group, j] = element(steps_tile, 2 * (j * INTERVAL + t) + which)
