"""The names, signatures and layouts of `mamba_ssm` 2.3 and `causal_conv1d` 1.6 on the ops of this package.

To move existing code over, change what it imports from:

    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from ssm_kernels.compat.mamba_ssm import selective_scan_fn
"""

from .modules import Mamba, Mamba2
from .ops import (
    causal_conv1d_fn,
    causal_conv1d_update,
    layer_norm_fn,
    mamba_chunk_scan_combined,
    mamba_inner_fn,
    mamba_split_conv1d_scan_combined,
    rms_norm_fn,
    rmsnorm_fn,
    selective_scan_fn,
    selective_state_update,
)

__all__ = [
    "Mamba",
    "Mamba2",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "layer_norm_fn",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "rms_norm_fn",
    "rmsnorm_fn",
    "selective_scan_fn",
    "selective_state_update",
]
