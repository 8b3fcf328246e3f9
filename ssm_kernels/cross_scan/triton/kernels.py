"""The cross scan and its merge: a kernel each, by grid place, so that each element is read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._triton.device import on_device, pack_directions
from ..._triton.primitives import compute_type, grid_offset, unpack_direction

# Elements of a tile: 8 a lane of 4 warps. Not measured on a GPU.
TILE = 1024


@triton.jit
def _scan_kernel(
    x, y, height, width, dim, x_row, x_height, x_width, x_channel,
    CODES: tl.constexpr, DIRECTIONS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile (BLOCK_L, BLOCK_D) of one image, written to each direction. Grid: (tiles of all images, channel tiles)."""
    row, at, channel, inside = _tile(height, width, dim, BLOCK_L, BLOCK_D)
    offset = row * x_row + (at // width).to(tl.int64) * x_height + (at % width).to(tl.int64) * x_width
    value = tl.load(x + offset + channel * x_channel, inside)
    for k in tl.static_range(DIRECTIONS):
        step = _step(at, unpack_direction(CODES, k), height, width)
        tl.store(y + ((row * DIRECTIONS + k) * (height * width) + step) * dim + channel, value, inside)


@triton.jit
def _merge_kernel(
    y, x, height, width, dim, y_row, y_route, y_time, y_channel,
    CODES: tl.constexpr, DIRECTIONS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """A tile (BLOCK_L, BLOCK_D) of one image, the sum over directions. Grid: (tiles of all images, channel tiles)."""
    row, at, channel, inside = _tile(height, width, dim, BLOCK_L, BLOCK_D)
    total = tl.zeros((BLOCK_L, BLOCK_D), COMPUTE)
    for k in tl.static_range(DIRECTIONS):
        step = _step(at, unpack_direction(CODES, k), height, width)
        offset = row * y_row + k * y_route + step * y_time
        total += tl.load(y + offset + channel * y_channel, inside, other=0.0).to(COMPUTE)
    tl.store(x + (row * (height * width) + at) * dim + channel, total.to(x.dtype.element_ty), inside)


@triton.jit
def _tile(height, width, dim, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's batch row, places (BLOCK_L, 1), channels (1, BLOCK_D), and which of them exist."""
    tiles = tl.cdiv(height * width, BLOCK_L)
    at = tl.program_id(0) % tiles * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    inside = (at < height * width) & (channel < dim)
    return (tl.program_id(0) // tiles).to(tl.int64), at, channel.to(tl.int64), inside


@triton.jit
def _step(at, direction, height, width):
    """The step of a direction that is at a place: `place` of the grid turned on its side undoes that of the grid."""
    return grid_offset(at, direction, height * width, width).to(tl.int64)


def scan(x, codes):
    """As `cross_scan_triton`."""
    batch, height, width, dim = x.shape
    y = torch.empty((batch, len(codes), height * width, dim), dtype=x.dtype, device=x.device)
    if y.numel():
        grid, options = _plan(batch, height * width, dim, codes)
        with on_device(x):
            _scan_kernel[grid](x, y, height, width, dim, *x.stride(), **options)
    return y


def merge(y, height, width, codes):
    """As `cross_merge_triton`."""
    batch, _, length, dim = y.shape
    x = torch.empty((batch, height, width, dim), dtype=y.dtype, device=y.device)
    if x.numel():
        grid, options = _plan(batch, length, dim, codes)
        with on_device(y):
            _merge_kernel[grid](y, x, height, width, dim, *y.stride(), COMPUTE=compute_type(y.dtype), **options)
    return x


def _plan(batch, length, dim, codes):
    block_d = min(triton.next_power_of_2(dim), 256)
    block_l = TILE // block_d
    options = {"CODES": pack_directions(codes), "DIRECTIONS": len(codes), "BLOCK_L": block_l, "BLOCK_D": block_d}
    return (batch * triton.cdiv(length, block_l), triton.cdiv(dim, block_d)), options | {"num_warps": 4}
