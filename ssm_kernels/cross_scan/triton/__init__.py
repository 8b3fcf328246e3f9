"""Cross-scan and cross-merge in Triton: registration of the ops. The kernels are imported when an op first runs.

Each is the adjoint, and so the backward, of the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..._core.library import Gradient, define_op, lazy_function
from ..._core.transforms import Fold, transformable
from .. import pytorch
from ..directions import CROSS, ScanDirection, direction_codes


def cross_scan(x: Tensor, directions: Sequence[ScanDirection]) -> Tensor:
    """x (B, height, width, D) -> (B, K, L, D)."""
    return _scan(x, direction_codes(directions))


def cross_merge(y: Tensor, height: int, width: int, directions: Sequence[ScanDirection]) -> Tensor:
    """y (B, K, L, D) -> (B, height, width, D)."""
    return _merge(y, height, width, direction_codes(directions))


def _save_scan(ctx, inputs, outputs):
    ctx.directions = inputs.directions
    ctx.height, ctx.width = inputs.x.shape[1:3]


def _scan_gradients(ctx, dy):
    return {"x": _merge(dy, ctx.height, ctx.width, ctx.directions)}


def _save_merge(ctx, inputs, outputs):
    ctx.directions = inputs.directions


def _merge_gradients(ctx, dx):
    return {"y": _scan(dx, ctx.directions)}


def _scan_formula(arguments: Mapping[str, Any]) -> tuple[Tensor]:
    return (pytorch.cross_scan(arguments["x"], _names(arguments["directions"])),)


def _merge_formula(arguments: Mapping[str, Any]) -> tuple[Tensor]:
    y, height, width = (arguments[name] for name in ("y", "height", "width"))
    return (pytorch.cross_merge(y, height, width, _names(arguments["directions"])),)


def _names(codes: Sequence[int]) -> tuple[ScanDirection, ...]:
    return tuple(CROSS[code] for code in codes)


_scan_gradient = Gradient(_save_scan, _scan_gradients, _scan_formula, 1)
_merge_gradient = Gradient(_save_merge, _merge_gradients, _merge_formula, 1)
_scan_op = define_op(
    "cross_scan_triton(Tensor x, int[] directions) -> Tensor",
    lazy_function(f"{__name__}.forward", "scan"),
    lambda x, directions: x.new_empty(x.shape[0], len(directions), x.shape[1] * x.shape[2], x.shape[3]),
    _scan_gradient,
)
_merge_op = define_op(
    "cross_merge_triton(Tensor y, int height, int width, int[] directions) -> Tensor",
    lazy_function(f"{__name__}.backward", "merge"),
    lambda y, height, width, directions: y.new_empty(y.shape[0], height, width, y.shape[3]),
    _merge_gradient,
)
# A vmap is a part of the batch: there are no parameters.
_FOLDED = {"x": -4, "y": -4}
_scan = transformable(_scan_op, Fold(_FOLDED, ("y",)), _scan_gradient)
_merge = transformable(_merge_op, Fold(_FOLDED, ("x",)), _merge_gradient)
