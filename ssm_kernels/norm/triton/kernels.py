"""RMSNorm with gate, groups and residual add: one kernel forward, one backward.

A row of D channels is split in D / SIZE groups. A program takes BLOCK_ROWS rows of one group, whole; the backward's
programs walk over several such tiles, so that each writes one partial sum of the weight's gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import on_device, processors, rows_of

# Elements of a tile: 8 a lane of 4 warps. Chosen from the compiler's register counts; not measured on a GPU.
TILE = 1024


@triton.jit
def _forward_kernel(
    x, residual, weight, z, y, total, rstd,
    n_rows, x_stride, residual_stride, z_stride, eps,
    SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_Z: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """A tile of y and, with a residual, of the sum. Grid: (row tiles, groups)."""
    group, n_groups = tl.program_id(1), tl.num_programs(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    channels = group * SIZE + lane
    mask = (rows < n_rows) & (lane < SIZE)
    here = rows * (n_groups * SIZE) + channels  # in contiguous tensors

    v = tl.load(x + rows * x_stride + channels, mask, other=0.0).to(COMPUTE)
    if HAS_RESIDUAL:
        v += tl.load(residual + rows * residual_stride + channels, mask, other=0.0).to(COMPUTE)
        rounded = v.to(total.dtype.element_ty)
        tl.store(total + here, rounded, mask)
        v = rounded.to(COMPUTE)
    if HAS_Z:
        gate = tl.load(z + rows * z_stride + channels, mask, other=0.0).to(COMPUTE)
        gate = gate / (1 + tl.exp(-gate))
        if not NORM_BEFORE_GATE:
            v *= gate
    scale = 1 / tl.sqrt(tl.sum(v * v, axis=1, keep_dims=True) / SIZE + eps)  # (BLOCK_ROWS, 1)
    tl.store(rstd + rows * n_groups + group, scale, rows < n_rows)
    out = v * scale * tl.load(weight + channels, lane < SIZE, other=0.0).to(COMPUTE)
    if HAS_Z:
        if NORM_BEFORE_GATE:
            out *= gate
    tl.store(y + here, out.to(y.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(
    x, weight, z, rstd, dy, dtotal, dx, dx_narrow, dweight, dz,
    n_rows, x_stride, z_stride, dy_stride, dtotal_stride,
    SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_TOTAL: tl.constexpr,
    NARROW: tl.constexpr, HAS_Z: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Tiles of dx, in one dtype or two, and dz, and one row of partial sums of dweight. Grid: (programs, groups)."""
    group, n_groups = tl.program_id(1), tl.num_programs(1)
    dim = n_groups * SIZE
    lane = tl.arange(0, BLOCK)[None, :]
    channels = group * SIZE + lane
    w = tl.load(weight + channels, lane < SIZE, other=0.0).to(COMPUTE)
    dw = tl.zeros((BLOCK_ROWS, BLOCK), COMPUTE)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (rows < n_rows) & (lane < SIZE)
        here = rows * dim + channels
        v = tl.load(x + rows * x_stride + channels, mask, other=0.0).to(COMPUTE)
        scale = tl.load(rstd + rows * n_groups + group, rows < n_rows, other=0.0)
        g = tl.load(dy + rows * dy_stride + channels, mask, other=0.0).to(COMPUTE)
        if HAS_Z:
            before = tl.load(z + rows * z_stride + channels, mask, other=0.0).to(COMPUTE)
            sigmoid = 1 / (1 + tl.exp(-before))
            gate = before * sigmoid
            slope = sigmoid * (1 + before * (1 - sigmoid))
        # v is what was normalised, u what came of it, g the gradient of u * w.
        if HAS_Z and not NORM_BEFORE_GATE:
            ungated = v
            v = v * gate
        u = v * scale
        if HAS_Z and NORM_BEFORE_GATE:
            tl.store(dz + here, (g * u * w * slope).to(dz.dtype.element_ty), mask)
            g = g * gate
        dw += g * u
        g = g * w
        dv = scale * (g - u * (tl.sum(g * u, axis=1, keep_dims=True) / SIZE))
        if HAS_Z and not NORM_BEFORE_GATE:
            tl.store(dz + here, (dv * ungated * slope).to(dz.dtype.element_ty), mask)
            dv = dv * gate
        if HAS_TOTAL:
            dv += tl.load(dtotal + rows * dtotal_stride + channels, mask, other=0.0).to(COMPUTE)
        tl.store(dx + here, dv.to(dx.dtype.element_ty), mask)
        if NARROW:
            tl.store(dx_narrow + here, dv.to(dx_narrow.dtype.element_ty), mask)
    sums = tl.sum(dw, axis=0, keep_dims=True)  # (1, BLOCK)
    tl.store(dweight + tl.program_id(0).to(tl.int64) * dim + channels, sums, lane < SIZE)


def _options(size: int, dtype: torch.dtype) -> dict[str, object]:
    block = triton.next_power_of_2(size)
    return {
        "SIZE": size,
        "BLOCK": block,
        "BLOCK_ROWS": max(1, TILE // block),
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        "num_warps": min(16, max(4, block // 512)),
    }


def forward(x, residual, weight, z, eps, group_size, norm_before_gate, total_dtype):
    """As `norm_triton`: y, the sum (empty without a residual), and 1 / rms of each row and group."""
    rows = rows_of(x)
    n_rows, dim = rows.shape
    options = _options(group_size, x.dtype)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(0 if residual is None else x.shape, dtype=total_dtype, device=x.device)
    compute = torch.promote_types(x.dtype, torch.float32)
    rstd = torch.empty(n_rows, dim // group_size, dtype=compute, device=x.device)
    residual, gate = (None if m is None else rows_of(m) for m in (residual, z))
    if n_rows:
        with on_device(x):
            _forward_kernel[triton.cdiv(n_rows, options["BLOCK_ROWS"]), dim // group_size](
                rows, residual, weight.contiguous(), gate, y, total, rstd,
                n_rows, rows.stride(0), _stride(residual), _stride(gate), eps,
                HAS_RESIDUAL=residual is not None, HAS_Z=z is not None, NORM_BEFORE_GATE=norm_before_gate, **options,
            )  # fmt: skip
    return y, total, rstd


def backward(x, weight, z, rstd, dy, dtotal, group_size, norm_before_gate, narrow_dtype):
    """As `norm_triton_backward`: gradients of x, of x in `narrow_dtype` if that is another, of weight and of z.

    x is the sum where there was a residual. What does not apply is empty.
    """
    rows, dy = rows_of(x), rows_of(dy)
    n_rows, dim = rows.shape
    options = _options(group_size, x.dtype)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dx_narrow = torch.empty(0 if narrow_dtype == x.dtype else x.shape, dtype=narrow_dtype, device=x.device)
    dz = torch.empty(0 if z is None else z.shape, dtype=x.dtype if z is None else z.dtype, device=x.device)
    tiles = triton.cdiv(n_rows, options["BLOCK_ROWS"])
    # Four a processor hide each other's waiting; more would only be more partial sums.
    programs = min(tiles, 4 * processors(x.device))
    dweight = torch.empty(programs, dim, dtype=rstd.dtype, device=x.device)
    gate, dtotal = (None if m is None else rows_of(m) for m in (z, dtotal))
    if n_rows:
        with on_device(x):
            _backward_kernel[programs, dim // group_size](
                rows, weight.contiguous(), gate, rstd, dy, dtotal, dx, dx_narrow, dweight, dz,
                n_rows, rows.stride(0), _stride(gate), dy.stride(0), _stride(dtotal),
                HAS_TOTAL=dtotal is not None, NARROW=narrow_dtype != x.dtype, HAS_Z=z is not None,
                NORM_BEFORE_GATE=norm_before_gate, **options,
            )  # fmt: skip
    return dx, dx_narrow, dweight.sum(0).to(weight.dtype), dz


def _stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)
