"""RMSNorm in PyTorch operations alone: the formula of the derivatives that no kernel has."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `x / sqrt(mean(x^2) + eps) * weight` over the last dimension; weight broadcasts to x."""
    # The result does not depend on the scale, a constant therefore: without it, powers of large x would overflow.
    scale = x.detach().abs().amax(-1, keepdim=True).clamp(min=1)  # (..., 1)
    scaled = x / scale
    return scaled * torch.rsqrt(scaled.square().mean(-1, keepdim=True) + eps / scale / scale) * weight


def rms_norm(
    x: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    """Normalize with the arguments of `reference.rms_norm`; the result is float32, or float64 where x is."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    gate = None if z is None else F.silu(z.to(dtype))
    if gate is not None and not norm_before_gate:
        y = y * gate
    y, weight = (m.unflatten(-1, (-1, group_size)) for m in (y, weight.to(dtype)))  # (..., groups, group_size)
    y = normalize(y, weight, eps).flatten(-2)  # (..., D)
    return y * gate if gate is not None and norm_before_gate else y
