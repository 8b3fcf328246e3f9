"""Correctness of results whose values may be anything, infinities and NaN among them.

The tolerance is that of `ssm_kernels.testing`, plus `MARGIN` times the sensitivity of the reference: its error in
float32 (or the case's wider type) with its inputs and the upstream gradients each off by a rounding, the largest of
`SAMPLES` draws: all away from zero in the first, since signs of two factors that decide alone may cancel in all draws.
Where terms cancel, the scale of the result does not bound the error that can be reached, and one run of the reference
may be right by luck. A loss of digits that the definition does not have is an error.

Infinities and NaN are compared by position, not by kind, since the order of a sum of infinities decides which of them
it is:

- where the reference is finite, in float64 and in the dtype under test, the result must be finite and close;
- where it is not finite in both, the result must not be finite: an infinity may be neither lost nor spread;
- within a factor `ROUNDINGS` of the largest number of the type, a partial sum may overflow;
- where float64 is finite and the dtype is not, or the reverse, the range of the dtype decides, and anything is right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssm_kernels.testing import ROUNDINGS, coarsest_dtype, roundings

MARGIN = 16
SAMPLES = 4


@dataclass(frozen=True)
class Expected:
    """Results of the reference by name: outputs, and `gradient of` each input."""

    exact: dict[str, Tensor]
    """Results in float64."""
    rounded: dict[str, Tensor]
    """Results in the dtypes of the case."""
    perturbed: list[dict[str, Tensor]]
    """Results in the compute type, each input off by a rounding of it, up or down."""
    compute: torch.dtype
    operands: torch.dtype | None = None
    """The type to which compiled kernels round the operands of matrix products."""


def expected(
    op: Callable[..., Any], tensors: Mapping[str, Tensor], gradients: bool, is_compiled: bool = False
) -> Expected:
    """Run the reference.

    Args:
        op: the reference, a function of tensors by name.
        is_compiled: the results under test are those of kernels compiled for a GPU.
    """
    floats = [t.dtype for t in tensors.values() if t.is_floating_point()]
    compute = functools.reduce(torch.promote_types, floats, torch.float32)
    return Expected(
        results(op, tensors, gradients, torch.float64),
        results(op, tensors, gradients),
        [results(op, tensors, gradients, compute, seed) for seed in range(SAMPLES)],
        compute,
        coarsest_dtype(tensors) if is_compiled else None,
    )


def results(
    op: Callable[..., Any],
    tensors: Mapping[str, Tensor],
    gradients: bool,
    dtype: torch.dtype | None = None,
    noise: int | None = None,
) -> dict[str, Tensor]:
    """Outputs by name, and gradients of a weighted sum of all of them, which shows a permutation or a missing term.

    Args:
        dtype: type of the floating-point inputs; by default their own, with their strides.
        noise: seed with which each input and upstream gradient is moved by a rounding of `dtype`; 0 moves all of them
            away from zero, None none.
    """
    # One generator for inputs and upstream gradients: results do not share their noise.
    generator = torch.Generator().manual_seed(noise or 0)

    def perturb(t: Tensor) -> Tensor:
        if noise is None or dtype is None:
            return t
        sign = 2 * torch.randint(2, t.shape, generator=generator).to(t) - 1 if noise else 1
        return t * (1 + torch.finfo(dtype).eps * sign)

    inputs = {
        name: perturb(t.detach() if dtype is None else t.detach().to(dtype)) if t.is_floating_point() else t
        for name, t in tensors.items()
    }
    wanted = {name: t.requires_grad_() for name, t in inputs.items() if t.is_floating_point() and gradients}
    out = op(**inputs)
    names = getattr(out, "_fields", ("y",))
    outputs: dict[str, Tensor] = dict(zip(names, out if isinstance(out, tuple) else (out,), strict=True))
    found = {name: t.detach() for name, t in outputs.items()}
    if gradients:
        total = torch.stack([(t.double() * perturb(_weights(t))).sum() for t in outputs.values()]).sum()
        grads: Sequence[Tensor | None] = [None] * len(wanted)
        if total.requires_grad:
            grads = torch.autograd.grad(total, [*wanted.values()], allow_unused=True)
        for (name, t), g in zip(wanted.items(), grads, strict=True):
            found[f"gradient of {name}"] = torch.zeros_like(t) if g is None else g
    return found


def _weights(t: Tensor) -> Tensor:
    return torch.cos(torch.arange(t.numel(), dtype=torch.float64)).view(t.shape).to(t.device)


def disagreement(expected: Expected, actual: Mapping[str, Tensor]) -> str:
    """Describe the first result that is wrong; empty if none is. Results may be missing."""
    for name, got in actual.items():
        want, peer = expected.exact[name], expected.rounded[name]
        perturbed = [p[name] for p in expected.perturbed]
        if got.shape != want.shape:
            return f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        if got.dtype != peer.dtype:
            return f"{name}: dtype {got.dtype}, expected {peer.dtype}"
        rounding, limits = roundings(got.dtype, operands=expected.operands), torch.finfo(got.dtype)
        got, peer = got.double(), peer.double()
        # Elements at which every run of the reference is finite decide the scale and the errors.
        is_finite = functools.reduce(torch.logical_and, [t.isfinite() for t in (want, peer, *perturbed)])
        scale, own, *samples = (_largest(t[is_finite]) for t in (want, peer - want, *(p - want for p in perturbed)))
        # The reference's own error in this dtype, roundings of the result, and the sensitivity to its inputs.
        allowed = 2 * own + rounding * max(scale, 1e-3) + MARGIN * max(samples)
        # So far from the largest number that neither the result nor a partial sum overflows.
        fits = (want.abs() + allowed < limits.max) & (want.abs() * ROUNDINGS < torch.finfo(expected.compute).max)
        failures = {
            "not finite": is_finite & fits & ~got.isfinite(),
            "finite where the reference is not": (
                ~want.isfinite() & ~peer.isfinite() & (got.abs() * ROUNDINGS < limits.max)
            ),
            "off": is_finite & got.isfinite() & ((got - want).abs() > allowed),
        }
        for what, where in failures.items():
            if where.any():
                error = torch.where(where, (got - want).abs().nan_to_num(torch.inf), -1.0)
                worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
                return (
                    f"{name}: {what} at {int(where.sum())} of {where.numel()} elements, the worst {worst}: "
                    f"got {got[worst]:.6g}, expected {want[worst]:.6g}, allowed error {allowed:.3g}"
                )
    return ""


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0
