"""The norms in fast PyTorch, with their own backward.

It saves its input and one number a row. PyTorch's `rms_norm` is slower on a CPU, and wrong beyond |x| = 1e14, since its
backward takes the third power of that number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._core.invariant import silu
from .._core.library import autocast_off
from .._core.transforms import is_transformed, vjp
from .differentiable import normalize


def rms_norm(
    x: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    """Normalize with arguments in the canonical form of `reference.rms_norm`, and the same results."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with autocast_off(x.device):
        y = x.to(dtype)
        gate = None if z is None else silu(z.to(dtype))
        if gate is not None and not norm_before_gate:
            y = y * gate
        if group_size == x.shape[-1]:
            y = _normalize(y, weight.to(dtype), eps)
        else:
            y, weight = (m.unflatten(-1, (-1, group_size)) for m in (y, weight.to(dtype)))  # (..., groups, group_size)
            y = _normalize(y, weight, eps).flatten(-2)  # (..., D)
        if gate is not None and norm_before_gate:
            y = y * gate
    return y.to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, residual_out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Add and normalize with arguments in the canonical form of `reference.add_rms_norm`, and the same results."""
    residual_out = (x if residual is None else residual + x).to(residual_out_dtype)
    return rms_norm(residual_out, weight, None, eps, x.shape[-1], False).to(x.dtype), residual_out


def _normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if is_transformed():
        return normalize(x, weight, eps)
    return _Norm.apply(x, weight, eps)


class _Norm(torch.autograd.Function):
    """x * rstd * weight, with rstd = 1 / sqrt(mean(x^2) + eps) over the last dimension; weight broadcasts to x."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rstd = torch.rsqrt(norm.square() / x.shape[-1] + eps)  # (..., 1)
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps = eps
        return (x * rstd).mul_(weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # the graph of the backward is wanted, and rstd has none
            arguments = {"x": x, "weight": weight}
            grads = vjp(lambda a: (normalize(a["x"], a["weight"], ctx.eps),), arguments, ("x", "weight"), (dy,))
            return grads["x"], grads["weight"], None
        normalized = x * rstd
        product = dy * normalized
        dweight = product.sum_to_size(weight.shape)
        # dx = rstd (w dy - x_hat mean(w dy x_hat)), x_hat = x rstd
        mean = (product * weight).mean(-1, keepdim=True)  # (..., 1)
        return torch.addcmul(dy * weight, normalized, mean, value=-1).mul_(rstd), dweight, None
