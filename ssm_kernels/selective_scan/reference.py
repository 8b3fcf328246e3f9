"""The selective scan as it is defined, step by step. The ground truth of the other backends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.varlen import parse_sequences, without_padding


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scan step by step (arXiv 2312.00752, equation 2 and algorithm 2).

    Args:
        u, dt, z: (B, L, D).
        A: (D, N).
        B, C: (B, L, G, N), each with its own G, or (D, N) where constant in time.
        D, dt_bias: (D,).
        dt_softplus: whether `dt` passes through softplus, after the bias.
        initial_states: (rows, D, N).
        cu_seqlens, seq_idx: as in `ssm_kernels.selective_scan`.

    Returns:
        y (B, L, D) in the dtype of u, and the final states (rows, D, N) in float32, or float64 where u is.
    """
    batch, length, dim = u.shape
    dtype = torch.promote_types(u.dtype, torch.float32)
    sequences = parse_sequences(batch, length, cu_seqlens, seq_idx)
    u, dt = (without_padding(x, cu_seqlens, seq_idx) for x in (u, dt))
    z = None if z is None else without_padding(z, cu_seqlens, seq_idx)

    # Algorithm 2: dt = softplus(parameter + projection).
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)

    A = A.to(dtype)
    B, C = (_per_channel(m.to(dtype), batch * length, dim) for m in (B, C))  # (B * L, D, N)
    us, dts = (x.to(dtype).flatten(0, 1) for x in (u, dt))  # (B * L, D)
    row_of_start = {s: row for row, s in enumerate(sequences.initial_sequences)}
    ys, final_states = [A.new_zeros(dim)] * (batch * length), []
    for s, (start, n_steps) in enumerate(zip(sequences.starts, sequences.lengths, strict=True)):
        h = torch.zeros_like(A)  # (D, N)
        if initial_states is not None and s in row_of_start:
            h = initial_states[row_of_start[s]].to(dtype)
        for t in range(start, start + n_steps):
            # Equation 2a, with A-bar = exp(dt A) and B-bar = dt B.
            h = torch.exp(dts[t, :, None] * A) * h + (dts[t] * us[t])[:, None] * B[t]  # (D, N)
            # Equation 2b.
            ys[t] = (C[t] * h).sum(-1)
        final_states.append(h)
    y = torch.stack(ys).view(batch, length, dim) if ys else A.new_zeros(batch, length, dim)  # (B, L, D)

    # Skip connection, and the gate of the Mamba block (figure 3).
    if D is not None:
        y = y + D.to(dtype) * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    states = [final_states[s] for s in sequences.final_sequences]
    return y.to(u.dtype), torch.stack(states) if states else A.new_zeros(0, *A.shape)


def _per_channel(m: Tensor, total: int, dim: int) -> Tensor:
    """B or C, (B, L, G, N) or (D, N), for each step and channel: (B * L, D, N)."""
    if m.dim() == 2:
        return m.expand(total, -1, -1)
    return m.flatten(0, 1).repeat_interleave(dim // m.shape[2], dim=1)
