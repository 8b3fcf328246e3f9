"""SSD as it is defined, step by step. The ground truth of the other backends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.slots import StepPlan
from .._core.state_format_reference import decode, store
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
    input_weights: Tensor | None = None,
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
        input_weights: (B, L, H) weights of the inputs; those of dt by default.

    Returns:
        y (B, L, H, P) in the dtype of x, and the final states (rows, H, P, N) in float32, or float64 where x is.
    """
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    sequences = parse_sequences(batch, length, cu_seqlens, seq_idx)
    x, dt = (without_padding(t, cu_seqlens, seq_idx) for t in (x, dt))
    z = None if z is None else without_padding(z, cu_seqlens, seq_idx)

    dt = _step_size(dt, dt_bias, dt_softplus, dt_limit, dtype)
    weights = dt if input_weights is None else without_padding(input_weights, cu_seqlens, seq_idx)
    A = A.to(dtype)
    xs, dts, weights = (t.to(dtype).flatten(0, 1) for t in (x, dt, weights))  # (B * L, H, P), (B * L, H) twice
    Bs, Cs = (t.to(dtype).flatten(0, 1).repeat_interleave(heads // groups, dim=1) for t in (B, C))  # (B * L, H, N)
    row_of_start = {s: row for row, s in enumerate(sequences.initial_sequences)}
    ys, final_states = [A.new_zeros(heads, headdim)] * (batch * length), []
    for s, (start, n_steps) in enumerate(zip(sequences.starts, sequences.lengths, strict=True)):
        state = A.new_zeros(heads, headdim, d_state)
        if initial_states is not None and s in row_of_start:
            state = initial_states[row_of_start[s]].to(dtype)
        for t in range(start, start + n_steps):
            state, ys[t] = _advance(state, xs[t], dts[t], weights[t], A, Bs[t], Cs[t])  # (H, P, N), (H, P)
        final_states.append(state)
    y = torch.stack(ys).unflatten(0, (batch, length)) if ys else A.new_zeros(x.shape)  # (B, L, H, P)

    states = [final_states[s] for s in sequences.final_sequences]
    return _skip_and_gate(y, x, D, z), torch.stack(states) if states else A.new_zeros(0, heads, headdim, d_state)


def ssd_step(
    state: Tensor,
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
    plan: StepPlan | None,
    input_weights: Tensor | None = None,
    state_scale: Tensor | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """Advance the scan by T tokens, one after the other.

    Args:
        state: (B, H, P, N) in any format, or a pool of them, updated in place; a step on float64 is computed in it,
            others in float32.
        x, z: (B, T, H, P).
        dt: (B, T, H).
        B, C: (B, T, G, N).
        A, D, dt_bias, dt_softplus, dt_limit: as in `ssd`.
        plan: slots of the tokens; None where every state has T of them.
        input_weights: (B, T, H) weights of the inputs; those of dt by default.
        state_scale: (B, H, P) scales of int8, updated.
        seeds: (M,) of the tokens, for stochastic rounding.

    Returns:
        y (B, T, H, P) in the dtype of x.
    """
    batch, tokens, heads = x.shape[:3]
    if plan is None:
        sources, bounds = [*range(batch)], [tokens * s for s in range(batch + 1)]
        destinations = [s if t == tokens - 1 else -1 for s in range(batch) for t in range(tokens)]
    else:
        sources, bounds, destinations = plan.sources.tolist(), plan.bounds.tolist(), plan.destinations.tolist()
    before, y = decode(state, state_scale).clone(), torch.zeros_like(x.flatten(0, 1))  # (M, H, P)
    dtype = before.dtype
    x, dt, B, C = (t.flatten(0, 1) for t in (x, dt, B, C))  # (M, ...)
    dt = _step_size(dt, dt_bias, dt_softplus, dt_limit, dtype)  # (M, H)
    weights = dt if input_weights is None else input_weights.flatten(0, 1).to(dtype)
    z = None if z is None else z.flatten(0, 1)
    B, C = (m.to(dtype).repeat_interleave(heads // m.shape[1], dim=1) for m in (B, C))  # (M, H, N)
    for s, source in enumerate(sources):
        S = before[source]  # (H, P, N)
        for m in range(bounds[s], bounds[s + 1]) if source >= 0 else ():
            S, y_m = _advance(S, x[m].to(dtype), dt[m], weights[m], A.to(dtype), B[m], C[m])
            y[m] = _skip_and_gate(y_m, x[m], D, None if z is None else z[m])
            if (slot := destinations[m]) >= 0:
                scale = None if state_scale is None else state_scale[slot]
                store(state[slot], scale, S, None if seeds is None else int(seeds[m]))
                S = decode(state[slot], scale).clone()
    return y.unflatten(0, (batch, tokens))


def _step_size(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float], dtype: torch.dtype
) -> Tensor:
    """dt with its bias, through softplus, within its bounds."""
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    return dt.clamp(*dt_limit)


def _advance(
    S: Tensor, x: Tensor, dt: Tensor, weight: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    """One step: S (..., H, P, N); x (..., H, P); dt, weight (..., H); A (H,); B, C (..., H, N) -> S, and y like x."""
    # Equation 2, discretized: S_t = exp(dt A) S_{t-1} + dt x B^T, or with a weight in place of the second dt.
    decay = torch.exp(dt * A)[..., None, None]  # (..., H, 1, 1)
    S = decay * S + (weight[..., None] * x)[..., None] * B[..., None, :]  # (..., H, P, N)
    # y_t = S_t C_t.
    return S, (S * C[..., None, :]).sum(-1)


def _skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """The skip connection and the gate: y, x, z (..., H, P), D (H, P) or (H, 1) -> y in the dtype of x."""
    if D is not None:
        y = y + D.to(y.dtype) * x
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)
