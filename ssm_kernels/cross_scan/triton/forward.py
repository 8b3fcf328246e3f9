"""The kernel of the cross-scan and its launch. It is the backward of the cross-merge too."""
# Constexpr arguments and tuples of strides, which stubs of Triton do not know.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import FUSED_MULTIPLY_ADD, on_device
from ..._triton.primitives import unpack_direction
from .tile import step_at, tile_options, tile_positions


@triton.jit
def _scan_kernel(
    x_ptr, y_ptr, height, width, dim, x_strides,
    DIRECTIONS: tl.constexpr, NUM_DIRECTIONS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Read a tile of one image once, and write it along each direction.

    Grid: (tiles of all images, channel tiles). Tiles are (BLOCK_L, BLOCK_D).
    x is (B, height, width, D), y (B, K, L, D).
    """
    x_batch, x_height, x_width, x_channel = x_strides
    row, position, channel, mask = tile_positions(height, width, dim, BLOCK_L, BLOCK_D)
    offset = row * x_batch + (position // width).to(tl.int64) * x_height + (position % width).to(tl.int64) * x_width
    value = tl.load(x_ptr + offset + channel * x_channel, mask)  # (BLOCK_L, BLOCK_D)
    for k in tl.static_range(NUM_DIRECTIONS):
        step = step_at(position, unpack_direction(DIRECTIONS, k), height, width)
        tl.store(y_ptr + ((row * NUM_DIRECTIONS + k) * (height * width) + step) * dim + channel, value, mask)


def scan(x: Tensor, directions: Sequence[int]) -> Tensor:
    """Run `cross_scan_triton`: x (B, height, width, D) -> (B, K, L, D)."""
    batch, height, width, dim = x.shape
    y = torch.empty((batch, len(directions), height * width, dim), dtype=x.dtype, device=x.device)
    if y.numel():
        grid, options = tile_options(batch, height * width, dim, directions)
        with on_device(x):
            _scan_kernel[grid](x, y, height, width, dim, x.stride(), **options, **FUSED_MULTIPLY_ADD)
    return y
