"""The tiles of the compiled norms: up to 16 rows. One group of channels of a row is normalized at a time."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..._numba.lanes import lane_count
from ..._numba.launch import as_array

ROWS = 16
"""Rows of a tile."""
UNROLL = 4
"""Vectors that are summed apart: an addition waits for the one before it."""


def as_rows(x: Tensor | None, like: Tensor, compute: torch.dtype) -> np.ndarray:
    """Return the memory of x (..., D) as (1, rows, D) in its `stored_dtype`; that of nothing in the dtype of `like`."""
    dtype = stored_dtype((like if x is None else x).dtype, compute)
    return as_array(None if x is None else x.reshape(-1, x.shape[-1]), dtype, 3)


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
