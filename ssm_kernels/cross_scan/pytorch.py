"""Cross-scan and cross-merge by transposing and flipping, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_scan(x: Tensor, directions: tuple[str, ...]) -> Tensor:
    """x (B, height, width, D) -> (B, K, L, D)."""
    ys = []
    for direction in directions:
        y = (x if direction.startswith("rows") else x.transpose(1, 2)).flatten(1, 2)  # (B, L, D)
        ys.append(y.flip(1) if direction.endswith("reversed") else y)
    return torch.stack(ys, dim=1)


def cross_merge(y: Tensor, height: int, width: int, directions: tuple[str, ...]) -> Tensor:
    """y (B, K, L, D) -> (B, height, width, D)."""
    grids = [_to_grid(y[:, k], height, width, direction) for k, direction in enumerate(directions)]
    # A copy, where nothing is added: the result is no view of y.
    total = grids[0].to(torch.promote_types(y.dtype, torch.float32), copy=len(grids) == 1)
    for grid in grids[1:]:
        total = total + grid
    return total.to(y.dtype)


def _to_grid(y: Tensor, height: int, width: int, direction: str) -> Tensor:
    """y (B, L, D) in the order of a direction -> (B, height, width, D)."""
    y = y.flip(1) if direction.endswith("reversed") else y
    if direction.startswith("rows"):
        return y.unflatten(1, (height, width))
    return y.unflatten(1, (width, height)).transpose(1, 2)
