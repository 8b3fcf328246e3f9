"""SSD as it is defined, step by step. The ground truth of the other backends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.varlen import parse_sequences, without_padding


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scan step by step (arXiv 2405.21060, equation 2, with A a scalar a head).

    Args:
        x, z: (B, L, H, P).
        dt: (B, L, H).
        A, dt_bias: (H,).
        B, C: (B, L, G, N).
        D: (H, P), or (H, 1) for one weight a head.
        dt_softplus: whether `dt` passes through softplus, after the bias.
        dt_limit: bounds that `dt` is clamped to, after the softplus.
        initial_states: (rows, H, P, N).
        cu_seqlens, seq_idx: as in `ssm_kernels.ssd`.

    Returns:
        y (B, L, H, P) in the dtype of x, and the final states (rows, H, P, N) in float32, or float64 where x is.
    """
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    sequences = parse_sequences(batch, length, cu_seqlens, seq_idx)
    x, dt = (without_padding(t, cu_seqlens, seq_idx) for t in (x, dt))
    z = None if z is None else without_padding(z, cu_seqlens, seq_idx)

    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(*dt_limit)

    A = A.to(dtype)
    xs, dts = (t.to(dtype).flatten(0, 1) for t in (x, dt))  # (B * L, H, P), (B * L, H)
    Bs, Cs = (t.to(dtype).flatten(0, 1).repeat_interleave(heads // groups, dim=1) for t in (B, C))  # (B * L, H, N)
    row_of_start = {s: row for row, s in enumerate(sequences.initial_sequences)}
    ys, final_states = [A.new_zeros(heads, headdim)] * (batch * length), []
    for s, (start, n_steps) in enumerate(zip(sequences.starts, sequences.lengths, strict=True)):
        state = A.new_zeros(heads, headdim, d_state)
        if initial_states is not None and s in row_of_start:
            state = initial_states[row_of_start[s]].to(dtype)
        for t in range(start, start + n_steps):
            # Equation 2, discretized: S_t = exp(dt A) S_{t-1} + dt x B^T.
            decay = torch.exp(dts[t] * A)[:, None, None]  # (H, 1, 1)
            state = decay * state + (dts[t, :, None] * xs[t])[:, :, None] * Bs[t, :, None, :]  # (H, P, N)
            # y_t = S_t C_t.
            ys[t] = (state * Cs[t, :, None, :]).sum(-1)  # (H, P)
        final_states.append(state)
    y = torch.stack(ys).unflatten(0, (batch, length)) if ys else A.new_zeros(x.shape)  # (B, L, H, P)

    # Skip connection and gate.
    if D is not None:
        y = y + D.to(dtype) * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    states = [final_states[s] for s in sequences.final_sequences]
    return y.to(x.dtype), torch.stack(states) if states else A.new_zeros(0, heads, headdim, d_state)
