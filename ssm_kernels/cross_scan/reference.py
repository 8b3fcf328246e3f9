"""Cross-scan and cross-merge as they are defined, by a table of positions. The ground truth of the other backends."""

from __future__ import annotations

import torch
from torch import Tensor


def positions(direction: str, height: int, width: int) -> list[int]:
    """The position in the row-major grid that each step of a direction reads."""
    if direction.startswith("rows"):
        steps = [h * width + w for h in range(height) for w in range(width)]
    else:
        steps = [h * width + w for w in range(width) for h in range(height)]
    return steps[::-1] if direction.endswith("reversed") else steps


def cross_scan(x: Tensor, directions: tuple[str, ...]) -> Tensor:
    """x (B, height, width, D) -> (B, K, L, D)."""
    grid = x.flatten(1, 2)  # (B, L, D)
    return torch.stack([grid[:, positions(d, *x.shape[1:3])] for d in directions], dim=1)


def cross_merge(y: Tensor, height: int, width: int, directions: tuple[str, ...]) -> Tensor:
    """y (B, K, L, D) -> (B, height, width, D)."""
    grid = y.new_zeros(y.shape[0], *y.shape[2:], dtype=torch.promote_types(y.dtype, torch.float32))  # (B, L, D)
    for k, direction in enumerate(directions):
        index = torch.tensor(positions(direction, height, width), dtype=torch.int64, device=y.device)
        grid = grid.index_add(1, index, y[:, k].to(grid.dtype))
    return grid.unflatten(1, (height, width)).to(y.dtype)
