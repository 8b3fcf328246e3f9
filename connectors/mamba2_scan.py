"""ML-Mamba's Mamba-2 Scan Connector (arXiv 2407.19832, section 3.3), with the parameter names of its checkpoint.

Letters: B batch, h and w the grid of patches, D width, E inner width, N state, H heads, P head dimension, G groups,
K scan directions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_kernels import ScanDirection, cross_causal_conv1d, cross_ssd
from ssm_kernels.modules import Mamba2, conv_weight, decay_rate, depthwise_conv, without_weight_decay

from .config import ConnectorConfig

SUFFIXES: dict[ScanDirection, str] = {"rows": "", "rows_reversed": "_b", "columns": "_c", "columns_reversed": "_cb"}
"""Suffixes of the parameters that each direction has for itself.

The checkpoint has the first two, rows forward and backward. Those of the columns are ours.
"""


class Mamba2ScanConnector(nn.Module):
    """Project to the language model's width, scan the grid with Mamba-2 blocks in several directions, then an MLP.

    Args:
        vision_width: width of the patch features.
        lm_width: width of the language model.
        config: sizes of the blocks. `mamba2-advanced` adds a SwiGLU to each.
    """

    def __init__(self, vision_width: int, lm_width: int, config: ConnectorConfig):
        super().__init__()
        swiglu = config.kind == "mamba2-advanced"
        self.mlp = nn.Sequential(nn.Linear(vision_width, lm_width), nn.GELU())
        self.bidirectional_mamba = _ScanBlocks(lm_width, config, swiglu)
        self.projector = ThreeLayerMLP(lm_width, lm_width)

    def forward(self, features: Tensor) -> Tensor:
        """Project patch features to tokens.

        Args:
            features: (B, h, w, vision_width).

        Returns:
            (B, h * w, lm_width).
        """
        x = self.mlp(features)  # (B, h, w, lm_width)
        x = self.bidirectional_mamba(x)  # (B, h, w, lm_width)
        return self.projector(x)  # (B, h * w, lm_width)


class ThreeLayerMLP(nn.Module):
    """Three linear layers on each patch. Without a scan before them, they are the connector of Cobra.

    Args:
        vision_width: width of the patch features.
        lm_width: width of the language model.
    """

    def __init__(self, vision_width: int, lm_width: int):
        super().__init__()
        hidden = 4 * vision_width
        layers = [nn.Linear(vision_width, hidden), nn.Linear(hidden, lm_width), nn.Linear(lm_width, lm_width)]
        self.projector = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        for layer in layers:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Project patch features to tokens.

        Args:
            features: (B, h, w, vision_width).

        Returns:
            (B, h * w, lm_width).
        """
        return self.projector(features).flatten(1, 2)  # (B, h * w, lm_width)


class _ScanBlocks(nn.Module):
    def __init__(self, width: int, config: ConnectorConfig, swiglu: bool):
        super().__init__()
        self.layers = nn.ModuleList(_ScanBlock(width, config, swiglu) for _ in range(config.n_layer))
        self.norm_f = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)  # (B, h, w, D)
        return self.norm_f(x)


class _ScanBlock(nn.Module):
    """`a = x + scan(x)`, without a norm before the scan, as released; then `a + SwiGLU(Norm(a))`."""

    def __init__(self, width: int, config: ConnectorConfig, swiglu: bool):
        super().__init__()
        self.mixer = GridMamba2(width, config)
        self.norm = nn.LayerNorm(width) if swiglu else None
        self.mlp = _SwiGLU(width) if swiglu else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x)  # (B, h, w, D)
        if self.norm is None or self.mlp is None:
            return x
        return x + self.mlp(self.norm(x))  # (B, h, w, D)


class _SwiGLU(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class GridMamba2(Mamba2):
    """Mamba-2 mixer over a grid in K directions.

    The directions share the projections and the gated norm; convolution, dt bias, A and D are separate. The results
    of the directions are gated, normalized and averaged before the output projection.

    Args:
        width: width D of the features.
        config: directions and sizes.
    """

    def __init__(self, width: int, config: ConnectorConfig):
        super().__init__(
            width,
            config.d_state or 128,
            config.d_conv,
            config.expand,
            config.headdim,
            config.ngroups,
            chunk_size=config.chunk_size,
        )
        self.directions = config.directions
        # The first direction has the parameters of `Mamba2` itself.
        for suffix in (SUFFIXES[d] for d in self.directions if SUFFIXES[d]):
            self.register_module(f"conv1d{suffix}", depthwise_conv(self.d_conv_channels, config.d_conv, True))
            for name in ("dt_bias", "A_log", "D"):
                self.register_parameter(name + suffix, without_weight_decay(getattr(self, name).detach().clone()))

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  a grid, no state
        """Mix the patches of a grid.

        Args:
            x: (B, h, w, D) features.

        Returns:
            (B, h, w, D).
        """
        # z (B, h, w, E), xBC (B, h, w, E + 2GN), dt (B, h, w, H)
        z, xBC, dt = self.in_proj(x).split([self.d_inner, self.d_conv_channels, self.nheads], dim=-1)

        names = ["conv1d" + SUFFIXES[d] for d in self.directions]
        weight, bias = map(torch.stack, zip(*(conv_weight(n, getattr(self, n)) for n in names), strict=True))
        # Two convolutions, so that the heads of x are contiguous and the scan reads them without a copy.
        sizes = [self.d_inner, self.d_conv_channels - self.d_inner]
        parts = zip(xBC.split(sizes, 3), weight.split(sizes, 1), bias.split(sizes, 1), strict=True)
        x, BC = (cross_causal_conv1d(*part, "silu", self.directions) for part in parts)  # (B, h, w, K, ...)
        B, C = BC.unflatten(-1, (2, self.ngroups, self.d_state)).unbind(-3)  # (B, h, w, K, G, N) each

        y = cross_ssd(
            x.unflatten(-1, (self.nheads, self.headdim)),  # (B, h, w, K, H, P)
            dt.unsqueeze(3).expand(-1, -1, -1, len(self.directions), -1),  # (B, h, w, K, H)
            decay_rate(self._per_direction("A_log")),  # (K, H)
            B,
            C,
            self._per_direction("D"),  # (K, H)
            self._per_direction("dt_bias"),  # (K, H)
            True,
            self.dt_limit,
            self.directions,
            chunk_size=self.chunk_size,
        ).flatten(-2)  # (B, h, w, K, E)
        y = self.norm(y, z.unsqueeze(3).expand_as(y))  # (B, h, w, K, E)
        return self.out_proj(y.mean(3))  # (B, h, w, D)

    def _per_direction(self, name: str) -> Tensor:
        """Stack a parameter of all directions, (K, ...)."""
        return torch.stack([getattr(self, name + SUFFIXES[d]) for d in self.directions])
