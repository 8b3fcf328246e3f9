"""Connectors: the features of an image's patches become tokens of the language model's width."""

from __future__ import annotations

from torch import nn

from .config import ConnectorConfig, Kind
from .mamba2_scan import GridMamba2, Mamba2ScanConnector, ThreeLayerMLP
from .vss import SS2D, MLPConnector, VSSL2Connector, VSSMLPConnector

__all__ = [
    "SS2D",
    "ConnectorConfig",
    "GridMamba2",
    "Kind",
    "MLPConnector",
    "Mamba2ScanConnector",
    "ThreeLayerMLP",
    "VSSL2Connector",
    "VSSMLPConnector",
    "build_connector",
]


def build_connector(config: ConnectorConfig, vision_width: int, lm_width: int) -> nn.Module:
    """A connector: (B, h, w, vision width) -> (B, h * w, language width), patches row by row."""
    if config.kind == "mlp":
        return MLPConnector(vision_width, lm_width)
    if config.kind == "mamba2-mlp":
        return ThreeLayerMLP(vision_width, lm_width)
    if config.kind in ("vss-mlp", "vss-l2"):
        connector = VSSMLPConnector if config.kind == "vss-mlp" else VSSL2Connector
        return connector(vision_width, lm_width, config.directions, config.d_state or 16, config.expand)
    return Mamba2ScanConnector(vision_width, lm_width, config)
