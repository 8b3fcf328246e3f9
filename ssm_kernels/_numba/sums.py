"""Sums of the parts that tiles write of a gradient that they share."""

from __future__ import annotations

from torch import Tensor

from .compile import Kernel
from .lanes import element, lane_count, load, set_element, store
from .launch import memory_of
from .threads import run_tiles

SIZE = 1 << 12
"""Elements of a tile."""


def sum_parts(parts: Tensor) -> Tensor:
    """Sum contiguous parts over the first dimension in order, which `torch.sum` does not promise for all sizes alike.

    PyTorch's additions would do, but for the OpenMP threads that they start: those spin for milliseconds afterwards,
    on cores that the next kernel wants.
    """
    if len(parts) <= 1:
        return parts[0] if len(parts) else parts.new_zeros(parts.shape[1:])
    result = parts.new_empty(parts.shape[1:])
    args = memory_of(parts.view(len(parts), -1)), memory_of(result.view(-1))
    run_tiles(lambda first, end: add_tiles(*args, first, end), -(-result.numel() // SIZE), parts.numel())
    return result


@Kernel
def add_tiles(parts, result, first, end):
    """result (n,) = parts (P, n) summed over P, for the tiles from `first` to `end` - 1."""
    n_parts, size = parts.shape
    lanes, stop = lane_count(result), min(end * SIZE, size)
    for i in range(first * SIZE, stop - stop % lanes, lanes):
        total = load(parts, i)
        for p in range(1, n_parts):
            total = total + load(parts, p * size + i)
        store(result, i, total)
    for i in range(stop - stop % lanes, stop):
        total = element(parts, i)
        for p in range(1, n_parts):
            total += element(parts, p * size + i)
        set_element(result, i, total)
