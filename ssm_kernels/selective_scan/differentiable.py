"""The selective scan in PyTorch operations alone: the formula of the derivatives that no kernel has.

All states are in memory at once: it is for second derivatives and forward-mode AD, not for speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.differentiable import PaddedSequences, linear_recurrence, softplus, steps_along, take_steps


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    directions: Sequence[int] = (),
    height: int = 1,
) -> tuple[Tensor, Tensor]:
    """Scan with the arguments of `ScanArguments`.

    Returns:
        y (B, L, G, E) and the final states (rows, G * E, N), in float32, or float64 where u is.
    """
    length, groups, channels = u.shape[1:]
    dtype = torch.promote_types(u.dtype, torch.float32)
    order = steps_along(directions, height, length, u.device) if directions else None  # (L, G)
    packing = PaddedSequences(u, cu_seqlens, seq_idx)

    def to_steps(x: Tensor) -> Tensor:
        x = x if order is None else take_steps(x, order)
        return packing.gather(x).to(dtype)

    def by_group(x: Tensor) -> Tensor:
        return x.to(dtype).unflatten(-1 if x.dim() == 1 else -2, (groups, channels))  # (..., G, E) or (..., G, E, N)

    def matrix(m: Tensor) -> Tensor:
        """(S, T, G, 1, N), or (G, E, N) where constant in time."""
        return by_group(m) if m.dim() == 2 else to_steps(m).unsqueeze(3)

    u, dt = to_steps(u), to_steps(dt)  # (S, T, G, E)
    if dt_bias is not None:
        dt = dt + by_group(dt_bias)
    dt = softplus(dt) if dt_softplus else dt
    dt = dt.masked_fill(~packing.has_step(dt), 0)  # a state stays as it is

    # Equation 2a of arXiv 2312.00752, with A-bar = exp(dt A) and B-bar = dt B.
    decay = torch.exp(dt.unsqueeze(-1) * by_group(A))  # (S, T, G, E, N)
    inputs = (dt * u).unsqueeze(-1) * matrix(B)
    if initial_states is None:
        initial = inputs.new_zeros(len(inputs), *decay.shape[2:])
    else:
        initial = packing.initial(by_group(initial_states))  # (S, G, E, N)
    states = linear_recurrence(decay, inputs, initial)  # (S, T, G, E, N)
    final_states = states[:, -1] if states.shape[1] else initial
    y = (states * matrix(C)).sum(-1)  # (S, T, G, E), equation 2b
    if D is not None:
        y = y + by_group(D) * u
    if z is not None:
        y = y * F.silu(to_steps(z))
    y = packing.scatter(y)  # (B, L, G, E)
    y = y if order is None else take_steps(y, order.argsort(0))
    return y, packing.final(final_states).flatten(1, 2)
