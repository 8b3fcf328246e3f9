"""VL-Mamba's connectors: an MLP, alone or around a two-dimensional selective scan (arXiv 2403.13600, section 3.2).

The scan is the first form of VMamba's SS2D (arXiv 2401.10166), with its parameter names. Letters: B batch, h and w
the grid, L = h * w, D width, E inner width, N state, R rank of dt, K directions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_kernels import ScanDirection, cross_selective_scan
from ssm_kernels.modules import initial_dt_bias, without_weight_decay


class SS2D(nn.Module):
    """A Mamba layer whose scan follows K directions over the grid, with parameters of its own for each."""

    def __init__(self, width: int, directions: tuple[ScanDirection, ...], d_state: int = 16, expand: int = 2):
        super().__init__()
        inner, rank, k = expand * width, math.ceil(width / 16), len(directions)
        self.directions, self.rank, self.d_state = directions, rank, d_state
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj_weight = nn.Parameter(torch.empty(k, rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(k, inner, rank).uniform_(-(rank**-0.5), rank**-0.5))
        self.dt_projs_bias = nn.Parameter(initial_dt_bias((k, inner), 1e-3, 0.1, 1e-4))
        self.A_logs = without_weight_decay(torch.arange(1.0, d_state + 1).log().repeat(k * inner, 1))
        self.Ds = without_weight_decay(torch.ones(k * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)
        for weight in self.x_proj_weight:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h, w, D)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        # A direction only orders the places, so each place is projected where it is.
        projected = torch.einsum("bhwe,kce->bhwkc", x, self.x_proj_weight)
        dt, B, C = projected.split([self.rank, self.d_state, self.d_state], dim=-1)  # (B, h, w, K, ...)
        dt = torch.einsum("bhwkr,ker->bhwke", dt, self.dt_projs_weight)
        by_route = (len(self.directions), -1)
        y = cross_selective_scan(
            x,
            dt,
            -torch.exp(self.A_logs.float()).unflatten(0, by_route),
            B,
            C,
            self.Ds.unflatten(0, by_route),
            self.dt_projs_bias,
            True,
            self.directions,
        )
        y = self.out_norm(y)
        return self.out_proj(y * F.silu(z))


class MLPConnector(nn.Module):
    """Two linear layers on each patch, as in LLaVA-1.5."""

    def __init__(self, vision_width: int, lm_width: int):
        super().__init__()
        self.linear1 = nn.Linear(vision_width, lm_width)
        self.linear2 = nn.Linear(lm_width, lm_width)

    def forward(self, features: Tensor) -> Tensor:
        """(B, h, w, vision width) -> (B, h * w, language width)."""
        return self.linear2(F.gelu(self.linear1(features))).flatten(1, 2)


class VSSMLPConnector(nn.Module):
    """The scan at the encoder's width, then an MLP: `MLP(Norm(scan(V) + V))`."""

    def __init__(
        self, vision_width: int, lm_width: int, directions: tuple[ScanDirection, ...], d_state: int, expand: int
    ):
        super().__init__()
        self.vss = SS2D(vision_width, directions, d_state, expand)
        self.norm = nn.LayerNorm(vision_width)
        self.mlp = MLPConnector(vision_width, lm_width)

    def forward(self, features: Tensor) -> Tensor:
        """(B, h, w, vision width) -> (B, h * w, language width)."""
        return self.mlp(self.norm(self.vss(features) + features))


class VSSL2Connector(nn.Module):
    """The scan between two linear layers, at the language model's width: `L2(Norm(scan(GELU(L1 V)) + L1 V))`."""

    def __init__(
        self, vision_width: int, lm_width: int, directions: tuple[ScanDirection, ...], d_state: int, expand: int
    ):
        super().__init__()
        self.linear1 = nn.Linear(vision_width, lm_width)
        self.vss = SS2D(lm_width, directions, d_state, expand)
        self.norm = nn.LayerNorm(lm_width)
        self.linear2 = nn.Linear(lm_width, lm_width)

    def forward(self, features: Tensor) -> Tensor:
        """(B, h, w, vision width) -> (B, h * w, language width)."""
        x = self.linear1(features)
        return self.linear2(self.norm(self.vss(F.gelu(x)) + x)).flatten(1, 2)
