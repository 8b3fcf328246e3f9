"""Launches as a GPU would get them, recorded from calls on meta tensors: arguments and grids."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ssm_kernels
from ssm_kernels._triton.device import MAX_PROGRAMS_X, MAX_PROGRAMS_Y
from ssm_kernels.testing import is_interpreted
from vlmamba.benchmarks import cases, compile_report
from vlmamba.benchmarks.cases import DTYPES, Case, Shape
from vlmamba.benchmarks.compile_report import Request

jit = pytest.importorskip("triton.runtime.jit")
if is_interpreted():
    pytest.skip("the interpreter launches nothing", allow_module_level=True)


def scalar_types(signature: dict) -> Iterator[tuple[str, str]]:
    """Names and types of the arguments of a kernel, with the members of tuples."""
    for name, kind in signature.items():
        members = kind if isinstance(kind, tuple) else (kind,)
        yield from ((name, member) for member in members)


def float_arguments(request: Request) -> list[str]:
    """Arguments that are Python floats, which a kernel gets in float32, whatever it computes in."""
    return [name for name, kind in scalar_types(request.signature) if kind in ("fp16", "bf16", "fp32", "fp64")]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_kernel_takes_a_float_argument(dtype):
    # `seq_idx` is read when a table of segments is built, which the meta device has no values for.
    requests = compile_report.record([case for case in cases.small(dtype) if not case.seq_idx], "sm_90")
    assert {request.module.split(".")[1] for request in requests} >= {"selective_scan", "ssd", "causal_conv1d", "norm"}
    for request in requests:
        assert not float_arguments(request), f"{request.name} in {request.case}"


def test_a_float_argument_is_found_inside_a_tuple_too():
    signature = {"x_ptr": "*fp64", "strides": ("i32", "constexpr"), "eps": "fp32", "limits": ("fp32", "i32")}
    request = Request("module", "kernel", signature, {}, {}, {}, "sm_90", "case")  # pyright: ignore[reportArgumentType]
    assert float_arguments(request) == ["eps", "limits"]


MANY = MAX_PROGRAMS_Y + 1
WIDE = [
    Case("rms_norm", Shape(1, 2, MANY, groups=MANY), z=True),
    Case("causal_conv1d", Shape(1, 2, 128 * MANY)),
    Case("causal_conv1d_step", Shape(1, 1, 256 * MANY)),
    Case("cross_scan", Shape(1, 2, 256 * MANY, height=1)),
    Case("cross_merge", Shape(1, 2, 256 * MANY, height=1)),
]


def test_states_of_any_size_are_passed(grids):
    """More than 65,535 tiles of a state, in a dimension of the grid that has room for them."""
    compile_report.record([Case("ssd", Shape(1, 600, heads=2100, headdim=64, d_state=128), sequences=2)], "sm_90")
    assert max(grid[0] for grid in grids) > 2 * MAX_PROGRAMS_Y
    assert all(max(grid[1:], default=1) <= MAX_PROGRAMS_Y for grid in grids)


PADDED = [
    Case("selective_scan", Shape(1, 2, 128 * MANY), sequences=2),
    Case("ssd", Shape(1, 2, heads=2 * MANY, headdim=64, d_state=16), sequences=2),
]
"""Calls whose padding, once zeroed, takes a tile of channels more than the second dimension of a grid has room for."""


@pytest.mark.parametrize("case", PADDED, ids=str)
def test_padding_of_any_number_of_channels_is_zeroed(case, grids):
    compile_report.record([case], "sm_90")
    assert any(grid[0] == MANY for grid in grids)
    assert all(max(grid[1:], default=1) <= MAX_PROGRAMS_Y for grid in grids)


def launches() -> Iterator[tuple[Path, dict[str, ast.expr], ast.Call]]:
    """Launches in the source, `kernel[grid](...)`: the folder, the values assigned to names in it, and the call."""
    for folder in {path.parent for path in Path(ssm_kernels.__file__).parent.rglob("*triton/*.py")}:
        nodes = [node for path in folder.glob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
        values = {ast.unparse(n.targets[0]): n.value for n in nodes if isinstance(n, ast.Assign)}
        for node in nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                if ast.unparse(node.func.value).endswith("kernel"):
                    yield folder, values, node


def test_every_dimension_of_a_grid_but_the_first_is_limited():
    """In the source of each launch they are checked by `launch_grid`, numbers, or a minimum of a number and more."""
    count, unlimited = 0, []
    for folder, values, launch in launches():
        assert isinstance(launch.func, ast.Subscript)
        count += 1
        grid = values.get(ast.unparse(launch.func.slice), launch.func.slice)
        if not is_limited(grid):
            unlimited.append(f"{folder}, line {launch.lineno}: {ast.unparse(grid)}")
    assert count > 15 and not unlimited


def test_every_launch_says_whether_a_product_and_a_sum_are_rounded_once():
    """Triton's default changes, and with it the counts and the last bits."""
    silent = [
        f"{folder}, line {launch.lineno}"
        for folder, _, launch in launches()
        if not any(k.arg is None and ast.unparse(k.value) == "FUSED_MULTIPLY_ADD" for k in launch.keywords)
    ]
    assert not silent


def is_limited(grid: ast.expr) -> bool:
    """Whether the source shows that no dimension of a grid but the first grows with a tensor."""
    if isinstance(grid, ast.Call):
        return ast.unparse(grid.func) == "launch_grid"
    others = grid.elts[1:] if isinstance(grid, ast.Tuple) else [grid]
    numbers = [
        other.args[0] if isinstance(other, ast.Call) and ast.unparse(other.func) == "min" else other for other in others
    ]
    return all(isinstance(number, ast.Constant) for number in numbers)


@pytest.mark.parametrize(
    ("grid", "limited"),
    [("(n, 2)", True), ("(n,)", True), ("n, min(32, m)", True), ("launch_grid(n, m, 'tiles')", True),
     ("(n, m)", False), ("(n, 2, cdiv(m, 4))", False), ("(n, min(m, k))", False), ("grid", False)],
)  # fmt: skip
def test_a_dimension_that_grows_is_found(grid, limited):
    assert is_limited(ast.parse(grid, mode="eval").body) == limited


@pytest.fixture
def grids(monkeypatch) -> list[tuple[int, ...]]:
    """The grids of the launches of a test."""
    found, run = [], jit.JITFunction.run

    def record(self, *args, grid, **options):
        found.append(grid)
        return run(self, *args, grid=grid, **options)

    monkeypatch.setattr(jit.JITFunction, "run", record)
    return found


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_a_grid_that_no_gpu_launches_is_refused(case, grids):
    with pytest.raises(ValueError, match=r"at most 65,535 (groups|tiles) of channels.*got 65,536.*backend='torch'"):
        compile_report.record([case], "sm_90")
    assert not grids


@pytest.mark.parametrize("op", ["rms_norm", "causal_conv1d", "causal_conv1d_step", "cross_scan", "cross_merge"])
def test_the_largest_grid_is_launched(op, grids):
    wide = next(case for case in WIDE if case.op == op).shape
    groups = min(wide.groups, MAX_PROGRAMS_Y)
    channels = wide.channels // MANY * MAX_PROGRAMS_Y
    compile_report.record([Case(op, Shape(1, wide.length, channels, groups=groups, height=wide.height))], "sm_90")
    assert grids
    assert all(grid[0] <= MAX_PROGRAMS_X and grid[1] == MAX_PROGRAMS_Y for grid in grids), grids
