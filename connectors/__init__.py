"""Connectors: patch features of an image to tokens of the language model's width."""

from __future__ import annotations

from torch import nn

from .config import VSS, ConnectorConfig, Kind, Scan
from .mamba2_scan import GridMamba2, Mamba2ScanConnector, ThreeLayerMLP
from .vss import SS2D, DirectionalMamba, MLPConnector, VSSL2Connector, VSSMLPConnector

__all__ = [
    "SS2D",
    "VSS",
    "ConnectorConfig",
    "DirectionalMamba",
    "GridMamba2",
    "Kind",
    "MLPConnector",
    "Mamba2ScanConnector",
    "Scan",
    "ThreeLayerMLP",
    "VSSL2Connector",
    "VSSMLPConnector",
    "build_connector",
]


def build_connector(config: ConnectorConfig, vision_width: int, lm_width: int) -> nn.Module:
    """Build a connector with new weights.

    Args:
        config: kind and sizes.
        vision_width: width of the patch features.
        lm_width: width of the language model.

    Returns:
        A module: (B, h, w, vision_width) -> (B, h * w, lm_width), patches row by row.
    """
    if config.kind == "mlp":
        return MLPConnector(vision_width, lm_width)
    if config.kind == "mamba2-mlp":
        return ThreeLayerMLP(vision_width, lm_width)
    if config.kind in ("vss-mlp", "vss-l2"):
        connector = VSSMLPConnector if config.kind == "vss-mlp" else VSSL2Connector
        return connector(vision_width, lm_width, config)
    return Mamba2ScanConnector(vision_width, lm_width, config)
