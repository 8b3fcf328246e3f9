"""Registration of a set of compiled kernels of the selective scan, and the functions that call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._core.library import Gradient, call_op, define_op, lazy_function, unknown_size
from .._core.memory_layout import empty_like
from .._core.slots import PLAN_SCHEMA, StepPlan, plan_tensors
from .._core.state_format import FORMAT_SCHEMA
from .._core.transforms import Fold, backward_formula, may_need_gradients, refuse_forward_mode, transformable
from . import differentiable
from .arguments import SCHEMA, TENSORS, ScanArguments, ScanGradients
from .groups import repeat_groups


class ScanKernels:
    """The selective scan by the kernels of a package, whose modules `forward`, `backward` and `step` are imported when
    an op first runs.

    Args:
        name: of the op; those of its backward and step are `<name>_backward` and `<name>_step`.
        package: full name of the package.
        checkpoint_shape: shape of the states that the forward saves, from u, A, the number of rows of the final states,
            and whether sequences are packed by `cu_seqlens`: from shapes alone, as tracing needs. The first size counts
            the states.
    """

    def __init__(self, name: str, package: str, checkpoint_shape: Callable[[Tensor, Tensor, int, bool], tuple]):
        self._checkpoint_shape = checkpoint_shape
        self.backward_op = define_op(
            f"{name}_backward({SCHEMA}, Tensor checkpoint_states, Tensor dy, Tensor dfinal_states)"
            f" -> ({', '.join(['Tensor'] * len(ScanGradients._fields))})",
            lazy_function(f"{package}.backward", "backward"),
            _backward_fake,
        )
        backward = transformable(
            self.backward_op,
            Fold(_FOLDED, ScanGradients._fields, ("directions",), self._saved),
            backward_formula(_formula, ScanGradients._fields, ("dy", "dfinal_states")),
        )
        gradient = Gradient(_save, _gradients(backward), _formula, 2)
        self.forward_op = define_op(
            f"{name}({SCHEMA}, bool save_states) -> (Tensor, Tensor, Tensor)",
            lazy_function(f"{package}.forward", "forward"),
            self._forward_fake,
            gradient,
        )
        self._forward = transformable(
            self.forward_op, Fold(_FOLDED, ("u", "initial_states", None), ("directions",)), gradient
        )
        self.step_op = define_op(
            f"{name}_step(Tensor(a!) state, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,"
            f" Tensor? dt_bias, bool dt_softplus, {PLAN_SCHEMA}, {FORMAT_SCHEMA}) -> Tensor",
            lazy_function(f"{package}.step", "step"),
            _step_fake,
        )

    def selective_scan(
        self,
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
        y, final_states = self.grouped_selective_scan(
            u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_states, cu_seqlens, seq_idx
        )
        return y.flatten(2), final_states

    def grouped_selective_scan(
        self,
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
            directions: code of the scan direction of each group in `cross_scan.CROSS`. With them, L is a row-major
                grid, and step t of a group reads and writes all tensors at its t-th position along that direction.
            height: rows of that grid.

        Returns:
            y (B, L, G, E) in the dtype of u, with contiguous steps where u has them, and the final states
            (rows, G * E, N).
        """
        arguments = ScanArguments(
            u=u, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states, cu_seqlens=cu_seqlens,
            seq_idx=seq_idx, dt_softplus=dt_softplus, directions=list(directions), height=height,
        )  # fmt: skip
        y, final_states, _ = self._forward(*arguments, may_need_gradients(arguments))
        return y, final_states

    def selective_scan_step(
        self,
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
        state_scale: Tensor | None,
        seeds: Tensor | None,
    ) -> Tensor:
        """Advance `state` (B, D, N) in place; u, dt, z (M, D); B, C (M, G, N) or (D, N) -> y (M, D)."""
        refuse_forward_mode("selective_scan_step")
        return call_op(
            self.step_op, state, u, dt, A, B, C, D, z, dt_bias, dt_softplus, *plan_tensors(plan), state_scale, seeds
        )

    def _saved(self, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        with torch.no_grad():
            _, _, states = self._forward(*(arguments[name] for name in ScanArguments._fields), True)
        return {"checkpoint_states": states}

    def _forward_fake(self, *args):
        *arguments, save_states = args
        arguments = ScanArguments(*arguments)
        u, A, cu_seqlens = arguments.u, arguments.A, arguments.cu_seqlens
        rows = u.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        state_dtype = torch.promote_types(u.dtype, torch.float32)
        count, *sizes = self._checkpoint_shape(u, A, rows, cu_seqlens is not None)
        if not save_states:
            count = 0
        elif arguments.seq_idx is not None:
            count = unknown_size(u)  # the number of sequences depends on values
        y, final_states = empty_like(u, u.new_empty), u.new_empty(rows, *A.shape, dtype=state_dtype)
        return y, final_states, u.new_empty(count, *sizes, dtype=state_dtype)


_FOLDED = {
    "u": -2, "dt": -2, "A": -2, "B": -2, "C": -2, "D": -1, "z": -2, "dt_bias": -1, "initial_states": -2, "dy": -2,
    "dfinal_states": -2,
}  # fmt: skip
"""Dimension of groups, or of channels, of each tensor."""


def _formula(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    by_name = {name: arguments[name] for name in ScanArguments._fields}
    y, final_states = differentiable.selective_scan(**by_name)
    return y.to(arguments["u"].dtype), final_states


def _save(ctx, inputs, outputs):
    if not inputs.save_states:
        raise RuntimeError("this graph was traced without gradients, and saved nothing that they need: trace it again")
    _, _, checkpoint_states = outputs
    ctx.save_for_backward(*(getattr(inputs, name) for name in TENSORS), checkpoint_states)
    ctx.options = {name: getattr(inputs, name) for name in ("dt_softplus", "directions", "height")}


def _gradients(backward: Callable) -> Callable:
    def gradients(ctx, dy, dfinal_states):
        *tensors, checkpoint_states = ctx.saved_tensors
        arguments = ScanArguments(**dict(zip(TENSORS, tensors, strict=True)), **ctx.options)
        grads = ScanGradients(*backward(*arguments, checkpoint_states, dy, dfinal_states))._asdict()
        # The op returns an empty tensor for an input that is None.
        return {name: None if getattr(arguments, name) is None else grad for name, grad in grads.items()}

    return gradients


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
