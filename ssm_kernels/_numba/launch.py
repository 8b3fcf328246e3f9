"""Parts that launches of compiled kernels share: arrays, tiles, and lists of sequences. numba is not needed."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from .._core.memory_layout import empty_like
from .._core.varlen import Sequences

BLOCK = 64
"""Channels of a tile."""
MAX_RUNS = 16
"""Copies of a gradient that sequences share, at most."""


TYPES = {
    torch.float32: "=f4", torch.float64: "=f8", torch.bfloat16: "=u2", torch.int64: "=i8", torch.int8: "=i1",
    torch.uint8: "=u1", torch.float16: "=i2",
}  # fmt: skip
"""NumPy's types of the memory that kernels take. numba has neither bfloat16 nor float16: `load_as` reads their bits."""
Memory: TypeAlias = tuple[torch.dtype, int, Sequence[int], Sequence[int], Tensor | None]
"""Dtype, address, shape and strides of an array that a kernel takes, and the tensor that has the memory, so that it is
alive as long as the kernel may read it.

A NumPy array would take four times as long to make, and `Tensor.numpy` leaves a mark on the storage, which nobody may
resize then: FSDP resizes the storages of parameters and of gathered shards.
"""


def memory_of(x: Tensor) -> Memory:
    """Return the memory of a tensor. Kernels take any strides."""
    return x.dtype, x.data_ptr(), x.shape, x.stride(), x


def as_array(x: Tensor | None, dtype: torch.dtype, n_dims: int) -> Memory:
    """Return the memory of a tensor where it has the dtype, else that of a copy; without a tensor, no elements.

    Leading dimensions of size 1 are added: here, since that takes a tenth of the time that a tensor's takes.
    """
    if x is None:
        return _nothing(dtype, n_dims)
    x = as_dtype(x, dtype)
    shape, strides = x.shape, x.stride()
    if len(shape) < n_dims:
        added = n_dims - len(shape)
        shape, strides = (1,) * added + shape, (0,) * added + strides
    return dtype, x.data_ptr(), shape, strides, x


@functools.cache
def _nothing(dtype: torch.dtype, n_dims: int) -> Memory:
    return dtype, 0, (0,) * n_dims, (0,) * n_dims, None


def plan_arrays(
    sources: Tensor | None, destinations: Tensor | None, bounds: Tensor | None, batch: int, tokens: int
) -> tuple[Memory, Memory, Memory]:
    """Return the fields of a `StepPlan`; without one, those of a state for each of `batch` rows of `tokens` tokens."""
    if sources is None or destinations is None or bounds is None:
        return _plan_in_order(batch, tokens)
    return memory_of(sources), memory_of(destinations), memory_of(bounds)


@functools.lru_cache(maxsize=64)
def _plan_in_order(batch: int, tokens: int) -> tuple[Memory, Memory, Memory]:
    sources, destinations = np.arange(batch), np.full((batch, tokens), -1)
    destinations[:, -1:] = sources[:, None]
    return _integers(sources), _integers(destinations.reshape(-1)), _integers(np.arange(batch + 1) * tokens)


def _integers(array: np.ndarray) -> Memory:
    return memory_of(torch.from_numpy(array.astype(np.int64, copy=False)))


def as_directions(directions: Sequence[int], groups: int) -> Memory:
    """Return the code of each group's scan direction, that of a scan in time where there are none."""
    return _codes(tuple(directions) or (0,) * groups)


@functools.lru_cache(maxsize=64)
def _codes(directions: tuple[int, ...]) -> Memory:
    return _integers(np.array(directions))


def empty_steps(x: Tensor, sequences: Sequences, dtype: torch.dtype) -> Tensor:
    """Return memory for a result like x (..., L, G, E), with contiguous steps where x has them; zero in padding."""
    return empty_like(x, functools.partial(empty_of(x, sequences), dtype=dtype))


def empty_of(x: Tensor, sequences: Sequences) -> Callable[..., Tensor]:
    """Return the function that makes memory for results like x (B, L, ...) of some sizes; it is zero in padding."""
    return x.new_zeros if sequences.has_padding(x.shape[0] * x.shape[1]) else x.new_empty


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which takes as long as a small kernel where it does nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def count_tiles(dim: int, groups: int = 1) -> int:
    """Return the number of tiles of a sequence: blocks of the `dim` channels of each group."""
    return groups * -(-dim // BLOCK)


@functools.lru_cache(maxsize=64)
def sequence_table(sequences: Sequences, length: int, interval: int) -> Memory:
    """List sequences for a kernel, (S, 6) int64.

    Columns: row of the batch, first step, steps, rows of initial and final states or -1, and the first of the blocks of
    `interval` steps into which the sequence is divided, of which all sequences have different ones.
    """
    n = len(sequences.lengths)
    # -1 stays for a sequence without a row: with `seq_idx`, one that is not the first or the last of its batch row.
    table = np.full((n, 6), -1, np.int64)
    starts = np.array(sequences.starts, np.int64)
    table[:, 0], table[:, 1] = np.divmod(starts, max(length, 1))
    table[:, 2] = sequences.lengths
    for column, rows in ((3, sequences.initial_sequences), (4, sequences.final_sequences)):
        table[list(rows), column] = np.arange(len(rows))
    table[:, 5] = _first_blocks(sequences, interval)
    return _integers(table)


def _first_blocks(sequences: Sequences, interval: int) -> np.ndarray:
    # `+ s` makes up for the rounding down: the next sequence's is at least ceil(steps / interval) blocks later.
    return np.array(sequences.starts, np.int64) // interval + np.arange(len(sequences.starts))


def split_sequences(n_sequences: int) -> int:
    """Return the number of runs of sequences whose shares of a common gradient are summed apart.

    It does not depend on the number of threads, so that no sum does.
    """
    return min(n_sequences, MAX_RUNS)


def clear_unused(checkpoints: Tensor, sequences: Sequences, interval: int) -> None:
    """Set the contiguous checkpoints (n, ...) to zero that belong to no block of `interval` steps of a sequence."""
    size = checkpoints[0].numel() * checkpoints.element_size()
    for first, end in _unused_blocks(sequences, interval, len(checkpoints)):
        # Not by PyTorch: its threads would spin for milliseconds afterwards, on cores that the kernel wants.
        ctypes.memset(checkpoints.data_ptr() + first * size, 0, (end - first) * size)


@functools.lru_cache(maxsize=64)
def _unused_blocks(sequences: Sequences, interval: int, n: int) -> list[tuple[int, int]]:
    """Return the runs of unused blocks among n: the first of each, and the one after its last."""
    firsts = _first_blocks(sequences, interval).tolist()
    ends = [0, *(first - -steps // interval for first, steps in zip(firsts, sequences.lengths, strict=True))]
    return [(end, first) for end, first in zip(ends, [*firsts, n], strict=True) if end < first]
