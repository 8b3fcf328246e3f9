"""RMSNorm with gate, groups and residual add: one kernel each way.

A row of D channels is split in D / SIZE groups. A program takes BLOCK_ROWS rows of one group, whole; the backward's
programs walk over several such tiles, so that each writes one partial sum of the weight's gradient. A group wider than
the widest tile is cut in several, and each is read twice: for what the mean needs, and for the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import num_sms, on_device, rows_of
from ..._triton.primitives import and_scalar, compute_type, d_silu, silu

# Elements of a tile: 8 a lane of 4 to 16 warps, 16 in the widest. From the compiler's register counts; not measured on
# a GPU.
TILE, WIDEST_TILE = 1024, 8192
# Of a wider group. The backward takes several rows for each time it adds to the weight's gradient in memory.
WIDE_FORWARD = {"BLOCK": 4096, "BLOCK_ROWS": 1, "num_warps": 16}
WIDE_BACKWARD = {"BLOCK": 1024, "BLOCK_ROWS": 2, "num_warps": 8}


@triton.jit
def _forward_kernel(
    x, residual, weight, z, y, total, rstd,
    n_rows, x_stride, residual_stride, z_stride,
    EPS: tl.constexpr, SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_Z: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """BLOCK_ROWS rows of y and, with a residual, of the sum. Grid: (row tiles, groups)."""
    group, n_groups = tl.program_id(1), tl.num_programs(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    squares = tl.zeros((BLOCK_ROWS, BLOCK), COMPUTE)
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    for i in tl.static_range(BLOCKS):
        channels, within = _channels(group, i, SIZE, BLOCK)
        mask = (rows < n_rows) & within
        v = tl.load(x + rows * x_stride + channels, mask, other=0.0).to(COMPUTE)
        if HAS_RESIDUAL:
            v += tl.load(residual + rows * residual_stride + channels, mask, other=0.0).to(COMPUTE)
            rounded = v.to(total.dtype.element_ty)
            tl.store(total + rows * (n_groups * SIZE) + channels, rounded, mask)
            v = rounded.to(COMPUTE)
        if HAS_Z:
            gate, _ = _load_gate_and_slope(z + rows * z_stride + channels, mask, COMPUTE)
            if not NORM_BEFORE_GATE:
                v *= gate
        squares += v * v
    # A constant, since a float argument would reach the kernel as float32, whatever it computes in.
    eps = tl.full((), EPS, COMPUTE)
    scale = 1 / tl.sqrt(tl.sum(squares, axis=1, keep_dims=True) / SIZE + eps)  # (BLOCK_ROWS, 1)
    tl.store(rstd + rows * n_groups + group, scale, rows < n_rows)
    for i in tl.static_range(BLOCKS):
        if BLOCKS > 1:
            channels, within = _channels(group, i, SIZE, BLOCK)
            mask = (rows < n_rows) & within
            if HAS_RESIDUAL:
                tl.debug_barrier()  # what one thread stored another may load
                v = tl.load(total + rows * (n_groups * SIZE) + channels, mask, other=0.0).to(COMPUTE)
            else:
                v = tl.load(x + rows * x_stride + channels, mask, other=0.0).to(COMPUTE)
            if HAS_Z:
                gate, _ = _load_gate_and_slope(z + rows * z_stride + channels, mask, COMPUTE)
                if not NORM_BEFORE_GATE:
                    v *= gate
        out = v * scale * tl.load(weight + channels, within, other=0.0).to(COMPUTE)
        if HAS_Z:
            if NORM_BEFORE_GATE:
                out *= gate
        tl.store(y + rows * (n_groups * SIZE) + channels, out.to(y.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(
    x, weight, z, rstd, dy, dtotal, dx, dresidual, dweight, dz,
    n_rows, x_stride, z_stride, dy_stride, dtotal_stride,
    SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_TOTAL: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr, HAS_Z: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Rows of dx, of dresidual where that is of another dtype, and of dz; and one row of partial sums of dweight.

    Grid: (programs, groups).
    """
    group, n_groups = tl.program_id(1), tl.num_programs(1)
    dim = n_groups * SIZE
    channels, within = _channels(group, 0, SIZE, BLOCK)
    dw = tl.zeros((BLOCK_ROWS, BLOCK), COMPUTE)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (rows < n_rows) & within
        here = rows * dim + channels
        w = tl.load(weight + channels, within, other=0.0).to(COMPUTE)  # not kept: it would take registers
        v = tl.load(x + rows * x_stride + channels, mask, other=0.0).to(COMPUTE)
        scale = tl.load(rstd + rows * n_groups + group, rows < n_rows, other=0.0)
        g = tl.load(dy + rows * dy_stride + channels, mask, other=0.0).to(COMPUTE)
        if HAS_Z:
            gate, slope = _load_gate_and_slope(z + rows * z_stride + channels, mask, COMPUTE)
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
        if HAS_DRESIDUAL:
            tl.store(dresidual + here, dv.to(dresidual.dtype.element_ty), mask)
    sums = tl.sum(dw, axis=0, keep_dims=True)  # (1, BLOCK)
    tl.store(dweight + tl.program_id(0).to(tl.int64) * dim + channels, sums, within)


@triton.jit
def _wide_backward_kernel(
    x, weight, z, rstd, dy, dtotal, dx, dresidual, dweight, dz,
    n_rows, x_stride, z_stride, dy_stride, dtotal_stride,
    SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_TOTAL: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr, HAS_Z: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """As `_backward_kernel` for a group of several tiles: dweight is summed in memory, not in registers."""
    group, n_groups = tl.program_id(1), tl.num_programs(1)
    dim = n_groups * SIZE
    dweight += tl.program_id(0).to(tl.int64) * dim
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        scale = tl.load(rstd + rows * n_groups + group, rows < n_rows, other=0.0)
        products = tl.zeros((BLOCK_ROWS, BLOCK), COMPUTE)
        for i in range(tl.cdiv(SIZE, BLOCK)):
            channels, within = _channels(group, i, SIZE, BLOCK)
            mask = (rows < n_rows) & within
            w = tl.load(weight + channels, within, other=0.0).to(COMPUTE)
            u = tl.load(x + rows * x_stride + channels, mask, other=0.0).to(COMPUTE) * scale
            g = tl.load(dy + rows * dy_stride + channels, mask, other=0.0).to(COMPUTE)
            if HAS_Z:
                gate, slope = _load_gate_and_slope(z + rows * z_stride + channels, mask, COMPUTE)
                if NORM_BEFORE_GATE:
                    tl.store(dz + rows * dim + channels, (g * u * w * slope).to(dz.dtype.element_ty), mask)
                    g *= gate
                else:
                    u *= gate
            products += g * u * w
            before = tl.load(dweight + channels, and_scalar(within, tile != tl.program_id(0)), other=0.0)
            tl.store(dweight + channels, before + tl.sum(g * u, axis=0, keep_dims=True), within)
        mean = tl.sum(products, axis=1, keep_dims=True) / SIZE  # (BLOCK_ROWS, 1)
        tl.debug_barrier()  # what one thread stored another may load, for the next rows
        for i in range(tl.cdiv(SIZE, BLOCK)):
            channels, within = _channels(group, i, SIZE, BLOCK)
            mask = (rows < n_rows) & within
            here = rows * dim + channels
            w = tl.load(weight + channels, within, other=0.0).to(COMPUTE)
            v = tl.load(x + rows * x_stride + channels, mask, other=0.0).to(COMPUTE)
            g = tl.load(dy + rows * dy_stride + channels, mask, other=0.0).to(COMPUTE) * w
            if HAS_Z:
                gate, slope = _load_gate_and_slope(z + rows * z_stride + channels, mask, COMPUTE)
                if NORM_BEFORE_GATE:
                    dv = scale * (g * gate - v * scale * mean)
                else:
                    dv = scale * (g - v * gate * scale * mean)
                    tl.store(dz + here, (dv * v * slope).to(dz.dtype.element_ty), mask)
                    dv *= gate
            else:
                dv = scale * (g - v * scale * mean)
            if HAS_TOTAL:
                dv += tl.load(dtotal + rows * dtotal_stride + channels, mask, other=0.0).to(COMPUTE)
            tl.store(dx + here, dv.to(dx.dtype.element_ty), mask)
            if HAS_DRESIDUAL:
                tl.store(dresidual + here, dv.to(dresidual.dtype.element_ty), mask)


@triton.jit
def _channels(group, i, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The channels (1, BLOCK) of tile i of a group, and whether they are the group's."""
    lane = i * BLOCK + tl.arange(0, BLOCK)[None, :]
    return group * SIZE + lane, lane < SIZE


@triton.jit
def _load_gate_and_slope(z, mask, COMPUTE: tl.constexpr):
    """SiLU, and its derivative."""
    before = tl.load(z, mask, other=0.0).to(COMPUTE)
    return silu(before), d_silu(before)


def _options(size: int, wide: dict[str, int], dtype: torch.dtype) -> dict[str, object]:
    block = triton.next_power_of_2(size)
    if block <= WIDEST_TILE:
        tile = {"BLOCK": block, "BLOCK_ROWS": max(1, TILE // block), "num_warps": min(16, max(4, block // 256))}
    else:
        tile = wide
    return {"SIZE": size, "COMPUTE": compute_type(dtype), **tile}


def forward(x, residual, weight, z, eps, group_size, norm_before_gate, total_dtype):
    """As `norm_triton`: y, the sum (empty without a residual), and 1 / rms of each row and group."""
    rows = rows_of(x)
    n_rows, dim = rows.shape
    compute = torch.promote_types(torch.promote_types(x.dtype, total_dtype), torch.float32)
    options = _options(group_size, WIDE_FORWARD, compute)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(0 if residual is None else x.shape, dtype=total_dtype, device=x.device)
    rstd = torch.empty(n_rows, dim // group_size, dtype=compute, device=x.device)
    residual, gate = (None if m is None else rows_of(m) for m in (residual, z))
    if n_rows:
        with on_device(x):
            _forward_kernel[triton.cdiv(n_rows, options["BLOCK_ROWS"]), dim // group_size](
                rows, residual, weight.contiguous(), gate, y, total, rstd,
                n_rows, rows.stride(0), _stride(residual), _stride(gate), EPS=float(eps),
                HAS_RESIDUAL=residual is not None, HAS_Z=z is not None, NORM_BEFORE_GATE=norm_before_gate, **options,
            )  # fmt: skip
    return y, total, rstd


def backward(x, weight, z, rstd, dy, dtotal, group_size, norm_before_gate, x_dtype, residual_dtype):
    """As `norm_triton_backward`: gradients of x, of the residual if it is of another dtype, of weight and of z.

    x is the sum where there was a residual. What does not apply is empty.
    """
    rows, dy = rows_of(x), rows_of(dy)
    n_rows, dim = rows.shape
    options = _options(group_size, WIDE_BACKWARD, rstd.dtype)
    dx = torch.empty(x.shape, dtype=x_dtype, device=x.device)
    dresidual = torch.empty(0 if residual_dtype == x_dtype else x.shape, dtype=residual_dtype, device=x.device)
    dz = torch.empty(0 if z is None else z.shape, dtype=x.dtype if z is None else z.dtype, device=x.device)
    tiles = triton.cdiv(n_rows, options["BLOCK_ROWS"])
    # Four a processor hide each other's waiting; more would only be more partial sums.
    programs = min(tiles, 4 * num_sms(x.device))
    dweight = torch.empty(programs, dim, dtype=rstd.dtype, device=x.device)
    gate, dtotal = (None if m is None else rows_of(m) for m in (z, dtotal))
    kernel = _backward_kernel if options["BLOCK"] >= group_size else _wide_backward_kernel
    if n_rows:
        with on_device(x):
            kernel[programs, dim // group_size](
                rows, weight.contiguous(), gate, rstd, dy, dtotal, dx, dresidual, dweight, dz,
                n_rows, rows.stride(0), _stride(gate), dy.stride(0), _stride(dtotal),
                HAS_TOTAL=dtotal is not None, HAS_DRESIDUAL=residual_dtype != x_dtype, HAS_Z=z is not None,
                NORM_BEFORE_GATE=norm_before_gate, **options,
            )  # fmt: skip
    return dx, dresidual, dweight.sum(0).to(weight.dtype), dz


def _stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)
