"""Parts that launches of compiled kernels share: arrays, tiles, and lists of sequences. numba is not needed."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .._core.memory_layout import empty_like
from .._core.varlen import Sequences

BLOCK = 64
"""Channels of a tile."""
MAX_RUNS = 16
"""Copies of a gradient that sequences share, at most."""


class _Memory:
    """The memory of a tensor, as NumPy's array interface describes it.

    `Tensor.numpy` would do, but for a mark that it leaves on the storage, which nobody may resize then: FSDP resizes
    the storages of parameters and of gathered shards.
    """

    __slots__ = ("__array_interface__", "tensor")

    def __init__(self, x: Tensor):
        self.tensor = x  # alive as long as the array is
        size = x.element_size()
        self.__array_interface__ = {
            "data": (x.data_ptr(), False),
            "shape": tuple(x.shape),
            "strides": None if x.is_contiguous() else tuple([n * size for n in x.stride()]),  # in bytes
            "typestr": TYPES[x.dtype],
            "version": 3,
        }


TYPES = {
    torch.float32: "=f4", torch.float64: "=f8", torch.bfloat16: "=u2", torch.int64: "=i8", torch.int8: "=i1",
    torch.uint8: "=u1", torch.float16: "=i2",
}  # fmt: skip
"""NumPy's types of the memory that kernels take. numba has neither bfloat16 nor float16: `load_as` reads their bits."""


def memory_of(x: Tensor) -> np.ndarray:
    """Return an array on the tensor's memory, with its strides. Kernels take any strides."""
    if x.numel() == 0:  # without an address
        return np.empty(tuple(x.shape), TYPES[x.dtype])
    return np.asarray(_Memory(x))


def as_array(x: Tensor | None, dtype: torch.dtype, n_dims: int) -> np.ndarray:
    """Return the tensor's memory where it has the dtype, else a copy; without a tensor, an array of no elements.

    Leading dimensions of size 1 are added: to an array, since that takes a tenth of the time that a tensor's takes.
    """
    if x is None:
        return _nothing(dtype, n_dims)
    array = memory_of(x if x.dtype == dtype else x.to(dtype))
    return array if array.ndim == n_dims else array[(None,) * (n_dims - array.ndim)]


@functools.cache
def _nothing(dtype: torch.dtype, n_dims: int) -> np.ndarray:
    return np.empty((0,) * n_dims, TYPES[dtype])


def plan_arrays(
    sources: Tensor | None, destinations: Tensor | None, bounds: Tensor | None, batch: int, tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the fields of a `StepPlan`; without one, those of a state for each of `batch` rows of `tokens` tokens."""
    if sources is None or destinations is None or bounds is None:
        return _plan_in_order(batch, tokens)
    return memory_of(sources), memory_of(destinations), memory_of(bounds)


@functools.lru_cache(maxsize=64)
def _plan_in_order(batch: int, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sources, destinations = np.arange(batch), np.full((batch, tokens), -1)
    destinations[:, -1:] = sources[:, None]
    return sources, destinations.reshape(-1), np.arange(batch + 1) * tokens


def as_directions(directions: Sequence[int], groups: int) -> np.ndarray:
    """Return the code of each group's scan direction, that of a scan in time where there are none."""
    return np.array(directions or [0] * groups, np.int64)


def empty_steps(x: Tensor, sequences: Sequences, dtype: torch.dtype) -> Tensor:
    """Return memory for a result like x (..., L, G, E), with contiguous steps where x has them; zero in padding."""
    has_padding = bool(sequences.padding_runs(x.shape[0] * x.shape[1]))
    new = x.new_zeros if has_padding else x.new_empty
    return empty_like(x, functools.partial(new, dtype=dtype))


def count_tiles(dim: int, groups: int = 1) -> int:
    """Return the number of tiles of a sequence: blocks of the `dim` channels of each group."""
    return groups * -(-dim // BLOCK)


def sequence_table(sequences: Sequences, length: int, interval: int) -> np.ndarray:
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
    # `+ s` makes up for the rounding down: the next sequence's is at least ceil(steps / interval) blocks later.
    table[:, 5] = starts // interval + np.arange(n)
    return table


def split_sequences(n_sequences: int) -> int:
    """Return the number of runs of sequences whose shares of a common gradient are summed apart.

    It does not depend on the number of threads, so that no sum does.
    """
    return min(n_sequences, MAX_RUNS)


def clear_unused(checkpoints: Tensor, table: np.ndarray, interval: int) -> None:
    """Set the checkpoints (n, ...) to zero that no sequence of a table of `interval` steps writes."""
    starts = np.zeros(len(checkpoints) + 1, np.int64)  # sequences that start at a block, less those that end there
    np.add.at(starts, table[:, 5], 1)
    np.add.at(starts, table[:, 5] - -table[:, 2] // interval, -1)
    # By NumPy: PyTorch's threads would spin for milliseconds afterwards, on cores that the kernel wants.
    memory_of(checkpoints)[starts[:-1].cumsum() == 0] = 0
