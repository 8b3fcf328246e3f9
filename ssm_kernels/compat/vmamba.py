"""VMamba's scans over images under the names of its code (`csm_triton.py`, `csms6s.py`).

Each project has its own copy of the two files; change its imports::

    from .csm_triton import cross_scan_fn, cross_merge_fn  # before
    from ssm_kernels.compat.vmamba import cross_scan_fn, cross_merge_fn  # after

Letters: B batch, C channels, H height, W width, L = H W, N state, K = 4 directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cross_scan import CROSS, cross_merge, cross_scan
from .mamba_ssm import selective_scan_fn as _selective_scan_fn
from .mamba_ssm._shared import single

_DIRECTIONS = {0: CROSS, 1: ("rows",) * 4, 2: ("rows", "rows", "rows_reversed", "rows_reversed")}


def cross_scan_fn(
    x: Tensor,
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: int = 0,
    force_torch: bool = False,
) -> Tensor:
    """Read a grid along four directions.

    Args:
        x: (B, C, H, W), or (B, H, W, C) where not `in_channel_first`; with `one_by_one`, a grid for each direction:
            (B, 4, C, H, W), or (B, H, W, 4, C).
        out_channel_first: return (B, 4, C, L), rather than (B, L, 4, C).
        scans: 0 rows, columns and both reversed; 1 rows four times; 2 rows and reversed rows, twice each.
        force_torch: the original's choice of backend; no effect here. See `ssm_kernels.use_backend`.

    Returns:
        (B, 4, C, L), or (B, L, 4, C).
    """
    directions = _directions(scans)
    if one_by_one:
        x = x.permute(0, 1, 3, 4, 2) if in_channel_first else x.permute(0, 3, 1, 2, 4)  # (B, 4, H, W, C)
        each = zip(x.unbind(1), directions, strict=True)
        y = torch.cat([cross_scan(grid, (direction,)) for grid, direction in each], 1)
    else:
        y = cross_scan(x.permute(0, 2, 3, 1) if in_channel_first else x, directions)
    # (B, 4, L, C) -> (B, 4, C, L) or (B, L, 4, C)
    return y.transpose(2, 3) if out_channel_first else y.transpose(1, 2)


def cross_merge_fn(
    y: Tensor,
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: int = 0,
    force_torch: bool = False,
) -> Tensor:
    """Write sequences along four directions back to the grid, and sum: the adjoint of `cross_scan_fn`.

    Args:
        y: (B, 4, C, H, W), or (B, H, W, 4, C) where not `out_channel_first`, as `cross_scan_fn` returns it.
        in_channel_first: return (B, C, L), rather than (B, L, C).
        one_by_one: return a grid for each direction, not summed: (B, 4, C, L), or (B, L, 4, C).
        scans, force_torch: as in `cross_scan_fn`.

    Returns:
        (B, C, L), or as `in_channel_first` and `one_by_one` say.
    """
    directions = _directions(scans)
    y = y.permute(0, 1, 3, 4, 2) if out_channel_first else y.permute(0, 3, 1, 2, 4)  # (B, 4, H, W, C)
    height, width = y.shape[2:4]
    y = y.flatten(2, 3)  # (B, 4, L, C)
    if one_by_one:
        each = zip(y.unbind(1), directions, strict=True)
        x = torch.stack([cross_merge(read.unsqueeze(1), height, width, (direction,)) for read, direction in each], 1)
        x = x.flatten(2, 3)  # (B, 4, L, C)
        return x.transpose(2, 3) if in_channel_first else x.transpose(1, 2)
    x = cross_merge(y, height, width, directions).flatten(1, 2)  # (B, L, C)
    return x.transpose(1, 2) if in_channel_first else x


class CrossScan:
    """`CrossScan.apply(x)` of `csms6s.py`: x (B, C, H, W) -> (B, 4, C, L)."""

    @staticmethod
    def apply(x: Tensor) -> Tensor:
        """`cross_scan_fn` with its defaults."""
        return cross_scan_fn(x)


class CrossMerge:
    """`CrossMerge.apply(ys)` of `csms6s.py`: ys (B, 4, C, H, W) -> (B, C, L)."""

    @staticmethod
    def apply(ys: Tensor) -> Tensor:
        """`cross_merge_fn` with its defaults."""
        return cross_merge_fn(ys)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    oflex: bool = True,
    backend: str | None = None,
) -> Tensor:
    """The scan of all directions side by side, with gradients.

    Args:
        u, delta: (B, K C, L). A: (K C, N). B, C: (B, K, N, L). D, delta_bias: (K C,).
        delta_softplus: pass delta (after the bias) through softplus.
        oflex: return float32 where u is narrower.
        backend: names an extension of the original; no effect here. See `ssm_kernels.use_backend`.

    Returns:
        (B, K C, L).
    """
    u = u.to(torch.promote_types(u.dtype, torch.float32)) if oflex else u
    return single(_selective_scan_fn(u, delta, A, B, C, D, None, delta_bias, delta_softplus))


def _directions(scans: int) -> tuple:
    if scans not in _DIRECTIONS:
        raise ValueError(f"scans must be 0, 1 or 2, got {scans!r}")
    return _DIRECTIONS[scans]
