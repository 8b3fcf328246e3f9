"""Comparison of an implementation with the reference: the same calls, one tolerance rule, stated here.

The error of an implementation against the reference in float64 may be twice that of the reference in the
implementation's dtype, plus a few roundings of the result's scale: those of `roundings`. Nothing is tuned by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .._triton.device import is_interpreted

ROUNDINGS = 64
"""Roundings of the largest element that are allowed in the dtype of sums, whose order differs."""
ROUNDINGS_OF_RESULT = 8
"""Roundings that are allowed in the result's own dtype, to which operands of matrix products are rounded too."""


def roundings(dtype: torch.dtype, times: int = 1, operands: torch.dtype | None = None) -> float:
    """Return the error that roundings allow in a result, as a share of its largest element.

    Args:
        dtype: dtype of the result.
        times: factor on the roundings of sums.
        operands: dtype to which operands of matrix products are rounded, where it is coarser than the result's:
            compiled kernels multiply in the inputs' dtype on tensor cores, and sum in float32.
    """
    sums = torch.promote_types(dtype, torch.float32)
    coarsest = max(torch.finfo(d).eps for d in (dtype, operands or dtype))
    return times * ROUNDINGS * torch.finfo(sums).eps + ROUNDINGS_OF_RESULT * coarsest


def coarsest_dtype(tensors: Mapping[str, Tensor | None]) -> torch.dtype:
    """Return the floating-point dtype of the tensors that has the largest rounding error."""
    dtypes = [t.dtype for t in tensors.values() if t is not None and t.is_floating_point()]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def assert_agrees(
    op: Callable[..., tuple[Tensor, ...] | Tensor],
    tensors: Mapping[str, Tensor | None],
    options: Mapping[str, object] | None = None,
    *,
    backend: str,
    gradients: bool = True,
    oracle: str = "reference",
) -> None:
    """Compare outputs and the gradients of all floating-point inputs with the oracle's in float64.

    Args:
        op: a public op of this package.
        tensors: its tensor arguments by name; those of floating point get gradients.
        options: its other arguments.
        backend: the implementation under test.
        gradients: whether to compare gradients.
        oracle: the ground truth: where the reference takes too long, `"torch"`, which is tested against it.

    Raises:
        AssertionError: names the output or gradient that differs, by how much, and how much is allowed.
    """
    options = dict(options or {})
    # The oracle twice: in float64 for the truth, in the inputs' dtype for the error that rounding alone makes.
    exact = _run(op, tensors, options, oracle, torch.float64, gradients)
    rounded = _run(op, tensors, options, oracle, None, gradients)
    actual = _run(op, tensors, options, backend, None, gradients)
    is_compiled = backend == "triton" and not is_interpreted()
    # Only compiled kernels round the operands of products: the interpreter has the tighter limit.
    operands = coarsest_dtype(tensors) if is_compiled else None
    assert actual.keys() == exact.keys(), f"outputs differ: {sorted(actual)} against {sorted(exact)}"
    for name, want in exact.items():
        got, peer = actual[name], rounded[name]
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        assert got.dtype == peer.dtype, f"{name}: dtype {got.dtype}, expected {peer.dtype}"
        if not want.numel():
            continue
        assert got.isfinite().all() or not want.isfinite().all(), f"{name}: not finite"
        error, peer_error = ((t.double() - want).abs().max().item() for t in (got, peer))
        # At least 1e-3 of scale: results that cancel to about zero have the roundings of their terms.
        allowed = 2 * peer_error + roundings(got.dtype, operands=operands) * max(want.abs().max().item(), 1e-3)
        assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g} in {got.dtype}"


def _run(op, tensors, options, backend, dtype, gradients) -> dict[str, Tensor]:
    def prepared(t: Tensor | None) -> Tensor | None:
        if t is None or not t.is_floating_point():
            return t
        # A view keeps its strides; a copy to another dtype need not.
        return (t.detach() if dtype is None else t.detach().to(dtype)).requires_grad_(gradients)

    inputs = {name: prepared(t) for name, t in tensors.items()}
    out = op(**inputs, **options, backend=backend)
    names = getattr(out, "_fields", ("y",))
    outputs = dict(zip(names, out if isinstance(out, tuple) else (out,), strict=True))
    result = {name: t.detach() for name, t in outputs.items()}
    if gradients:
        # A weighted sum, so that a permuted or dropped gradient shows.
        total = torch.stack([(t.double() * _weights(t)).sum() for t in outputs.values()]).sum()
        wanted = {n: t for n, t in inputs.items() if t is not None and t.requires_grad}
        grads = [torch.zeros_like(t) for t in wanted.values()]
        if total.requires_grad:  # with no steps, the reference computes nothing that a gradient could flow through
            grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True, materialize_grads=True)
        result |= {f"gradient of {name}": g for name, g in zip(wanted, grads, strict=True)}
    return result


def _weights(t: Tensor) -> Tensor:
    # Of both signs and without a period, so that no two elements have the same weight.
    return torch.cos(torch.arange(t.numel(), device=t.device, dtype=torch.float64)).view(t.shape)
