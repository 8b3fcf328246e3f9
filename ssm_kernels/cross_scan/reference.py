"""The ops along directions as they are defined, by tables of positions. The ground truth of the other backends."""

from __future__ import annotations

import torch
from torch import Tensor

from ..causal_conv1d import reference as conv_in_time
from ..selective_scan import reference as scan_in_time
from ..ssd import reference as ssd_in_time


def positions(direction: str, height: int, width: int) -> list[int]:
    """The position in the row-major grid that each step of a direction reads."""
    if direction.startswith("rows"):
        steps = [h * width + w for h in range(height) for w in range(width)]
    else:
        steps = [h * width + w for w in range(width) for h in range(height)]
    return steps[::-1] if direction.endswith("reversed") else steps


def cross_scan(x: Tensor, directions: tuple[str, ...]) -> Tensor:
    """x (B, height, width, D) -> (B, K, L, D)."""
    return torch.stack([_read(x, direction) for direction in directions], dim=1)


def cross_merge(y: Tensor, height: int, width: int, directions: tuple[str, ...]) -> Tensor:
    """y (B, K, L, D) -> (B, height, width, D)."""
    grid = y.new_zeros(y.shape[0], *y.shape[2:], dtype=torch.promote_types(y.dtype, torch.float32))  # (B, L, D)
    for k, direction in enumerate(directions):
        index = torch.tensor(positions(direction, height, width), dtype=torch.int64, device=y.device)
        grid = grid.index_add(1, index, y[:, k].to(grid.dtype))
    return grid.unflatten(1, (height, width)).to(y.dtype)


def cross_causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, directions: tuple[str, ...]
) -> Tensor:
    """Convolve along each direction with its own taps.

    Args:
        x: (B, height, width, E).
        weight: (K, E, W).
        bias: (K, E).
        silu: whether the sums pass through SiLU.
        directions: K names.

    Returns:
        (B, height, width, K, E) in the dtype of x.
    """
    ys = []
    for k, direction in enumerate(directions):
        bias_k = None if bias is None else bias[k]
        y, _ = conv_in_time.causal_conv1d(_read(x, direction), weight[k], bias_k, silu, None, None, None)
        ys.append(_write(y, direction, *x.shape[1:3]))
    return torch.stack(ys, 3)


def cross_selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    directions: tuple[str, ...],
) -> Tensor:
    """Scan along each direction with its own parameters, and add (VMamba, arXiv 2401.10166, section 4.3).

    Args:
        u: (B, height, width, E).
        dt: (B, height, width, K, E).
        A: (K, E, N).
        B, C: (B, height, width, K, N).
        D, dt_bias: (K, E).
        dt_softplus: whether `dt` passes through softplus, after the bias.
        directions: K names.

    Returns:
        (B, height, width, E) in the dtype of u, summed in float32 at least.
    """
    ys = []
    for k, direction in enumerate(directions):
        dt_k = _read(dt[..., k, :], direction)  # (B, L, E)
        B_k, C_k = (_read(m[..., k : k + 1, :], direction) for m in (B, C))  # (B, L, 1, N)
        D_k, bias_k = (None if m is None else m[k] for m in (D, dt_bias))  # (E,)
        y, _ = scan_in_time.selective_scan(
            _read(u, direction), dt_k, A[k], B_k, C_k, D_k, None, bias_k, dt_softplus, None, None, None
        )
        ys.append(_write(y, direction, *u.shape[1:3]))
    return torch.stack(ys).sum(0, dtype=torch.promote_types(u.dtype, torch.float32)).to(u.dtype)


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
    directions: tuple[str, ...],
) -> Tensor:
    """Scan the k-th slice of x along the k-th direction.

    Args:
        x: (B, height, width, K, H, P).
        dt: (B, height, width, K, H).
        A, dt_bias: (K, H).
        B, C: (B, height, width, K, G, N).
        D: (K, H) or (K, H, P).
        dt_softplus, dt_limit: as in `ssd`.
        directions: K names.

    Returns:
        (B, height, width, K, H, P) in the dtype of x.
    """
    ys = []
    for k, direction in enumerate(directions):
        x_k, dt_k, B_k, C_k = (_read(m[:, :, :, k], direction) for m in (x, dt, B, C))  # (B, L, H, P), ...
        D_k = None if D is None else D[k].reshape(D.shape[1], -1)  # (H, 1) or (H, P)
        bias_k = None if dt_bias is None else dt_bias[k]
        y, _ = ssd_in_time.ssd(x_k, dt_k, A[k], B_k, C_k, D_k, None, bias_k, dt_softplus, dt_limit, None, None, None)
        ys.append(_write(y, direction, *x.shape[1:3]))
    return torch.stack(ys, 3)


def _read(grid: Tensor, direction: str) -> Tensor:
    """(B, height, width, ...) -> (B, L, ...), in the order of the direction."""
    return grid.flatten(1, 2)[:, positions(direction, *grid.shape[1:3])]


def _write(y: Tensor, direction: str, height: int, width: int) -> Tensor:
    """(B, L, ...) in the order of the direction -> (B, height, width, ...)."""
    step_of = {position: step for step, position in enumerate(positions(direction, height, width))}
    return y[:, [step_of[position] for position in range(height * width)]].unflatten(1, (height, width))
