"""Mamba-3 as it is defined, step by step. The ground truth of the fast path.

The state turns at every step, as in the paper's complex recurrence. The fast path turns B and C instead, by the sum of
all angles so far; states at both ends of a sequence are in that form.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.slots import StepPlan
from .._core.state_format_reference import decode, store
from .._core.varlen import parse_sequences, without_padding
from .arguments import Mamba3Arguments, Mamba3States


def mamba3(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    mimo_x: Tensor | None,
    mimo_z: Tensor | None,
    mimo_o: Tensor | None,
    initial_states: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Scan step by step (arXiv 2603.15569, section 3).

    Args:
        x, z: (B, L, H, P).
        dt, A, trap: (B, L, H).
        B, C: (B, L, R, G, N), with a rank R of 1 for SISO.
        angles: (B, L, K).
        B_bias, C_bias: (H, R, N).
        D: (H,).
        mimo_x, mimo_z, mimo_o: (H, R, P); no `mimo_x` for SISO. Without `mimo_o` the ranks stay apart.
        initial_states: angles (rows, H, K), state (rows, H, P, N), and B (rows, R, H, N) and x (rows, H, P) of the
            step before.
        cu_seqlens, seq_idx: as in `ssm_kernels.mamba3`.

    Returns:
        y (B, L, H, P) in the dtype of x, or (B, L, R, H, P) where the ranks stay apart; and the final states.
    """
    batch, length, heads, headdim = x.shape
    rank, groups, d_state = B.shape[2:]
    pairs, in_dtype = angles.shape[2], x.dtype
    dtype = torch.promote_types(in_dtype, torch.float32)

    def steps(t: Tensor) -> Tensor:
        return without_padding(t, cu_seqlens, seq_idx).to(dtype).flatten(0, 1)  # (B * L, ...)

    x, dt, A, trap = steps(x), steps(dt), steps(A), steps(trap)
    rotations = torch.tanh(steps(angles)).unsqueeze(1) * math.pi * dt.unsqueeze(2)  # (B * L, H, K)
    # Each head reads its group, and adds its own bias: (B * L, R, H, N).
    B, C = (steps(m).repeat_interleave(heads // groups, dim=2) for m in (B, C))
    B = B if B_bias is None else B + B_bias.to(dtype).transpose(0, 1)
    C = C if C_bias is None else C + C_bias.to(dtype).transpose(0, 1)
    is_mimo = mimo_x is not None
    mimo_x = x.new_ones(heads, rank, headdim) if mimo_x is None else mimo_x.to(dtype)

    sequences = parse_sequences(batch, length, cu_seqlens, seq_idx)
    row_of_start = {s: row for row, s in enumerate(sequences.initial_sequences)}
    ys, final_states = [x.new_zeros(rank, heads, headdim)] * (batch * length), []
    for s, (start, n_steps) in enumerate(zip(sequences.starts, sequences.lengths, strict=True)):
        angle, h = x.new_zeros(heads, pairs), x.new_zeros(heads, headdim, d_state)
        B_before, x_before = x.new_zeros(rank, heads, d_state), x.new_zeros(heads, headdim)
        if initial_states is not None and s in row_of_start:
            angle, h, B_before, x_before = (t[row_of_start[s]].to(dtype) for t in initial_states)
            h, B_before = _turn(h, -angle.unsqueeze(1), is_mimo), _turn(B_before, -angle, is_mimo)
        for t in range(start, start + n_steps):
            # Exponential-trapezoidal rule: the integral over a step has the weight lambda at its end.
            trapezoid = torch.sigmoid(trap[t])  # (H,)
            alpha = torch.exp(dt[t] * A[t])
            beta, gamma = (1 - trapezoid) * dt[t] * alpha, trapezoid * dt[t]
            before, now = _outer(B_before, x_before, mimo_x), _outer(B[t], x[t], mimo_x)  # (H, P, N)
            turned = _turn(alpha[:, None, None] * h + beta[:, None, None] * before, -rotations[t].unsqueeze(1), is_mimo)
            h = turned + gamma[:, None, None] * now
            ys[t] = torch.einsum("hpn,rhn->rhp", h, C[t])
            B_before, x_before, angle = B[t], x[t], angle + rotations[t]
        angle = torch.remainder(angle, 2 * math.pi)
        final_states.append((angle, _turn(h, angle.unsqueeze(1), is_mimo), _turn(B_before, angle, is_mimo), x_before))

    y = torch.stack(ys).unflatten(0, (batch, length)) if ys else x.new_zeros(batch, length, rank, heads, headdim)
    if D is not None:
        y = y + D.to(dtype)[:, None] * x.unflatten(0, (batch, length)).unsqueeze(2) * mimo_x.transpose(0, 1)
    if z is not None:
        z = steps(z).unflatten(0, (batch, length)).unsqueeze(2)  # (B, L, 1, H, P)
        y = y * F.silu(z if mimo_z is None else z * mimo_z.to(dtype).transpose(0, 1))
    if not is_mimo:
        y = y.squeeze(2)
    elif mimo_o is not None:
        y = (y * mimo_o.to(dtype).transpose(0, 1)).sum(2)
    rows = [final_states[s] for s in sequences.final_sequences]
    shapes = ((heads, pairs), (heads, headdim, d_state), (rank, heads, d_state), (heads, headdim))
    angle, h, B, x = [torch.stack(part) for part in zip(*rows, strict=True)] or [x.new_zeros(0, *s) for s in shapes]
    return y.to(in_dtype), (angle, h, B, x)


def mamba3_step(
    states: Mamba3States,
    arguments: Mamba3Arguments,
    plan: StepPlan | None,
    state_scale: Tensor | None,
    seeds: Tensor | None,
) -> Tensor:
    """Advance by T tokens, one after the other.

    Args:
        states: of B sequences, or a pool of them, updated in place; `ssm` in any format.
        arguments: those of `mamba3` with L = T, without states and packing.
        plan: slots of the tokens; None where every sequence has T of them.
        state_scale: (B, H, P) scales of int8, updated.
        seeds: (M,) of the tokens, for stochastic rounding.

    Returns:
        y as `mamba3` returns it.
    """
    batch, tokens = arguments.x.shape[:2]
    if plan is None:
        sources, bounds = [*range(batch)], [tokens * s for s in range(batch + 1)]
        destinations = [s if t == tokens - 1 else -1 for s in range(batch) for t in range(tokens)]
    else:
        sources, bounds, destinations = plan.sources.tolist(), plan.bounds.tolist(), plan.destinations.tolist()
    before = states._replace(ssm=decode(states.ssm, state_scale))
    before = before._make(t.clone() for t in before)
    by_token = arguments.by_token()  # (M, 1, ...)
    ys: dict[int, Tensor] = {}
    for s, source in enumerate(sources):
        now: tuple[Tensor, Tensor, Tensor, Tensor] = before._make(t[source, None] for t in before)
        for m in range(bounds[s], bounds[s + 1]) if source >= 0 else ():
            y, now = mamba3(*by_token.rows(m, m + 1)._replace(initial_states=Mamba3States(*now)))
            ys[m] = y[0, 0]
            if (slot := destinations[m]) >= 0:
                scale = None if state_scale is None else state_scale[slot]
                store(states.ssm[slot], scale, now[1][0], None if seeds is None else int(seeds[m]))
                for state, new in ((states.angles, now[0]), (states.B, now[2]), (states.x, now[3])):
                    state[slot] = new[0]
                now = (now[0], decode(states.ssm[slot], scale).clone()[None], now[2], now[3])
    shape = arguments.x.shape[2:]
    if arguments.mimo_x is not None and arguments.mimo_o is None:
        shape = (arguments.B.shape[2], *shape)  # the ranks stay apart
    skipped = arguments.x.new_zeros(shape)
    return torch.stack([ys.get(m, skipped) for m in range(batch * tokens)]).unflatten(0, (batch, tokens))


def _outer(B: Tensor, x: Tensor, mimo_x: Tensor) -> Tensor:
    """The sum over ranks of x B^T: B (R, H, N), x (H, P), mimo_x (H, R, P) -> (H, P, N)."""
    return torch.einsum("rhn,hp,hrp->hpn", B, x, mimo_x)


def _turn(t: Tensor, angles: Tensor, halves: bool) -> Tensor:
    """Rotate the first K pairs of the last dimension, each by its angle (..., K).

    A pair is an entry and that of the other half with `halves`, else two neighbors, as the published kernels have it
    in MIMO and in SISO.
    """
    pairs, size = angles.shape[-1], t.shape[-1]
    if halves:
        first = torch.arange(pairs, device=t.device)
        second = first + size // 2
    else:
        first = torch.arange(0, 2 * pairs, 2, device=t.device)
        second = first + 1
    cos, sin = torch.cos(angles), torch.sin(angles)
    a, b = t[..., first], t[..., second]
    out = t.clone()
    out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return out
