"""Cross-scan and cross-merge in Triton: registration of the ops. The kernels are imported when an op first runs.

Each is the adjoint, and so the backward, of the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._core.library import Gradient, define_op, lazy_function
from ...causal_conv1d.triton import grouped_causal_conv1d
from ...selective_scan.triton import grouped_selective_scan
from ...ssd.triton import ssd
from ..directions import ScanDirection, direction_codes


def cross_scan(x: Tensor, directions: Sequence[ScanDirection]) -> Tensor:
    """x (B, height, width, D) -> (B, K, L, D)."""
    return _scan_op(x, direction_codes(directions))


def cross_merge(y: Tensor, height: int, width: int, directions: Sequence[ScanDirection]) -> Tensor:
    """y (B, K, L, D) -> (B, height, width, D)."""
    return _merge_op(y, height, width, direction_codes(directions))


def cross_causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, directions: Sequence[ScanDirection]
) -> Tensor:
    """x (B, height, width, E), weight (K, E, W), bias (K, E) -> (B, height, width, K, E)."""
    height, width = x.shape[1:3]
    x = _for_each_direction(x, len(directions))  # (B, L, K, E)
    bias = None if bias is None else bias.flatten()
    y = grouped_causal_conv1d(x, weight.flatten(0, 1), bias, silu, direction_codes(directions), height)
    return y.unflatten(1, (height, width))


def cross_selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    directions: Sequence[ScanDirection],
) -> Tensor:
    """Scan with the arguments of `permuted.cross_selective_scan`, and the same result."""
    height, width = u.shape[1:3]
    dt, B, C = (m.flatten(1, 2) for m in (dt, B, C))  # (B, L, K, ...)
    y, _ = grouped_selective_scan(
        _for_each_direction(u, len(directions)), dt, A, B, C, D, None, dt_bias, dt_softplus, None, None, None,
        direction_codes(directions), height,
    )  # fmt: skip
    y = y.sum(2, dtype=torch.promote_types(u.dtype, torch.float32)).to(u.dtype)  # (B, L, E)
    return y.unflatten(1, (height, width))


def cross_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    directions: Sequence[ScanDirection],
    chunk_size: int,
) -> Tensor:
    """Scan with the arguments of `permuted.cross_ssd`, but D (K * H, 1) or (K * H, P), and the same result."""
    height, width, k, heads = x.shape[1:5]
    x, dt, B, C = (m.flatten(1, 2).flatten(2, 3) for m in (x, dt, B, C))  # (B, L, K * H, P), ...
    y, _ = ssd(
        x, dt, A, B, C, D, None, dt_bias, dt_softplus, dt_limit, None, None, None, chunk_size,
        tuple(direction_codes(directions)), height,
    )  # fmt: skip
    return y.unflatten(2, (k, heads)).unflatten(1, (height, width))


def _for_each_direction(x: Tensor, k: int) -> Tensor:
    """(B, height, width, E) -> (B, L, K, E), a view."""
    return x.flatten(1, 2).unsqueeze(2).expand(-1, -1, k, -1)


def _save_scan(ctx, inputs, outputs):
    ctx.directions = inputs.directions
    ctx.height, ctx.width = inputs.x.shape[1:3]


def _scan_gradients(ctx, dy):
    return {"x": _merge_op(dy, ctx.height, ctx.width, ctx.directions)}


def _save_merge(ctx, inputs, outputs):
    ctx.directions = inputs.directions


def _merge_gradients(ctx, dx):
    return {"y": _scan_op(dx, ctx.directions)}


_scan_op = define_op(
    "cross_scan_triton(Tensor x, int[] directions) -> Tensor",
    lazy_function(f"{__name__}.forward", "scan"),
    lambda x, directions: x.new_empty(x.shape[0], len(directions), x.shape[1] * x.shape[2], x.shape[3]),
    Gradient(_save_scan, _scan_gradients, 1),
)
_merge_op = define_op(
    "cross_merge_triton(Tensor y, int height, int width, int[] directions) -> Tensor",
    lazy_function(f"{__name__}.backward", "merge"),
    lambda y, height, width, directions: y.new_empty(y.shape[0], height, width, y.shape[3]),
    Gradient(_save_merge, _merge_gradients, 1),
)
