"""For tests and benchmarks: agreement with the reference, and devices that are emulated or not there."""

from .._core.library import BODIES
from .._triton.device import Target, capability, fake_target, is_interpreted
from .agreement import ROUNDINGS, assert_agrees, coarsest_dtype, roundings

__all__ = [
    "BODIES",
    "ROUNDINGS",
    "Target",
    "assert_agrees",
    "capability",
    "coarsest_dtype",
    "fake_target",
    "is_interpreted",
    "roundings",
]
