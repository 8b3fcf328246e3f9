"""`mamba_ssm.ops.triton.k_activations`: the gate of a gated MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(xy: Tensor) -> Tensor:
    """`silu(x) * y` of the two halves of the last dimension: (..., 2 D) -> (..., D).

    Raises:
        ValueError: the last dimension has no halves.
    """
    if xy.dim() == 0 or xy.shape[-1] % 2:
        raise ValueError(f"xy must have shape (..., 2 D), got {tuple(xy.shape)}")
    x, y = xy.chunk(2, dim=-1)  # (..., D) each
    return F.silu(x) * y
