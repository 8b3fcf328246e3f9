"""Whether two results agree where values may be anything, and the smallest case in which they do not.

The tolerance is that of `ssm_kernels.testing`, and besides `MARGIN` times what the reference itself is off, computed in
float32 (or the case's wider type) with its inputs and the gradients that arrive each off by a rounding, the largest of
`SAMPLES` draws. Where terms cancel, the result's own scale says nothing of how near one can come, and one run of the
reference may be right by luck. A loss of digits that the definition does not have is not forgiven.

Infinities and NaN are compared by place, not by kind, since which of them a sum of infinities gives depends on its
order:

- where the reference is finite, in float64 and in the dtype under test, the result must be finite and near;
- where it is not finite in both, the result must not be finite: an infinity may be neither lost nor spread;
- within a factor `ROUNDINGS` of the largest number that is computed with, a partial sum may overflow;
- where float64 is finite and the dtype is not, or the other way, the dtype's range decided, and anything is right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ssm_kernels.testing import ROUNDINGS, coarsest_dtype, roundings

from .cases import SIZES, Case, Shape

T = TypeVar("T")
MARGIN = 16
SAMPLES = 3
ATTEMPTS = 300
"""At making a failing case smaller."""
SIMPLEST = {
    "z": False, "D": False, "wide_D": False, "dt_bias": False, "dt_softplus": False, "dt_limit": False, "silu": False,
    "norm_before_gate": False, "initial_states": False, "constant": False, "sequences": 0, "seq_idx": False,
    "channels_first": False, "chunk_size": Case.chunk_size, "dtype": "fp32",
}  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """What the reference gives, by name: outputs, and `gradient of` each input."""

    exact: dict[str, Tensor]
    """In float64."""
    rounded: dict[str, Tensor]
    """In the dtypes of the case."""
    moved: list[dict[str, Tensor]]
    """In the type that is computed in, each input off by a rounding of it, up or down."""
    compute: torch.dtype
    operands: torch.dtype | None = None
    """To which operands of matrix products are rounded, in compiled kernels."""


def expected(
    op: Callable[..., object], tensors: Mapping[str, Tensor], gradients: bool, is_compiled: bool = False
) -> Expected:
    """Run the reference, given as a function of tensors by name; for what kernels give that a GPU's compiler made."""
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
    op: Callable[..., object],
    tensors: Mapping[str, Tensor],
    gradients: bool,
    dtype: torch.dtype | None = None,
    noise: int | None = None,
) -> dict[str, Tensor]:
    """Outputs by name, and gradients of a weighted sum of all of them, which shows what is permuted or dropped.

    Args:
        dtype: of the floating-point inputs; by default their own, and their strides.
        noise: a seed, with which each of them, and of the gradients that arrive, is off by a rounding of `dtype`.
    """
    generator = torch.Generator().manual_seed(noise or 0)

    def off(t: Tensor) -> Tensor:
        if noise is None:
            return t
        sign = 2 * torch.randint(2, t.shape, generator=generator).to(t) - 1
        return t * (1 + torch.finfo(dtype).eps * sign)

    inputs = {
        name: off(t.detach() if dtype is None else t.detach().to(dtype)) if t.is_floating_point() else t
        for name, t in tensors.items()
    }
    wanted = {name: t.requires_grad_() for name, t in inputs.items() if t.is_floating_point() and gradients}
    out = op(**inputs)
    names = getattr(out, "_fields", ("y",))
    outputs = dict(zip(names, out if isinstance(out, tuple) else (out,), strict=True))
    found = {name: t.detach() for name, t in outputs.items()}
    if gradients:
        total = sum((t.double() * off(_weights(t))).sum() for t in outputs.values())
        none = [None] * len(wanted)
        grads = torch.autograd.grad(total, [*wanted.values()], allow_unused=True) if total.requires_grad else none
        for (name, t), g in zip(wanted.items(), grads, strict=True):
            found[f"gradient of {name}"] = torch.zeros_like(t) if g is None else g
    return found


def _weights(t: Tensor) -> Tensor:
    return torch.cos(torch.arange(t.numel(), dtype=torch.float64)).view(t.shape).to(t.device)


def disagreement(expected: Expected, actual: Mapping[str, Tensor]) -> str:
    """What is wrong first in results by name, in words, or nothing; some may be lacking."""
    for name, got in actual.items():
        want, peer, moved = expected.exact[name], expected.rounded[name], [m[name] for m in expected.moved]
        if got.shape != want.shape:
            return f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        if got.dtype != peer.dtype:
            return f"{name}: dtype {got.dtype}, expected {peer.dtype}"
        forgiven, kind = roundings(got.dtype, operands=expected.operands), torch.finfo(got.dtype)
        got, peer = got.double(), peer.double()
        is_finite = functools.reduce(torch.logical_and, [t.isfinite() for t in (want, peer, *moved)])
        scale, own, *samples = (_largest(t[is_finite]) for t in (want, peer - want, *(m - want for m in moved)))
        allowed = 2 * own + forgiven * max(scale, 1e-3) + MARGIN * max(samples)
        fits = (want.abs() + allowed < kind.max) & (want.abs() * ROUNDINGS < torch.finfo(expected.compute).max)
        failures = {
            "not finite": is_finite & fits & ~got.isfinite(),
            "finite where the reference is not": ~want.isfinite()
            & ~peer.isfinite()
            & (got.abs() * ROUNDINGS < kind.max),
            "off": is_finite & got.isfinite() & ((got - want).abs() > allowed),
        }
        for what, where in failures.items():
            if where.any():
                error = torch.where(where, (got - want).abs().nan_to_num(torch.inf), -1.0)
                worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
                return (
                    f"{name}: {what} at {int(where.sum())} of {where.numel()} places, the worst {worst}: "
                    f"got {got[worst]:.6g}, expected {want[worst]:.6g}, allowed error {allowed:.3g}"
                )
    return ""


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def shrink(start: T, smaller: Callable[[T], Iterable[T]], fails: Callable[[T], bool]) -> T:
    """Take the first smaller one that still fails, until none does or `ATTEMPTS` are spent."""
    attempts = 0
    found = True
    while found:
        found = False
        for candidate in smaller(start):
            attempts += 1
            if attempts > ATTEMPTS:
                return start
            if fails(candidate):
                start, found = candidate, True
                break
    return start


def brief(value: object) -> str:
    """A dataclass as the expression that makes it, without what is at its default."""
    if not is_dataclass(value):
        return repr(value)
    own = [(f.name, getattr(value, f.name)) for f in fields(value) if getattr(value, f.name) != f.default]
    return f"{type(value).__name__}({', '.join(f'{name}={brief(v)}' for name, v in own)})"


def smaller_cases(case: Case) -> Iterator[Case]:
    """Cases with one option less, or one size that is smaller: the boldest first. Not all are valid."""
    for name, simplest in SIMPLEST.items():
        if getattr(case, name) != simplest:
            yield replace(case, **{name: simplest})
    for name in SIZES[case.op].split():
        size = getattr(case.shape, name)
        for less in sorted({1, size // 2, size - 1}):
            if 0 < less < size and (shape := _with_size(case, name, less)) is not None:
                yield replace(case, shape=shape)


def _with_size(case: Case, name: str, size: int) -> Shape | None:
    """The shape with that size; the length of a grid goes in whole columns, and so does its height."""
    shape = replace(case.shape, **{name: size})
    if "height" in SIZES[case.op].split() and name in ("length", "height"):
        columns = case.shape.length // case.shape.height
        if name == "height":
            return replace(shape, length=columns * size)
        return replace(shape, length=size * shape.height) if size < columns else None
    if shape.channels % shape.groups or shape.heads % shape.groups and case.folder == "ssd":
        return None
    return shape
