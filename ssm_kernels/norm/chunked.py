"""RMSNorm on PyTorch's own fused `rms_norm`, which keeps its input and one number a row for the backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def norm(x: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int, norm_before_gate: bool) -> Tensor:
    """x, z (..., D); weight (D,) -> (..., D)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        y = x.to(dtype)
        gate = None if z is None else F.silu(z.to(dtype))
        if gate is not None and not norm_before_gate:
            y = y * gate
        if group_size == x.shape[-1]:
            y = F.rms_norm(y, (group_size,), weight.to(dtype), eps)
        else:
            y = F.rms_norm(y.unflatten(-1, (-1, group_size)), (group_size,), None, eps).flatten(-2) * weight.to(dtype)
        if gate is not None and norm_before_gate:
            y = y * gate
    return y.to(x.dtype)
