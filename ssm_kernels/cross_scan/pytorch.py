"""The directions by transposing and flipping, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def scan(x: Tensor, directions: tuple[str, ...]) -> Tensor:
    """x (B, height, width, D) -> (B, K, L, D)."""
    paths = []
    for direction in directions:
        path = (x if direction.startswith("rows") else x.transpose(1, 2)).flatten(1, 2)
        paths.append(path.flip(1) if direction.endswith("reversed") else path)
    return torch.stack(paths, dim=1)


def merge(y: Tensor, height: int, width: int, directions: tuple[str, ...]) -> Tensor:
    """y (B, K, L, D) -> (B, height, width, D)."""
    total: Tensor | None = None
    for k, direction in enumerate(directions):
        path = y[:, k].flip(1) if direction.endswith("reversed") else y[:, k]
        by_rows = direction.startswith("rows")
        grid = path.unflatten(1, (height, width) if by_rows else (width, height))
        grid = grid if by_rows else grid.transpose(1, 2)
        if total is None:  # a copy, where nothing is added: the result is no view of y
            total = grid.to(torch.promote_types(y.dtype, torch.float32), copy=len(directions) == 1)
        else:
            total = total + grid
    return total.to(y.dtype)
