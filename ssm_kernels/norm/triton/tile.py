"""A tile of the norms: BLOCK_ROWS rows of BLOCK channels of one group.

A row of D channels has D / SIZE groups of SIZE channels. A program takes BLOCK_ROWS rows of one group. A group that is
wider than the widest tile is cut in several tiles, and each is read twice: for the mean, and for the result.
"""
# Constexpr arguments and tuples of strides, which stubs of Triton do not know.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.primitives import compute_type, d_silu, silu

# Elements of a tile: 8 a lane of 4 to 16 warps, 16 in the widest. From the compiler's register counts; not measured on
# a GPU.
TILE, WIDEST_TILE = 1024, 8192


@triton.jit
def tile_channels(group, i, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The channels (1, BLOCK) of tile i of a group, and their mask."""
    lane = i * BLOCK + tl.arange(0, BLOCK)[None, :]
    return group * SIZE + lane, lane < SIZE


@triton.jit
def load_gate(z_ptr, mask, COMPUTE: tl.constexpr):
    """silu(z), and its derivative with respect to z."""
    z = tl.load(z_ptr, mask, other=0.0).to(COMPUTE)
    return silu(z), d_silu(z)


def tile_options(size: int, wide: dict[str, int], dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments of a kernel for groups of `size` channels.

    Args:
        wide: BLOCK, BLOCK_ROWS and num_warps for a group that is wider than the widest tile.
        dtype: the type of sums.
    """
    block = triton.next_power_of_2(size)
    if block <= WIDEST_TILE:
        tile = {"BLOCK": block, "BLOCK_ROWS": max(1, TILE // block), "num_warps": min(16, max(4, block // 256))}
    else:
        tile = wide
    return {"SIZE": size, "COMPUTE": compute_type(dtype), **tile}


def row_stride(rows: Tensor | None) -> int:
    """Stride of the rows of (n_rows, D), or 0."""
    return 0 if rows is None else rows.stride(0)
