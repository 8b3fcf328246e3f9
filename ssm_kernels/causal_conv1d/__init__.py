"""Causal depthwise 1-D convolution."""

from .api import CausalConv1dOutput, causal_conv1d, causal_conv1d_step

__all__ = ["CausalConv1dOutput", "causal_conv1d", "causal_conv1d_step"]
