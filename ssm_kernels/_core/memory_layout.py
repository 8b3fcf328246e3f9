"""Memory layout of results: that of the inputs, in time or in channels."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def has_contiguous_steps(x: Tensor) -> bool:
    """Whether the steps of x (B, L, G, E) are contiguous in memory, and its channels are not."""
    return x.stride(1) == 1 and x.stride(3) != 1


def empty_like(x: Tensor, empty: Callable[..., Tensor] | None = None) -> Tensor:
    """An empty tensor of the shape and dtype of x (B, L, G, E), with contiguous steps where x has them.

    Args:
        empty: makes a contiguous tensor of some sizes; on the device of x by default.
    """
    # Sizes one by one: PyTorch takes twice as long to read a shape.
    empty = empty or functools.partial(torch.empty, dtype=x.dtype, device=x.device)
    if has_contiguous_steps(x):
        batch, length, groups, channels = x.shape
        return empty(batch, groups, channels, length).permute(0, 3, 1, 2)  # (B, L, G, E)
    return empty(*x.shape)
