"""The ops along directions on permuted copies, for the fast backend without kernels that read along a direction.

Each runs cross-scan, the op in time with the directions as groups, and cross-merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .._core.dispatch import Backend
from .._core.sharding import local
from ..causal_conv1d import causal_conv1d
from ..selective_scan import selective_scan
from ..ssd import ssd
from .directions import ScanDirection
from .pytorch import cross_merge, cross_scan


def cross_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Literal["silu"] | None,
    directions: Sequence[ScanDirection],
    backend: Backend,
) -> Tensor:
    """x (B, height, width, E), weight (K, E, W), bias (K, E) -> (B, height, width, K, E)."""
    height, width = x.shape[1:3]
    x = cross_scan(x, tuple(directions))  # (B, K, L, E)
    x = x.transpose(1, 2).flatten(2)  # (B, L, K * E)
    bias = None if bias is None else bias.flatten()
    y, _ = local(causal_conv1d)(x, weight.flatten(0, 1), bias, activation, backend=backend)
    return _to_grid(y.unflatten(2, weight.shape[:2]), height, width, directions)


def cross_selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    directions: Sequence[ScanDirection],
    backend: Backend,
) -> Tensor:
    """Scan u (B, height, width, E) along each direction and add: (B, height, width, E).

    dt is (B, height, width, K, E), A (K * E, N), B and C (B, height, width, K, N), D and dt_bias (K * E,).
    """
    height, width, dim = u.shape[1:]
    u = cross_scan(u, tuple(directions)).transpose(1, 2).flatten(2)  # (B, L, K * E)
    dt, B, C = (_to_steps(m, directions) for m in (dt, B, C))  # (B, L, K, ...)
    y, _ = local(selective_scan)(u, dt.flatten(2), A, B, C, D, None, dt_bias, dt_softplus, backend=backend)
    y = y.unflatten(2, (len(directions), dim)).transpose(1, 2)  # (B, K, L, E)
    return cross_merge(y, height, width, tuple(directions))


def cross_ssd(
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
    backend: Backend,
) -> Tensor:
    """Scan each slice of x (B, height, width, K, H, P) along its own direction.

    dt is (B, height, width, K, H), A and dt_bias (K * H,), B and C (B, height, width, K, G, N), D (K * H,) or
    (K * H, P).
    """
    height, width, k, heads = x.shape[1:5]
    x, dt, B, C = (_to_steps(m, directions).flatten(2, 3) for m in (x, dt, B, C))  # (B, L, K * H, P), ...
    y, _ = local(ssd)(x, dt, A, B, C, D, None, dt_bias, dt_softplus, dt_limit, chunk_size=chunk_size, backend=backend)
    return _to_grid(y.unflatten(2, (k, heads)), height, width, directions)


def _to_steps(x: Tensor, directions: Sequence[ScanDirection]) -> Tensor:
    """(B, height, width, K, ...) -> (B, L, K, ...), each slice in the order of its own direction."""
    slices = [
        cross_scan(part.flatten(3), (direction,))[:, 0]  # (B, L, ...)
        for part, direction in zip(x.unbind(3), directions, strict=True)
    ]
    return torch.stack(slices, 2).unflatten(3, x.shape[4:])


def _to_grid(y: Tensor, height: int, width: int, directions: Sequence[ScanDirection]) -> Tensor:
    """(B, L, K, ...) -> (B, height, width, K, ...), the inverse of `_to_steps`."""
    slices = [
        cross_merge(part.flatten(2).unsqueeze(1), height, width, (direction,))  # (B, height, width, ...)
        for part, direction in zip(y.unbind(2), directions, strict=True)
    ]
    return torch.stack(slices, 3).unflatten(4, y.shape[3:])
