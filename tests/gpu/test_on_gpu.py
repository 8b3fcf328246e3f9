"""Tests that need a GPU: realistic sizes, CUDA graphs, other streams and devices, offsets beyond 31 bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ssm_kernels.testing import is_interpreted
from vlmamba.benchmarks import cases
from vlmamba.benchmarks.cases import Case
from vlmamba.benchmarks.gpu_suite import check

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)
if is_interpreted():
    pytest.skip("TRITON_INTERPRET=1 interprets the kernels on a CPU", allow_module_level=True)
pytestmark = pytest.mark.gpu

ALL = list(cases.correctness())
DENSE = [c for c in cases.realistic("bf16") if not c.sequences]
PACKED = [c for c in cases.realistic("bf16") if c.sequences]


def results(case: Case, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of the inputs."""
    if case.is_step:
        return list(case.call(inputs, "triton"))
    outputs = case.call(inputs, "triton")
    wanted = [t for t in inputs.values() if t.requires_grad]
    dy = torch.cos(torch.arange(outputs[0].numel(), device=outputs[0].device)).view_as(outputs[0]).to(outputs[0].dtype)
    return [*outputs, *torch.autograd.grad(outputs[0], wanted, dy, allow_unused=True)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Bit-equal: no change that these tests make may change an operation or its order."""
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got.to(want.device), want)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_op_agrees_with_its_reference(case):
    check(case, "cuda")


@pytest.mark.parametrize("case", DENSE + PACKED, ids=str)
def test_the_same_call_gives_the_same_bits(case):
    inputs = case.inputs("cuda")
    assert_same(results(case, inputs), results(case, inputs))


@pytest.mark.parametrize("case", DENSE + PACKED, ids=str)
def test_forward_and_backward_are_captured_in_a_graph(case):
    static, other = case.inputs("cuda", seed=0), case.inputs("cuda", seed=1)
    expected = results(case, other)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and allocates autograd's buffers
            results(case, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(case, static)
    with torch.no_grad():
        for name, t in static.items():
            t.copy_(other[name])
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, expected)


@pytest.mark.parametrize("case", [c for c in DENSE if not c.is_step], ids=str)
def test_a_capture_that_is_not_replayed_leaves_nothing_behind(case):
    """A value cached per shape must not come from a graph that was captured and never replayed."""
    results(case, case.inputs("cuda"))  # compiles
    new = replace(case, shape=replace(case.shape, batch=case.shape.batch + 1))
    inputs = new.inputs("cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results(new, inputs)
    del graph
    check(new, "cuda")


@pytest.mark.parametrize("case", DENSE + PACKED, ids=str)
def test_kernels_run_on_the_current_stream(case):
    """Inputs are written late on another stream: kernels on the default stream would not wait for them."""
    expected = results(case, case.inputs("cuda", seed=1))
    late, other = case.inputs("cuda", seed=0), case.inputs("cuda", seed=1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # clock cycles
        with torch.no_grad():
            for name, t in late.items():
                t.copy_(other[name])
        found = results(case, late)
    stream.synchronize()
    assert_same(found, expected)


@pytest.mark.parametrize("case", [c for c in DENSE + PACKED if not c.is_step], ids=str)
def test_tables_of_a_stream_that_sleeps_are_not_read_by_another(case):
    """Tables of a shape, or of boundaries, that are new to the process are cached by the first call that needs them."""
    results(case, case.inputs("cuda"))  # compiles
    if not case.sequences:  # a batch that is larger by 16 takes the same compiled kernels
        case = replace(case, shape=replace(case.shape, batch=case.shape.batch + 16))
    inputs = case.inputs("cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)  # clock cycles: half a second
        late = results(case, inputs)
    found = results(case, inputs)
    assert not stream.query(), "the stream slept too short a time for the test to show anything"
    torch.cuda.synchronize()
    assert_same(found, late)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@pytest.mark.parametrize("case", DENSE + PACKED, ids=str)
def test_kernels_run_on_the_device_of_their_tensors(case):
    first = case.inputs("cuda:0")
    expected = results(case, first)
    inputs = {name: t.detach().to("cuda:1").requires_grad_(t.requires_grad) for name, t in first.items()}
    found = results(case, inputs)
    assert all(t.device == torch.device("cuda:1") for t in found)
    assert_same(found, expected)
    assert torch.cuda.current_device() == 0


def far_apart(inputs: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """Inputs by batch and step with a batch stride of more than 2**31 elements."""
    batch, length = case.shape.batch, case.shape.length
    moved = {n: t for n, t in inputs.items() if t.dtype == inputs_dtype(case) and t.shape[:2] == (batch, length)}
    between = 2**31 + 64
    row = sum(t[0].numel() for t in moved.values())
    memory = torch.empty(between + row, dtype=inputs_dtype(case), device=next(iter(inputs.values())).device)
    at, out = 0, dict(inputs)
    for name, t in moved.items():
        strides = t[0].contiguous().stride()
        far = memory.as_strided(t.shape, (between, *strides), at)
        far.copy_(t.detach())
        out[name] = far.requires_grad_()
        at += t[0].numel()
    return out


def inputs_dtype(case: Case) -> torch.dtype:
    return cases.DTYPES[case.dtype]


@pytest.mark.parametrize("case", [c for c in DENSE if not c.is_step and "cross" not in c.op], ids=str)
def test_offsets_beyond_31_bits(case):
    case = replace(case, shape=replace(case.shape, batch=2, length=min(case.shape.length, 300)))
    inputs = case.inputs("cuda")
    assert_same(results(case, far_apart(inputs, case)), results(case, inputs))


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_results_of_more_than_31_bits_of_elements(op):
    """4.3 GB in bf16; the last rows equal those of a call on them alone."""
    case = Case(op, cases.Shape(batch=1, length=2**21 + 8, channels=1024), "bf16")
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free memory")
    complete = {name: t.detach() for name, t in case.inputs("cuda").items()}
    last = {name: t[:, -8:] if t.dim() == 3 else t for name, t in complete.items()}
    with torch.no_grad():
        for got, want in zip(case.call(complete, "triton"), case.call(last, "triton"), strict=True):
            assert torch.equal(got[:, -8:], want)
