"""Selective scan in Triton: registration of the ops. The modules with kernels are imported when an op first runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._core.library import Gradient, define_op, lazy_function, unknown_size
from ..._triton.device import empty_like
from ..._triton.segment_table import max_segments
from ..arguments import SCHEMA, TENSORS, ScanArguments, ScanGradients
from ..groups import repeat_groups

CHECKPOINT_INTERVAL = 64
"""Steps between two states that the forward saves for the backward, which recomputes the states between them."""


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
    B, C = (repeat_groups(m, groups) if m.dim() == 4 else m for m in (B, C))  # (B, L, G, N) or (D, N)
    u, dt = (x.unflatten(2, (groups, -1)) for x in (u, dt))  # (B, L, G, E)
    z = None if z is None else z.unflatten(2, (groups, -1))  # (B, L, G, E)
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
    """Scan E channels in each of G groups; tensors as in `ScanArguments`.

    Args:
        directions: code of the scan direction of each group in `cross_scan.CROSS`. With them, L is a row-major grid,
            and step t of a group reads and writes all tensors at its t-th position along that direction.
        height: rows of that grid.

    Returns:
        y (B, L, G, E) in the dtype of u, with contiguous steps where u has them, and the final states (rows, G * E, N).
    """
    arguments = ScanArguments(
        u=u, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states, cu_seqlens=cu_seqlens,
        seq_idx=seq_idx, dt_softplus=dt_softplus, directions=list(directions), height=height,
    )  # fmt: skip
    save_states = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
    y, final_states, _ = _forward_op(*arguments, save_states)
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
    """Advance `state` (B, D, N) in place; u, dt, z (B, D); B, C (B, G, N) or (D, N) -> y (B, D)."""
    return _step_op(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _save(ctx, inputs, outputs):
    if not inputs.save_states:
        raise RuntimeError("this graph was traced without gradients, and saved nothing that they need: trace it again")
    _, _, checkpoint_states = outputs
    ctx.save_for_backward(*(getattr(inputs, name) for name in TENSORS), checkpoint_states)
    ctx.options = {name: getattr(inputs, name) for name in ("dt_softplus", "directions", "height")}


@torch.autograd.function.once_differentiable
def _gradients(ctx, dy, dfinal_states):
    *tensors, checkpoint_states = ctx.saved_tensors
    arguments = ScanArguments(**dict(zip(TENSORS, tensors, strict=True)), **ctx.options)
    grads = ScanGradients(*_backward_op(*arguments, checkpoint_states, dy, dfinal_states))._asdict()
    # The op returns an empty tensor for an input that is None.
    return {name: None if getattr(arguments, name) is None else grad for name, grad in grads.items()}


def _forward_fake(*args):
    *arguments, save_states = args
    arguments = ScanArguments(*arguments)
    u, cu_seqlens = arguments.u, arguments.cu_seqlens
    batch, length = u.shape[:2]
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    state_dtype = torch.promote_types(u.dtype, torch.float32)
    checkpoints = 0
    if save_states and arguments.seq_idx is not None:
        checkpoints = unknown_size(u)
    elif save_states:
        # One more than needed, so that tracing with a dynamic length need not know whether there is only one.
        checkpoints = max_segments(batch, length, rows, CHECKPOINT_INTERVAL, cu_seqlens is not None) + 1
    y = empty_like(u, u.new_empty)
    final_states, checkpoint_states = (
        u.new_empty(n, *arguments.A.shape, dtype=state_dtype) for n in (rows, checkpoints)
    )
    return y, final_states, checkpoint_states


def _backward_fake(*args):
    *arguments, checkpoint_states, dy, dfinal_states = args
    by_name = ScanArguments(*arguments)._asdict()
    return tuple(_gradient_fake(name, by_name[name], dy) for name in ScanGradients._fields)


def _gradient_fake(name: str, x: Tensor | None, dy: Tensor) -> Tensor:
    if x is None:
        return dy.new_empty(0)
    return empty_like(x, x.new_empty) if name in ("u", "dt", "z") else x.new_empty(x.shape)


def _step_fake(state, u, *rest):
    return u.new_empty(u.shape)


_forward_op = define_op(
    f"selective_scan_triton({SCHEMA}, bool save_states) -> (Tensor, Tensor, Tensor)",
    lazy_function(f"{__name__}.forward", "forward"),
    _forward_fake,
    Gradient(_save, _gradients, 2),
)
_backward_op = define_op(
    f"selective_scan_triton_backward({SCHEMA}, Tensor checkpoint_states, Tensor dy, Tensor dfinal_states)"
    f" -> ({', '.join(['Tensor'] * len(ScanGradients._fields))})",
    lazy_function(f"{__name__}.backward", "backward"),
    _backward_fake,
)
_step_op = define_op(
    "selective_scan_triton_step(Tensor(a!) state, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D,"
    " Tensor? z, Tensor? dt_bias, bool dt_softplus) -> Tensor",
    lazy_function(f"{__name__}.step", "step"),
    _step_fake,
)
