"""VL-Mamba's connectors: an MLP, alone or with a two-dimensional selective scan (arXiv 2403.13600, section 3.2).

The scan is the first version of VMamba's SS2D (arXiv 2401.10166), with its parameter names, or a Mamba-1 mixer along
each direction. Letters: B batch, h and w
the grid of patches, D width, E inner width, N state, R rank of dt, K scan directions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_kernels import ScanDirection, cross_merge, cross_scan, cross_selective_scan
from ssm_kernels.modules import Mamba, decay_rate, initial_dt_bias, without_weight_decay

from .config import ConnectorConfig


class SS2D(nn.Module):
    """Mamba layer that scans a grid in K directions, with separate dt, A, B, C and D for each.

    Args:
        width: width D of the features.
        directions: K scan directions.
        d_state: state size N.
        expand: E / D.
    """

    def __init__(self, width: int, directions: tuple[ScanDirection, ...], d_state: int = 16, expand: int = 2):
        super().__init__()
        inner, rank, k = expand * width, math.ceil(width / 16), len(directions)
        self.directions, self.rank, self.d_state = directions, rank, d_state
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj_weight = nn.Parameter(torch.empty(k, rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(k, inner, rank).uniform_(-(rank**-0.5), rank**-0.5))
        self.dt_projs_bias = nn.Parameter(initial_dt_bias((k, inner), 1e-3, 0.1, 1e-4))
        # Per row: A = -1, ..., -N, the S4D-real initialization.
        self.A_logs = without_weight_decay(torch.arange(1.0, d_state + 1).log().repeat(k * inner, 1))  # (K * E, N)
        self.Ds = without_weight_decay(torch.ones(k * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)
        for weight in self.x_proj_weight:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Mix the patches of a grid.

        Args:
            x: (B, h, w, D) features.

        Returns:
            (B, h, w, D).
        """
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, h, w, E) each
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)  # (B, h, w, E)
        # Directions only differ in order, so dt, B and C are projected at each patch and never copied into an order.
        projected = torch.einsum("bhwe,kce->bhwkc", x, self.x_proj_weight)  # (B, h, w, K, R + 2N)
        dt, B, C = projected.split([self.rank, self.d_state, self.d_state], dim=-1)
        dt = torch.einsum("bhwkr,ker->bhwke", dt, self.dt_projs_weight)  # (B, h, w, K, E)
        per_direction = (len(self.directions), -1)
        y = cross_selective_scan(
            x,
            dt,
            decay_rate(self.A_logs).unflatten(0, per_direction),  # (K, E, N)
            B,
            C,
            self.Ds.unflatten(0, per_direction),  # (K, E)
            self.dt_projs_bias,
            True,
            self.directions,
        )  # (B, h, w, E): the sum over directions
        y = self.out_norm(y)
        return self.out_proj(y * F.silu(z))  # (B, h, w, D)


class DirectionalMamba(nn.Module):
    """One Mamba-1 mixer that runs along K directions over a grid; what they give a patch is summed.

    Args:
        width: width D of the features.
        directions: K scan directions.
        d_state: state size N.
        expand: E / D.
        d_conv: width of the convolution, along each direction.
    """

    def __init__(self, width: int, directions: tuple[ScanDirection, ...], d_state: int, expand: int, d_conv: int):
        super().__init__()
        self.directions = directions
        self.mamba = Mamba(width, d_state, d_conv, expand)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the patches of a grid.

        Args:
            x: (B, h, w, D) features.

        Returns:
            (B, h, w, D).
        """
        height, width = x.shape[1:3]
        paths = cross_scan(x, self.directions)  # (B, K, h * w, D)
        y = self.mamba(paths.flatten(0, 1)).unflatten(0, paths.shape[:2])  # (B, K, h * w, D)
        return cross_merge(y, height, width, self.directions)  # (B, h, w, D)


def build_vss(width: int, config: ConnectorConfig) -> SS2D | DirectionalMamba:
    """Build the layer that scans, at width D."""
    d_state = config.d_state or 16
    if config.vss == "mamba":
        return DirectionalMamba(width, config.directions, d_state, config.expand, config.d_conv)
    return SS2D(width, config.directions, d_state, config.expand)


class MLPConnector(nn.Module):
    """Two linear layers on each patch, as in LLaVA-1.5.

    Args:
        vision_width: width of the patch features.
        lm_width: width of the language model.
    """

    def __init__(self, vision_width: int, lm_width: int):
        super().__init__()
        self.linear1 = nn.Linear(vision_width, lm_width)
        self.linear2 = nn.Linear(lm_width, lm_width)

    def forward(self, features: Tensor) -> Tensor:
        """Project patch features to tokens.

        Args:
            features: (B, h, w, vision_width).

        Returns:
            (B, h * w, lm_width).
        """
        return self.linear2(F.gelu(self.linear1(features))).flatten(1, 2)  # (B, h * w, lm_width)


class VSSMLPConnector(nn.Module):
    """Scan at the encoder's width, then an MLP: `MLP(Norm(VSS(V) + V))`.

    Args:
        vision_width: width of the patch features.
        lm_width: width of the language model.
        config: layer that scans, its directions and sizes.
    """

    def __init__(self, vision_width: int, lm_width: int, config: ConnectorConfig):
        super().__init__()
        self.vss = build_vss(vision_width, config)
        self.norm = nn.LayerNorm(vision_width)
        self.mlp = MLPConnector(vision_width, lm_width)

    def forward(self, features: Tensor) -> Tensor:
        """Project patch features to tokens.

        Args:
            features: (B, h, w, vision_width).

        Returns:
            (B, h * w, lm_width).
        """
        x = self.vss(features) + features  # (B, h, w, vision_width)
        return self.mlp(self.norm(x))  # (B, h * w, lm_width)


class VSSL2Connector(nn.Module):
    """Scan between two linear layers, at the language model's width: `L2(Norm(VSS(GELU(L1 V)) + L1 V))`.

    Args:
        vision_width: width of the patch features.
        lm_width: width of the language model.
        config: layer that scans, its directions and sizes.
    """

    def __init__(self, vision_width: int, lm_width: int, config: ConnectorConfig):
        super().__init__()
        self.linear1 = nn.Linear(vision_width, lm_width)
        self.vss = build_vss(lm_width, config)
        self.norm = nn.LayerNorm(lm_width)
        self.linear2 = nn.Linear(lm_width, lm_width)

    def forward(self, features: Tensor) -> Tensor:
        """Project patch features to tokens.

        Args:
            features: (B, h, w, vision_width).

        Returns:
            (B, h * w, lm_width).
        """
        x = self.linear1(features)  # (B, h, w, lm_width)
        x = self.vss(F.gelu(x)) + x  # (B, h, w, lm_width)
        return self.linear2(self.norm(x)).flatten(1, 2)  # (B, h * w, lm_width)
