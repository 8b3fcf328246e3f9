"""The fixed cost of a call on a CPU: what happens in Python around a kernel that takes microseconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ssm_kernels
from ssm_kernels.testing import is_interpreted
from vlmamba.benchmarks.workloads import named_case, named_shape

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(is_interpreted(), reason="counts what the CPU's kernels do")

# Functions that a call enters, in Python and in C together, without gradients and with a backward.
# A quarter more than counted with Python 3.11 and torch 2.13.
MOST_FUNCTIONS = {
    "rms_norm": (190, 480), "add_rms_norm": (190, 480), "causal_conv1d": (205, 520), "selective_scan": (360, 1000),
    "ssd": (310, 950), "selective_scan_step": (300, 0), "ssd_step": (345, 0), "causal_conv1d_step": (200, 0),
}  # fmt: skip


def tiny_call(op: str, backend: str, backward: bool) -> Callable[[], None]:
    case = named_case(op, named_shape(op, "tiny"), torch.float32)
    inputs = case.inputs()
    needed = [x for x in inputs.values() if x.requires_grad]

    def call() -> None:
        with torch.set_grad_enabled(backward):
            y = getattr(ssm_kernels, op)(**inputs, **case.options, backend=backend)
        if backward:
            y = y if isinstance(y, Tensor) else y[0]
            torch.autograd.grad(y, needed, torch.ones_like(y), allow_unused=True)

    return call


def count_functions(call: Callable[[], None]) -> int:
    entered = 0

    def see(frame, event, arg):
        nonlocal entered
        entered += event in ("call", "c_call")

    call()  # compiles, and makes what is made once for a shape
    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


@pytest.mark.parametrize("op", MOST_FUNCTIONS)
def test_a_tiny_call_enters_few_functions(op):
    forward, both = MOST_FUNCTIONS[op]
    assert count_functions(tiny_call(op, "auto", False)) <= forward
    if both:
        assert count_functions(tiny_call(op, "auto", True)) <= both


@pytest.mark.parametrize("op", MOST_FUNCTIONS)
def test_a_tiny_call_takes_no_longer_than_in_pytorch(op):
    """The fastest of many short bursts in turn: other work on the machine lengthens most of them, and not all."""
    calls = {backend: tiny_call(op, backend, False) for backend in ("auto", "torch")}
    fastest = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    for _ in range(100):
        for backend, call in calls.items():
            start = time.perf_counter()
            for _ in range(5):
                call()
            fastest[backend] = min(fastest[backend], time.perf_counter() - start)
    assert fastest["auto"] < fastest["torch"]


def test_a_mode_sees_the_op_that_a_plain_call_passes():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    x, weight = torch.rand(2, 8, requires_grad=True), torch.rand(8)
    plain = ssm_kernels.rms_norm(x, weight)
    with Seen():
        shown = ssm_kernels.rms_norm(x, weight)
    assert [name for name in seen if "norm" in name] == ["ssm_kernels::norm_numba"]
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (plain, shown)]
    assert torch.equal(plain, shown) and torch.equal(*grads)


def test_a_plain_call_with_autocast_is_as_without():
    x, weight = torch.rand(2, 8, requires_grad=True), torch.rand(8)
    with torch.autocast("cpu", torch.bfloat16):
        y = ssm_kernels.rms_norm(x, weight)
    assert y.dtype == torch.float32 and torch.equal(y, ssm_kernels.rms_norm(x, weight))
