"""Arguments and gradients of the compiled selective scan and its backward, by name, in the order of their schemas.

Letters: B batch, L length, G groups, E channels of a group, N states, S sequences in a pack.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ScanArguments(NamedTuple):
    """Arguments of the scan as `selective_scan` documents them, with the channels in groups."""

    u: Tensor
    """(B, L, G, E), of any strides."""
    dt: Tensor
    """(B, L, G, E), of any strides."""
    A: Tensor
    """(G * E, N)"""
    B: Tensor
    """(B, L, G, N), of any strides, or (G * E, N) where constant in time."""
    C: Tensor
    """(B, L, G, N), of any strides, or (G * E, N) where constant in time."""
    D: Tensor | None
    """(G * E,)"""
    z: Tensor | None
    """(B, L, G, E), of any strides."""
    dt_bias: Tensor | None
    """(G * E,)"""
    initial_states: Tensor | None
    """(B, G * E, N), or (S, G * E, N) with `cu_seqlens`."""
    cu_seqlens: Tensor | None
    """(S + 1,)"""
    seq_idx: Tensor | None
    """(B, L)"""
    dt_softplus: bool
    directions: list[int]
    """Scan direction code of each group; empty for a scan in time. Not for packed sequences."""
    height: int
    """Rows of the grid that `directions` traverse."""


SCHEMA = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_states,"
    " Tensor? cu_seqlens, Tensor? seq_idx, bool dt_softplus, int[] directions, int height"
)
"""`ScanArguments` in the language of `torch.library`."""

TENSORS = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states", "cu_seqlens", "seq_idx")
"""Fields of `ScanArguments` that hold tensors."""


class ScanGradients(NamedTuple):
    """Gradients of the differentiable arguments; an empty tensor where the argument is None."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor
    dt_bias: Tensor
    initial_states: Tensor
