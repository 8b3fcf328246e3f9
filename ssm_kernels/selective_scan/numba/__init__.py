"""Selective scan in numba on a CPU: registration of the ops. The modules with kernels are imported when an op first
runs."""

from __future__ import annotations

from torch import Tensor

from ..._core.varlen import max_blocks
from ..registration import ScanKernels

CHECKPOINT_INTERVAL = 32
"""Steps between two states that the forward saves for the backward, which recomputes the states between them."""


def _checkpoint_shape(u: Tensor, A: Tensor, rows: int, packed: bool) -> tuple:
    """(checkpoints, N, D)"""
    dim, d_state = A.shape
    return max_blocks(u, rows, CHECKPOINT_INTERVAL), d_state, dim


kernels = ScanKernels("selective_scan_numba", __name__, _checkpoint_shape)
selective_scan, grouped_selective_scan = kernels.selective_scan, kernels.grouped_selective_scan
selective_scan_step = kernels.selective_scan_step
