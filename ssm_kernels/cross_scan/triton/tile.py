"""A tile of a grid: BLOCK_L positions of one image and BLOCK_D channels."""
# Constexpr arguments and tuples of strides, which stubs of Triton do not know.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from ..._triton.device import launch_grid, pack_directions
from ..._triton.primitives import grid_offset

TILE = 1024
"""Elements of a tile: 8 a lane of 4 warps. Not measured on a GPU."""


@triton.jit
def tile_positions(height, width, dim, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's batch row, positions (BLOCK_L, 1), channels (1, BLOCK_D), and their mask (BLOCK_L, BLOCK_D)."""
    tiles = tl.cdiv(height * width, BLOCK_L)
    position = tl.program_id(0) % tiles * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    mask = (position < height * width) & (channel < dim)
    return (tl.program_id(0) // tiles).to(tl.int64), position, channel.to(tl.int64), mask


@triton.jit
def step_at(position, direction, height, width):
    """The step of a direction that visits a position: `grid_offset` in the transposed grid inverts it in the grid."""
    return grid_offset(position, direction, height * width, width).to(tl.int64)


def tile_options(
    batch: int, length: int, dim: int, directions: Sequence[int]
) -> tuple[tuple[int, int], dict[str, Any]]:
    """The launch grid (tiles of all images, channel tiles), and the compile-time arguments."""
    block_d = min(triton.next_power_of_2(dim), 256)
    block_l = TILE // block_d
    options = {
        "DIRECTIONS": pack_directions(directions),
        "NUM_DIRECTIONS": len(directions),
        "BLOCK_L": block_l,
        "BLOCK_D": block_d,
        "num_warps": 4,
    }
    grid = launch_grid(batch * triton.cdiv(length, block_l), triton.cdiv(dim, block_d), "tiles of channels")
    return grid, options
