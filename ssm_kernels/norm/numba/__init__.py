"""RMSNorm in numba on a CPU, gated or with a residual add: registration of the op.

Kernels are imported when it first runs.
"""

from __future__ import annotations

from ..registration import NormKernels

kernels = NormKernels("norm_numba", __name__)
rms_norm, add_rms_norm = kernels.rms_norm, kernels.add_rms_norm
