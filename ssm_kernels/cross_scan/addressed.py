"""The ops along directions without permuted copies: kernels read each step where it is in the grid.

An implementation is a module of kernels of the op that takes directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .directions import ScanDirection, direction_codes


def cross_causal_conv1d(
    implementation: ModuleType,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    directions: Sequence[ScanDirection],
) -> Tensor:
    """x (B, height, width, E), weight (K, E, W), bias (K, E) -> (B, height, width, K, E)."""
    height, width = x.shape[1:3]
    x = _for_each_direction(x, len(directions))  # (B, L, K, E)
    bias = None if bias is None else bias.flatten()
    codes = direction_codes(directions)
    y = implementation.grouped_causal_conv1d(x, weight.flatten(0, 1), bias, silu, codes, height)
    return y.unflatten(1, (height, width))


def cross_selective_scan(
    implementation: ModuleType,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    directions: Sequence[ScanDirection],
) -> Tensor:
    """Scan with the arguments of `permuted.cross_selective_scan`, and the same result."""
    height, width = u.shape[1:3]
    dt, B, C = (m.flatten(1, 2) for m in (dt, B, C))  # (B, L, K, ...)
    y, _ = implementation.grouped_selective_scan(
        _for_each_direction(u, len(directions)), dt, A, B, C, D, None, dt_bias, dt_softplus, None, None, None,
        direction_codes(directions), height,
    )  # fmt: skip
    y = y.sum(2, dtype=torch.promote_types(u.dtype, torch.float32)).to(u.dtype)  # (B, L, E)
    return y.unflatten(1, (height, width))


def cross_ssd(
    implementation: ModuleType,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    directions: Sequence[ScanDirection],
    chunk_size: int,
) -> Tensor:
    """Scan with the arguments of `permuted.cross_ssd`, but D (K * H, 1) or (K * H, P), and the same result."""
    height, width, k, heads = x.shape[1:5]
    x, dt, B, C = (m.flatten(1, 2).flatten(2, 3) for m in (x, dt, B, C))  # (B, L, K * H, P), ...
    y, _ = implementation.ssd(
        x, dt, A, B, C, D, None, dt_bias, dt_softplus, dt_limit, None, None, None, chunk_size,
        tuple(direction_codes(directions)), height,
    )  # fmt: skip
    return y.unflatten(2, (k, heads)).unflatten(1, (height, width))


def _for_each_direction(x: Tensor, k: int) -> Tensor:
    """(B, height, width, E) -> (B, L, K, E), a view."""
    return x.flatten(1, 2).unsqueeze(2).expand(-1, -1, k, -1)
