"""The norms as they are defined. The ground truth of the other backends."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    """Normalize, x / sqrt(mean(x^2) + eps) * weight, with a gate silu(z) before or after (arXiv 2405.21060, section 7).

    Args:
        x, z: (..., D).
        weight: (D,).
        eps: added to the mean square.
        group_size: channels that are normalized together.
        norm_before_gate: whether the gate multiplies the result, rather than x.

    Returns:
        (..., D) in the dtype of x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    gate = None if z is None else z.to(dtype) * torch.sigmoid(z.to(dtype))
    if gate is not None and not norm_before_gate:
        y = y * gate
    groups = y.unflatten(-1, (-1, group_size))  # (..., D / group_size, group_size)
    y = (groups / torch.sqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.to(dtype)  # (..., D)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, residual_out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Add x and residual (..., D), and normalize the rounded sum; both are returned, the norm in the dtype of x."""
    residual_out = (x if residual is None else residual + x).to(residual_out_dtype)
    return rms_norm(residual_out, weight, None, eps, x.shape[-1], False).to(x.dtype), residual_out
