"""Causal convolution in Triton: registration of the ops. The kernels are imported when an op first runs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._core.library import Gradient, define_op, lazy_function
from ..._triton.device import empty_like


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
    """x (B, L, G, E), weight (G * E, K) -> y (B, L, G, E) and the final states (rows, K - 1, G * E), in x's dtype.

    With `directions`, one code a group, L is a grid of `height` rows in row-major order, and each group is convolved
    along its own direction; y is row-major too. Codes are indices in `cross_scan.CROSS`. Not with packed sequences.
    """
    bias = None if bias is None else bias.contiguous()
    return _forward_op(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx, list(directions), height)


def conv_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Advance the convolution by one step: state (B, K - 1, D), updated in place; x (B, D) -> y (B, D)."""
    return _step_op(state, x, weight, None if bias is None else bias.contiguous(), silu)


def _save(ctx, inputs, outputs):
    x, weight, bias, ctx.silu, initial_states, cu_seqlens, seq_idx, ctx.directions, ctx.height = inputs
    ctx.save_for_backward(x, weight, bias, initial_states, cu_seqlens, seq_idx)


@torch.autograd.function.once_differentiable
def _gradients(ctx, dy, dfinal_states):
    x, weight, bias, initial_states, cu_seqlens, seq_idx = ctx.saved_tensors
    dy = x.new_zeros(x.shape) if dy is None else dy
    dx, dweight, dbias, dinitial_states = _backward_op(
        x, weight, bias, ctx.silu, initial_states, cu_seqlens, seq_idx, ctx.directions, ctx.height, dy, dfinal_states
    )
    return {
        "x": dx,
        "weight": dweight,
        "bias": None if bias is None else dbias,
        "initial_states": None if initial_states is None else dinitial_states,
    }


def _forward_fake(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx, directions, height):
    rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return empty_like(x, x.new_empty), x.new_empty(rows, weight.shape[1] - 1, weight.shape[0])


def _backward_fake(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx, directions, height, dy, dfinal_states):
    dbias, dinitial_states = (x.new_empty(0) if m is None else m.new_empty(m.shape) for m in (bias, initial_states))
    return empty_like(x, x.new_empty), weight.new_empty(weight.shape), dbias, dinitial_states


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_states, Tensor? cu_seqlens, Tensor? seq_idx,"
    " int[] directions, int height"
)
_forward_op = define_op(
    f"causal_conv1d_triton({_ARGUMENTS}) -> (Tensor, Tensor)",
    lazy_function(f"{__name__}.forward", "forward"),
    _forward_fake,
    Gradient(_save, _gradients, 2, materialize_grads=False),  # most callers do not use the final states
)
_backward_op = define_op(
    f"causal_conv1d_triton_backward({_ARGUMENTS}, Tensor dy, Tensor? dfinal_states)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lazy_function(f"{__name__}.backward", "backward"),
    _backward_fake,
)
_step_op = define_op(
    "causal_conv1d_triton_step(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, bool silu) -> Tensor",
    lazy_function(f"{__name__}.step", "step"),
    lambda state, x, weight, bias, silu: x.new_empty(x.shape),
)
