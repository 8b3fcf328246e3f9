"""Causal convolution in numba on a CPU: registration of the ops. The kernels are imported when an op first runs."""

from __future__ import annotations

from ..registration import ConvKernels

kernels = ConvKernels("causal_conv1d_numba", __name__)
causal_conv1d, grouped_causal_conv1d = kernels.causal_conv1d, kernels.grouped_causal_conv1d
causal_conv1d_step = kernels.causal_conv1d_step
