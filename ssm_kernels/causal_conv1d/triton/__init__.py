"""The causal convolution as Triton kernels; `kernels` holds them, and is imported when one first runs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._core.library import Gradient, define_op, from_kernels


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    directions: tuple[int, ...] = (),
    height: int = 1,
) -> tuple[Tensor, Tensor]:
    """x (B, L, G, E), weight (G * E, K) -> y (B, L, G, E) and the last inputs (rows, K - 1, G * E), in x's dtype.

    With `directions`, one code a group, L is a grid of `height` rows, row by row, and each group is convolved along its
    own direction, at the grid's own places. The codes are places in `cross_scan.CROSS`. Needs sequences that are rows.
    """
    bias = None if bias is None else bias.contiguous()
    return _forward_op(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx, list(directions), height)


def step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """state (B, K - 1, D), moved on in place; x (B, D) -> y (B, D)."""
    return _step_op(state, x, weight, None if bias is None else bias.contiguous(), silu)


def like(x: Tensor, new) -> Tensor:
    """`new(shape)` for a result shaped (B, L, G, E) as x is, with with_contiguous_last_dim steps where x has them."""
    if is_time_first(x):
        batch, length, groups, dim = x.shape
        return new((batch, groups, dim, length)).permute(0, 3, 1, 2)
    return new(x.shape)


def is_time_first(x: Tensor) -> bool:
    """Whether steps lie side by side in memory, and channels do not."""
    return x.stride(1) == 1 and x.stride(3) != 1


def _save(ctx, inputs, outputs):
    x, weight, bias, ctx.silu, initial_states, cu_seqlens, seq_idx, ctx.directions, ctx.height = inputs
    ctx.save_for_backward(x, weight, bias, initial_states, cu_seqlens, seq_idx)


@torch.autograd.function.once_differentiable
def _gradients(ctx, dy, dfinal):
    x, weight, bias, initial_states, cu_seqlens, seq_idx = ctx.saved_tensors
    dy = x.new_zeros(x.shape) if dy is None else dy
    dx, dweight, dbias, dinitial = _backward_op(
        x, weight, bias, ctx.silu, initial_states, cu_seqlens, seq_idx, ctx.directions, ctx.height, dy, dfinal
    )
    dbias = None if bias is None else dbias
    dinitial = None if initial_states is None else dinitial
    return dx, dweight, dbias, None, dinitial, None, None, None, None


def _forward_fake(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx, directions, height):
    rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return like(x, x.new_empty), x.new_empty(rows, weight.shape[1] - 1, weight.shape[0])


def _backward_fake(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx, directions, height, dy, dfinal):
    dbias, dinitial = (x.new_empty(0) if m is None else m.new_empty(m.shape) for m in (bias, initial_states))
    return like(x, x.new_empty), weight.new_empty(weight.shape), dbias, dinitial


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_states, Tensor? cu_seqlens, Tensor? seq_idx,"
    " int[] directions, int height"
)
_forward_op = define_op(
    f"causal_conv1d_triton({_ARGUMENTS}) -> (Tensor, Tensor)",
    from_kernels(__name__, "forward"),
    _forward_fake,
    Gradient(_save, _gradients, 2, with_zeros=False),  # most callers have no use for the final windows
)
_backward_op = define_op(
    f"causal_conv1d_triton_backward({_ARGUMENTS}, Tensor dy, Tensor? dfinal) -> (Tensor, Tensor, Tensor, Tensor)",
    from_kernels(__name__, "backward"),
    _backward_fake,
)
_step_op = define_op(
    "causal_conv1d_triton_step(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, bool silu) -> Tensor",
    from_kernels(__name__, "step"),
    lambda state, x, weight, bias, silu: x.new_empty(x.shape),
)
