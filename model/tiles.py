"""Tiles of an image at a higher resolution, as in LLaVA-NeXT: a grid chosen by aspect ratio, after a view of the whole.

Sources: `select_best_resolution`, `resize_and_pad_image` and `process_anyres_image` of LLaVA-NeXT, `unpad_image` and
`pack_image_features` of its port in `transformers`, which rounds where LLaVA's floats are a hair below an integer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor


class TileGrid(NamedTuple):
    """Grid of the tiles of an image, and the patches of it that are kept."""

    rows: int
    columns: int
    """Numbers of tiles."""
    top: int
    bottom: int
    left: int
    right: int
    """Bounds of the rows and columns of patches, counted over all tiles; others are padding that is left out."""


def choose_grid(size: tuple[int, int], grids: Sequence[tuple[int, int]], side: int) -> tuple[int, int]:
    """Choose the grid that keeps most of an image's pixels, and of those the one that wastes fewest.

    Args:
        size: width and height of the image.
        grids: rows and columns of tiles, to choose from; of equally good ones the first is taken.
        side: of a tile, in pixels.

    Returns:
        Rows and columns.
    """
    width, height = size

    def quality(grid: tuple[int, int]) -> tuple[int, int]:
        rows, columns = grid[0] * side, grid[1] * side
        scale = min(columns / width, rows / height)
        # Pixels after resizing; enlarging an image adds none.
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - rows * columns

    return max(grids, key=quality)


def cut_tiles(image: Image.Image, grid: tuple[int, int], side: int) -> list[Image.Image]:
    """Resize an image into a grid of tiles, in the middle of a black border, and cut the tiles row by row.

    Args:
        image: RGB image.
        grid: rows and columns of tiles.
        side: of a tile, in pixels.

    Returns:
        The tiles.
    """
    width, height = grid[1] * side, grid[0] * side
    # The aspect ratio is kept: one side fills the grid, the other is rounded up.
    if width / image.width < height / image.height:
        size = width, min(math.ceil(image.height * (width / image.width)), height)
    else:
        size = min(math.ceil(image.width * (height / image.height)), width), height
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC), ((width - size[0]) // 2, (height - size[1]) // 2))
    corners = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]
    return [canvas.crop((x, y, x + side, y + side)) for x, y in corners]


def patch_bounds(size: tuple[int, int], grid: tuple[int, int], patches: int, unpad: bool) -> TileGrid:
    """Compute which patches of a grid of tiles are kept.

    Args:
        size: width and height of the image.
        grid: rows and columns of tiles.
        patches: along a side of a tile.
        unpad: leave out rows or columns of patches that are border.

    Returns:
        The grid with the bounds.
    """
    width, height = size
    rows, columns = grid[0] * patches, grid[1] * patches
    # An image wider than its grid has border above and below, else left and right.
    top = left = 0
    if unpad and width / height > columns / rows:
        top = (rows - int(round(height * (columns / width), 7))) // 2
    elif unpad:
        left = (columns - int(round(width * (rows / height), 7))) // 2
    return TileGrid(*grid, top, rows - top, left, columns - left)


def merge_views(features: Tensor, grid: TileGrid | None, newline: Tensor | None) -> Tensor:
    """Put the features of an image's views in the order of its tokens.

    Args:
        features: (views, h, w, D); with a grid the first view is the whole image, and tiles follow row by row.
        grid: of the tiles; None joins the views one after the other.
        newline: (D,) vector that ends each row of a grid, or an image without one; None adds none.

    Returns:
        (tokens, D): the whole image, then the rows of patches over all tiles.
    """
    if grid is None:
        ends = features.new_empty(0, features.shape[-1]) if newline is None else newline[None].to(features)
        return torch.cat([features.flatten(0, 2), ends])  # (views * h * w [+ 1], D)
    whole, tiles = features[0], features[1:]
    rows = tiles.unflatten(0, (grid.rows, grid.columns)).transpose(1, 2)  # (rows, h, columns, w, D)
    rows = rows.flatten(2, 3).flatten(0, 1)  # (rows * h, columns * w, D)
    rows = rows[grid.top : grid.bottom, grid.left : grid.right]  # (kept rows, kept columns, D)
    if newline is not None:
        rows = torch.cat([rows, newline.to(rows).expand(len(rows), 1, -1)], 1)  # (kept rows, kept columns + 1, D)
    return torch.cat([whole.flatten(0, 1), rows.flatten(0, 1)])  # (tokens, D)


def count_tokens(n_views: int, grid: TileGrid | None, patches: int, has_newline: bool) -> int:
    """Count the tokens that `merge_views` gives.

    Args:
        n_views: views of the image.
        grid: of the tiles, if any.
        patches: along a side of a view.
        has_newline: whether rows end with a vector.
    """
    if grid is None:
        return n_views * patches**2 + has_newline
    return patches**2 + (grid.bottom - grid.top) * (grid.right - grid.left + has_newline)
