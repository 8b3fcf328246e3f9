"""ML-Mamba's Mamba-2 Scan Connector (arXiv 2407.19832, section 3.3), with the parameter names of its checkpoint.

Letters: B batch, h and w the grid, L = h * w, D width, E inner width, N state, H heads, P head dimension, G groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_kernels import ScanDirection, cross_causal_conv1d, cross_ssd
from ssm_kernels.modules import Mamba2, conv_weight, depthwise_conv, without_weight_decay

from .config import ConnectorConfig

# Endings of the parameters that a direction has to itself. The checkpoint has the first two: rows forth and back.
# The two of the columns are ours.
SUFFIXES: dict[ScanDirection, str] = {"rows": "", "rows_reversed": "_b", "columns": "_c", "columns_reversed": "_cb"}


class Mamba2ScanConnector(nn.Module):
    """Features to the language model's width, Mamba-2 blocks that scan the grid both ways, and an MLP."""

    def __init__(self, vision_width: int, lm_width: int, config: ConnectorConfig):
        super().__init__()
        swiglu = config.kind == "mamba2-advanced"
        self.mlp = nn.Sequential(nn.Linear(vision_width, lm_width), nn.GELU())
        self.bidirectional_mamba = _ScanBlocks(lm_width, config, swiglu)
        self.projector = ThreeLayerMLP(lm_width, lm_width)

    def forward(self, features: Tensor) -> Tensor:
        """(B, h, w, vision width) -> (B, h * w, language width)."""
        return self.projector(self.bidirectional_mamba(self.mlp(features)))


class ThreeLayerMLP(nn.Module):
    """Three linear layers on each patch; also the whole of the connector without a scan (and Cobra's)."""

    def __init__(self, vision_width: int, lm_width: int):
        super().__init__()
        hidden = 4 * vision_width
        self.projector = nn.Sequential(
            nn.Linear(vision_width, hidden),
            nn.GELU(),
            nn.Linear(hidden, lm_width),
            nn.GELU(),
            nn.Linear(lm_width, lm_width),
        )
        for layer in self.projector[::2]:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(B, h, w, vision width) -> (B, h * w, language width)."""
        return self.projector(features).flatten(1, 2)


class _ScanBlocks(nn.Module):
    def __init__(self, width: int, config: ConnectorConfig, swiglu: bool):
        super().__init__()
        self.layers = nn.ModuleList(_ScanBlock(width, config, swiglu) for _ in range(config.n_layer))
        self.norm_f = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm_f(x)


class _ScanBlock(nn.Module):
    """`a = x + scan(x)`, without a norm before the scan, as released; then `a + SwiGLU(Norm(a))`."""

    def __init__(self, width: int, config: ConnectorConfig, swiglu: bool):
        super().__init__()
        self.mixer = GridMamba2(width, config)
        self.norm = nn.LayerNorm(width) if swiglu else None
        self.mlp = _SwiGLU(width) if swiglu else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x)
        return x if self.mlp is None else x + self.mlp(self.norm(x))


class _SwiGLU(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class GridMamba2(Mamba2):
    """A Mamba-2 mixer over a grid. Projections and gated norm are shared by the directions; the rest each has its own.

    What is projected is convolved and scanned along each direction, gated and normalised; the directions' results are averaged
    at each place and projected back.
    """

    def __init__(self, width: int, config: ConnectorConfig):
        super().__init__(
            width, config.d_state or 128, config.d_conv, config.expand, config.headdim, config.ngroups,
            chunk_size=config.chunk_size,
        )  # fmt: skip
        self.directions = config.directions
        for suffix in (SUFFIXES[r] for r in self.directions if SUFFIXES[r]):
            self.register_module(f"conv1d{suffix}", depthwise_conv(self.d_conv_channels, config.d_conv, True))
            for name in ("dt_bias", "A_log", "D"):
                self.register_parameter(name + suffix, without_weight_decay(getattr(self, name).detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h, w, D)."""
        z, xBC, dt = self.in_proj(x).split([self.d_inner, self.d_conv_channels, self.nheads], dim=-1)
        names = ["conv1d" + SUFFIXES[r] for r in self.directions]
        weight, bias = map(torch.stack, zip(*(conv_weight(n, getattr(self, n)) for n in names), strict=True))
        # Apart, so that x has its heads side by side and the scan reads it where it is.
        sizes = [self.d_inner, self.d_conv_channels - self.d_inner]
        parts = zip(xBC.split(sizes, 3), weight.split(sizes, 1), bias.split(sizes, 1), strict=True)
        x, BC = (cross_causal_conv1d(*part, "silu", self.directions) for part in parts)  # (B, h, w, K, ...)
        B, C = BC.unflatten(-1, (2, self.ngroups, self.d_state)).unbind(-3)
        y = cross_ssd(
            x.unflatten(-1, (self.nheads, self.headdim)),
            dt.unsqueeze(3).expand(-1, -1, -1, len(self.directions), -1),
            -torch.exp(self._of_each_route("A_log").float()),
            B,
            C,
            self._of_each_route("D"),
            self._of_each_route("dt_bias"),
            True,
            self.dt_limit,
            self.directions,
            chunk_size=self.chunk_size,
        ).flatten(-2)
        y = self.norm(y, z.unsqueeze(3).expand_as(y))
        return self.out_proj(y.mean(3))

    def _of_each_route(self, name: str) -> Tensor:
        return torch.stack([getattr(self, name + SUFFIXES[r]) for r in self.directions])
