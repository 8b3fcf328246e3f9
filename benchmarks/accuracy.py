"""Errors of an implementation against float64, and the errors that its rounding allows.

y is compared with the step-by-step reference where that takes no more than `SECONDS` and `BYTES`, else with the torch
backend, which tests compare with the reference. Gradients are always compared with the torch backend, since autograd
through single steps takes time quadratic in the length. Both run in float64, on inputs rounded to the dtype that is
measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssm_kernels.testing import roundings

from .cases import DIRECTIONS, Shape
from .timing import Result, first_call, prepare, upstream_gradient
from .workloads import Workload, build, build_float64

SECONDS = 10.0
BYTES = 4 * 2**30
PROBE = 64
"""Steps of the call from which the reference's time is extrapolated."""
SUMMED = 4
"""Factor on the roundings allowed where the reference in the same dtype does not run to show its own."""


@dataclass(frozen=True)
class GroundTruth:
    """A case's result in float64."""

    by: str
    """The backend that computed y; gradients are the torch backend's."""
    result: Result
    allowed: float
    """Largest allowed error of y."""
    allowed_gradient: float

    def judge(self, got: Result) -> dict[str, float | bool]:
        """Largest errors of y and of the gradients, relative to the largest value of each, and whether they pass."""
        found: dict[str, float | bool] = {"error": relative_error(got.y, self.result.y)}
        found["is_right"] = found["error"] <= self.allowed
        if got.gradients:
            pairs = zip(got.gradients, self.result.gradients, strict=True)
            found["gradient_error"] = max(relative_error(a, b) for a, b in pairs if b is not None)
            found["is_right"] &= found["gradient_error"] <= self.allowed_gradient
        return found


def ground_truth(
    op: str, shape: Shape, dtype: torch.dtype, device: str = "cpu", *, gradients: bool = False
) -> GroundTruth:
    """The result with which implementations of a case are compared."""
    by = "reference" if is_affordable(op, shape, dtype, device) else "torch"
    # For gradients, and where no reference in the same dtype shows its own error.
    generous = allowed_error(0.0, dtype, SUMMED)
    result = Result(_y(build_float64(op, shape, dtype, by, device)))
    allowed = generous
    if by == "reference":
        own = relative_error(_y(build(op, by, shape, dtype, device=device)), result.y)
        allowed = allowed_error(own, dtype)
    if gradients:
        workload = build_float64(op, shape, dtype, "torch", device)
        dy = upstream_gradient(result.y.to(dtype)).double()
        result = Result(result.y, prepare(workload, "fwd+bwd", dy)().gradients)
    return GroundTruth(by, result, allowed, generous)


def is_affordable(op: str, shape: Shape, dtype: torch.dtype, device: str) -> bool:
    """Whether the reference in float64 takes no more than `SECONDS` and `BYTES`; a decoding step always."""
    if op.endswith("_step"):
        return True
    if "selective_scan" in op or op == "mamba_block":  # the reference expands B and C over channels
        directions = DIRECTIONS if op.startswith("cross_") else 1
        if 2 * 8 * directions * shape.batch * shape.length * shape.channels * shape.d_state > BYTES:
            return False
    probe = build_float64(op, replace(shape, length=min(shape.length, PROBE), height=1), dtype, "reference", device)
    _, first = first_call(probe, "fwd")
    # The first call also imports and allocates; where it was slow, the second one counts.
    if first.seconds > SECONDS / shape.length * PROBE:
        first = first_call(probe, "fwd")[1]
    return first.seconds * max(1, shape.length / PROBE) <= SECONDS


def allowed_error(own: float, dtype: torch.dtype, times: int = 1) -> float:
    """Twice the reference's own error in that dtype, and roundings of the sums and of the result."""
    return 2 * own + roundings(dtype, times)


def _y(workload: Workload) -> Tensor:
    return prepare(workload, "fwd")().y


def relative_error(got: Tensor | None, want: Tensor, least: float = 0.0) -> float:
    """Largest difference relative to the largest value of `want`, or to `least` where that is larger.

    Infinite where `got` is not finite or has another shape.
    """
    if got is None or got.shape != want.shape or not got.isfinite().all():
        return math.inf
    if want.numel() == 0:
        return 0.0
    scale = max(want.abs().max().item(), least) or 1.0
    return (got.double() - want).abs().max().item() / scale
