"""The forward kernel of the norms and its launch."""
# Constexpr arguments and tuples of strides, which stubs of Triton do not know.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import FUSED_MULTIPLY_ADD, launch_grid, on_device, rows_of
from .tile import load_gate, row_stride, tile_channels, tile_options

WIDE = {"BLOCK": 4096, "BLOCK_ROWS": 1, "num_warps": 16}
"""The tile of a group that is wider than the widest tile."""


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, z_ptr, y_ptr, residual_out_ptr, rstd_ptr,
    n_rows, stride_x_row, stride_residual_row, stride_z_row,
    EPS: tl.constexpr, SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_Z: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_ROWS rows of one group: y, 1 / rms and, with a residual, x + residual.

    Grid: (row tiles, groups). Tiles are (BLOCK_ROWS, BLOCK). The outputs are (n_rows, D), 1 / rms (n_rows, groups).
    """
    group, n_groups = tl.program_id(1), tl.num_programs(1)
    dim = n_groups * SIZE
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]  # (BLOCK_ROWS, 1)
    TILES: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK

    squares = tl.zeros((BLOCK_ROWS, BLOCK), COMPUTE)
    for i in tl.static_range(TILES):
        channels, channel_mask = tile_channels(group, i, SIZE, BLOCK)
        mask = (rows < n_rows) & channel_mask  # (BLOCK_ROWS, BLOCK)
        v = tl.load(x_ptr + rows * stride_x_row + channels, mask, other=0.0).to(COMPUTE)
        if HAS_RESIDUAL:
            v += tl.load(residual_ptr + rows * stride_residual_row + channels, mask, other=0.0).to(COMPUTE)
            rounded = v.to(residual_out_ptr.dtype.element_ty)
            tl.store(residual_out_ptr + rows * dim + channels, rounded, mask)
            v = rounded.to(COMPUTE)  # the backward sees the rounded sum
        if HAS_Z:
            gate, _ = load_gate(z_ptr + rows * stride_z_row + channels, mask, COMPUTE)
            if not NORM_BEFORE_GATE:
                v *= gate
        squares += v * v

    # A constant: a float argument would reach the kernel as float32, whatever COMPUTE is.
    eps = tl.full((), EPS, COMPUTE)
    # rstd = 1 / sqrt(mean(v^2) + eps)
    rstd = 1 / tl.sqrt(tl.sum(squares, axis=1, keep_dims=True) / SIZE + eps)  # (BLOCK_ROWS, 1)
    tl.store(rstd_ptr + rows * n_groups + group, rstd, rows < n_rows)

    for i in tl.static_range(TILES):
        if TILES > 1:  # the only tile is in registers still
            channels, channel_mask = tile_channels(group, i, SIZE, BLOCK)
            mask = (rows < n_rows) & channel_mask
            if HAS_RESIDUAL:
                tl.debug_barrier()  # a thread may load what another stored
                v = tl.load(residual_out_ptr + rows * dim + channels, mask, other=0.0).to(COMPUTE)
            else:
                v = tl.load(x_ptr + rows * stride_x_row + channels, mask, other=0.0).to(COMPUTE)
            if HAS_Z:
                gate, _ = load_gate(z_ptr + rows * stride_z_row + channels, mask, COMPUTE)
                if not NORM_BEFORE_GATE:
                    v *= gate
        y = v * rstd * tl.load(weight_ptr + channels, channel_mask, other=0.0).to(COMPUTE)
        if HAS_Z:
            if NORM_BEFORE_GATE:
                y *= gate
        tl.store(y_ptr + rows * dim + channels, y.to(y_ptr.dtype.element_ty), mask)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    z: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    residual_out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `norm_triton`: y, x + residual (empty without a residual), and 1 / rms (n_rows, groups)."""
    rows = rows_of(x)
    n_rows, dim = rows.shape
    compute = torch.promote_types(torch.promote_types(x.dtype, residual_out_dtype), torch.float32)
    options = tile_options(group_size, WIDE, compute)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual_out = torch.empty(0 if residual is None else x.shape, dtype=residual_out_dtype, device=x.device)
    rstd = torch.empty(n_rows, dim // group_size, dtype=compute, device=x.device)
    residual, z = (None if m is None else rows_of(m) for m in (residual, z))
    if n_rows:
        grid = launch_grid(triton.cdiv(n_rows, options["BLOCK_ROWS"]), dim // group_size, "groups of channels")
        with on_device(x):
            _forward_kernel[grid](
                rows, residual, weight.contiguous(), z, y, residual_out, rstd,
                n_rows, row_stride(rows), row_stride(residual), row_stride(z), EPS=float(eps),
                HAS_RESIDUAL=residual is not None, HAS_Z=z is not None, NORM_BEFORE_GATE=norm_before_gate, **options,
                **FUSED_MULTIPLY_ADD,
            )  # fmt: skip
    return y, residual_out, rstd
