"""Selective scan in Triton: registration of the ops. The modules with kernels are imported when an op first runs."""

from __future__ import annotations

from torch import Tensor

from ..._triton.segment_table import max_segments
from ..registration import ScanKernels

CHECKPOINT_INTERVAL = 64
"""Steps between two states that the forward saves for the backward, which recomputes the states between them."""


def _checkpoint_shape(u: Tensor, A: Tensor, rows: int, packed: bool) -> tuple:
    """(checkpoints, D, N)"""
    batch, length = u.shape[:2]
    # One more than needed, so that tracing with a dynamic length need not know whether there is only one.
    return max_segments(batch, length, rows, CHECKPOINT_INTERVAL, packed) + 1, *A.shape


kernels = ScanKernels("selective_scan_triton", __name__, _checkpoint_shape)
selective_scan, grouped_selective_scan = kernels.selective_scan, kernels.grouped_selective_scan
selective_scan_step = kernels.selective_scan_step
