"""Arguments and gradients of the compiled SSD and its backward, by name, in the order of their schemas.

Letters: B batch, L length, H heads, P head dimension, N state, G groups, S sequences in a pack.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ScanArguments(NamedTuple):
    """Arguments of the scan as `ssd` documents them, in canonical form."""

    x: Tensor
    """(B, L, H, P)"""
    dt: Tensor
    """(B, L, H)"""
    A: Tensor
    """(H,)"""
    B: Tensor
    """(B, L, G, N)"""
    C: Tensor
    """(B, L, G, N)"""
    D: Tensor | None
    """(H, P), or (H, 1) for one weight a head."""
    dt_bias: Tensor | None
    """(H,)"""
    dt_softplus: bool
    dt_min: float
    dt_max: float
    initial_states: Tensor | None
    """(B, H, P, N), or (S, H, P, N) with `cu_seqlens`."""
    chunk_size: int
    cu_seqlens: Tensor | None
    """(S + 1,)"""
    seq_idx: Tensor | None
    """(B, L)"""
    directions: list[int]
    """Scan direction codes, one for each run of groups; empty for a scan in time."""
    height: int
    """Rows of the grid that `directions` traverse."""
    out_dtype: torch.dtype
    """dtype of y."""
    input_weights: Tensor | None
    """(B, L, H) weights of the inputs, in place of dt."""


SCHEMA = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, bool dt_softplus,"
    " float dt_min, float dt_max, Tensor? initial_states, int chunk_size, Tensor? cu_seqlens, Tensor? seq_idx,"
    " int[] directions, int height, ScalarType out_dtype, Tensor? input_weights"
)
"""`ScanArguments` in the language of `torch.library`."""

TENSORS = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_states", "cu_seqlens", "seq_idx", "input_weights")
"""Fields of `ScanArguments` that hold tensors."""


class ScanGradients(NamedTuple):
    """Gradients of the differentiable arguments; an empty tensor where the argument is None."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    dt_bias: Tensor
    initial_states: Tensor
    input_weights: Tensor
