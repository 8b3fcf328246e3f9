"""The tiles of the compiled SSD: one sequence, and some heads of one group.

A program walks the time of its tile in chunks of CHUNK steps. Inside a chunk the scan is a few matrix products on tiles
that stay in the cache (arXiv 2405.21060, listing 1). Tiles of steps are (CHUNK, P) or (CHUNK, N), states (N, P), all
with rows padded to complete vectors. No decay is the exponential of a sum, nor a ratio: each is a product of the decays
of its steps.
"""

from __future__ import annotations

import torch
from numba import njit

from ..._numba.functions import LOG2_E, exp2, softplus
from ..._numba.lanes import (
    clear,
    element,
    fma,
    lane_count,
    load,
    read_row,
    set_element,
    splat,
    store,
    total,
    write_row,
)
from ..._numba.launch import Memory, as_array
from ..arguments import ScanArguments

CHUNK = 32
"""Steps that are one matrix product: fewer make more of the passes over the state, more of the scores."""
MAX_PARTS = 8
"""Parts of the gradients of B and C at most, one for each tile of a group."""


def heads_per_tile(heads: int, groups: int) -> int:
    """Return the number of heads of a tile, which share scores and transposed matrices. It depends on shapes alone."""
    per_group = heads // groups
    return min(per_group, max(4, -(-per_group // MAX_PARTS)))


def input_arrays(arguments: ScanArguments, compute: torch.dtype) -> list[Memory]:
    """Return x, B, C (4 dims each), dt (B, L, H), D (1, H, P), A and dt_bias (1, 1, H), and the weights like dt.

    All are in the dtype of arithmetic.
    """
    heads, headdim = arguments.x.shape[2:]
    D = None if arguments.D is None else arguments.D.expand(heads, headdim)[None]
    dt_bias = None if arguments.dt_bias is None else arguments.dt_bias[None, None]
    arrays = [as_array(t, compute, 4) for t in (arguments.x, arguments.B, arguments.C)]
    others = (arguments.dt, D, arguments.A[None, None], dt_bias, arguments.input_weights)
    return arrays + [as_array(t, compute, 3) for t in others]


# --- compiled -------------------------------------------------------------------------------------------------------


@njit
def locate_heads(tile, heads, groups, n_heads):
    """Return the sequence of a tile, its group, its first head, and the head after its last."""
    per_group = heads // groups
    blocks = (per_group + n_heads - 1) // n_heads
    sequence, block = tile // (groups * blocks), tile % (groups * blocks)
    group, block = block // blocks, block % blocks
    head = group * per_group + block * n_heads
    return sequence, group, head, min(head + n_heads, (group + 1) * per_group)


@njit
def padded(like, size):
    """The size of a row of complete vectors."""
    return (size + lane_count(like) - 1) // lane_count(like) * lane_count(like)


@njit
def scale(tile, at, size, factor):
    """Multiply a part of a tile by a number."""
    for i in range(at, at + size, lane_count(tile)):
        store(tile, i, load(tile, i) * factor)


@njit
def read_matrix(source, i, positions, count, group, tile, at, row_size):
    """Copy source[i, positions[:count], group] to rows of a tile."""
    size = source.itemsize
    step, stride = source.strides[1] // size, source.strides[3] // size
    offset = i * (source.strides[0] // size) + group * (source.strides[2] // size)
    for t in range(count):
        read_row(source, offset + positions[t] * step, stride, source.shape[3], tile, at + t * row_size)


@njit
def write_matrix(tile, at, row_size, target, i, positions, count, group):
    """Copy rows of a tile to target[i, positions[:count], group]."""
    size = target.itemsize
    step, stride = target.strides[1] // size, target.strides[3] // size
    offset = i * (target.strides[0] // size) + group * (target.strides[2] // size)
    for t in range(count):
        write_row(tile, at + t * row_size, target, offset + positions[t] * step, stride, target.shape[3])


@njit
def transpose(source, at, row_size, count, n, target, to):
    """Copy rows (count, n) as columns (n, CHUNK); columns from `count` on are zero."""
    for j in range(n):
        for t in range(count):
            set_element(target, to + j * CHUNK + t, element(source, at + t * row_size + j))
        for t in range(count, CHUNK):
            set_element(target, to + j * CHUNK + t, 0.0)


@njit
def read_state(source, i, head, tile, at, row_size):
    """Copy source[i, head] (P, N) to a tile (N, P)."""
    clear(tile, at, source.shape[3] * row_size)
    for p in range(source.shape[2]):
        for n in range(source.shape[3]):
            set_element(tile, at + n * row_size + p, source[i, head, p, n])


@njit
def write_state(tile, at, row_size, target, i, head):
    """Copy a tile (N, P) to target[i, head] (P, N)."""
    for p in range(target.shape[2]):
        for n in range(target.shape[3]):
            target[i, head, p, n] = element(tile, at + n * row_size + p)


@njit
def read_step_sizes(
    dt, row, positions, count, head, A, dt_bias, input_weights, dt_softplus, dt_min, dt_max, raw, steps, decays,
    weights, at,
):  # fmt: skip
    """Read dt (B, L, H) of a chunk: with the bias to `raw`, the step size, its decay and the weight of its input.

    The weight is that of `input_weights`, or the step size. Steps of nothing are 0.
    """
    bias = dt_bias[0, 0, head] if dt_bias.size else 0.0
    for t in range(CHUNK):
        set_element(raw, at + t, dt[row, positions[t], head] + bias if t < count else bias)
    for i in range(at, at + CHUNK, lane_count(steps)):
        value = load(raw, i)
        if dt_softplus:
            value = softplus(value)
        store(steps, i, value)
    for t in range(CHUNK):
        clamped = min(max(element(steps, at + t), dt_min), dt_max) if t < count else 0.0
        set_element(steps, at + t, clamped)
        weight = input_weights[row, positions[t], head] if input_weights.size and t < count else clamped
        set_element(weights, at + t, weight)
    for i in range(at, at + CHUNK, lane_count(steps)):
        store(decays, i, exp2(load(steps, i) * A[0, 0, head] * LOG2_E))


@njit
def make_decays(decays, at, count, matrix, from_start, to_end):
    """Compute L of listing 1 (CHUNK, CHUNK), the decays from the start through each step, and from each to the end."""
    n = lane_count(matrix)
    so_far = element(decays, at)
    for i in range(count):
        decay = element(decays, at + i)
        if i:
            so_far = so_far * decay
        set_element(from_start, i, so_far)
        for j in range(0, CHUNK, n):
            store(matrix, i * CHUNK + j, load(matrix, (i - 1) * CHUNK + j) * decay if i else splat(matrix, 0.0))
        set_element(matrix, i * CHUNK + i, 1.0)
    for i in range(count, CHUNK):
        set_element(from_start, i, 0.0)
    for j in range(0, CHUNK, n):
        store(to_end, j, load(matrix, (count - 1) * CHUNK + j))


@njit
def multiply_rows(source, at, count, row_size, factors, first, target, to):
    """Multiply each row by a number of its own."""
    for t in range(count):
        factor = element(factors, first + t)
        for i in range(0, row_size, lane_count(source)):
            store(target, to + t * row_size + i, load(source, at + t * row_size + i) * factor)


@njit
def dot(a, at, b, to, size):
    """The sum of products of two rows of complete vectors."""
    result = splat(a, 0.0)
    for i in range(0, size, lane_count(a)):
        result = fma(load(a, at + i), load(b, to + i), result)
    return total(result)
