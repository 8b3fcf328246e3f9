"""The selective scan in numba on a CPU, fused with its step size, skip connection and gate."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._core.library import Gradient, define_op, lazy_function, unknown_size

INTERVAL = 32
"""Steps between two states that are saved for the backward, which computes those between again."""


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
    """u, dt, z (B, L, D), A (D, N), B, C (B, L, G, N) or (D, N) -> y (B, L, D) and final states (rows, D, N)."""
    floats = (u, dt, A, B, C, D, z, dt_bias, initial_states)
    # Inside the op autograd is off: whether to save checkpoints is decided here.
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floats)
    y, final_states, _ = _forward_op(*floats, cu_seqlens, seq_idx, dt_softplus, keep)
    return y, final_states


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
) -> Tensor:
    """state (B, D, N), updated in place; u, dt, z (B, D); B, C (B, G, N) or (D, N) -> y (B, D)."""
    return _step_op(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus)


def n_checkpoints(total_steps: int, n_sequences: int) -> int:
    """At least the blocks of all sequences together, from shapes alone as tracing needs.

    One more, so that tracing with a dynamic length need not know whether there is only one.
    """
    return total_steps // INTERVAL + n_sequences + 1


def _save(ctx, inputs, outputs):
    if not inputs.keep:
        raise RuntimeError("this graph was traced without gradients, and saved nothing that they need: trace it again")
    _, _, checkpoints = outputs
    ctx.save_for_backward(*(getattr(inputs, name) for name in (*FLOATS, "cu_seqlens", "seq_idx")), checkpoints)
    ctx.softplus = inputs.dt_softplus


@torch.autograd.function.once_differentiable
def _gradients(ctx, dy, dfinal):
    *inputs, checkpoints = ctx.saved_tensors
    grads = _backward_op(*inputs, checkpoints, dy, dfinal, ctx.softplus)
    # The op returns an empty tensor for an input that is None.
    return {
        name: None if x is None else grad for name, x, grad in zip(FLOATS, inputs[: len(FLOATS)], grads, strict=True)
    }


def _forward_fake(u, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, seq_idx, dt_softplus, keep):
    batch, length, dim = u.shape
    compute = torch.promote_types(u.dtype, torch.float32)
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    n_saved = 0
    if keep:
        n_saved = unknown_size(u) if seq_idx is not None else n_checkpoints(batch * length, rows)
    final_states = u.new_empty(rows, *A.shape, dtype=compute)
    return u.new_empty(u.shape), final_states, u.new_empty(n_saved, A.shape[1], dim, dtype=compute)


def _backward_fake(u, dt, A, B, C, D, z, dt_bias, initial_states, *rest):
    inputs = (u, dt, A, B, C, D, z, dt_bias, initial_states)
    return tuple(u.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _step_fake(state, u, *rest):
    return u.new_empty(u.shape)


FLOATS = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
"""Inputs that have gradients, in the order of the schemas."""
_INPUTS = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_states,"
    " Tensor? cu_seqlens, Tensor? seq_idx"
)
_forward_op = define_op(
    f"selective_scan_numba({_INPUTS}, bool dt_softplus, bool keep) -> (Tensor, Tensor, Tensor)",
    lazy_function(f"{__name__}.forward", "forward"),
    _forward_fake,
    Gradient(_save, _gradients, 2),
)
_backward_op = define_op(
    f"selective_scan_numba_backward({_INPUTS}, Tensor checkpoints, Tensor dy, Tensor dfinal, bool dt_softplus)"
    f" -> ({', '.join(['Tensor'] * 9)})",
    lazy_function(f"{__name__}.backward", "backward"),
    _backward_fake,
)
_step_op = define_op(
    "selective_scan_numba_step(Tensor(a!) state, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D,"
    " Tensor? z, Tensor? dt_bias, bool dt_softplus) -> Tensor",
    lazy_function(f"{__name__}.step", "step"),
    _step_fake,
)
