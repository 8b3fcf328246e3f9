"""How right an implementation is: its results against float64, and how far off they may be.

y is held against the step-by-step reference where that takes no more than `SECONDS` and `BYTES`, else against the
torch backend, which tests hold to the reference; gradients always against the torch backend, since autograd through
single steps takes time in proportion to the square of the length. Both in float64, on inputs rounded to the dtype that
is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssm_kernels.testing import roundings

from .cases import DIRECTIONS, Shape
from .measure import Result, first_call, incoming, ready
from .workloads import Workload, build, exact

SECONDS = 30.0
BYTES = 4 * 2**30
PROBE = 64
"""Steps by which the reference's time is estimated."""
SUMMED = 4
"""Times as much is forgiven where the reference in the same dtype is not at hand to say what rounding costs."""


@dataclass(frozen=True)
class Truth:
    """What a case gives in float64."""

    by: str
    """The backend that gave y; gradients are the torch backend's."""
    result: Result
    allowed: float
    """Largest error of y that is forgiven."""
    allowed_gradient: float

    def judge(self, got: Result) -> dict[str, float | bool]:
        """Largest errors of y and of the gradients, relative to the largest value of each; are they within bounds?"""
        found: dict[str, float | bool] = {"error": off(got.y, self.result.y)}
        found["is_right"] = found["error"] <= self.allowed
        if got.gradients:
            pairs = zip(got.gradients, self.result.gradients, strict=True)
            found["gradient_error"] = max(off(a, b) for a, b in pairs if b is not None)
            found["is_right"] &= found["gradient_error"] <= self.allowed_gradient
        return found


def truth(op: str, shape: Shape, dtype: torch.dtype, device: str = "cpu", *, gradients: bool = False) -> Truth:
    """What implementations of a case are held against."""
    by = "reference" if is_affordable(op, shape, dtype, device) else "torch"
    freely = forgiven(0.0, dtype, SUMMED)
    result = Result(_y(exact(op, shape, dtype, by, device=device)))
    allowed = freely
    if by == "reference":
        own = off(_y(build(op, by, shape, dtype, device=device)), result.y)
        allowed = forgiven(own, dtype)
    if gradients:
        workload = exact(op, shape, dtype, "torch", device=device)
        dy = incoming(result.y.to(dtype)).double()
        result = Result(result.y, ready(workload, "fwd+bwd", dy)().gradients)
    return Truth(by, result, allowed, freely)


def is_affordable(op: str, shape: Shape, dtype: torch.dtype, device: str) -> bool:
    """Whether the reference in float64 takes no more than `SECONDS` and `BYTES`; a decoding step always."""
    if op.endswith("_step"):
        return True
    if "selective_scan" in op or op == "mamba_block":  # whose reference spreads B and C over channels
        directions = DIRECTIONS if op.startswith("cross_") else 1
        if 2 * 8 * directions * shape.batch * shape.length * shape.channels * shape.d_state > BYTES:
            return False
    probe = exact(op, replace(shape, length=min(shape.length, PROBE), height=1), dtype, "reference", device=device)
    _, first = first_call(probe, "fwd")
    seconds = first if first < SECONDS / shape.length * PROBE else first_call(probe, "fwd")[1]
    return seconds * max(1, shape.length / PROBE) <= SECONDS


def forgiven(own: float, dtype: torch.dtype, times: int = 1) -> float:
    """What an error may be: twice the reference's own in that dtype, and roundings of the sums and of the result."""
    return 2 * own + roundings(dtype, times)


def _y(workload: Workload) -> Tensor:
    return ready(workload, "fwd")().y


def off(got: Tensor | None, want: Tensor, least: float = 0.0) -> float:
    """Largest difference relative to the largest value, or to `least` where that is more.

    Infinite where it is not finite or has another shape.
    """
    if got is None or got.shape != want.shape or not got.isfinite().all():
        return math.inf
    if want.numel() == 0:
        return 0.0
    scale = max(want.abs().max().item(), least) or 1.0
    return (got.double() - want).abs().max().item() / scale
