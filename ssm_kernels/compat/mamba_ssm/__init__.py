"""The names, signatures and layouts of `mamba_ssm` 2.3 and `causal_conv1d` 1.6 on the ops of this package.

To port existing code, change its imports::

    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # before
    from ssm_kernels.compat.mamba_ssm import selective_scan_fn  # after

Unmodified code finds them under the original names after `ssm_kernels.compat.install()`.

Everything runs on a CPU too. An unsupported argument is refused by name, with a `ValueError` where the original refuses
it too and a `NotImplementedError` where it does not. Where the originals drop a gradient (`return_last_state`), it
flows here. As there, the two `*_update` functions have none. Each function whose name ends in `_ref` computes the same
as its equation reads, in float32 at least: slow, and the ground truth of the others' tests.
"""

from ._shared import _rows as _rows
from .causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
    causal_conv1d_varlen_states,
    causal_conv1d_varlen_states_ref,
)
from .layer_norm import layer_norm_fn, layer_norm_linear_fn, layer_norm_ref, rms_norm_fn, rms_norm_ref
from .layernorm_gated import layernorm_fn, rmsnorm_fn
from .modules import MHA, Block, GatedMLP, InferenceParams, Mamba, Mamba2, Mamba2Simple, Mamba3
from .selective_scan import (
    bimamba_inner_fn,
    bimamba_inner_ref,
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
)
from .ssd import (
    mamba_chunk_scan,
    mamba_chunk_scan_combined,
    mamba_conv1d_scan_ref,
    mamba_split_conv1d_scan_combined,
    mamba_split_conv1d_scan_ref,
    ssd_chunk_scan_combined_ref,
    ssd_minimal_discrete,
    ssd_selective_scan,
)
from .state_update import selective_state_update, selective_state_update_ref

__all__ = [
    "MHA",
    "Block",
    "GatedMLP",
    "InferenceParams",
    "Mamba",
    "Mamba2",
    "Mamba2Simple",
    "Mamba3",
    "bimamba_inner_fn",
    "bimamba_inner_ref",
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
    "causal_conv1d_varlen_states",
    "causal_conv1d_varlen_states_ref",
    "layer_norm_fn",
    "layer_norm_linear_fn",
    "layer_norm_ref",
    "layernorm_fn",
    "mamba_chunk_scan",
    "mamba_chunk_scan_combined",
    "mamba_conv1d_scan_ref",
    "mamba_inner_fn",
    "mamba_inner_fn_no_out_proj",
    "mamba_inner_ref",
    "mamba_split_conv1d_scan_combined",
    "mamba_split_conv1d_scan_ref",
    "rms_norm_fn",
    "rms_norm_ref",
    "rmsnorm_fn",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
    "selective_state_update_ref",
    "ssd_chunk_scan_combined_ref",
    "ssd_minimal_discrete",
    "ssd_selective_scan",
]
