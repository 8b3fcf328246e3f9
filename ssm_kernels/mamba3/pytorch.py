"""Mamba-3 on the SSD of any backend.

Rotating the state by an angle a step is the same as rotating B and C by the sum of all angles so far. What is left is
a recurrence of scalar decays with the trapezoid `h_t = a_t (h_{t-1} + b_t B_{t-1} x_{t-1}) + c_t B_t x_t`, where
`c = lambda dt` and `b = (1 - lambda) dt`. It is SSD: in states after its own step, input t weighs `c_t + b_{t+1}`. In
its own output it weighs c_t, which is a correction on the diagonal.

MIMO of rank R takes R steps of SSD a step: the state decays in the first of them, and each adds one rank of inputs and
reads one rank of outputs. The ranks of a step that SSD's order hides from each other are part of the same correction.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.dispatch import Backend
from .._core.invariant import silu
from .._core.library import autocast_off
from .._core.sharding import local
from .._core.slots import StepPlan
from .._core.state_format import compute_dtype
from .._core.varlen import without_padding
from ..ssd import ssd
from ..ssd.api import run_step
from .arguments import Mamba3Arguments, Mamba3States


def mamba3(arguments: Mamba3Arguments, chunk_size: int, backend: Backend) -> tuple[Tensor, Mamba3States]:
    """Scan with arguments in the canonical form of `reference.mamba3`, and the same results.

    Args:
        arguments: of the op.
        chunk_size: most steps of a chunk of SSD, R for each step.
        backend: of SSD.
    """
    with autocast_off(arguments.x.device):
        return _scan(arguments, chunk_size, backend)


def _scan(a: Mamba3Arguments, chunk_size: int, backend: Backend) -> tuple[Tensor, Mamba3States]:
    batch, length, heads, headdim = a.x.shape
    rank = a.B.shape[2]
    compute = torch.promote_types(a.x.dtype, torch.float32)

    def steps(t: Tensor) -> Tensor:
        return without_padding(t, a.cu_seqlens, a.seq_idx).to(compute)

    x, dt, trap, angles = steps(a.x), steps(a.dt), steps(a.trap), steps(a.angles)
    initial_states = a.initial_states or _zero_states(a, compute)
    x_ranks = _up_project(x, a.mimo_x)  # (B, L, R, H, P)
    if not batch * length:
        return _skip_gate_and_project(x_ranks, x_ranks, a), Mamba3States(*(t.to(compute) for t in initial_states))
    bounds = _boundaries(batch, length, a.cu_seqlens, a.seq_idx, x.device)

    weight_before, weight_now = _trapezoid(dt, trap)  # (B, L, H) twice
    # b_{t+1}: none after the last step of a sequence, whose next step belongs to another, or is padding with a dt of 0.
    weight_next = F.pad(weight_before.masked_fill(bounds.is_first.unsqueeze(2), 0), (0, 0, 0, 1))[:, 1:]
    angles = _cumulative_angles(angles, dt, initial_states.angles, bounds)  # (B, L, H, K)
    B, C = _rotated(a.B, a.B_bias, angles, a), _rotated(a.C, a.C_bias, angles, a)  # (B, L, R, H, N)

    # On tensor cores B, C and x have the dtype of x; elsewhere SSD computes in float32 anyway.
    operands = a.x.dtype if backend == "triton" else compute
    B_operand, C_operand = B.to(operands), C.to(operands)
    y, final_ssm = local(ssd)(
        x_ranks.to(operands).flatten(1, 2),  # (B, L R, H, P)
        F.pad((-steps(a.A) * dt).unsqueeze(2), (0, 0, 0, rank - 1)).flatten(1, 2),  # decays in the first rank alone
        -x.new_ones(heads),
        B_operand.flatten(1, 2),  # (B, L R, H, N)
        C_operand.flatten(1, 2),
        initial_states=None if a.initial_states is None else _with_input_before(a, weight_before, bounds),
        input_weights=(weight_now + weight_next).repeat_interleave(rank, 1),
        chunk_size=chunk_size,
        cu_seqlens=None if a.cu_seqlens is None else a.cu_seqlens * rank,
        seq_idx=None if a.seq_idx is None else a.seq_idx.repeat_interleave(rank, 1),
        backend=backend,
    )
    # Of the matrices as SSD rounds them: the two cancel where an input weighs more in the state than in its output.
    own = _own_outputs(x_ranks, B_operand.to(compute), C_operand.to(compute), weight_now, -weight_next)
    y = y.to(compute).view(batch, length, rank, heads, headdim) + own
    y = _skip_gate_and_project(y, x_ranks, a)
    last = (t.flatten(0, 1).index_select(0, bounds.last) for t in (angles, B, x))
    has_steps = bounds.has_steps
    last_angles, last_B, last_x = (
        torch.where(has_steps.view(-1, *[1] * (t.dim() - 1)), t, before.to(compute))
        for t, before in zip(last, (initial_states.angles, initial_states.B, initial_states.x), strict=True)
    )
    return y, Mamba3States(last_angles, final_ssm, last_B, last_x)


def mamba3_step(
    states: Mamba3States,
    arguments: Mamba3Arguments,
    backend: Backend,
    plan: StepPlan | None,
    state_scale: Tensor | None,
    seeds: Tensor | None,
) -> Tensor:
    """Advance states, in place, by T tokens; arguments are those of `reference.mamba3_step`."""
    with autocast_off(arguments.x.device):
        return _step(states, arguments, backend, plan, state_scale, seeds)


def _step(
    states: Mamba3States,
    a: Mamba3Arguments,
    backend: Backend,
    plan: StepPlan | None,
    state_scale: Tensor | None,
    seeds: Tensor | None,
) -> Tensor:
    batch, tokens, heads, headdim = a.x.shape
    rank = a.B.shape[2]
    compute = compute_dtype(states.ssm)
    a = a.by_token()  # (M, 1, ...)
    x, dt = a.x.to(compute), a.dt.to(compute)
    weight_before, weight_now = _trapezoid(dt, a.trap.to(compute))  # (M, 1, H) twice
    rotations = _rotations(a.angles.to(compute), dt)[:, 0].double()  # (M, H, K)
    if plan is not None:
        rotations = _since_first(rotations, plan)
    start = Mamba3States(*states) if plan is None else Mamba3States(*(_at_source(t, plan) for t in states))
    angles = _wrap(start.angles + rotations).to(compute)  # (M, H, K)
    B, C = (_rotated(m, bias, angles.unsqueeze(1), a) for m, bias in ((a.B, a.B_bias), (a.C, a.C_bias)))
    x_ranks = _up_project(x, a.mimo_x)  # (M, 1, R, H, P)
    B_before, x_before = (_before(t[:, 0], first, plan) for t, first in ((B, start.B), (x, start.x)))

    # The step as 2 R tokens of SSD: the inputs before it, the first of them with the decay, and its own.
    log_decay = -dt * a.A.to(compute)  # (M, 1, H)
    weights = torch.cat([weight_before * torch.exp(-log_decay), weight_now], 1).repeat_interleave(
        rank, 1
    )  # (M, 2 R, H)
    y = run_step(
        backend,
        states.ssm,
        torch.cat([_up_project(x_before.to(compute).unsqueeze(1), a.mimo_x), x_ranks], 1).flatten(1, 2),
        F.pad(log_decay, (0, 0, 0, 2 * rank - 1)),
        -x.new_ones(heads),
        torch.cat([B_before.to(compute).unsqueeze(1), B], 1).flatten(1, 2),  # (M, 2 R, H, N)
        torch.cat([C, C], 1).flatten(1, 2),
        None, None, None, False, (0.0, math.inf),
        None if plan is None else plan.repeated(2 * rank),
        weights,
        state_scale,
        None if seeds is None else seeds.repeat_interleave(2 * rank),
    )  # fmt: skip
    y = y.view(batch * tokens, 2, rank, heads, headdim)[:, 1:]  # (M, 1, R, H, P)
    if rank > 1:
        y = y + _own_outputs(x_ranks, B, C, weight_now, torch.zeros_like(weight_now))
    for state, new in zip((states.angles, states.B, states.x), (angles, B[:, 0], x[:, 0]), strict=True):
        state.copy_(new) if plan is None else plan.write(state, new)
    y = _skip_gate_and_project(y, x_ranks, a).flatten(0, 1).unflatten(0, (batch, tokens))
    return y if plan is None else plan.blank(y)


def _since_first(rotations: Tensor, plan: StepPlan) -> Tensor:
    """Sum the rotations of tokens (M, H, K) from the first token of each sequence on."""
    rotations = rotations.masked_fill(~plan.is_run[:, None, None], 0)  # padding may hold anything
    total = rotations.cumsum(0)
    return total - (total - rotations)[plan.bounds[plan.sequence].clamp(max=len(total) - 1)]


def _at_source(state: Tensor, plan: StepPlan) -> Tensor:
    """The rows of a state (slots, ...) that the sequences of tokens start from: (M, ...)."""
    return state[F.pad(plan.sources, (0, 1))[plan.sequence].clamp(min=0)]


def _before(values: Tensor, start: Tensor, plan: StepPlan | None) -> Tensor:
    """Values (M, ...) of the token before each; those of the state, (M, ...), before the first of a sequence."""
    if plan is None:
        return start
    is_first = plan.bounds[plan.sequence] == torch.arange(len(values), device=values.device)
    return torch.where(is_first.view(-1, *[1] * (values.dim() - 1)), start.to(values.dtype), values.roll(1, 0))


# --- bounds of sequences ----------------------------------------------------------------------------------------


class _Boundaries(NamedTuple):
    """Bounds of sequences as tensors, made without a host-device synchronization."""

    is_first: Tensor
    """(B, L) bool: the first step of a sequence."""
    start: Tensor | None
    """(B * L,) position of the first step of each step's sequence; None where that of the row is."""
    row: Tensor
    """(B, L) row of the states that each step's sequence starts from; that of no state where it is negative."""
    first: Tensor
    """(rows,) position of the first step after each initial state, anywhere for none."""
    last: Tensor
    """(rows,) position of the last step before each final state, anywhere for none."""
    has_steps: Tensor
    """(rows,) bool"""


def _boundaries(
    batch: int, length: int, cu_seqlens: Tensor | None, seq_idx: Tensor | None, device: torch.device
) -> _Boundaries:
    steps = torch.arange(length, device=device)
    rows = torch.arange(batch, device=device)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(device)
        # Of empty sequences at one position, the search finds the first that ends after it.
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), steps, right=True)  # (L,); S in padding
        starts = F.pad(cu_seqlens, (0, 1)).index_select(0, sequence)
        in_padding = steps >= cu_seqlens[-1]
        start = torch.where(in_padding, steps, starts)
        first, last = cu_seqlens[:-1], cu_seqlens[1:] - 1
        return _Boundaries(
            (steps == start).unsqueeze(0), start, torch.where(in_padding, -1, sequence).unsqueeze(0),
            first.clamp(0, length - 1), last.clamp(0, length - 1), first <= last,
        )  # fmt: skip
    if seq_idx is not None:
        seq_idx = seq_idx.to(device)
        is_first = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True)
        is_step = seq_idx >= 0
        start = torch.where(is_first, steps, 0).cummax(1).values  # (B, L)
        has_steps = is_step.any(1)
        first = is_step.int().argmax(1)
        last = length - 1 - is_step.flip(1).int().argmax(1)
        row = torch.where(start == first.unsqueeze(1), rows.unsqueeze(1), -1)
        base = rows * length
        return _Boundaries(
            is_first, (start + base.unsqueeze(1)).flatten(), row, first + base, last + base, has_steps
        )  # fmt: skip
    is_first = (steps == 0).expand(batch, -1)
    first = rows * length
    return _Boundaries(
        is_first, None, rows.unsqueeze(1).expand(-1, length), first, first + length - 1, torch.ones_like(rows).bool()
    )


# --- parts of a step --------------------------------------------------------------------------------------------


def _zero_states(a: Mamba3Arguments, dtype: torch.dtype) -> Mamba3States:
    batch, _, heads, headdim = a.x.shape
    rows = batch if a.cu_seqlens is None else len(a.cu_seqlens) - 1
    rank, _, d_state = a.B.shape[2:]
    shapes = ((heads, a.angles.shape[2]), (heads, headdim, d_state), (rank, heads, d_state), (heads, headdim))
    return Mamba3States(*(a.x.new_zeros(rows, *shape, dtype=dtype) for shape in shapes))


def _trapezoid(dt: Tensor, trap: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the step before and of this one, `(1 - lambda) dt` and `lambda dt`, neither by a difference."""
    return dt * torch.sigmoid(-trap), dt * torch.sigmoid(trap)


def _rotations(angles: Tensor, dt: Tensor) -> Tensor:
    """Angle by which each step turns the state: (B, L, K), (B, L, H) -> (B, L, H, K)."""
    return (torch.tanh(angles) * math.pi).unsqueeze(2) * dt.unsqueeze(3)


def _wrap(angles: Tensor) -> Tensor:
    """The same angles, from 0 to 2 pi."""
    return angles - 2 * math.pi * (angles.detach() / (2 * math.pi)).floor()


def _cumulative_angles(angles: Tensor, dt: Tensor, initial: Tensor, bounds: _Boundaries) -> Tensor:
    """Angle through each step from the start of its sequence, and from its initial state: (B, L, H, K)."""
    # In float64: a long sequence turns many times, of which the last fraction counts.
    rotations = _rotations(angles, dt).double()
    total = rotations.cumsum(1)
    if bounds.start is None:
        return _wrap(total + initial.double().unsqueeze(1)).to(dt.dtype)
    before = (total - rotations).flatten(0, 1).index_select(0, bounds.start)
    initial = F.pad(initial.double(), (0, 0, 0, 0, 1, 0))  # row 0 for sequences without an initial state
    total = total.flatten(0, 1) - before + initial.index_select(0, bounds.row.flatten() + 1)
    return _wrap(total).view_as(rotations).to(dt.dtype)


def _rotated(matrix: Tensor, bias: Tensor | None, angles: Tensor, a: Mamba3Arguments) -> Tensor:
    """B or C of each head, with its bias, rotated.

    Args:
        matrix: (B, L, R, G, N).
        bias: (H, R, N), or None.
        angles: (B, L, H, K).
        a: arguments of the op.

    Returns:
        (B, L, R, H, N) in the dtype of the angles.
    """
    heads, pairs = angles.shape[2:]
    matrix = without_padding(matrix, a.cu_seqlens, a.seq_idx).to(angles.dtype)
    matrix = matrix.repeat_interleave(heads // matrix.shape[3], dim=3)  # (B, L, R, H, N)
    if bias is not None:
        matrix = matrix + bias.to(angles.dtype).transpose(0, 1)
    cos, sin = (t.unsqueeze(2) for t in (angles.cos(), angles.sin()))  # (B, L, 1, H, K)
    # As the published kernels pair them: entry n with that of the other half in MIMO, with its neighbor in SISO.
    if a.mimo_x is not None:
        halves = matrix.unflatten(-1, (2, -1))  # (B, L, R, H, 2, N / 2)
        first, second = halves[..., :pairs].unbind(-2)
        turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -2)  # (B, L, R, H, 2, K)
        return torch.cat([turned, halves[..., pairs:]], -1).flatten(-2)
    first, second = matrix[..., : 2 * pairs].unflatten(-1, (-1, 2)).unbind(-1)  # (B, L, R, H, K) twice
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1)
    return torch.cat([turned.flatten(-2), matrix[..., 2 * pairs :]], -1)


def _up_project(x: Tensor, mimo_x: Tensor | None) -> Tensor:
    """Inputs of each rank: (..., H, P) -> (..., R, H, P)."""
    x = x.unsqueeze(-3)
    return x if mimo_x is None else x * mimo_x.to(x.dtype).transpose(0, 1)


def _with_input_before(a: Mamba3Arguments, weight_before: Tensor, bounds: _Boundaries) -> Tensor:
    """The initial states (rows, H, P, N) with the input before them, as the trapezoid of the first step has it."""
    assert a.initial_states is not None
    _, ssm, B, x = (t.to(weight_before.dtype) for t in a.initial_states)
    weight = weight_before.flatten(0, 1).index_select(0, bounds.first)  # (rows, H)
    x_ranks = _up_project(x, a.mimo_x)  # (rows, R, H, P)
    outer = (x_ranks.unsqueeze(4) * B.unsqueeze(3)).sum(1)  # (rows, H, P, N)
    # A sequence without steps keeps its state, even beside an infinite B, of which a weight of 0 would make NaN.
    return torch.where(bounds.has_steps[:, None, None, None], torch.addcmul(ssm, weight[..., None, None], outer), ssm)


def _own_outputs(x_ranks: Tensor, B: Tensor, C: Tensor, later_weight: Tensor, weight: Tensor) -> Tensor:
    """Outputs of the inputs of the same step.

    Args:
        x_ranks: (B, L, R, H, P).
        B, C: (B, L, R, H, N).
        later_weight: (B, L, H) weight of an input in the outputs of the ranks before its own.
        weight: (B, L, H) weight of an input in the outputs of its own rank and of those after it.

    Returns:
        like `x_ranks`.
    """
    # Not a matrix product, whose backward would be in the dtype of an autocast around it.
    rank = x_ranks.shape[2]
    own = torch.zeros_like(x_ranks)
    for r in range(rank):
        weights = torch.stack([later_weight] * r + [weight] * (rank - r), 2)  # (B, L, R, H)
        scores = (C * B[:, :, r : r + 1]).sum(-1) * weights
        own = own + scores.unsqueeze(-1) * x_ranks[:, :, r : r + 1]
    return own


def _skip_gate_and_project(y: Tensor, x_ranks: Tensor, a: Mamba3Arguments) -> Tensor:
    """The skip connection and the gate of y (B, L, R, H, P), and the sum over its ranks; in the dtype of x."""
    if a.D is not None:
        y = y + a.D.to(y.dtype).unsqueeze(-1) * x_ranks
    if a.z is not None:
        z = without_padding(a.z, a.cu_seqlens, a.seq_idx).to(y.dtype)
        y = y * silu(_up_project(z, a.mimo_z))
    if a.mimo_x is None:
        y = y.squeeze(2)
    elif a.mimo_o is not None:
        y = (y * a.mimo_o.to(y.dtype).transpose(0, 1)).sum(2)
    return y.to(a.x.dtype)
