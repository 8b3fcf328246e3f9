"""The tiles of the compiled norms: up to 16 rows. One group of channels of a row is normalized at a time."""

from __future__ import annotations

import torch
from numba import njit
from torch import Tensor

from ..._numba.lanes import lane_count, load_as, read_vector, store_as, write_vector
from ..._numba.launch import Memory, as_array

ROWS = 16
"""Rows of a tile."""
UNROLL = 4
"""Vectors that are summed apart: an addition waits for the one before it."""


def as_rows(x: Tensor | None, shape: tuple[int, int, int], compute: torch.dtype) -> Memory:
    """Return the memory of x (..., D) as (1, rows, D), in its `stored_dtype`."""
    if x is None:
        return as_array(None, compute, 3)
    dtype = stored_dtype(x.dtype, compute)
    if not x.is_contiguous():
        return as_array(x.reshape(shape), dtype, 3)
    if x.dtype != dtype:
        x = x.to(dtype)
    return dtype, x.data_ptr(), shape, (0, shape[2], 1), x


def stored_dtype(dtype: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """Return the dtype in which kernels read and write what has a dtype; each pair of them is compiled apart."""
    return dtype if dtype == torch.bfloat16 else compute


def count_tiles(n_rows: int) -> int:
    """Return the number of tiles."""
    return -(-n_rows // ROWS)


@njit
def padded_size(like, group_size):
    """Elements of a tile that holds a group: a multiple of UNROLL vectors."""
    multiple = UNROLL * lane_count(like)
    return (group_size + multiple - 1) // multiple * multiple


@njit
def has_dense_rows(array):
    """Whether neighbouring channels of (1, rows, D) are neighbours in memory; an empty array has none that are not."""
    return array.size == 0 or array.strides[2] == array.itemsize


@njit(forceinline=True)
def read_at(source, first, i, count, is_whole, scratch):
    """The vector of the channels from `i` on, where `first` is what `place_of` returns of the first one; zeros
    beyond `count`.

    `is_whole` is a constant: then a vector fits there.
    """
    offset, stride = first
    if is_whole:
        return load_as(scratch, source, offset + i)
    return read_vector(source, offset + i * stride, stride, count, scratch)


@njit(forceinline=True)
def write_at(value, target, first, i, count, is_whole, scratch):
    """Write a vector to where `read_at` reads it."""
    offset, stride = first
    if is_whole:
        store_as(target, offset + i, value)
    else:
        write_vector(value, target, offset + i * stride, stride, count, scratch)
