"""SSD: every backend against the step-by-step reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssm_kernels import selective_scan, ssd, ssd_step
from ssm_kernels.testing import assert_agrees

pytestmark = pytest.mark.triton

IN_TIME = ("x", "dt", "B", "C", "z")


def make(batch=2, length=7, heads=4, headdim=3, n=5, groups=1, dtype=torch.float64, rows=None, seed=0, **without):
    """All tensor arguments; those named in `without` as False are left out."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    tensors = {
        "x": randn(batch, length, heads, headdim),
        "dt": randn(batch, length, heads),
        "A": -torch.rand(heads, generator=g, dtype=torch.float64).to(dtype) * 3,
        "B": randn(batch, length, groups, n),
        "C": randn(batch, length, groups, n),
        "D": randn(heads, headdim),
        "z": randn(batch, length, heads, headdim),
        "dt_bias": randn(heads),
        "initial_states": randn(batch if rows is None else rows, heads, headdim, n),
    }
    return {k: v for k, v in tensors.items() if without.get(k, True)}


@given(
    batch=st.integers(0, 3),
    length=st.integers(0, 70),
    groups=st.sampled_from([1, 2, 4]),
    chunk_size=st.sampled_from([1, 3, 16, 64]),
    limit=st.sampled_from([(0.0, float("inf")), (0.3, 1.0)]),
    d_per_head=st.booleans(),
    optional=st.fixed_dictionaries({k: st.booleans() for k in ("D", "z", "dt_bias", "initial_states")}),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_agrees_with_the_reference(backend, batch, length, groups, chunk_size, limit, d_per_head, optional, dtype, seed):
    tensors = make(batch, length, groups=groups, dtype=dtype, seed=seed, **optional)
    if "D" in tensors and d_per_head:
        tensors["D"] = tensors["D"][:, 0].clone()
    options = {"dt_softplus": True, "dt_limit": limit, "chunk_size": chunk_size}
    assert_agrees(ssd, tensors, options, backend=backend)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    chunk_size=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 99),
)
def test_packed_sequences_agree_with_the_reference(backend, lengths, chunk_size, seed):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    tensors = make(1, sum(lengths), rows=len(lengths), seed=seed)
    options = {"dt_softplus": True, "chunk_size": chunk_size}
    assert_agrees(ssd, tensors | {"cu_seqlens": bounds}, options, backend=backend)


@given(changes=st.lists(st.booleans(), min_size=20, max_size=20), seed=st.integers(0, 99))
def test_seq_idx_agrees_with_the_reference(backend, changes, seed):
    seq_idx = torch.tensor(changes).view(2, 10).cumsum(1)
    options = {"dt_softplus": True, "chunk_size": 4}
    assert_agrees(ssd, make(2, 10, seed=seed) | {"seq_idx": seq_idx}, options, backend=backend)


def test_many_chunks_pass_several_checkpoints(backend):
    assert_agrees(ssd, make(2, 83), {"dt_softplus": True, "chunk_size": 2}, backend=backend)


def test_strided_inputs(backend):
    tensors = make(2, 9)
    tensors["x"] = torch.randn(2, 4, 9, 3, dtype=torch.float64).transpose(1, 2)
    tensors["B"] = torch.randn(2, 9, 1, 10, dtype=torch.float64)[..., 5:]
    assert_agrees(ssd, tensors, {"dt_softplus": True}, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_two_halves_equal_the_whole(backend):
    tensors = make(2, 37)
    whole = ssd(**tensors, dt_softplus=True, chunk_size=8, backend=backend)
    state, ys = tensors.pop("initial_states"), []
    for part in (slice(0, 13), slice(13, None)):
        cut = {k: v[:, part] if k in IN_TIME else v for k, v in tensors.items()}
        y, state = ssd(**cut, initial_states=state, dt_softplus=True, chunk_size=8, backend=backend)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), whole.y)
    torch.testing.assert_close(state, whole.final_states)


def test_permuting_packed_sequences_permutes_the_outputs():
    lengths, order = [5, 17, 1, 9], [2, 0, 3, 1]
    tensors = make(1, sum(lengths), rows=4)
    pieces = torch.arange(sum(lengths)).split(lengths)
    permuted = torch.cat([pieces[i] for i in order])
    moved = {k: v[:, permuted] if k in IN_TIME else v for k, v in tensors.items()}
    moved["initial_states"] = tensors["initial_states"][order]
    one = ssd(**tensors, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0), chunk_size=4)
    two = ssd(**moved, cu_seqlens=torch.tensor([0, *[lengths[i] for i in order]]).cumsum(0), chunk_size=4)
    torch.testing.assert_close(two.y, one.y[:, permuted])
    torch.testing.assert_close(two.final_states, one.final_states[order])


def test_nothing_crosses_a_bound():
    tensors = make(1, 12, rows=2)
    bad = {k: v.clone() for k, v in tensors.items()}
    bad["x"][:, :5] = torch.inf
    good, spoilt = (ssd(**t, dt_softplus=True, cu_seqlens=torch.tensor([0, 5, 12])) for t in (tensors, bad))
    torch.testing.assert_close(spoilt.y[:, 5:], good.y[:, 5:])
    torch.testing.assert_close(spoilt.final_states[1], good.final_states[1])


def test_large_steps_stay_finite(backend):
    tensors = make(1, 50, dtype=torch.float32, z=False)
    tensors["dt"] = tensors["dt"].abs() * 1e4
    tensors["A"] = tensors["A"] - 1
    assert_agrees(ssd, tensors, backend=backend)


def test_equals_the_selective_scan_with_one_rate_a_head():
    """A scalar rate a head is a special case of Mamba-1's recurrence."""
    tensors = make(2, 20, heads=2, headdim=3, n=4, D=False, z=False, dt_bias=False)
    y, final = ssd(**tensors, dt_softplus=True)
    scan = selective_scan(
        tensors["x"].flatten(2),
        tensors["dt"].repeat_interleave(3, dim=2),
        tensors["A"].repeat_interleave(3)[:, None].expand(6, 4),
        tensors["B"],
        tensors["C"],
        initial_states=tensors["initial_states"].flatten(1, 2),
        dt_softplus=True,
    )
    torch.testing.assert_close(scan.y, y.flatten(2))
    torch.testing.assert_close(scan.final_states, final.flatten(1, 2))


def test_steps_equal_the_scan():
    tensors = make(2, 11, groups=2)
    whole = ssd(**tensors, dt_softplus=True, dt_limit=(0.1, 2.0))
    state = tensors["initial_states"].clone()
    for t in range(11):
        now = {k: tensors[k][:, t] for k in IN_TIME}
        rest = {k: tensors[k] for k in ("A", "D", "dt_bias")}
        y = ssd_step(state, **now, **rest, dt_softplus=True, dt_limit=(0.1, 2.0))
        torch.testing.assert_close(y, whole.y[:, t])
    torch.testing.assert_close(state, whole.final_states)


def test_gradcheck(backend):
    tensors = make(1, 5, 2, 2, 2)
    inputs = [t.requires_grad_() for t in tensors.values()]
    names = list(tensors)

    def run(*values):
        return tuple(ssd(**dict(zip(names, values, strict=True)), dt_softplus=True, chunk_size=2, backend=backend))

    assert torch.autograd.gradcheck(run, inputs)


def test_compiles_to_one_graph():
    tensors = {k: v.float() for k, v in make(2, 9).items()}
    compiled = torch.compile(lambda t: ssd(**t, dt_softplus=True), fullgraph=True, backend="aot_eager")
    tensors["A"].requires_grad_()
    torch.testing.assert_close(compiled(tensors).y, ssd(**tensors, dt_softplus=True).y)
    compiled(tensors).y.sum().backward()
    assert tensors["A"].grad.abs().sum() > 0


def test_registered_ops_pass_opcheck():
    t = {k: v.float() for k, v in make(2, 9).items()}
    args = (t["x"], t["dt"], t["A"], t["B"], t["C"], t["initial_states"], None, None, 4)
    torch.library.opcheck(torch.ops.ssm_kernels.ssd_chunked.default, args)
    y, final, kept = torch.ops.ssm_kernels.ssd_chunked(*args)
    args = (*args[:5], kept, torch.ones_like(y), torch.ones_like(final), None, None, 4)
    torch.library.opcheck(torch.ops.ssm_kernels.ssd_chunked_backward.default, args)


def test_autocast_changes_nothing():
    tensors = make(2, 20, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ssd(**tensors, dt_softplus=True)
    assert torch.equal(inside.y, ssd(**tensors, dt_softplus=True).y)


WRONG = [
    ({"x": torch.zeros(2, 7)}, ValueError, "x must have shape"),
    ({"dt": torch.zeros(2, 6, 4)}, ValueError, r"dt must have shape \(2, 7, 4\), got \(2, 6, 4\)"),
    ({"dt": torch.full((2, 7, 4), torch.nan)}, ValueError, "dt must not hold NaN"),
    ({"A": torch.zeros(4, 5)}, ValueError, "A must have shape"),
    ({"B": torch.zeros(2, 7, 3, 5)}, ValueError, "must divide H"),
    ({"C": torch.zeros(2, 7, 1, 9)}, ValueError, "C must have shape"),
    ({"D": torch.zeros(3)}, ValueError, "D must have shape"),
    ({"dt_limit": (1.0, 0.5)}, ValueError, "dt_limit must be"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be a positive integer"),
    ({"initial_states": torch.zeros(1, 4, 3, 5)}, ValueError, "initial_states must have shape"),
    ({"backend": "triton"}, RuntimeError, "backend='triton' was asked for, but"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
def test_bad_arguments_are_named(wrong, error, message):
    with pytest.raises(error, match=message):
        ssd(**(make() | wrong))
