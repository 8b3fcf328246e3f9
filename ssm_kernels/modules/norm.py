"""The gated RMSNorm of the Mamba-2 mixer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..norm import rms_norm


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last dimension; with a gate, of `x * silu(z)` (arXiv 2405.21060, section 7).

    Args:
        width: size of the last dimension.
        eps: added to the mean square.
        group_size: channels that share one mean square; all of them by default.
        norm_before_gate: the gate multiplies the result rather than the input.
    """

    def __init__(self, width: int, eps: float = 1e-5, group_size: int | None = None, norm_before_gate: bool = False):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalize, and gate.

        Args:
            x: (..., width).
            z: (..., width) gate, or None.

        Returns:
            (..., width) in the dtype of `x`.
        """
        return rms_norm(
            x, self.weight, z=z, eps=self.eps, group_size=self.group_size, norm_before_gate=self.norm_before_gate
        )
