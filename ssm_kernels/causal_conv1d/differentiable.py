"""The causal convolution in PyTorch operations alone: the formula of the derivatives that no kernel has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.differentiable import PaddedSequences, steps_along, take_steps


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    directions: Sequence[int] = (),
    height: int = 1,
) -> tuple[Tensor, Tensor]:
    """Convolve G groups of E channels.

    Args:
        x: (B, L, G, E), in the row-major order of a grid where there are directions.
        weight: (G * E, K).
        bias: (G * E,).
        silu: whether the sums pass through SiLU.
        initial_states: (rows, K - 1, G * E).
        cu_seqlens, seq_idx: as in `ssm_kernels.causal_conv1d`.
        directions: an index in `cross_scan.CROSS` for each group.
        height: rows of the grid.

    Returns:
        y (B, L, G, E) and the final states (rows, K - 1, G * E), in float32, or float64 where x is.
    """
    groups, channels = x.shape[2:]
    width = weight.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    order = steps_along(directions, height, x.shape[1], x.device) if directions else None  # (L, G)
    packing = PaddedSequences(x, cu_seqlens, seq_idx)
    x = x if order is None else take_steps(x, order)
    x = packing.gather(x).to(dtype).flatten(2)  # (S, T, G * E)
    steps = x.shape[1]
    if initial_states is None:
        earlier = x.new_zeros(len(x), width - 1, x.shape[2])
    else:
        earlier = packing.initial(initial_states.to(dtype))  # (S, K - 1, G * E)
    inputs = torch.cat([earlier, x], 1)  # (S, K - 1 + T, G * E)
    taps = weight.to(dtype).unbind(1)
    y = sum((inputs[:, k : k + steps] * tap for k, tap in enumerate(taps)), torch.zeros_like(x))
    y = y if bias is None else y + bias.to(dtype)
    y = F.silu(y) if silu else y
    y = packing.scatter(y).unflatten(2, (groups, channels))  # (B, L, G, E)
    y = y if order is None else take_steps(y, order.argsort(0))

    last = packing.lengths[:, None] + torch.arange(width - 1, device=x.device)  # (S, K - 1)
    final_states = inputs[torch.arange(len(inputs), device=x.device)[:, None], last]  # (S, K - 1, G * E)
    return y, packing.final(final_states)
