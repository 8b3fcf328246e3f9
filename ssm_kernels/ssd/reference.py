"""The recurrence of Mamba-2 as it is defined: one step after the other. The ground truth of the other backends."""

from __future__ import annotations

import torch
from torch import Tensor

from .._core.varlen import parse_sequences


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x (B, L, H, P); dt (B, L, H); A (H,); B, C (B, L, G, N) -> y like x and final states (rows, H, P, N)."""
    batch, length, heads, headdim = x.shape
    n = B.shape[3]
    sequences = parse_sequences(batch, length, cu_seqlens, seq_idx)
    dtype = A.dtype
    x, dt = (m.to(dtype).flatten(0, 1) for m in (x, dt))  # (B * L, H, P), (B * L, H)
    B, C = (m.to(dtype).flatten(0, 1).repeat_interleave(heads // m.shape[2], dim=1) for m in (B, C))  # (B * L, H, N)

    begins = {s: row for row, s in enumerate(sequences.initial_sequences)}
    ys, ends = [A.new_zeros(heads, headdim)] * (batch * length), []
    for s, (start, n_steps) in enumerate(zip(sequences.starts, sequences.lengths, strict=True)):
        state = A.new_zeros(heads, headdim, n)
        if initial_states is not None and s in begins:
            state = initial_states[begins[s]].to(dtype)
        for t in range(start, start + n_steps):
            decay = torch.exp(dt[t] * A)[:, None, None]
            state = decay * state + (dt[t, :, None] * x[t])[:, :, None] * B[t, :, None, :]
            ys[t] = (state * C[t, :, None, :]).sum(-1)
        ends.append(state)
    y = torch.stack(ys).unflatten(0, (batch, length)) if ys else A.new_zeros(batch, length, heads, headdim)
    states = [ends[s] for s in sequences.final_sequences]
    return y, torch.stack(states) if states else A.new_zeros(0, heads, headdim, n)
