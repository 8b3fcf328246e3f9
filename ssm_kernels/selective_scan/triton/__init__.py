"""Triton ops of the selective scan, fused with its step size, skip connection and gate.

`forward`, `backward` and `step` hold the kernels with their launches; they are imported when an op first runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._core.library import Gradient, define_op, lazy_function, unknown_size
from ..._triton.segment_table import max_segments
from ..groups import repeat_groups

CHECKPOINT_INTERVAL = 64
"""Steps between two states that the forward saves for the backward, which recomputes those between."""
FLOATS = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
"""Inputs that have gradients, in the order of the schemas."""


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
    groups = max(m.shape[2] if m.dim() == 4 else 1 for m in (B, C))
    B, C = (repeat_groups(m, groups) if m.dim() == 4 else m for m in (B, C))
    u, dt, z = (x if x is None else x.unflatten(2, (groups, -1)) for x in (u, dt, z))  # (B, L, G, E)
    y, final_states = grouped_selective_scan(
        u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_states, cu_seqlens, seq_idx
    )
    return y.flatten(2), final_states


def grouped_selective_scan(
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
    directions: Sequence[int] = (),
    height: int = 1,
) -> tuple[Tensor, Tensor]:
    """Scan E channels in each of G groups.

    Args:
        u, dt, z: (B, L, G, E), of any strides.
        A: (G * E, N).
        B, C: (B, L, G, N), of any strides, or (G * E, N) where constant in time.
        D, dt_bias: (G * E,).
        initial_states: (rows, G * E, N).
        directions: the way of each group through a row-major grid of L places, as in `grid_offset`: step t of the scan
            reads and writes all tensors at that place. Empty where a step is a place. Not for packed sequences.
        height: of the grid.

    Returns:
        y (B, L, G, E) in the dtype of u, its time contiguous where that of u is, and the final states (rows, G * E, N).
    """
    floats = (u, dt, A, B, C, D, z, dt_bias, initial_states)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floats)
    y, final_states, _ = _forward_op(*floats, cu_seqlens, seq_idx, dt_softplus, list(directions), height, keep)
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


def _save(ctx, inputs, outputs):
    if not inputs.keep:
        raise RuntimeError("this graph was traced without gradients, and saved nothing that they need: trace it again")
    _, _, checkpoint_states = outputs
    ctx.save_for_backward(*(getattr(inputs, name) for name in (*FLOATS, "cu_seqlens", "seq_idx")), checkpoint_states)
    ctx.options = inputs.dt_softplus, inputs.directions, inputs.height


@torch.autograd.function.once_differentiable
def _gradients(ctx, dy, dfinal):
    *inputs, checkpoint_states = ctx.saved_tensors
    grads = _backward_op(*inputs, checkpoint_states, dy, dfinal, *ctx.options)
    # The op returns an empty tensor for an input that is None.
    return {
        name: None if x is None else grad for name, x, grad in zip(FLOATS, inputs[: len(FLOATS)], grads, strict=True)
    }


def empty_like(x: Tensor, empty=None) -> Tensor:
    """(B, L, G, E), contiguous, or as (B, G, E, L) where the time of x is contiguous."""
    batch, length, groups, channels = x.shape
    empty = empty or (lambda *size: torch.empty(size, dtype=x.dtype, device=x.device))
    if x.stride(1) == 1 and x.stride(3) != 1:
        return empty(batch, groups, channels, length).permute(0, 3, 1, 2)
    return empty(batch, length, groups, channels)


def _forward_fake(
    u, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, seq_idx, softplus, directions, height, keep
):
    batch, length = u.shape[:2]
    compute = torch.promote_types(u.dtype, torch.float32)
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    kept = 0
    if keep and seq_idx is not None:
        kept = unknown_size(u)
    elif keep:  # one to spare, so that tracing with a dynamic length need not know whether there is only one
        kept = max_segments(batch, length, rows, CHECKPOINT_INTERVAL, cu_seqlens is not None) + 1
    y = empty_like(u, u.new_empty)
    return y, u.new_empty(rows, *A.shape, dtype=compute), u.new_empty(kept, *A.shape, dtype=compute)


def _backward_fake(u, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, seq_idx, starts, dy, dfinal, *options):
    def like(x):
        return u.new_empty(0) if x is None else x.new_empty(x.shape)

    du, ddt, dz = (u.new_empty(0) if x is None else empty_like(x, x.new_empty) for x in (u, dt, z))
    return du, ddt, like(A), like(B), like(C), like(D), dz, like(dt_bias), like(initial_states)


def _step_fake(state, u, *rest):
    return u.new_empty(u.shape)


_INPUTS = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_states,"
    " Tensor? cu_seqlens, Tensor? seq_idx"
)
_OPTIONS = "bool dt_softplus, int[] directions, int height"
_forward_op = define_op(
    f"selective_scan_triton({_INPUTS}, {_OPTIONS}, bool keep) -> (Tensor, Tensor, Tensor)",
    lazy_function(f"{__name__}.forward", "forward"),
    _forward_fake,
    Gradient(_save, _gradients, 2),
)
_backward_op = define_op(
    f"selective_scan_triton_backward({_INPUTS}, Tensor starts, Tensor dy, Tensor dfinal, {_OPTIONS})"
    f" -> ({', '.join(['Tensor'] * 9)})",
    lazy_function(f"{__name__}.backward", "backward"),
    _backward_fake,
)
_step_op = define_op(
    "selective_scan_triton_step(Tensor(a!) state, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D,"
    " Tensor? z, Tensor? dt_bias, bool dt_softplus) -> Tensor",
    lazy_function(f"{__name__}.step", "step"),
    _step_fake,
)
