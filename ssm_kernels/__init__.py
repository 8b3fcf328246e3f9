"""State-space model kernels: selective scan (Mamba-1), SSD (Mamba-2), Mamba-3 and what surrounds them."""

from ._core.dispatch import Backend, resolve_backend, use_backend
from ._core.slots import StateSlots
from ._core.state_format import decode_state, encode_state
from ._core.validation import NonFiniteError, has_readable_values
from .causal_conv1d import CausalConv1dOutput, causal_conv1d, causal_conv1d_step
from .context_parallel import SequenceSharding, context_parallel
from .cross_scan import (
    BIDIRECTIONAL,
    CROSS,
    ScanDirection,
    cross_causal_conv1d,
    cross_merge,
    cross_scan,
    cross_selective_scan,
    cross_ssd,
)
from .mamba3 import Mamba3Output, Mamba3States, mamba3, mamba3_step
from .norm import AddRMSNormOutput, add_rms_norm, rms_norm
from .selective_scan import SelectiveScanOutput, selective_scan, selective_scan_step
from .ssd import SSDOutput, ssd, ssd_step

__all__ = [
    "BIDIRECTIONAL",
    "CROSS",
    "AddRMSNormOutput",
    "Backend",
    "CausalConv1dOutput",
    "Mamba3Output",
    "Mamba3States",
    "NonFiniteError",
    "ScanDirection",
    "SSDOutput",
    "SelectiveScanOutput",
    "SequenceSharding",
    "StateSlots",
    "add_rms_norm",
    "causal_conv1d",
    "causal_conv1d_step",
    "context_parallel",
    "cross_causal_conv1d",
    "cross_merge",
    "cross_scan",
    "cross_selective_scan",
    "cross_ssd",
    "decode_state",
    "encode_state",
    "has_readable_values",
    "mamba3",
    "mamba3_step",
    "resolve_backend",
    "rms_norm",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_step",
    "use_backend",
]
