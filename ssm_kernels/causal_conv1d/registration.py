"""Registration of a set of compiled kernels of the causal convolution, and the functions that call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .._core.library import Gradient, call_op, define_op, lazy_function
from .._core.memory_layout import empty_like
from .._core.slots import PLAN_SCHEMA, StepPlan, plan_tensors
from .._core.transforms import Fold, backward_formula, refuse_forward_mode, transformable
from . import differentiable

_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_states, Tensor? cu_seqlens, Tensor? seq_idx,"
    " int[] directions, int height"
)


class ConvKernels:
    """The convolution by the kernels of a package, whose modules `forward`, `backward` and `step` are imported when an
    op first runs.

    Args:
        name: of the op; those of its backward and step are `<name>_backward` and `<name>_step`.
        package: full name of the package.
    """

    def __init__(self, name: str, package: str):
        self.backward_op = define_op(
            f"{name}_backward({_ARGUMENTS}, Tensor dy, Tensor? dfinal_states) -> (Tensor, Tensor, Tensor, Tensor)",
            lazy_function(f"{package}.backward", "backward"),
            _backward_fake,
        )
        backward = transformable(
            self.backward_op,
            Fold(_FOLDED, _GRADIENTS, ("directions",)),
            backward_formula(_formula, _GRADIENTS, ("dy", "dfinal_states")),
        )
        # Most callers do not use the final states.
        gradient = Gradient(_save, _gradients(backward), _formula, 2, materialize_grads=False)
        self.forward_op = define_op(
            f"{name}({_ARGUMENTS}) -> (Tensor, Tensor)",
            lazy_function(f"{package}.forward", "forward"),
            _forward_fake,
            gradient,
        )
        self._forward = transformable(
            self.forward_op, Fold(_FOLDED, ("x", "initial_states"), ("directions",)), gradient
        )
        self.step_op = define_op(
            f"{name}_step(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, bool silu, {PLAN_SCHEMA}) -> Tensor",
            lazy_function(f"{package}.step", "step"),
            lambda state, x, *rest: x.new_empty(x.shape),
        )

    def causal_conv1d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        silu: bool,
        initial_states: Tensor | None,
        cu_seqlens: Tensor | None,
        seq_idx: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Convolve with arguments in the canonical form of `reference.causal_conv1d`, and the same results."""
        y, final_states = self._forward(
            x.unsqueeze(2), weight, _contiguous(bias), silu, initial_states, cu_seqlens, seq_idx, [], 1
        )
        return y.squeeze(2), final_states

    def grouped_causal_conv1d(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, directions: Sequence[int], height: int
    ) -> Tensor:
        """Convolve each of G groups of channels along its own scan direction.

        Args:
            x: (B, L, G, E), where L is a grid of `height` rows in row-major order.
            weight: (G * E, K).
            bias: (G * E,).
            directions: an index in `cross_scan.CROSS` for each group.

        Returns:
            y (B, L, G, E) in row-major order, in the dtype of x.
        """
        return self._forward(x, weight, _contiguous(bias), silu, None, None, None, list(directions), height)[0]

    def causal_conv1d_step(
        self, state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, plan: StepPlan | None
    ) -> Tensor:
        """Advance by one step: state (B, K - 1, D), updated in place; x (M, D) -> y (M, D)."""
        refuse_forward_mode("causal_conv1d_step")
        return call_op(self.step_op, state, x, weight, _contiguous(bias), silu, *plan_tensors(plan))


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


_GRADIENTS = ("x", "weight", "bias", "initial_states")
_FOLDED = {"x": -2, "weight": -2, "bias": -1, "initial_states": -1, "dy": -2, "dfinal_states": -1}
"""Dimension of groups, or of channels, of each tensor."""


def _formula(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    names = ("x", "weight", "bias", "silu", "initial_states", "cu_seqlens", "seq_idx", "directions", "height")
    y, final_states = differentiable.causal_conv1d(*(arguments[name] for name in names))
    return y.to(arguments["x"].dtype), final_states.to(arguments["x"].dtype)


def _save(ctx, inputs, outputs):
    x, weight, bias, ctx.silu, initial_states, cu_seqlens, seq_idx, ctx.directions, ctx.height = inputs
    ctx.save_for_backward(x, weight, bias, initial_states, cu_seqlens, seq_idx)


def _gradients(backward: Callable) -> Callable:
    def gradients(ctx, dy, dfinal_states):
        x, weight, bias, initial_states, cu_seqlens, seq_idx = ctx.saved_tensors
        dy = x.new_zeros(x.shape) if dy is None else dy
        dx, dweight, dbias, dinitial_states = backward(
            x, weight, bias, ctx.silu, initial_states, cu_seqlens, seq_idx, ctx.directions, ctx.height,
            dy, dfinal_states,
        )  # fmt: skip
        return {
            "x": dx,
            "weight": dweight,
            "bias": None if bias is None else dbias,
            "initial_states": None if initial_states is None else dinitial_states,
        }

    return gradients


def _forward_fake(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx, directions, height):
    rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return empty_like(x, x.new_empty), x.new_empty(rows, weight.shape[1] - 1, weight.shape[0])


def _backward_fake(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx, directions, height, dy, dfinal_states):
    dbias, dinitial_states = (x.new_empty(0) if m is None else m.new_empty(m.shape) for m in (bias, initial_states))
    return empty_like(x, x.new_empty), weight.new_empty(weight.shape), dbias, dinitial_states
