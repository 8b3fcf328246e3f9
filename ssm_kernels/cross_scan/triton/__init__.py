"""Cross-scan and cross-merge in Triton: registration of the ops. The kernels are imported when an op first runs.

Each is the adjoint, and so the backward, of the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..._core.library import Gradient, define_op, lazy_function
from ..directions import ScanDirection, direction_codes


def cross_scan(x: Tensor, directions: Sequence[ScanDirection]) -> Tensor:
    """x (B, height, width, D) -> (B, K, L, D)."""
    return _scan_op(x, direction_codes(directions))


def cross_merge(y: Tensor, height: int, width: int, directions: Sequence[ScanDirection]) -> Tensor:
    """y (B, K, L, D) -> (B, height, width, D)."""
    return _merge_op(y, height, width, direction_codes(directions))


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
