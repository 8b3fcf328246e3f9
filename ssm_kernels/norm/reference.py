"""RMSNorm as it is defined. The ground truth of the other backends."""

from __future__ import annotations

import torch
from torch import Tensor


def norm(x: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int, norm_before_gate: bool) -> Tensor:
    """x, z (..., D); weight (D,) -> (..., D)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    gate = None if z is None else z.to(dtype) * torch.sigmoid(z.to(dtype))
    if gate is not None and not norm_before_gate:
        y = y * gate
    groups = y.unflatten(-1, (-1, group_size))
    y = (groups / torch.sqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.to(dtype)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)
