"""The promises that docs/numerics.md makes of the ops; its tables name the test of each."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.cases import OPS, Case, Shape, variants
from ssm_kernels._core.dispatch import NUMBA_SPEEDUPS
from ssm_kernels.testing import is_interpreted

pytestmark = pytest.mark.triton

SHARED = {"A", "D", "dt_bias", "weight", "bias", "B_bias", "C_bias"}
"""Inputs that all sequences share, but for Mamba-3's A, which has an entry for each step."""
STEPPED = {"u", "x", "dt", "z", "B", "C"}
"""Inputs with an entry for each step."""
PACKABLE = ("selective_scan", "ssd", "causal_conv1d")
FLOATS = ("fp32",) if is_interpreted() else ("fp32", "bf16", "fp64")
SIZES = (
    {"odd": Shape(2, 4, 4, d_state=4, heads=2, headdim=4, height=2)}
    if is_interpreted()
    else {
        "odd": Shape(5, 37, 24, d_state=4, heads=6, headdim=4),
        "long": Shape(3, 203, 72, d_state=16, heads=6, headdim=16, groups=2, height=7),
        "wide": Shape(8, 26, 384, d_state=16, heads=6, headdim=64, height=13),
    }
)


def has_numba(op):
    kernels = op.removeprefix("cross_").removesuffix("_step")
    return ("ssd" if kernels == "mamba3" else kernels) in NUMBA_SPEEDUPS


@pytest.fixture
def backend(compiled_or_not, request):
    """Every implementation that the op has."""
    op = getattr(request.node, "callspec", None) and request.node.callspec.params.get("op")
    if compiled_or_not == "numba" and op and not has_numba(op):
        pytest.skip(f"{op} has no kernels in numba")
    return compiled_or_not


def cases(op, shape, dtype):
    """The op with all its options that are not packing; in the interpreter, with those that matter most."""
    case = Case(op, shape, dtype, chunk_size=64)
    every = [c for c in variants(case) if not c.sequences and not c.seq_idx]
    if op in ("selective_scan", "ssd"):
        every.append(replace(case, z=True, dt_bias=True, initial_states=True))
    return [every[-1]] if is_interpreted() else every


def run(case, inputs, backend, weights=None):
    """Outputs and gradients by name. The gradients are of a sum whose weights a sequence takes along."""
    inputs = {k: v.detach().clone() if v.is_floating_point() else v for k, v in inputs.items()}
    wanted = [] if case.is_step else [k for k, v in inputs.items() if v.is_floating_point()]
    for name in wanted:
        inputs[name].requires_grad_()
    outputs = case.call(inputs, backend)
    result = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    if wanted:
        weights = weights or [torch.linspace(-1, 1, out[0].numel()).view(out.shape[1:]) for out in outputs]
        total = sum((out.double() * w).sum() for out, w in zip(outputs, weights, strict=True))
        result |= zip(wanted, torch.autograd.grad(total, [inputs[k] for k in wanted]), strict=True)
    return result


def is_shared(case, name):
    return name in SHARED and not (case.is_mamba3 and name == "A") or (case.constant and name in ("B", "C"))


def assert_same(got, want, *context):
    """Equal to the bit. A NaN is equal to a NaN.

    Triton's interpreter takes NumPy's products, which round by the layout of their operands: there SSD is held to 1e-6
    of the largest element.
    """
    same = (got == want) | (got.isnan() & want.isnan())
    if is_interpreted() and "ssd" in str(context):
        same |= (got - want).abs() <= 1e-6 * want.abs().max()
    assert got.shape == want.shape and same.all(), (*context, f"{(~same).sum()} of {same.numel()} differ")


@pytest.mark.skipif(is_interpreted(), reason="the interpreter runs programs one by one, in one order")
@pytest.mark.parametrize("op", OPS)
def test_two_runs_are_equal(op, backend):
    """Forward and backward, with all sequences' shares of a gradient added up."""
    for case in cases(op, SIZES["long"], "fp32"):
        once, twice = (run(case, case.inputs(), backend) for _ in range(2))
        for name, value in once.items():
            assert_same(twice[name], value, str(case), name)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", [op for op in OPS if not op.startswith("mamba3")])
def test_a_sequence_is_the_same_alone_and_among_others(op, size, backend):
    """At every place in the batch: outputs, states, and the gradients that belong to the sequence."""
    for dtype in FLOATS:
        for case in cases(op, SIZES[size], dtype):
            inputs = case.inputs()
            together = run(case, inputs, backend)
            for i in range(case.shape.batch):
                mine = {k: v if is_shared(case, k) else v[i : i + 1] for k, v in inputs.items()}
                alone = run(replace(case, shape=replace(case.shape, batch=1)), mine, backend)
                for name, value in alone.items():
                    if not is_shared(case, name):
                        assert_same(together[name][i : i + 1], value, str(case), name, i)


LENGTHS = (3, 0, 7, 1) if is_interpreted() else (37, 0, 200, 5, 64, 1, 130)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", PACKABLE)
def test_a_sequence_is_the_same_packed_and_alone(op, dtype, backend):
    """In a pack of unequal lengths: outputs, states, and the gradients that belong to the sequence."""
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    shape = replace(SIZES["odd" if is_interpreted() else "long"], batch=1, length=sum(LENGTHS))
    case = Case(op, shape, dtype, z=True, dt_bias=True, initial_states=True, sequences=len(LENGTHS))
    inputs = case.inputs() | {"cu_seqlens": bounds}
    weights = [torch.randn_like(out, dtype=torch.float64) for out in case.call(inputs, backend)]
    together = run(case, inputs, backend, weights)
    for i, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if begin == end:
            continue

        def mine(name, value, begin=begin, end=end, i=i):
            if name in STEPPED or name == "output 0":
                return value[:, begin:end]
            return value if is_shared(case, name) else value[i : i + 1]

        length = int(end - begin)
        lone = replace(case, sequences=0, shape=replace(shape, length=length))
        parts = {k: mine(k, v) for k, v in inputs.items() if k != "cu_seqlens"}
        alone = run(lone, parts, backend, [weights[0][:, begin:end], weights[1][i : i + 1]])
        for name, value in alone.items():
            if not is_shared(case, name):
                assert_same(mine(name, together[name]), value, str(case), name, length)


PREFILL_MULTIPLE = 64
"""Steps at a multiple of which a sequence may be cut; as docs/numerics.md says."""


@pytest.mark.skipif(is_interpreted(), reason="the kernels promise agreement to rounding here")
@pytest.mark.parametrize("cut", [PREFILL_MULTIPLE, 3 * PREFILL_MULTIPLE])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", PACKABLE)
def test_a_sequence_is_the_same_at_once_and_in_prefill_chunks(op, dtype, cut, backend):
    case = Case(op, replace(SIZES["long"], length=500), dtype, z=True, dt_bias=True, initial_states=True)
    inputs = case.inputs()
    y, final_states = case.call(inputs, backend)
    states, parts = inputs["initial_states"], []
    for begin in range(0, 500, cut):
        part = {k: v[:, begin : begin + cut] if k in STEPPED else v for k, v in inputs.items()}
        part_y, states = case.call(part | {"initial_states": states}, backend)
        parts.append(part_y)
    assert_same(torch.cat(parts, 1), y, str(case))
    assert_same(states, final_states, str(case))


@pytest.mark.parametrize("op", ["ssd"])
def test_results_do_not_depend_on_the_chunk_size_given(op, backend):
    """From 64 steps on the PyTorch backend takes chunks of 64; its checkpoints must be counted in the same."""
    shape = Shape(1, 1100, heads=2, headdim=4, d_state=4)
    small, large = (Case("ssd", shape, chunk_size=size) for size in (64, 1000))
    if not is_interpreted():
        want = run(small, small.inputs(), backend)
        for name, value in run(large, large.inputs(), backend).items():
            assert_same(value, want[name], name)


DUMP = """
import sys, torch
from benchmarks.cases import OPS, Case, Shape
from tests.ssm_kernels.test_numerics import run
sums = {}
for op in sys.argv[4:]:
    case = Case(op, Shape(2, 1000, 256, d_state=16, heads=4, headdim=64, height=10), z=op in ("selective_scan", "ssd"))
    generator = torch.Generator().manual_seed(0)
    inputs = case.inputs()
    torch.set_num_threads(int(sys.argv[1]))
    for name, value in run(case, inputs, sys.argv[3]).items():
        sums[op, name] = value
    torch.set_num_threads(1)
torch.save(sums, sys.argv[2])
"""


@pytest.mark.skipif(is_interpreted(), reason="of the PyTorch backend")
def test_the_number_of_threads_changes_nothing(tmp_path, backend):
    """In processes of their own, since the suite runs with one thread."""
    ops = [op for op in OPS if backend != "numba" or has_numba(op)]
    results = []
    for threads in (1, 2):
        out = tmp_path / f"{threads}.pt"
        subprocess.run([sys.executable, "-W", "ignore", "-c", DUMP, str(threads), str(out), backend, *ops], check=True)
        results.append(torch.load(out))
    assert results[0].keys() == results[1].keys()
    for (op, name), value in results[0].items():
        assert_same(results[1][op, name], value, op, name)


TINY = Shape(2, 4, 4, d_state=4, heads=2, headdim=4, height=2)


@pytest.mark.parametrize("op", OPS)
def test_offsets_beyond_32_bits(op, backend):
    """Each input in turn with more than 2**31 elements between batch rows; what is between them is never touched."""
    case = Case(op, TINY, "bf16", z=op in ("selective_scan", "ssd"))
    inputs = {k: v.detach() for k, v in case.inputs().items()}
    own = {name: inputs[name].clone() for name in case.state_names}
    want = case.run(inputs | own, backend)
    for name, value in inputs.items():
        if is_shared(case, name):
            continue
        strides = (2**31 + 64, *value.stride()[1:])
        far = torch.empty(2**31 + 64 + value[0].numel(), dtype=value.dtype).as_strided(value.shape, strides)
        far.copy_(value)
        states = {state: inputs[state].clone() for state in case.state_names}
        got = case.run(inputs | states | {name: far}, backend)
        assert_same(*(out if isinstance(out, torch.Tensor) else out[0] for out in (got, want)), name)
        for state in case.state_names:
            assert_same(far if name == state else states[state], own[state], name)


@pytest.mark.skipif(is_interpreted(), reason="the interpreter rounds bfloat16 in its own way")
@pytest.mark.parametrize("op", [op for op in OPS if not op.startswith("cross")])
def test_bfloat16_is_computed_in_float32(op, backend):
    """Rounded once, at the end: what float32 copies of the inputs give, rounded to the output's dtype."""
    for case in cases(op, TINY, "bf16"):
        inputs = {k: v.detach() for k, v in case.inputs().items()}
        low = case.call(inputs, backend)
        high = case.call({k: v.float() for k, v in inputs.items()}, backend)
        for i, (a, b) in enumerate(zip(low, high, strict=True)):
            is_state = i > 0 and op != "causal_conv1d"
            if is_state:
                assert a.dtype == (inputs[case.state_names[0]].dtype if case.is_step else torch.float32)
            assert_same(a, b.to(a.dtype), str(case), i)


@pytest.mark.parametrize("op", [op for op in OPS if not op.endswith("_step")])
def test_autocast_changes_nothing(op, backend):
    case = cases(op, TINY, "fp32")[-1]
    want = run(case, case.inputs(), backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(case, case.inputs(), backend)
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        assert_same(got[name], value, name)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["x", "B", "C", "z"])
@pytest.mark.parametrize("op", PACKABLE)
def test_infinities_and_nan_stay_in_their_sequence(op, name, value, backend):
    """In a batch and in a pack; and never before its step, but in SSD before its step within the chunk."""
    case = Case(op, replace(TINY, length=40), z=True, chunk_size=16)
    name = "u" if op == "selective_scan" and name == "x" else name
    inputs = {k: v.detach().clone() for k, v in case.inputs().items()}
    if name not in inputs:
        pytest.skip(f"{op} has no {name}")
    clean = case.call(inputs, backend)
    step = 20
    inputs[name][1, step] = value
    got = case.call(inputs, backend)
    assert not got[0][1, step].isfinite().all()
    first = 16 if op == "ssd" and name in ("x", "B") else step
    for a, b in zip(got, clean, strict=True):
        assert_same(a[0], b[0], op, name)
    assert_same(got[0][1, :first], clean[0][1, :first], op, name)

    rows = {k: v if is_shared(case, k) else v.flatten(0, 1).unsqueeze(0) for k, v in inputs.items()}
    packed = case.call(rows | {"cu_seqlens": torch.tensor([0, 40, 80])}, backend)
    assert packed[0][0, :40].isfinite().all() and packed[1][0].isfinite().all()
    assert not packed[0][0, 40 + step].isfinite().all()


def test_nan_in_dt_is_refused(backend):
    ops = ("selective_scan", "ssd", "cross_selective_scan", "cross_ssd", "selective_scan_step", "ssd_step")
    for op in (op for op in ops if backend != "numba" or has_numba(op)):
        case = Case(op, TINY)
        inputs = {k: v.detach().clone() for k, v in case.inputs().items()}
        inputs["dt"].view(-1)[3] = torch.nan
        with pytest.raises(ValueError, match="dt must not hold NaN"):
            case.call(inputs, backend)


@pytest.mark.skipif(is_interpreted(), reason="reads files")
def test_every_test_that_the_page_names_exists_and_every_promise_is_on_the_page():
    root = Path(__file__).parents[2]
    named = set(re.findall(r"`(test_\w+)`", (root / "docs" / "numerics.md").read_text(encoding="utf-8")))
    written = {
        test
        for path in (root / "tests").rglob("test_*.py")
        for test in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)
    }
    files = (Path(__file__), root / "tests" / "model" / "test_numerics.py")
    promises = {t for f in files for t in re.findall(r"^def (test_\w+)", f.read_text(encoding="utf-8"), re.M)}
    assert named <= written, named - written
    assert promises <= named, promises - named
