"""The selective scan in pure PyTorch at speed, on any device.

Time is walked in blocks of steps. In a block, everything that does not depend on the state (decays, inputs,
outputs) is one operation over all steps, and the recurrence itself is one fused multiply-add a step, written in
place over (sequences, groups, N, channels of a group). Blocks are small enough to stay in a CPU's cache. The
backward keeps the state before each block only, computes the block again, and walks it in reverse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .._core.discretization import skip_and_gate, step_size
from .._core.invariant import matmul
from .._core.library import Gradient, autocast_off, define_op, unknown_size
from .._core.slots import StepPlan, step_all, step_by_slots
from .._core.transforms import Fold, backward_formula, transformable
from .._core.varlen import Blocks, Sequences, batch_by_length, max_blocks, parse_sequences, without_padding
from . import differentiable
from .groups import repeat_groups

# Elements of one step of the recurrence, and of one block of steps: the first keeps a step's operands in a
# core's cache, the second a block's buffers in the shared one. Both were chosen by timing on a CPU.
STEP_ELEMENTS = 1 << 14
BLOCK_ELEMENTS = 1 << 20
MIN_BLOCK, MAX_BLOCK = 16, 64


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
    """Scan with arguments in the canonical form of `reference.selective_scan`, and the same results."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    # Operations outside the scan must not see padding.
    u, dt = (without_padding(x, cu_seqlens, seq_idx) for x in (u, dt))
    z = None if z is None else without_padding(z, cu_seqlens, seq_idx)
    dt = step_size(dt, dt_bias, dt_softplus, dtype)
    # A matrix that is constant in time has a group for each channel.
    B, C = (m.expand(*u.shape[:2], -1, -1) if m.dim() == 2 else m for m in (B, C))  # (B, L, G, N)
    groups = max(B.shape[2], C.shape[2])
    B, C = (repeat_groups(m, groups) for m in (B, C))
    y, final_states, _ = _scan(u, dt, A.to(dtype), B, C, initial_states, cu_seqlens, seq_idx)
    return skip_and_gate(y, u, D, z), final_states


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
    """Advance `state` (B, D, N) in place; u, dt, z (M, D); B, C (M, G, N) or (D, N) -> y (M, D). No gradients."""

    def step(h: Tensor, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> Tensor:
        dt = step_size(dt, dt_bias, dt_softplus, h.dtype)
        B, C = (_per_channel(m, u.shape[1]).to(h.dtype) for m in (B, C))  # (B or 1, D, N)
        # Equation 2a of arXiv 2312.00752, with A-bar = exp(dt A) and B-bar = dt B.
        h.mul_(torch.exp(dt.unsqueeze(-1) * A.to(h.dtype)))
        h.addcmul_((dt * u).unsqueeze(-1), B)
        y = (h * C).sum(-1)  # (B, D), equation 2b
        return skip_and_gate(y, u, D, z)

    with autocast_off(u.device):
        if plan is None:
            return step_all(step, state, (u, dt, B, C, z), state_scale, seeds)
        B, C = (m.expand(len(u), *m.shape) if m.dim() == 2 else m for m in (B, C))  # (M, G, N)
        return step_by_slots(step, state, plan, torch.zeros_like(u), (u, dt, B, C, z), state_scale, seeds)


def _per_channel(m: Tensor, dim: int) -> Tensor:
    """B or C of one step, (B, G, N) or (D, N) -> (B or 1, D, N)."""
    return m.unsqueeze(0) if m.dim() == 2 else m.repeat_interleave(dim // m.shape[1], dim=1)


# --- shapes -----------------------------------------------------------------------------------------------------
# Inside, the state is (rows, G, N, D / G): channels last, so that a group's outputs C h are one matrix product.


def _block_steps(state_size: int) -> int:
    per_step = max(1, STEP_ELEMENTS // state_size) * state_size
    return min(MAX_BLOCK, max(MIN_BLOCK, BLOCK_ELEMENTS // per_step))


def _tiles(sequences: Sequences, a: Tensor, n_buffers: int) -> Iterator[tuple[Tensor, Blocks, _Buffers]]:
    """Sequences that are scanned together, their blocks, and scratch for these."""
    width = max(1, STEP_ELEMENTS // a.numel())
    buffers = None
    for members, blocks in batch_by_length(sequences, width, _block_steps(a.numel()), a.device):
        buffers = buffers or _Buffers(blocks, a, n_buffers)  # the first blocks are the largest
        yield members, blocks, buffers


def _to_inner(states: Tensor, groups: int) -> Tensor:
    """(rows, D, N) -> (rows, G, N, D / G)"""
    return states.unflatten(1, (groups, -1)).transpose(2, 3)


def _from_inner(states: Tensor) -> Tensor:
    return states.transpose(2, 3).flatten(1, 2).contiguous()


def _state_rows(
    sequences: Sequences, initial_states: Tensor | None, A: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The state of every sequence (S, G, N, D / G), and the sequences that have a row of initial / final states."""
    first, last = sequences.state_indices(A.device)
    states = A.new_zeros(len(sequences.lengths), *_to_inner(A[None], groups).shape[1:])
    if initial_states is not None:
        states[first] = _to_inner(initial_states.to(A.dtype), groups)
    return states, first, last


# --- one block --------------------------------------------------------------------------------------------------


class _Buffers:
    """Scratch for blocks: fresh memory for each would cost more than the arithmetic."""

    def __init__(self, blocks: Blocks, a: Tensor, n_buffers: int):
        self.state = a.shape
        self.flat = a.new_empty(n_buffers, (blocks.size + 1) * blocks.active[0] * a.numel())

    def view(self, i: int, count: int, steps: int) -> Tensor:
        """Buffer i as (steps, count, G, N, E)."""
        return self.flat[i, : steps * count * self.state.numel()].view(steps, count, *self.state)


def _run_block(buffers: _Buffers, dt: Tensor, du: Tensor, a: Tensor, B: Tensor, start: Tensor):
    """Decays (K, n, G, N, E) and states (K + 1, n, G, N, E), the first of which is `start`.

    dt, du = dt * u (K, n, G, E); a (G, N, E); B (K, n, G, N). Padded steps have dt = 0, which keeps the state.
    """
    steps, count = dt.shape[:2]
    decay = torch.mul(dt.unsqueeze(3), a, out=buffers.view(0, count, steps)).exp_()
    states = buffers.view(1, count, steps + 1)
    states[0] = start
    torch.mul(du.unsqueeze(3), B.unsqueeze(4), out=states[1:])
    h = states.unbind(0)
    for t, decay_t in enumerate(decay.unbind(0)):
        h[t + 1].addcmul_(decay_t, h[t])
    return decay, states


# --- forward ----------------------------------------------------------------------------------------------------


def _forward(u, dt, A, B, C, initial_states, cu_seqlens, seq_idx):
    batch, length, dim = u.shape
    groups, n = B.shape[2:]
    sequences = parse_sequences(batch, length, cu_seqlens, seq_idx)
    states, _, last = _state_rows(sequences, initial_states, A, groups)
    a = _to_inner(A[None], groups)[0]  # (G, N, E)
    inputs = [_flat(x, groups) for x in (u, dt, B, C)]
    y = A.new_zeros(u.shape) if sequences.has_padding(batch * length) else A.new_empty(u.shape)
    checkpoint_states = A.new_empty(max_blocks(u, len(states), _block_steps(dim * n)), *states.shape[1:])
    num_saved = 0

    for members, blocks, buffers in _tiles(sequences, a, 2):
        h_0 = states[members]
        for k, count in enumerate(blocks.active):
            checkpoint_states[num_saved : num_saved + count] = h_0[:count]
            num_saved += count
            u_k, dt_k, B_k, C_k = _read(blocks, k, inputs, A.dtype)
            _, h = _run_block(buffers, dt_k, dt_k * u_k, a, B_k, h_0[:count])
            _write(blocks, k, [matmul(C_k.unsqueeze(3), h[1:])], [y])  # (K, n, G, 1, E)
            h_0[:count] = h[-1]
        states[members] = h_0
    checkpoint_states[num_saved:] = 0  # unused entries
    return y, _from_inner(states[last]), checkpoint_states


def _flat(x: Tensor, groups: int) -> Tensor:
    """(B, L, D) or (B, L, G, N) -> (B * L, G, D / G or N)."""
    batch, length, *inner = x.shape
    return x.reshape(batch * length, groups, math.prod(inner) // groups)


def _read(blocks: Blocks, k: int, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Block k of each input, (K, n, G, D / G or N)."""
    return [blocks.gather(k, x, dtype).transpose(0, 1) for x in inputs]


def _write(blocks: Blocks, k: int, parts: list[Tensor], outs: list[Tensor]) -> None:
    for part, out in zip(parts, outs, strict=True):
        rows = out.flatten(0, 1)
        blocks.scatter(k, part.transpose(0, 1).reshape(*part.shape[1::-1], *rows.shape[1:]), rows)


# --- backward ---------------------------------------------------------------------------------------------------


def _backward(u, dt, A, B, C, initial_states, cu_seqlens, seq_idx, checkpoint_states, dy, dfinal_states):
    batch, length, dim = u.shape
    groups, n = B.shape[2:]
    sequences = parse_sequences(batch, length, cu_seqlens, seq_idx)
    dstates, first, last = _state_rows(sequences, None, A, groups)
    dstates[last] = _to_inner(dfinal_states.to(A.dtype), groups)
    a = _to_inner(A[None], groups)[0]  # (G, N, E)
    inputs = [_flat(x, groups) for x in (u, dt, B, C, dy)]
    new = torch.zeros_like if sequences.has_padding(batch * length) else torch.empty_like
    grads = [new(x, memory_format=torch.contiguous_format) for x in (u, dt, B, C)]
    da = torch.zeros_like(a)
    num_saved = 0

    for members, blocks, buffers in _tiles(sequences, a, 3):
        dh = dstates[members]
        num_saved += sum(blocks.active)
        block_starts = checkpoint_states[num_saved - sum(blocks.active) : num_saved].split(blocks.active)
        for k in reversed(range(len(block_starts))):
            u_k, dt_k, B_k, C_k, dy_k = _read(blocks, k, inputs, A.dtype)
            *grads_k, da_k = _block_backward(
                buffers, block_starts[k], u_k, dt_k, B_k, C_k, dy_k, a, dh[: len(block_starts[k])]
            )
            _write(blocks, k, grads_k, grads)
            da += da_k
        dstates[members] = dh
    du, ddt, dB, dC = grads
    dinitial_states = _from_inner(dstates[first])
    if initial_states is not None:
        dinitial_states = dinitial_states.to(initial_states.dtype)
    return du, ddt, _from_inner(da[None])[0], dB, dC, dinitial_states


def _block_backward(buffers, start, u, dt, B, C, dy, a, dh):
    """Gradients of one block; `dh` (n, G, N, E), of the state after it, becomes that of `start`."""
    du = dt * u
    decay, h = _run_block(buffers, dt, du, a, B, start)
    # g: gradient of each step's state, given by its output and by the step after it.
    g = torch.mul(dy.unsqueeze(3), C.unsqueeze(4), out=buffers.view(2, *reversed(dt.shape[:2])))
    steps, decays = g.unbind(0), decay.unbind(0)
    steps[-1].add_(dh)
    for t in range(len(steps) - 2, -1, -1):
        steps[t].addcmul_(decays[t + 1], steps[t + 1])
    torch.mul(decays[0], steps[0], out=dh)

    # A row times a matrix: as a matrix times a column the same products are ten times slower on a CPU.
    dC = matmul(dy.unsqueeze(3), h[1:].transpose(3, 4)).squeeze(3)
    dB = matmul(du.unsqueeze(3), g.transpose(3, 4)).squeeze(3)
    d_input = matmul(B.unsqueeze(3), g).squeeze(3)  # of dt * u
    w = decay.mul_(h[:-1]).mul_(g)  # gradient of the exponent dt A
    ddt = d_input * u
    for i in range(a.shape[1]):
        ddt.addcmul_(w[:, :, :, i], a[:, i])
    da = w.mul_(dt.unsqueeze(3)).sum((0, 1))
    return d_input.mul_(dt), ddt, dB, dC, da


# --- ops --------------------------------------------------------------------------------------------------------


def _forward_fake(u, dt, A, B, C, initial_states, cu_seqlens, seq_idx):
    batch, length, dim = u.shape
    groups, n = B.shape[2:]
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    num_saved = max_blocks(u, rows, _block_steps(dim * n)) if seq_idx is None else unknown_size(u)
    checkpoint_states = A.new_empty(num_saved, groups, n, dim // groups)
    return A.new_empty(u.shape), A.new_empty(rows, dim, n), checkpoint_states


def _backward_fake(u, dt, A, B, C, initial_states, cu_seqlens, seq_idx, checkpoint_states, dy, dfinal_states):
    grads = (x.new_empty(x.shape) for x in (u, dt, A, B, C))
    dtype = A.dtype if initial_states is None else initial_states.dtype
    return *grads, A.new_empty(dfinal_states.shape, dtype=dtype)


def _formula(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    u, dt, A, B, C, initial_states, cu_seqlens, seq_idx = (arguments[name] for name in _TENSORS)
    u, dt = (x.unflatten(2, (B.shape[2], -1)) for x in (u, dt))  # (B, L, G, E)
    y, final_states = differentiable.selective_scan(
        u, dt, A, B, C, initial_states=initial_states, cu_seqlens=cu_seqlens, seq_idx=seq_idx
    )
    return y.flatten(2), final_states


def _save(ctx, inputs, outputs):
    _, _, checkpoint_states = outputs
    ctx.save_for_backward(*inputs, checkpoint_states)


def _gradients(ctx, dy, dfinal_states):
    # Read once: torch.utils.checkpoint does not return them again.
    *tensors, checkpoint_states = ctx.saved_tensors
    grads = dict(zip(_GRADIENTS, _backward_scan(*tensors, checkpoint_states, dy, dfinal_states), strict=True))
    return {name: grad for (name, grad), x in zip(grads.items(), tensors, strict=False) if x is not None}


def _saved(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad():
        _, _, states = _scan(*(arguments[name] for name in _TENSORS))
    return {"checkpoint_states": states}


_TENSORS = ("u", "dt", "A", "B", "C", "initial_states", "cu_seqlens", "seq_idx")
_GRADIENTS = _TENSORS[:6]
_SCHEMA = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? initial_states, Tensor? cu_seqlens, Tensor? seq_idx"
)
_FOLDED = {"u": -1, "dt": -1, "A": -2, "B": -2, "C": -2, "initial_states": -2, "dy": -1, "dfinal_states": -2}
"""Dimension of groups, or of channels, of each tensor."""

_gradient = Gradient(_save, _gradients, _formula, 2)
_forward_op = define_op(
    f"selective_scan_torch({_SCHEMA}) -> (Tensor, Tensor, Tensor)", _forward, _forward_fake, _gradient
)
_backward_op = define_op(
    f"selective_scan_torch_backward({_SCHEMA}, Tensor checkpoint_states, Tensor dy, Tensor dfinal_states)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_scan = transformable(_forward_op, Fold(_FOLDED, ("u", "initial_states", None)), _gradient)
_backward_scan = transformable(
    _backward_op,
    Fold(_FOLDED, _GRADIENTS, saved=_saved),
    backward_formula(_formula, _GRADIENTS, ("dy", "dfinal_states")),
)
