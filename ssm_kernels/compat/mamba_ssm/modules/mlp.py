"""`mamba_ssm.modules.mlp`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GatedMLP(nn.Module):
    """`mamba_ssm.modules.mlp.GatedMLP`: `fc2(y * activation(gate))` with (y, gate) of `fc1`.

    Args:
        in_features: width of the input.
        hidden_features: 8 / 3 of the input's width by default; rounded up to a multiple of `multiple_of`.
        out_features: width of the output; that of the input by default.
        activation: applied to the gate.
        bias: both layers have a bias.
        multiple_of: what the hidden width is a multiple of.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        # Three matrices of 8 / 3 D hold as many parameters as two of 4 D (arXiv 2002.05202).
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = math.ceil(hidden / multiple_of) * multiple_of
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, **like)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, in_features if out_features is None else out_features, bias=bias, **like)

    def forward(self, x: Tensor) -> Tensor:
        """Run both layers.

        Args:
            x: (..., in_features).

        Returns:
            (..., out_features).
        """
        y, gate = self.fc1(x).chunk(2, dim=-1)  # (..., hidden) each
        return self.fc2(y * self.activation(gate))
