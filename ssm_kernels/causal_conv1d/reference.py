"""The causal convolution as it is defined, window by window. The ground truth of the other backends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.slots import StepPlan
from .._core.varlen import parse_sequences


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Convolve step by step: y_t = silu(bias + sum_k weight_k x_{t - K + 1 + k}).

    Args:
        x: (B, L, D).
        weight: (D, K).
        bias: (D,).
        silu: whether the sums pass through SiLU.
        initial_states: (rows, K - 1, D) inputs before the first step of each sequence that starts a row.
        cu_seqlens, seq_idx: as in `ssm_kernels.causal_conv1d`.

    Returns:
        y (B, L, D) and the final states, the last inputs of each row (rows, K - 1, D), in the dtype of x.
    """
    batch, length, dim = x.shape
    width = weight.shape[1]
    sequences = parse_sequences(batch, length, cu_seqlens, seq_idx)
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(dtype).flatten(0, 1)  # (B * L, D)
    weight = weight.to(dtype)

    row_of_start = {s: row for row, s in enumerate(sequences.initial_sequences)}
    ys, final_states = [rows.new_zeros(dim)] * len(rows), []
    for s, (start, n_steps) in enumerate(zip(sequences.starts, sequences.lengths, strict=True)):
        state = rows.new_zeros(width - 1, dim)
        if initial_states is not None and s in row_of_start:
            state = initial_states[row_of_start[s]].to(dtype)
        inputs = torch.cat([state, rows[start : start + n_steps]])  # (K - 1 + n_steps, D)
        for t in range(n_steps):
            ys[start + t] = _convolve(inputs[t : t + width], weight, bias, silu)  # (D,)
        final_states.append(inputs[n_steps:])  # (K - 1, D)
    y = torch.stack(ys).unflatten(0, (batch, length)) if ys else rows.new_zeros(batch, length, dim)  # (B, L, D)
    states = [final_states[s] for s in sequences.final_sequences]
    final = torch.stack(states) if states else rows.new_zeros(0, width - 1, dim)
    return y.to(x.dtype), final.to(x.dtype)


def causal_conv1d_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, plan: StepPlan | None
) -> Tensor:
    """Advance the convolution by one step.

    Args:
        state: (B, K - 1, D) the last inputs, in order of time, or a pool of them; updated in place.
        x: (M, D), rounded to the dtype of the state.
        weight, bias, silu: as in `causal_conv1d`.
        plan: slots of the tokens; None for one token of every state.

    Returns:
        y (M, D) in the dtype of x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if plan is not None:
        before, y = state.clone(), torch.zeros_like(x)
        for s, source in enumerate(plan.sources.tolist()):
            h = before[source, None].clone()  # (1, K - 1, D)
            for m in range(*plan.bounds[s : s + 2].tolist()) if source >= 0 else ():
                y[m] = causal_conv1d_step(h, x[m, None], weight, bias, silu, None)[0]
                if plan.destinations[m] >= 0:
                    state[plan.destinations[m]] = h[0]
        return y
    window = torch.cat([state, x[:, None].to(state.dtype)], dim=1)  # (B, K, D)
    state.copy_(window[:, 1:])
    return _convolve(window.to(dtype), weight.to(dtype), bias, silu).to(x.dtype)


def _convolve(window: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """One window (..., K, D), weight (D, K) -> y (..., D)."""
    y = (window * weight.T).sum(-2)  # (..., D)
    y = y if bias is None else y + bias.to(y.dtype)
    return F.silu(y) if silu else y
