"""The causal convolution as it is defined: each output from its own window. The ground truth of the other backends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.varlen import parse_sequences


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x (B, L, D); weight (D, K) -> y (B, L, D) and the last inputs of each sequence (rows, K - 1, D)."""
    batch, length, dim = x.shape
    width = weight.shape[1]
    sequences = parse_sequences(batch, length, cu_seqlens, seq_idx)
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(dtype).flatten(0, 1)
    weight = weight.to(dtype)

    begins = {s: row for row, s in enumerate(sequences.initial_sequences)}
    ys, ends = [rows.new_zeros(dim)] * len(rows), []
    for s, (start, n_steps) in enumerate(zip(sequences.starts, sequences.lengths, strict=True)):
        before = rows.new_zeros(width - 1, dim)
        if initial_states is not None and s in begins:
            before = initial_states[begins[s]].to(dtype)
        inputs = torch.cat([before, rows[start : start + n_steps]])
        for t in range(n_steps):
            y = (inputs[t : t + width] * weight.T).sum(0)
            y = y if bias is None else y + bias.to(dtype)
            ys[start + t] = F.silu(y) if silu else y
        ends.append(inputs[n_steps:])
    y = torch.stack(ys).unflatten(0, (batch, length)) if ys else rows.new_zeros(batch, length, dim)
    states = [ends[s] for s in sequences.final_sequences]
    return y, torch.stack(states) if states else rows.new_zeros(0, width - 1, dim)
