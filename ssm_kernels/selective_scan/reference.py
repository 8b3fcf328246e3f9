"""The selective scan as it is defined, step by step. The ground truth of the other backends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.slots import StepPlan
from .._core.state_format_reference import decode, store
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

    dt = _step_size(dt, dt_bias, dt_softplus, dtype)
    A = A.to(dtype)
    B, C = (m.to(dtype) if m.dim() == 2 else m.to(dtype).flatten(0, 1) for m in (B, C))  # (B * L, G, N) or (D, N)
    B, C = (_per_channel(m, batch * length, dim) for m in (B, C))  # (B * L, D, N)
    us, dts = (x.to(dtype).flatten(0, 1) for x in (u, dt))  # (B * L, D)
    row_of_start = {s: row for row, s in enumerate(sequences.initial_sequences)}
    ys, final_states = [A.new_zeros(dim)] * (batch * length), []
    for s, (start, n_steps) in enumerate(zip(sequences.starts, sequences.lengths, strict=True)):
        h = torch.zeros_like(A)  # (D, N)
        if initial_states is not None and s in row_of_start:
            h = initial_states[row_of_start[s]].to(dtype)
        for t in range(start, start + n_steps):
            h, ys[t] = _advance(h, us[t], dts[t], A, B[t], C[t])
        final_states.append(h)
    y = torch.stack(ys).view(batch, length, dim) if ys else A.new_zeros(batch, length, dim)  # (B, L, D)

    states = [final_states[s] for s in sequences.final_sequences]
    return _skip_and_gate(y, u, D, z), torch.stack(states) if states else A.new_zeros(0, *A.shape)


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    plan: StepPlan | None,
    state_scale: Tensor | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """Advance the scan by one step.

    Args:
        state: (B, D, N) in any format, or a pool of them, updated in place; a step on float64 is computed in it, others
            in float32.
        u, dt, z: (M, D).
        B, C: (M, G, N), each with its own G, or (D, N) where constant in time.
        A, D, dt_bias, dt_softplus: as in `selective_scan`.
        plan: slots of the tokens; None for one token of every state.
        state_scale: (B, D) scales of int8, updated.
        seeds: (M,) of the tokens, for stochastic rounding.

    Returns:
        y (M, D) in the dtype of u.
    """
    tokens = range(len(u))
    if plan is None:  # a sequence for each token
        sources, bounds, destinations = [*tokens], [*tokens, len(u)], [*tokens]
    else:
        sources, bounds, destinations = plan.sources.tolist(), plan.bounds.tolist(), plan.destinations.tolist()
    before, y = decode(state, state_scale).clone(), torch.zeros_like(u)
    dtype = before.dtype
    dt = _step_size(dt, dt_bias, dt_softplus, dtype)  # (M, D)
    B, C = (_per_channel(m.to(dtype), *u.shape) for m in (B, C))  # (M, D, N)
    for s, source in enumerate(sources):
        h = before[source]  # (D, N)
        for m in range(bounds[s], bounds[s + 1]) if source >= 0 else ():
            h, y_m = _advance(h, u[m].to(dtype), dt[m], A.to(dtype), B[m], C[m])
            y[m] = _skip_and_gate(y_m, u[m], D, None if z is None else z[m])
            if (slot := destinations[m]) >= 0:
                scale = None if state_scale is None else state_scale[slot]
                store(state[slot], scale, h, None if seeds is None else int(seeds[m]))
                h = decode(state[slot], scale).clone()
    return y


def _step_size(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dtype: torch.dtype) -> Tensor:
    """Algorithm 2: dt = softplus(parameter + projection)."""
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    return F.softplus(dt) if dt_softplus else dt


def _advance(h: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the recurrence: h, B, C (..., D, N); u, dt (..., D); A (D, N) -> the next h, and y (..., D)."""
    # Equation 2a, with A-bar = exp(dt A) and B-bar = dt B.
    h = torch.exp(dt[..., None] * A) * h + (dt * u)[..., None] * B  # (..., D, N)
    # Equation 2b.
    return h, (C * h).sum(-1)


def _skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """The skip connection, and the gate of the Mamba block (figure 3): y, u, z (..., D) -> y in the dtype of u."""
    if D is not None:
        y = y + D.to(y.dtype) * u
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(u.dtype)


def _per_channel(m: Tensor, steps: int, dim: int) -> Tensor:
    """B or C, (steps, G, N) or (D, N), for each step and channel: (steps, D, N)."""
    if m.dim() == 2:
        return m.expand(steps, -1, -1)
    return m.repeat_interleave(dim // m.shape[1], dim=1)
