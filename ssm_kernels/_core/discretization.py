"""Step sizes, skip connection and gate of the scans, for the fast PyTorch paths. The references have their own."""

from __future__ import annotations

import torch
from torch import Tensor

from .invariant import silu, softplus


def step_size(
    dt: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dtype: torch.dtype,
    dt_limit: tuple[float, float] | None = None,
) -> Tensor:
    """Return the step size `clamp(softplus(dt + dt_bias), *dt_limit)` in `dtype`.

    Args:
        dt: (..., H) raw step.
        dt_bias: (H,) added to `dt`, or None.
        dt_softplus: whether to apply softplus.
        dtype: dtype of the arithmetic and of the result.
        dt_limit: lowest and highest step, or None for no limit.
    """
    # Algorithm 2 of arXiv 2312.00752: dt = softplus(parameter + projection).
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = softplus(dt)
    # softplus is in (0, inf): limits of that range need no pass over memory.
    if dt_limit is None or (dt_softplus and dt_limit == (0.0, float("inf"))):
        return dt
    return dt.clamp(*dt_limit)


def skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """Return `(y + D u) silu(z)` in the dtype of u, computed in that of y.

    Args:
        y: output of the recurrence, of the shape of u.
        u: input of the scan.
        D: skip weights, broadcast over u, or None.
        z: gate, of the shape of u, or None.
    """
    if D is not None:
        y = y + D.to(y.dtype) * u
    if z is not None:
        y = y * silu(z.to(y.dtype))
    return y.to(u.dtype)
