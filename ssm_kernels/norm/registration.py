"""Registration of a set of compiled kernels of the norms, and the functions that call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._core.library import Gradient, define_op, lazy_function
from .._core.transforms import Fold, transformable, vjp
from . import differentiable


class NormKernels:
    """The norms by the kernels of a package, whose modules `forward` and `backward` are imported when one first runs.

    Args:
        name: of the op; that of its backward is `<name>_backward`.
        package: full name of the package.
    """

    def __init__(self, name: str, package: str):
        kernels = lazy_function(f"{package}.backward", "backward")
        self.backward_op = define_op(
            f"{name}_backward(Tensor v, Tensor weight, Tensor? z, Tensor rstd, Tensor dy, Tensor? dresidual_out,"
            " int group_size, bool norm_before_gate, ScalarType x_dtype, ScalarType residual_dtype, float eps)"
            " -> (Tensor, Tensor, Tensor, Tensor)",
            lambda *args: kernels(*args[:-1]),  # eps is for derivatives of this backward; here rstd has it
            _backward_fake,
        )
        backward = transformable(self.backward_op, Fold(_FOLDED, ("v", "v", "weight", "z")), _backward_formula)
        # Often nothing depends on the sum but the norm.
        gradient = Gradient(_save, _gradients(backward), _formula, 2, materialize_grads=False)
        self.forward_op = define_op(
            f"{name}(Tensor x, Tensor? residual, Tensor weight, Tensor? z, float eps, int group_size,"
            " bool norm_before_gate, ScalarType residual_out_dtype) -> (Tensor, Tensor, Tensor)",
            lazy_function(f"{package}.forward", "forward"),
            _forward_fake,
            gradient,
        )
        self._forward = transformable(self.forward_op, Fold(_FOLDED, ("x", "residual", "rstd")), gradient)

    def rms_norm(
        self, x: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int, norm_before_gate: bool
    ) -> Tensor:
        """Normalize with arguments in the canonical form of `reference.rms_norm`, and the same results."""
        return self._forward(x, None, weight, z, eps, group_size, norm_before_gate, x.dtype)[0]

    def add_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, residual_out_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Add and normalize with arguments in the canonical form of `reference.add_rms_norm`, and the same results."""
        if residual is None:
            residual_out = x.to(residual_out_dtype)
            return self.rms_norm(residual_out, weight, None, eps, x.shape[-1], False).to(x.dtype), residual_out
        y, residual_out, _ = self._forward(x, residual, weight, None, eps, x.shape[-1], False, residual_out_dtype)
        return y, residual_out


_FOLDED = {
    "x": -1, "residual": -1, "weight": -1, "z": -1, "v": -1, "rstd": -1, "dy": -1, "dresidual_out": -1,
}  # fmt: skip
"""Dimension of channels, or of their groups, of each tensor."""


def _formula(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    x, residual = arguments["x"], arguments["residual"]
    v = x if residual is None else (residual + x).to(arguments["residual_out_dtype"])
    y = differentiable.rms_norm(v, *(arguments[n] for n in ("weight", "z", "eps", "group_size", "norm_before_gate")))
    return y.to(x.dtype), v.new_empty(0) if residual is None else v


def _backward_formula(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    names = ("v", "weight") if arguments["z"] is None else ("v", "weight", "z")
    x_dtype, residual_dtype, dresidual_out = (
        arguments[name] for name in ("x_dtype", "residual_dtype", "dresidual_out")
    )
    of_v = {**arguments, "residual": None}

    def forward(a: Mapping[str, Any]) -> tuple[Tensor]:
        return (_formula({**a, "x": a["v"]})[0],)

    grads = vjp(forward, of_v, names, (arguments["dy"],))
    dv = grads["v"] if dresidual_out is None else grads["v"] + dresidual_out
    dresidual = dv.new_empty(0) if residual_dtype == x_dtype else dv.to(residual_dtype)
    return dv.to(x_dtype), dresidual, grads["weight"], grads.get("z", dv.new_empty(0))


def _gradients(backward: Callable) -> Callable:
    def gradients(ctx, dy, dresidual_out):
        v, weight, z, rstd = ctx.saved_tensors  # once: torch.utils.checkpoint unpacks them a single time
        dresidual_out = dresidual_out if ctx.has_residual else None
        dy = v.new_zeros(v.shape, dtype=ctx.dtypes[0]) if dy is None else dy
        dx, dresidual, dweight, dz = backward(
            v, weight, z, rstd, dy, dresidual_out, ctx.group_size, ctx.norm_before_gate, *ctx.dtypes, ctx.eps
        )
        if not ctx.has_residual:
            dresidual = None
        elif ctx.dtypes[0] == ctx.dtypes[1]:
            dresidual = dx
        return {"x": dx, "residual": dresidual, "weight": dweight, "z": None if z is None else dz}

    return gradients


def _save(ctx, inputs, outputs):
    x, residual = inputs.x, inputs.residual
    _, residual_out, rstd = outputs
    ctx.save_for_backward(x if residual is None else residual_out, inputs.weight, inputs.z, rstd)
    ctx.eps, ctx.group_size, ctx.norm_before_gate = inputs.eps, inputs.group_size, inputs.norm_before_gate
    ctx.has_residual = residual is not None
    ctx.dtypes = x.dtype, x.dtype if residual is None else residual.dtype


def _forward_fake(x, residual, weight, z, eps, group_size, norm_before_gate, residual_out_dtype):
    rows = x.numel() // x.shape[-1]
    residual_out = x.new_empty(0 if residual is None else x.shape, dtype=residual_out_dtype)
    compute = torch.promote_types(torch.promote_types(x.dtype, residual_out_dtype), torch.float32)
    return x.new_empty(x.shape), residual_out, x.new_empty(rows, x.shape[-1] // group_size, dtype=compute)


def _backward_fake(v, weight, z, rstd, dy, dresidual_out, group_size, norm_before_gate, x_dtype, residual_dtype, eps):
    dresidual = v.new_empty(0 if residual_dtype == x_dtype else v.shape, dtype=residual_dtype)
    dz = v.new_empty(0) if z is None else z.new_empty(z.shape)
    return v.new_empty(v.shape, dtype=x_dtype), dresidual, weight.new_empty(weight.shape), dz
