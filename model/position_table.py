"""Position tables of vision transformers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def resample_positions(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resample position embeddings to another grid of patches, as `timm` does: bicubic, antialiased, in float32.

    Args:
        table: (1, h * w, D) embeddings, row by row.
        old_grid: (h, w) of the table.
        new_grid: (h', w') wanted.

    Returns:
        (1, h' * w', D), in the dtype of `table`.
    """
    if old_grid == new_grid:
        return table
    image = table.unflatten(1, old_grid).permute(0, 3, 1, 2).float()  # (1, D, h, w)
    image = F.interpolate(image, new_grid, mode="bicubic", antialias=True, align_corners=False)
    return image.flatten(2).mT.to(table.dtype)  # (1, h' * w', D)
