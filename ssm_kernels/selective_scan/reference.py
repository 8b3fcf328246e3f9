"""The selective scan as it is defined: one step after the other. The ground truth of the other backends."""

from __future__ import annotations

import torch
from torch import Tensor

from .._core.varlen import parse_sequences


def scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """u, dt (B, L, D); A (D, N); B, C (B, L, G, N) -> y (B, L, D) and final states (rows, D, N)."""
    batch, length, dim = u.shape
    sequences = parse_sequences(batch, length, cu_seqlens, seq_idx)
    dtype = A.dtype
    u, dt = (x.to(dtype).flatten(0, 1) for x in (u, dt))  # (B * L, D)
    B, C = (m.to(dtype).flatten(0, 1).repeat_interleave(dim // m.shape[2], dim=1) for m in (B, C))  # (B * L, D, N)

    begins = {s: row for row, s in enumerate(sequences.initial_sequences)}
    ys, ends = [A.new_zeros(dim)] * (batch * length), []
    for s, (start, n_steps) in enumerate(zip(sequences.starts, sequences.lengths, strict=True)):
        h = torch.zeros_like(A)  # (D, N)
        if initial_states is not None and s in begins:
            h = initial_states[begins[s]].to(dtype)
        for t in range(start, start + n_steps):
            h = torch.exp(dt[t, :, None] * A) * h + (dt[t] * u[t])[:, None] * B[t]
            ys[t] = (C[t] * h).sum(-1)
        ends.append(h)
    y = torch.stack(ys).unflatten(0, (batch, length)) if ys else torch.zeros(batch, length, dim).to(A)
    final_states = (
        torch.stack([ends[s] for s in sequences.final_sequences])
        if sequences.final_sequences
        else A.new_zeros(0, *A.shape)
    )
    return y, final_states
