"""Parts of the registration that sets of compiled kernels of SSD share: decoding step, sizes of gradients, formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .._core.library import call_op, define_op, lazy_function
from .._core.slots import PLAN_SCHEMA, StepPlan, plan_tensors
from .._core.state_format import FORMAT_SCHEMA
from .._core.transforms import refuse_forward_mode
from . import differentiable
from .arguments import TENSORS, ScanArguments, ScanGradients


class StepKernel:
    """The decoding step by the kernel of a package, whose module `step` is imported when the op first runs.

    Args:
        name: of the op.
        package: full name of the package.
    """

    def __init__(self, name: str, package: str):
        self.op: Callable = define_op(
            f"{name}(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,"
            f" Tensor? dt_bias, bool dt_softplus, float dt_min, float dt_max, Tensor? input_weights, {PLAN_SCHEMA},"
            f" {FORMAT_SCHEMA}) -> Tensor",
            lazy_function(f"{package}.step", "step"),
            _step_fake,
        )

    def ssd_step(
        self,
        state: Tensor,
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
        plan: StepPlan | None,
        input_weights: Tensor | None,
        state_scale: Tensor | None,
        seeds: Tensor | None,
    ) -> Tensor:
        """Advance `state` (B, H, P, N) by T tokens, in place; x (B, T, H, P) -> y like x."""
        refuse_forward_mode("ssd_step")
        return call_op(
            self.op, state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, *dt_limit, input_weights, *plan_tensors(plan),
            state_scale, seeds,
        )  # fmt: skip


def _step_fake(state, x, *rest):
    return x.new_empty(x.shape)


def gradients_fake(arguments: ScanArguments, dy: Tensor) -> tuple[Tensor, ...]:
    """`ScanGradients` without values, as tracing needs them."""
    inputs = (getattr(arguments, name) for name in ScanGradients._fields)
    return tuple(dy.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


FOLDED = {
    "x": -2, "dt": -1, "A": -1, "B": -2, "C": -2, "D": -2, "dt_bias": -1, "input_weights": -1, "initial_states": -3,
    "dy": -2, "dfinal_states": -3,
}  # fmt: skip
"""Dimension of heads, or of groups, of each tensor."""


def formula(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The results of the kernels, differentiable any number of times."""
    y, final_states = differentiable.ssd(
        **{name: arguments[name] for name in (*TENSORS, "dt_softplus", "directions", "height")},
        dt_limit=(arguments["dt_min"], arguments["dt_max"]),
    )
    return y.to(arguments["out_dtype"]), final_states
