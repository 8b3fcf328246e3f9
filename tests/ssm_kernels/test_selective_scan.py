"""Selective scan: every backend against the step-by-step reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssm_kernels import selective_scan, selective_scan_step
from ssm_kernels.testing import assert_agrees


def make(batch=2, length=7, dim=4, n=3, groups=1, dtype=torch.float64, rows=None, seed=0, **without):
    """All tensor arguments; those named in `without` as False are left out."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    tensors = {
        "u": randn(batch, length, dim),
        "dt": randn(batch, length, dim),
        "A": -torch.rand(dim, n, generator=g, dtype=torch.float64).to(dtype) * 3,
        "B": randn(batch, length, groups, n),
        "C": randn(batch, length, groups, n),
        "D": randn(dim),
        "z": randn(batch, length, dim),
        "dt_bias": randn(dim),
        "initial_states": randn(batch if rows is None else rows, dim, n),
    }
    return {k: v for k, v in tensors.items() if without.get(k, True)}


@given(
    batch=st.integers(0, 3),
    length=st.integers(0, 70),
    groups=st.sampled_from([1, 2, 4]),
    n=st.sampled_from([1, 2, 5, 16]),
    softplus=st.booleans(),
    optional=st.fixed_dictionaries({k: st.booleans() for k in ("D", "z", "dt_bias", "initial_states")}),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_agrees_with_the_reference(batch, length, groups, n, softplus, optional, dtype, seed):
    tensors = make(batch, length, 4, n, groups, dtype, seed=seed, **optional)
    tensors["dt"] = tensors["dt"] if softplus else tensors["dt"].abs()
    if "dt_bias" in tensors and not softplus:
        tensors["dt_bias"] = tensors["dt_bias"].abs()
    assert_agrees(selective_scan, tensors, {"dt_softplus": softplus}, backend="torch")


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_packed_sequences_agree_with_the_reference(lengths, seed):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    tensors = make(1, sum(lengths), rows=len(lengths), seed=seed)
    assert_agrees(selective_scan, tensors | {"cu_seqlens": bounds}, {"dt_softplus": True}, backend="torch")


@given(changes=st.lists(st.booleans(), min_size=20, max_size=20), seed=st.integers(0, 99))
def test_seq_idx_agrees_with_the_reference(changes, seed):
    tensors = make(2, 10, seed=seed)
    seq_idx = torch.tensor(changes).view(2, 10).cumsum(1)
    assert_agrees(selective_scan, tensors | {"seq_idx": seq_idx}, {"dt_softplus": True}, backend="torch")


@pytest.mark.parametrize("constant", [("B",), ("C",), ("B", "C")])
def test_matrices_constant_in_time(constant):
    tensors = make()
    for name in constant:
        tensors[name] = torch.randn_like(tensors["A"])
    assert_agrees(selective_scan, tensors, {"dt_softplus": True}, backend="torch")


def test_ungrouped_and_unequal_groups():
    tensors = make(groups=2)
    tensors["C"] = tensors["C"][:, :, 0]
    assert_agrees(selective_scan, tensors, {"dt_softplus": True}, backend="torch")


def test_strided_inputs():
    tensors = make(2, 9)
    tensors["u"] = torch.randn(2, 4, 9, dtype=torch.float64).transpose(1, 2)
    tensors["z"] = torch.randn(2, 9, 8, dtype=torch.float64)[..., ::2]
    tensors["dt"] = torch.randn(1, 9, 4, dtype=torch.float64).expand(2, 9, 4)
    assert_agrees(selective_scan, tensors, {"dt_softplus": True}, backend="torch")


def test_wide_channels_are_cut_in_tiles():
    """More channels than one tile of the fast path holds, several sequences, several blocks."""
    tensors = make(3, 40, 256, 128, dtype=torch.float32)
    assert_agrees(selective_scan, tensors, {"dt_softplus": True}, backend="torch", gradients=False)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_two_halves_equal_the_whole(backend):
    tensors = make(2, 37)
    whole = selective_scan(**tensors, dt_softplus=True, backend=backend)
    state, ys = tensors.pop("initial_states"), []
    for part in (slice(0, 13), slice(13, None)):
        cut = {k: v[:, part] if k in ("u", "dt", "B", "C", "z") else v for k, v in tensors.items()}
        y, state = selective_scan(**cut, initial_states=state, dt_softplus=True, backend=backend)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), whole.y)
    torch.testing.assert_close(state, whole.final_states)


def test_permuting_packed_sequences_permutes_the_outputs():
    lengths, order = [5, 17, 1, 9], [2, 0, 3, 1]
    tensors = make(1, sum(lengths), rows=4)
    pieces = torch.arange(sum(lengths)).split(lengths)
    permuted = torch.cat([pieces[i] for i in order])
    moved = {k: v[:, permuted] if k in ("u", "dt", "B", "C", "z") else v for k, v in tensors.items()}
    moved["initial_states"] = tensors["initial_states"][order]
    one = selective_scan(**tensors, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
    two = selective_scan(**moved, cu_seqlens=torch.tensor([0, *[lengths[i] for i in order]]).cumsum(0))
    torch.testing.assert_close(two.y, one.y[:, permuted])
    torch.testing.assert_close(two.final_states, one.final_states[order])


def test_nothing_crosses_a_bound():
    tensors = make(1, 12, rows=2)
    bad = {k: v.clone() for k, v in tensors.items()}
    bad["u"][:, :5] = torch.inf
    bounds = torch.tensor([0, 5, 12])
    good, spoilt = (selective_scan(**t, dt_softplus=True, cu_seqlens=bounds) for t in (tensors, bad))
    torch.testing.assert_close(spoilt.y[:, 5:], good.y[:, 5:])
    torch.testing.assert_close(spoilt.final_states[1], good.final_states[1])


def test_large_steps_stay_finite():
    tensors = make(1, 50, dtype=torch.float32, z=False)
    tensors["dt"] = tensors["dt"].abs() * 1e4
    tensors["A"] = tensors["A"] - 1
    assert_agrees(selective_scan, tensors, backend="torch")


def test_steps_equal_the_scan():
    tensors = make(2, 11, groups=2)
    whole = selective_scan(**tensors, dt_softplus=True)
    state = tensors["initial_states"].clone()
    for t in range(11):
        now = {k: tensors[k][:, t] for k in ("u", "dt", "B", "C", "z")}
        rest = {k: tensors[k] for k in ("A", "D", "dt_bias")}
        y = selective_scan_step(state, **now, **rest, dt_softplus=True)
        torch.testing.assert_close(y, whole.y[:, t])
    torch.testing.assert_close(state, whole.final_states)


def test_gradcheck():
    tensors = make(1, 5, 2, 2)
    inputs = [t.requires_grad_() for t in tensors.values()]
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *a: tuple(selective_scan(**dict(zip(names, a, strict=True)), dt_softplus=True, backend="torch")), inputs
    )


def test_compiles_to_one_graph():
    tensors = {k: v.float() for k, v in make(2, 9).items()}
    compiled = torch.compile(lambda t: selective_scan(**t, dt_softplus=True), fullgraph=True, backend="aot_eager")
    for k in ("u", "dt", "A"):
        tensors[k].requires_grad_()
    torch.testing.assert_close(compiled(tensors).y, selective_scan(**tensors, dt_softplus=True).y)
    compiled(tensors).y.sum().backward()
    assert tensors["A"].grad.abs().sum() > 0


def test_registered_ops_pass_opcheck():
    t = {k: v.float() for k, v in make(2, 9).items()}
    args = (t["u"], t["dt"], t["A"], t["B"], t["C"], t["initial_states"], None, None)
    torch.library.opcheck(torch.ops.ssm_kernels.selective_scan_chunked.default, args)
    y, final, kept = torch.ops.ssm_kernels.selective_scan_chunked(*args)
    args = (*args[:5], kept, torch.ones_like(y), torch.ones_like(final), None, None)
    torch.library.opcheck(torch.ops.ssm_kernels.selective_scan_chunked_backward.default, args)


def test_autocast_changes_nothing():
    tensors = make(2, 20, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = selective_scan(**tensors, dt_softplus=True)
    assert torch.equal(inside.y, selective_scan(**tensors, dt_softplus=True).y)


WRONG = [
    ({"u": torch.zeros(2, 7)}, ValueError, "u must have shape"),
    ({"u": [1.0]}, TypeError, "u must be a tensor"),
    ({"u": torch.zeros(2, 7, 4, dtype=torch.int64)}, TypeError, "u must have a dtype among"),
    ({"dt": torch.zeros(2, 6, 4)}, ValueError, r"dt must have shape \(2, 7, 4\), got \(2, 6, 4\)"),
    ({"dt": torch.full((2, 7, 4), torch.nan)}, ValueError, "dt must not hold NaN"),
    ({"B": torch.zeros(2, 7, 3, 3)}, ValueError, "G of B must divide D"),
    ({"C": torch.zeros(2, 7, 1, 9)}, ValueError, "C must have shape"),
    ({"D": torch.zeros(3)}, ValueError, "D must have shape"),
    ({"u": torch.zeros(2, 7, 4, device="meta")}, ValueError, "must be on meta"),
    ({"initial_states": torch.zeros(1, 4, 3)}, ValueError, "initial_states must have shape"),
    ({"seq_idx": torch.zeros(2, 6, dtype=torch.int32)}, ValueError, "seq_idx must have shape"),
    ({"seq_idx": torch.zeros(2, 7)}, TypeError, "seq_idx must be int32 or int64"),
    ({"cu_seqlens": torch.tensor([0, 3, 7])}, ValueError, "batch of one packed row"),
    ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ({"backend": "triton"}, RuntimeError, "backend='triton' was asked for, but"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
def test_bad_arguments_are_named(wrong, error, message):
    if "cu_seqlens" in wrong:
        wrong = wrong | {"initial_states": torch.zeros(2, 4, 3, dtype=torch.float64)}
    with pytest.raises(error, match=message):
        selective_scan(**(make() | wrong))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [([0, 5, 3, 7], "must not decrease: entry 1 is 5, entry 2 is 3"), ([1, 7], "from 0 to L"), ([0, 8], "from 0 to L")],
)
def test_bad_bounds_are_named(bounds, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**make(1, 7, initial_states=False), cu_seqlens=torch.tensor(bounds))
