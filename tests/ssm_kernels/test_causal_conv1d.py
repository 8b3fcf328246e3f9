"""Causal convolution: every backend against the window-by-window reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssm_kernels import causal_conv1d, causal_conv1d_step
from ssm_kernels.testing import assert_agrees


def make(batch=2, length=7, dim=3, width=4, dtype=torch.float64, rows=None, seed=0, **without):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    tensors = {
        "x": randn(batch, length, dim),
        "weight": randn(dim, width),
        "bias": randn(dim),
        "initial_states": randn(batch if rows is None else rows, width - 1, dim),
    }
    return {k: v for k, v in tensors.items() if without.get(k, True)}


@given(
    batch=st.integers(0, 3),
    length=st.integers(0, 12),
    width=st.integers(1, 8),
    activation=st.sampled_from([None, "silu"]),
    optional=st.fixed_dictionaries({k: st.booleans() for k in ("bias", "initial_states")}),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_agrees_with_the_reference(batch, length, width, activation, optional, dtype, seed):
    tensors = make(batch, length, width=width, dtype=dtype, seed=seed, **optional)
    assert_agrees(causal_conv1d, tensors, {"activation": activation}, backend="torch")


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5), width=st.integers(1, 5))
def test_packed_sequences_agree_with_the_reference(lengths, width):
    tensors = make(1, sum(lengths), width=width, rows=len(lengths))
    tensors["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    assert_agrees(causal_conv1d, tensors, {"activation": "silu"}, backend="torch")


@given(changes=st.lists(st.booleans(), min_size=20, max_size=20))
def test_seq_idx_agrees_with_the_reference(changes):
    tensors = make(2, 10) | {"seq_idx": torch.tensor(changes).view(2, 10).cumsum(1)}
    assert_agrees(causal_conv1d, tensors, {"activation": "silu"}, backend="torch")


def test_agrees_with_torch_conv1d():
    t = make(2, 20, initial_states=False)
    want = torch.nn.functional.conv1d(t["x"].mT, t["weight"][:, None], t["bias"], padding=3, groups=3)[..., :20].mT
    torch.testing.assert_close(causal_conv1d(**t).y, want)


def test_strided_inputs():
    tensors = make()
    tensors["x"] = torch.randn(2, 3, 7, dtype=torch.float64).transpose(1, 2)
    tensors["weight"] = torch.randn(4, 3, dtype=torch.float64).T
    assert_agrees(causal_conv1d, tensors, backend="torch")


def test_nothing_crosses_a_bound():
    tensors = make(1, 12, rows=2)
    bad = tensors | {"x": tensors["x"].clone()}
    bad["x"][:, :5] = torch.nan
    good, spoilt = (causal_conv1d(**t, cu_seqlens=torch.tensor([0, 5, 12])) for t in (tensors, bad))
    assert torch.equal(spoilt.y[:, 5:], good.y[:, 5:])


def test_steps_equal_the_whole():
    tensors = make(2, 11)
    whole = causal_conv1d(**tensors, activation="silu")
    state = tensors["initial_states"].clone()
    for t in range(11):
        y = causal_conv1d_step(state, tensors["x"][:, t], tensors["weight"], tensors["bias"], "silu")
        torch.testing.assert_close(y, whole.y[:, t])
    assert torch.equal(state, whole.final_states)


def test_gradcheck():
    inputs = [t.requires_grad_() for t in make(1, 5, 2, 3).values()]
    assert torch.autograd.gradcheck(
        lambda x, w, b, s: tuple(causal_conv1d(x, w, b, "silu", s, backend="torch")), inputs
    )


def test_compiles_to_one_graph_and_passes_opcheck():
    t = {k: v.float() for k, v in make().items()}
    compiled = torch.compile(lambda t: causal_conv1d(**t, activation="silu"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(t).y, causal_conv1d(**t, activation="silu").y)
    args = (t["x"], t["weight"], t["bias"], True, t["initial_states"], None, None)
    torch.library.opcheck(torch.ops.ssm_kernels.causal_conv1d_chunked.default, args)
    y, final = torch.ops.ssm_kernels.causal_conv1d_chunked(*args)
    torch.library.opcheck(torch.ops.ssm_kernels.causal_conv1d_chunked_backward.default, (*args, y, final))


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
