"""Norms: every backend against the definition."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssm_kernels import add_rms_norm, rms_norm
from ssm_kernels.testing import assert_agrees, is_interpreted

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def backend(compiled_or_not):
    return compiled_or_not


DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@given(
    rows=st.integers(0, 5),
    group_size=st.sampled_from([None, 3, 4, 12]),
    gated=st.booleans(),
    before=st.booleans(),
    dtype=DTYPES,
)
def test_rms_norm_agrees_with_the_reference(backend, rows, group_size, gated, before, dtype):
    tensors = {"x": randn(2, rows, 12, dtype=dtype), "weight": randn(12, dtype=dtype)}
    if gated:
        tensors["z"] = randn(2, rows, 12, dtype=dtype) + 1
    assert_agrees(rms_norm, tensors, {"group_size": group_size, "norm_before_gate": before}, backend=backend)


@given(rows=st.integers(0, 5), has_residual=st.booleans(), dtype=DTYPES)
def test_add_rms_norm_agrees_with_the_reference(backend, rows, has_residual, dtype):
    tensors = {"x": randn(rows, 12, dtype=dtype), "weight": randn(12, dtype=dtype)}
    if has_residual:
        tensors["residual"] = randn(rows, 12, dtype=dtype) * 2
    assert_agrees(add_rms_norm, tensors, backend=backend)


@pytest.mark.parametrize("dim", [1, 130, 1025])
@pytest.mark.parametrize("gated", ["no", "before", "after"])
def test_many_rows_of_any_strides_agree(backend, dim, gated):
    """More tiles than programs, channels that fill no power of two, and rows that do not lie side by side."""
    rows = 37 if dim > 130 else 300
    tensors = {"x": randn(rows, 2 * dim, dtype=torch.float32)[:, dim:], "weight": randn(2 * dim)[::2].float()}
    if gated != "no":
        tensors["z"] = randn(dim, rows, dtype=torch.float32).T
    assert_agrees(rms_norm, tensors, {"norm_before_gate": gated == "after"}, backend=backend)
    tensors = {n: t for n, t in tensors.items() if n != "z"} | {"residual": randn(dim, rows, dtype=torch.float32).T}
    assert_agrees(add_rms_norm, tensors, backend=backend)


@pytest.mark.parametrize("gated", ["no", "before", "after"])
@pytest.mark.parametrize(("rows", "groups"), [(37, 1), (3, 2)])
def test_groups_wider_than_a_tile_agree(backend, gated, rows, groups):
    """One group with more rows than the programs take at once, and two."""
    dim = 8195
    tensors = {"x": randn(rows, groups * dim).float(), "weight": randn(groups * dim).float()}
    if gated != "no":
        tensors["z"] = randn(1, rows, groups * dim)[0].float()
    assert_agrees(rms_norm, tensors, {"group_size": dim, "norm_before_gate": gated == "after"}, backend=backend)


def test_residual_wider_than_a_tile_agrees(backend):
    x, residual = randn(5, 8195).float(), randn(1, 5, 8195)[0].float()
    assert_agrees(add_rms_norm, {"x": x, "weight": randn(8195).float(), "residual": residual}, backend=backend)


@pytest.mark.parametrize("x", [torch.float16, torch.float32])
@pytest.mark.parametrize("residual", [torch.float16, torch.float32])
@pytest.mark.parametrize("stream", [torch.float32, torch.float64])
def test_input_residual_and_stream_of_different_dtypes_agree(backend, x, residual, stream):
    tensors = {"x": randn(9, 24, dtype=x), "weight": randn(24).float(), "residual": randn(1, 9, 24, dtype=residual)[0]}
    assert_agrees(add_rms_norm, tensors, {"residual_dtype": stream}, backend=backend)


def test_registered_ops_pass_opcheck(backend):
    if backend == "torch":
        pytest.skip("no registered ops")
    kernels = importlib.import_module(f"ssm_kernels.norm.{backend}").kernels
    x, w = randn(5, 12).float(), randn(12).float()
    torch.library.opcheck(kernels.forward_op, (x, None, w, x.clone(), 1e-5, 4, True, x.dtype))
    torch.library.opcheck(kernels.forward_op, (x, x.clone(), w, None, 1e-5, 12, False, torch.float64))
    rstd, dtotal = randn(5, 1).float(), x.clone()
    arguments = (x, w, None, rstd, x.clone(), dtotal, 12, False, torch.float32, torch.bfloat16, 1e-5)
    torch.library.opcheck(kernels.backward_op, arguments)


@pytest.mark.skipif(not is_interpreted(), reason="the kernels need Triton's interpreter here")
@pytest.mark.parametrize(("rows", "dim"), [(9, 24), (300, 130), (1, 1025), (2, 8195)])
def test_kernels_write_all_of_their_results_and_nothing_else(guarded_memory, rows, dim):
    from ssm_kernels.norm.triton import backward, forward

    x, z, dy, w = randn(rows, dim).float(), randn(1, rows, dim)[0].float(), randn(rows, dim).float(), randn(dim).float()
    for gate, residual in ((None, None), (z, None), (None, z)):
        _, total, rstd = forward.forward(x, residual, w, gate, 1e-5, dim, False, torch.float32)
        v, dtotal = (x, None) if residual is None else (total, z)
        backward.backward(v, w, gate, rstd, dy, dtotal, dim, False, torch.float32, torch.bfloat16)


def test_the_residual_has_the_requested_dtype():
    x = randn(3, 12, dtype=torch.bfloat16)
    y, residual = add_rms_norm(x, randn(12), residual_dtype=torch.float32)
    assert (y.dtype, residual.dtype) == (torch.bfloat16, torch.float32)
    y, residual = add_rms_norm(x, randn(12), residual)
    assert (y.dtype, residual.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(residual, 2 * x.float())


def test_gradcheck(backend):
    x, w, z = (t.requires_grad_() for t in (randn(2, 8), randn(8), randn(1, 2, 8)[0]))
    assert torch.autograd.gradcheck(lambda *a: rms_norm(a[0], a[1], z=a[2], group_size=4, backend=backend), (x, w, z))
    assert torch.autograd.gradcheck(lambda *a: tuple(add_rms_norm(a[0], a[1], a[2], backend=backend)), (x, w, z))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.tensor(1.0), "weight": torch.ones(1)}, "got a scalar"),
        ({"x": torch.ones(2, 4), "weight": torch.ones(3)}, "weight must have shape"),
        ({"x": torch.ones(2, 4), "weight": torch.ones(4), "z": torch.ones(2, 3)}, "z must have shape"),
        ({"x": torch.ones(2, 4), "weight": torch.ones(4), "group_size": 3}, "group_size must divide D"),
        ({"x": torch.ones(2, 4), "weight": torch.ones(4), "eps": -1.0}, "eps must not be negative"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(**arguments)


@pytest.mark.parametrize("gated", [False, True])
def test_large_values_have_right_gradients(backend, gated):
    tensors = {"x": randn(3, 8, dtype=torch.float32) * 1e16, "weight": randn(8, dtype=torch.float32)}
    if gated:
        tensors["z"] = randn(8, 3, dtype=torch.float32).T.contiguous()
    assert_agrees(rms_norm, tensors, backend=backend)
