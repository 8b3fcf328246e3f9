"""SSD as Triton kernels; `kernels` holds them, and is imported when one first runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core.library import Gradient, define_op, from_kernels


def scan(
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
    chunk_size: int,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    directions: tuple[int, ...] = (),
    height: int = 1,
) -> tuple[Tensor, Tensor]:
    """As `ssd`: x (B, L, H, P) -> y in the dtype of x and final states (rows, H, P, N).

    With `directions`, L is a grid of so many rows, row by row, and the G groups are cut in as many equal runs as there
    are directions: each is scanned along its own. The codes are places in `cross_scan.CROSS`.
    """
    low, high = dt_limit
    # The gate is not in the kernels: Mamba-2 has its own in the norm, and here it would cost them registers.
    wide = torch.promote_types(x.dtype, torch.float32)
    y, final_states = _forward_op(
        x, dt, A, B, C, D, dt_bias, dt_softplus, float(low), float(high), initial_states, chunk_size, cu_seqlens,
        seq_idx, list(directions), height, x.dtype if z is None else wide,
    )  # fmt: skip
    return y if z is None else (y * F.silu(z.to(wide))).to(x.dtype), final_states


def step(state: Tensor, *args) -> Tensor:
    """As `ssd_step`: x (B, T, H, P) -> y like x; `state` is updated in place."""
    return _step_op(state, *args)


def _save(ctx, inputs, outputs):
    ctx.tensors = [isinstance(a, Tensor) for a in inputs]
    ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))
    ctx.rest = [a for a in inputs if not isinstance(a, Tensor)]


@torch.autograd.function.once_differentiable
def _gradients(ctx, dy, dfinal):
    tensors, rest = iter(ctx.saved_tensors), iter(ctx.rest)
    args = [next(tensors if is_tensor else rest) for is_tensor in ctx.tensors]
    *grads, dinitial = _backward_op(dy, dfinal, *args)
    grads = [g if is_tensor else None for g, is_tensor in zip(grads, ctx.tensors, strict=False)]
    return *grads, None, None, None, dinitial if ctx.tensors[10] else None, *[None] * 6


def _step_fake(state, x, *rest):
    return x.new_empty(x.shape)


def _forward_fake(x, dt, A, B, C, D, dt_bias, softplus, low, high, initial, chunk_size, cu_seqlens, *rest):
    *_, out_dtype = rest
    rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    states = (rows, *x.shape[2:], B.shape[3])
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(states, dtype=wide)


def _backward_fake(dy, dfinal, x, dt, A, B, C, D, dt_bias, softplus, low, high, initial, *rest):
    given = (x, dt, A, B, C, D, dt_bias, initial)
    return tuple(x.new_empty(0) if m is None else m.new_empty(m.shape) for m in given)


_ARGUMENTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, bool dt_softplus,"
    " float dt_low, float dt_high, Tensor? initial_states, int chunk_size, Tensor? cu_seqlens, Tensor? seq_idx,"
    " int[] directions, int height, ScalarType out_dtype"
)
_forward_op = define_op(
    f"ssd_triton({_ARGUMENTS}) -> (Tensor, Tensor)",
    from_kernels(__name__, "forward"),
    _forward_fake,
    Gradient(_save, _gradients, 2),
)
_backward_op = define_op(
    f"ssd_triton_backward(Tensor dy, Tensor dfinal, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    from_kernels(__name__, "backward"),
    _backward_fake,
)
_step_op = define_op(
    "ssd_triton_step(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,"
    " Tensor? dt_bias, bool dt_softplus, float dt_low, float dt_high) -> Tensor",
    from_kernels(__name__, "step"),
    _step_fake,
)
