"""The cross scan and its merge as Triton kernels; `kernels` holds them, and is imported when one first runs."""

from __future__ import annotations

from torch import Tensor

from ..._core.library import Gradient, define_op, from_kernels


def scan(x: Tensor, codes: list[int]) -> Tensor:
    """x (B, height, width, D) -> (B, K, L, D). The codes are places in `cross_scan.CROSS`."""
    return _scan_op(x, codes)


def merge(y: Tensor, height: int, width: int, codes: list[int]) -> Tensor:
    """y (B, K, L, D) -> (B, height, width, D)."""
    return _merge_op(y, height, width, codes)


# Each is the adjoint of the other.


def _save_scan(ctx, inputs, outputs):
    x, ctx.codes = inputs
    ctx.height, ctx.width = x.shape[1:3]


def _scan_gradients(ctx, dy):
    return merge(dy, ctx.height, ctx.width, ctx.codes), None


def _save_merge(ctx, inputs, outputs):
    _, _, _, ctx.codes = inputs


def _merge_gradients(ctx, dx):
    return scan(dx, ctx.codes), None, None, None


_scan_op = define_op(
    "cross_scan_triton(Tensor x, int[] codes) -> Tensor",
    from_kernels(__name__, "scan"),
    lambda x, codes: x.new_empty(x.shape[0], len(codes), x.shape[1] * x.shape[2], x.shape[3]),
    Gradient(_save_scan, _scan_gradients, 1),
)
_merge_op = define_op(
    "cross_merge_triton(Tensor y, int height, int width, int[] codes) -> Tensor",
    from_kernels(__name__, "merge"),
    lambda y, height, width, codes: y.new_empty(y.shape[0], height, width, y.shape[3]),
    Gradient(_save_merge, _merge_gradients, 1),
)
