"""The kernel of the cross-merge and its launch. It is the backward of the cross-scan too."""
# Constexpr arguments and tuples of strides, which stubs of Triton do not know.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import FUSED_MULTIPLY_ADD, on_device
from ..._triton.primitives import compute_type, unpack_direction
from .tile import step_at, tile_options, tile_positions


@triton.jit
def _merge_kernel(
    y_ptr, x_ptr, height, width, dim, y_strides,
    DIRECTIONS: tl.constexpr, NUM_DIRECTIONS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Sum a tile of one image over the directions, and write it once.

    Grid: (tiles of all images, channel tiles). Tiles are (BLOCK_L, BLOCK_D).
    y is (B, K, L, D), x (B, height, width, D).
    """
    y_batch, y_direction, y_step, y_channel = y_strides
    row, position, channel, mask = tile_positions(height, width, dim, BLOCK_L, BLOCK_D)
    total = tl.zeros((BLOCK_L, BLOCK_D), COMPUTE)
    for k in tl.static_range(NUM_DIRECTIONS):
        step = step_at(position, unpack_direction(DIRECTIONS, k), height, width)
        offset = row * y_batch + k * y_direction + step * y_step
        total += tl.load(y_ptr + offset + channel * y_channel, mask, other=0.0).to(COMPUTE)
    tl.store(x_ptr + (row * (height * width) + position) * dim + channel, total.to(x_ptr.dtype.element_ty), mask)


def merge(y: Tensor, height: int, width: int, directions: Sequence[int]) -> Tensor:
    """Run `cross_merge_triton`: y (B, K, L, D) -> (B, height, width, D)."""
    batch, _, length, dim = y.shape
    x = torch.empty((batch, height, width, dim), dtype=y.dtype, device=y.device)
    if x.numel():
        grid, options = tile_options(batch, length, dim, directions)
        with on_device(y):
            _merge_kernel[grid](
                y, x, height, width, dim, y.stride(), COMPUTE=compute_type(y.dtype), **options, **FUSED_MULTIPLY_ADD
            )
    return x
