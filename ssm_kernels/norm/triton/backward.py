"""The backward kernels of the norms and their launch."""
# Constexpr arguments and tuples of strides, which stubs of Triton do not know.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import FUSED_MULTIPLY_ADD, launch_grid, num_sms, on_device, rows_of
from ..._triton.primitives import and_scalar
from .tile import load_gate, row_stride, tile_channels, tile_options

WIDE = {"BLOCK": 1024, "BLOCK_ROWS": 2, "num_warps": 8}
"""The tile of a group that is wider than the widest tile. It has several rows for each update of dweight in memory."""


@triton.jit
def _backward_kernel(
    x_ptr, weight_ptr, z_ptr, rstd_ptr, dy_ptr, dresidual_out_ptr, dx_ptr, dresidual_ptr, dweight_ptr, dz_ptr,
    n_rows, stride_x_row, stride_z_row, stride_dy_row, stride_dresidual_out_row,
    SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_DRESIDUAL_OUT: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr, HAS_Z: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute dx, dz and, where its dtype differs from that of dx, dresidual, of every `programs`-th tile of rows.

    Grid: (programs, groups). Tiles are (BLOCK_ROWS, BLOCK), as wide as a group. A program writes one row of partial
    sums of dweight (programs, D).
    """
    group, n_groups = tl.program_id(1), tl.num_programs(1)
    dim = n_groups * SIZE
    channels, channel_mask = tile_channels(group, 0, SIZE, BLOCK)  # (1, BLOCK)
    dw = tl.zeros((BLOCK_ROWS, BLOCK), COMPUTE)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]  # (BLOCK_ROWS, 1)
        mask = (rows < n_rows) & channel_mask  # (BLOCK_ROWS, BLOCK)
        offset = rows * dim + channels
        w = tl.load(weight_ptr + channels, channel_mask, other=0.0).to(COMPUTE)  # here: it would take registers above
        v = tl.load(x_ptr + rows * stride_x_row + channels, mask, other=0.0).to(COMPUTE)
        rstd = tl.load(rstd_ptr + rows * n_groups + group, rows < n_rows, other=0.0)
        g = tl.load(dy_ptr + rows * stride_dy_row + channels, mask, other=0.0).to(COMPUTE)
        if HAS_Z:
            gate, dgate = load_gate(z_ptr + rows * stride_z_row + channels, mask, COMPUTE)

        # v is the input of the norm, u = v rstd, and g the gradient of u w.
        if HAS_Z and not NORM_BEFORE_GATE:
            ungated = v
            v = v * gate
        u = v * rstd
        if HAS_Z and NORM_BEFORE_GATE:
            tl.store(dz_ptr + offset, (g * u * w * dgate).to(dz_ptr.dtype.element_ty), mask)
            g = g * gate
        dw += g * u

        # dv = rstd (w g - u mean(w g u))
        g = g * w
        dv = rstd * (g - u * (tl.sum(g * u, axis=1, keep_dims=True) / SIZE))
        if HAS_Z and not NORM_BEFORE_GATE:
            tl.store(dz_ptr + offset, (dv * ungated * dgate).to(dz_ptr.dtype.element_ty), mask)
            dv = dv * gate
        if HAS_DRESIDUAL_OUT:
            at_ptr = dresidual_out_ptr + rows * stride_dresidual_out_row + channels
            dv += tl.load(at_ptr, mask, other=0.0).to(COMPUTE)
        tl.store(dx_ptr + offset, dv.to(dx_ptr.dtype.element_ty), mask)
        if HAS_DRESIDUAL:
            tl.store(dresidual_ptr + offset, dv.to(dresidual_ptr.dtype.element_ty), mask)
    sums = tl.sum(dw, axis=0, keep_dims=True)  # (1, BLOCK)
    tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * dim + channels, sums, channel_mask)


@triton.jit
def _wide_backward_kernel(
    x_ptr, weight_ptr, z_ptr, rstd_ptr, dy_ptr, dresidual_out_ptr, dx_ptr, dresidual_ptr, dweight_ptr, dz_ptr,
    n_rows, stride_x_row, stride_z_row, stride_dy_row, stride_dresidual_out_row,
    SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_DRESIDUAL_OUT: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr, HAS_Z: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute the results of `_backward_kernel` for a group of several tiles; dweight is summed in memory.

    Grid: (programs, groups). Tiles are (BLOCK_ROWS, BLOCK).
    """
    group, n_groups = tl.program_id(1), tl.num_programs(1)
    dim = n_groups * SIZE
    dweight_ptr += tl.program_id(0).to(tl.int64) * dim
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]  # (BLOCK_ROWS, 1)
        rstd = tl.load(rstd_ptr + rows * n_groups + group, rows < n_rows, other=0.0)

        # First pass: mean(w g u) of each row, dweight, and dz of a gate after the norm.
        products = tl.zeros((BLOCK_ROWS, BLOCK), COMPUTE)
        for i in range(tl.cdiv(SIZE, BLOCK)):
            channels, channel_mask = tile_channels(group, i, SIZE, BLOCK)
            mask = (rows < n_rows) & channel_mask  # (BLOCK_ROWS, BLOCK)
            w = tl.load(weight_ptr + channels, channel_mask, other=0.0).to(COMPUTE)
            u = tl.load(x_ptr + rows * stride_x_row + channels, mask, other=0.0).to(COMPUTE) * rstd
            g = tl.load(dy_ptr + rows * stride_dy_row + channels, mask, other=0.0).to(COMPUTE)
            if HAS_Z:
                gate, dgate = load_gate(z_ptr + rows * stride_z_row + channels, mask, COMPUTE)
                if NORM_BEFORE_GATE:
                    dz = (g * u * w * dgate).to(dz_ptr.dtype.element_ty)
                    tl.store(dz_ptr + rows * dim + channels, dz, mask)
                    g *= gate
                else:
                    u *= gate
            products += g * u * w
            has_sum = tile != tl.program_id(0)  # after the program's first rows
            before = tl.load(dweight_ptr + channels, and_scalar(channel_mask, has_sum), other=0.0)
            tl.store(dweight_ptr + channels, before + tl.sum(g * u, axis=0, keep_dims=True), channel_mask)
        mean = tl.sum(products, axis=1, keep_dims=True) / SIZE  # (BLOCK_ROWS, 1)
        tl.debug_barrier()  # a thread may load the dweight that another stored, for the next rows

        # Second pass: dv = rstd (w g - u mean(w g u)), and dz of a gate before the norm.
        for i in range(tl.cdiv(SIZE, BLOCK)):
            channels, channel_mask = tile_channels(group, i, SIZE, BLOCK)
            mask = (rows < n_rows) & channel_mask
            offset = rows * dim + channels
            w = tl.load(weight_ptr + channels, channel_mask, other=0.0).to(COMPUTE)
            v = tl.load(x_ptr + rows * stride_x_row + channels, mask, other=0.0).to(COMPUTE)
            g = tl.load(dy_ptr + rows * stride_dy_row + channels, mask, other=0.0).to(COMPUTE) * w
            if HAS_Z:
                gate, dgate = load_gate(z_ptr + rows * stride_z_row + channels, mask, COMPUTE)
                if NORM_BEFORE_GATE:
                    dv = rstd * (g * gate - v * rstd * mean)
                else:
                    dv = rstd * (g - v * gate * rstd * mean)
                    tl.store(dz_ptr + offset, (dv * v * dgate).to(dz_ptr.dtype.element_ty), mask)
                    dv *= gate
            else:
                dv = rstd * (g - v * rstd * mean)
            if HAS_DRESIDUAL_OUT:
                at_ptr = dresidual_out_ptr + rows * stride_dresidual_out_row + channels
                dv += tl.load(at_ptr, mask, other=0.0).to(COMPUTE)
            tl.store(dx_ptr + offset, dv.to(dx_ptr.dtype.element_ty), mask)
            if HAS_DRESIDUAL:
                tl.store(dresidual_ptr + offset, dv.to(dresidual_ptr.dtype.element_ty), mask)


def backward(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    rstd: Tensor,
    dy: Tensor,
    dresidual_out: Tensor | None,
    group_size: int,
    norm_before_gate: bool,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run `norm_triton_backward`: dx, dresidual, dweight and dz.

    Args:
        x: the input of the norm: x + residual where there was a residual.

    dresidual is empty where it has the dtype, and so the values, of dx; dz is empty without a gate.
    """
    rows, dy = rows_of(x), rows_of(dy)
    n_rows, dim = rows.shape
    options = tile_options(group_size, WIDE, rstd.dtype)
    dx = torch.empty(x.shape, dtype=x_dtype, device=x.device)
    dresidual = torch.empty(0 if residual_dtype == x_dtype else x.shape, dtype=residual_dtype, device=x.device)
    dz = torch.empty(0 if z is None else z.shape, dtype=x.dtype if z is None else z.dtype, device=x.device)
    # Four programs a multiprocessor hide each other's latency; more would only be more partial sums.
    programs = min(triton.cdiv(n_rows, options["BLOCK_ROWS"]), 4 * num_sms(x.device))
    dweight = torch.empty(programs, dim, dtype=rstd.dtype, device=x.device)
    z, dresidual_out = (None if m is None else rows_of(m) for m in (z, dresidual_out))
    kernel = _backward_kernel if options["BLOCK"] >= group_size else _wide_backward_kernel
    if n_rows:
        with on_device(x):
            kernel[launch_grid(programs, dim // group_size, "groups of channels")](
                rows, weight.contiguous(), z, rstd, dy, dresidual_out, dx, dresidual, dweight, dz,
                n_rows, row_stride(rows), row_stride(z), row_stride(dy), row_stride(dresidual_out),
                HAS_DRESIDUAL_OUT=dresidual_out is not None, HAS_DRESIDUAL=residual_dtype != x_dtype,
                HAS_Z=z is not None, NORM_BEFORE_GATE=norm_before_gate, **options,
                **FUSED_MULTIPLY_ADD,
            )  # fmt: skip
    return dx, dresidual, dweight.sum(0).to(weight.dtype), dz
