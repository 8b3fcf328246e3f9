"""Causal convolution: every backend against the window-by-window reference."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_kernels import causal_conv1d, causal_conv1d_step
from ssm_kernels.testing import assert_agrees, is_interpreted
from tests.ssm_kernels.makers import draw_inputs, pure
from vlmamba.benchmarks.cases import Case, Shape

pytestmark = pytest.mark.triton

FEWER = settings(max_examples=3 if is_interpreted() else 25)  # each program is slow in the interpreter
needs_interpreter = pytest.mark.skipif(not is_interpreted(), reason="the kernels need Triton's interpreter here")


@pytest.fixture(scope="module")
def backend(compiled_or_not):
    return compiled_or_not


def make(batch=2, length=7, dim=3, width=4, dtype=torch.float64, rows=0, seed=0, bias=True, initial_states=True):
    """Tensor arguments, with initial states for `rows` packed sequences."""
    shape = Shape(batch, length, dim, width=width)
    tensors = draw_inputs(Case("causal_conv1d", shape, initial_states=initial_states, sequences=rows), dtype, seed)
    return {k: v for k, v in tensors.items() if bias or k != "bias"}


@given(
    batch=st.integers(0, 3),
    length=st.integers(0, 12),
    width=st.integers(1, 8),
    activation=st.sampled_from([None, "silu"]),
    optional=st.fixed_dictionaries({k: st.booleans() for k in ("bias", "initial_states")}),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_agrees_with_the_reference(backend, batch, length, width, activation, optional, dtype, seed):
    tensors = make(batch, length, width=width, dtype=dtype, seed=seed, **optional)
    assert_agrees(causal_conv1d, tensors, {"activation": activation}, backend=backend)


LAYOUTS = {
    "dense": lambda x: x,
    "steps first": lambda x: x.mT.contiguous().mT,
    "part of a wider tensor": lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3:-2],
    "every other channel": lambda x: x.repeat_interleave(2, 2)[..., ::2],
}


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [*((layout, torch.float32) for layout in LAYOUTS), ("dense", torch.bfloat16), ("steps first", torch.bfloat16)],
)
@pytest.mark.parametrize(("length", "dim", "width"), [(70, 130, 4), (300, 5, 3)])
def test_long_sequences_of_any_layout_agree(backend, layout, length, dim, width, dtype):
    """More segments than programs, runs that meet, channels that fill no tile."""
    # Each program takes the interpreter long.
    tensors = make(1 if is_interpreted() else 2, length, dim, width, dtype)
    tensors["x"] = LAYOUTS[layout](tensors["x"])
    tensors["weight"] = tensors["weight"].T.contiguous().T
    tensors["bias"] = tensors["bias"].repeat(2)[::2]
    tensors["initial_states"] = LAYOUTS[layout](tensors["initial_states"])
    assert_agrees(causal_conv1d, tensors, {"activation": "silu"}, backend=backend)


@pytest.mark.parametrize("layout", ["dense", "steps first"])
@FEWER
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 9, 40, 150]), min_size=1, max_size=4),
    width=st.integers(1, 5),
    has_initial=st.booleans(),
)
def test_packed_sequences_agree_with_the_reference(backend, layout, lengths, width, has_initial):
    tensors = make(1, sum(lengths), width=width, rows=len(lengths), initial_states=has_initial)
    tensors["x"] = LAYOUTS[layout](tensors["x"])
    tensors["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    assert_agrees(causal_conv1d, tensors, {"activation": "silu"}, backend=backend)


@FEWER
@given(changes=st.lists(st.booleans(), min_size=24, max_size=24), has_initial=st.booleans())
def test_seq_idx_agrees_with_the_reference(backend, changes, has_initial):
    tensors = make(2, 12, initial_states=has_initial) | {"seq_idx": torch.tensor(changes).view(2, 12).cumsum(1)}
    assert_agrees(causal_conv1d, tensors, {"activation": "silu"}, backend=backend)


def test_a_window_wider_than_the_sequences(backend):
    tensors = make(1, 20, 3, 19, rows=3) | {"cu_seqlens": torch.tensor([0, 4, 4, 20])}
    assert_agrees(causal_conv1d, tensors, {"activation": "silu"}, backend=backend)


def test_steps_first_in_gives_steps_first_out(backend):
    tensors = make(2, 20, dtype=torch.float32)
    tensors["x"] = tensors["x"].mT.contiguous().mT
    y = causal_conv1d(**tensors, backend=backend).y
    assert backend != "triton" or y.stride() == tensors["x"].stride()


def test_agrees_with_torch_conv1d(backend):
    t = make(2, 20, initial_states=False)
    want = torch.nn.functional.conv1d(t["x"].mT, t["weight"][:, None], t["bias"], padding=3, groups=3)[..., :20].mT
    torch.testing.assert_close(causal_conv1d(**t, backend=backend).y, want)


@pytest.mark.parametrize("strides", [(2**31 + 64, 3, 1), (4, 2**29 + 64, 1), (1, 2, 2**30 + 64)])
def test_offsets_beyond_32_bits(backend, strides):
    """Memory that is not touched is not mapped."""
    size = sum((n - 1) * s for n, s in zip((2, 6, 3), strides, strict=True)) + 1
    x = torch.empty(size, dtype=torch.bfloat16).as_strided((2, 6, 3), strides)
    tensors = make(dtype=torch.bfloat16)
    x.copy_(tensors["x"][:, :6])
    for inputs in (x, x.clone(memory_format=torch.contiguous_format)):
        tensors["x"] = inputs
        assert_agrees(causal_conv1d, tensors, backend=backend)


def test_nothing_crosses_a_bound(backend):
    tensors = make(1, 12, rows=2)
    bad = tensors | {"x": tensors["x"].clone()}
    bad["x"][:, :5] = torch.nan
    good, corrupted = (causal_conv1d(**t, cu_seqlens=torch.tensor([0, 5, 12]), backend=backend) for t in (tensors, bad))
    assert torch.equal(corrupted.y[:, 5:], good.y[:, 5:])


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_steps_of_the_reference_are_its_convolution(width, dtype):
    tensors = make(2, 5, 3, width, dtype)
    whole = causal_conv1d(**tensors, activation="silu", backend="reference")
    state = tensors.pop("initial_states")
    for t in range(5):
        y = causal_conv1d_step(state, **(tensors | {"x": tensors["x"][:, t]}), activation="silu", backend="reference")
        torch.testing.assert_close(y, whole.y[:, t])
    assert torch.equal(state, whole.final_states)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [torch.float64, torch.float32])
def test_a_step_agrees_with_the_reference(backend, width, dtype, state_dtype):
    tensors = make(2, 1, 300, width, dtype)
    tensors |= {"x": tensors["x"][:, 0], "state": tensors.pop("initial_states").to(state_dtype)}
    op = pure(causal_conv1d_step)
    assert_agrees(op, tensors, {"activation": "silu"}, backend=backend, gradients=False)
    assert_agrees(op, tensors | {"bias": None}, backend=backend, gradients=False)


def test_a_step_updates_a_state_of_any_strides_in_place(backend):
    tensors = make(2, 1)
    expected, x = tensors.pop("initial_states"), tensors.pop("x")[:, 0]
    state = expected.repeat_interleave(2, 1)[:, ::2]
    y = causal_conv1d_step(state, x, **tensors, backend=backend)
    torch.testing.assert_close(y, causal_conv1d_step(expected, x, **tensors, backend="reference"))
    assert torch.equal(state, expected)


def test_gradcheck(backend):
    inputs = [t.requires_grad_() for t in make(1, 3, 1, 3).values()]
    assert torch.autograd.gradcheck(
        lambda x, w, b, s: tuple(causal_conv1d(x, w, b, "silu", s, backend=backend)), inputs
    )


@pytest.mark.parametrize("part", ["y", "final_states"])
def test_gradient_of_one_result_alone(backend, part):
    def gradients(backend):
        inputs = [t.requires_grad_() for t in make().values()]
        out = getattr(causal_conv1d(*inputs[:3], "silu", inputs[3], backend=backend), part)
        grads = torch.autograd.grad(out.square().sum(), inputs, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads, strict=True)]

    for got, want in zip(gradients(backend), gradients("reference"), strict=True):
        torch.testing.assert_close(got, want)


def test_compiles_to_one_graph(backend):
    t = {k: v.float() for k, v in make(2, 20).items()}
    t["x"] = t["x"].mT.contiguous().mT

    def loss(t):
        out = causal_conv1d(**t, activation="silu", backend=backend)
        y = causal_conv1d_step(out.final_states.clone(), t["x"][:, 0], t["weight"], backend=backend)
        return (out.y * t["x"]).sum() + out.final_states.square().sum() + y.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = []
    for f in (loss, compiled):
        inputs = {k: v.clone().requires_grad_() for k, v in t.items()}
        grads.append(torch.autograd.grad(f(inputs), list(inputs.values())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_chunked_ops_pass_opcheck():
    t = {k: v.float() for k, v in make().items()}
    args = (t["x"], t["weight"], t["bias"], True, t["initial_states"], None, None)
    torch.library.opcheck(torch.ops.ssm_kernels.causal_conv1d_torch.default, args)
    y, final = torch.ops.ssm_kernels.causal_conv1d_torch(*args)
    torch.library.opcheck(torch.ops.ssm_kernels.causal_conv1d_torch_backward.default, (*args, y, final))


def kernel_arguments(layout="dense", **without):
    t = {k: v.float() for k, v in make(2, 40, 6, **without).items()}
    x = LAYOUTS[layout](t["x"]).unsqueeze(2)
    return x, t["weight"], t.get("bias"), True, t.get("initial_states"), None, None, [], 1


def test_kernels_pass_opcheck(backend):
    if backend == "torch":
        pytest.skip("has a test of its own")
    ops = importlib.import_module(f"ssm_kernels.causal_conv1d.{backend}").kernels
    for arguments in (kernel_arguments(), kernel_arguments("steps first", bias=False, initial_states=False)):
        torch.library.opcheck(ops.forward_op, arguments)
        dy, dfinal = (m.clone() for m in ops.forward_op(*arguments))
        torch.library.opcheck(ops.backward_op, (*arguments, dy, dfinal))
        torch.library.opcheck(ops.backward_op, (*arguments, dy, None))
    x, weight, bias = arguments[0][:, 0, 0], arguments[1], arguments[2]
    torch.library.opcheck(ops.step_op, (torch.randn(2, 3, 6), x, weight, bias, True, None, None, None))


@needs_interpreter
@pytest.mark.parametrize("layout", ["dense", "steps first"])
@pytest.mark.parametrize("packed", ["rows", "cu_seqlens", "seq_idx"])
def test_kernels_write_all_of_their_results_and_nothing_else(guarded_memory, layout, packed):
    from ssm_kernels.causal_conv1d.triton import backward, forward, step

    x, weight, bias, silu, initial, cu_seqlens, seq_idx, *rest = kernel_arguments(layout)
    if packed == "cu_seqlens":
        x, initial = x[:1], initial[:1].repeat(4, 1, 1)
        cu_seqlens = torch.tensor([0, 2, 2, 39, 40])
    elif packed == "seq_idx":
        seq_idx = torch.arange(40).repeat(2, 1) // 13
    arguments = (x, weight, bias, silu, initial, cu_seqlens, seq_idx, *rest)
    y, final = forward.forward(*arguments)
    backward.backward(*arguments, y.clone(), final.clone())
    step.step(torch.randn(2, 3, 6), x[0, :2, 0], weight, bias, silu, None, None, None)


WRONG = [
    ({"x": torch.zeros(2, 7)}, ValueError, "x must have shape"),
    ({"weight": torch.zeros(4, 4)}, ValueError, "weight must have shape"),
    ({"weight": torch.zeros(3, 0)}, ValueError, "width K of at least 1"),
    ({"bias": torch.zeros(4)}, ValueError, "bias must have shape"),
    ({"activation": "relu"}, ValueError, "activation must be None or 'silu'"),
    ({"initial_states": torch.zeros(2, 4, 3)}, ValueError, "initial_states must have shape"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
def test_bad_arguments_are_named(wrong, error, message):
    with pytest.raises(error, match=message):
        causal_conv1d(**(make() | wrong))
