"""Selective scan in numba on a CPU: registration of the ops. The modules with kernels are imported when an op first
runs."""

from __future__ import annotations

from torch import Tensor

from ..registration import ScanKernels

CHECKPOINT_INTERVAL = 32
"""Steps between two states that the forward saves for the backward, which recomputes the states between them."""


def max_checkpoints(u: Tensor, n_sequences: int) -> int:
    """Return at least the blocks of all sequences of u (B, L, ...), from shapes alone as tracing needs."""
    # One more, so that tracing with a dynamic length need not know whether there is only one.
    return u.shape[0] * u.shape[1] // CHECKPOINT_INTERVAL + n_sequences + 1


def _checkpoint_shape(u: Tensor, A: Tensor, rows: int, packed: bool) -> tuple:
    """(checkpoints, N, D)"""
    dim, d_state = A.shape
    return max_checkpoints(u, rows), d_state, dim


kernels = ScanKernels("selective_scan_numba", __name__, _checkpoint_shape)
selective_scan, grouped_selective_scan = kernels.selective_scan, kernels.grouped_selective_scan
selective_scan_step = kernels.selective_scan_step
