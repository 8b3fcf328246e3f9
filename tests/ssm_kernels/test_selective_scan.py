"""Selective scan: every backend against the step-by-step reference."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_kernels import StateSlots, encode_state, selective_scan, selective_scan_step, use_backend
from ssm_kernels._core.slots import plan_step, plan_tensors
from ssm_kernels.cross_scan import CROSS
from ssm_kernels.cross_scan.reference import positions
from ssm_kernels.testing import assert_agrees, is_interpreted
from tests.ssm_kernels.makers import draw_inputs, pure
from vlmamba.benchmarks.cases import Case, Shape

pytestmark = pytest.mark.triton
needs_interpreter = pytest.mark.skipif(not is_interpreted(), reason="the kernels need Triton's interpreter here")

# The interpreter takes a tenth of a second for a program's step.
FEW = {"max_examples": 3} if is_interpreted() else {}
LONG = 10 if is_interpreted() else 70
GROUPS, STATES = ([1, 2], [1, 2, 5]) if is_interpreted() else ([1, 2, 4], [1, 2, 5, 16])


@pytest.fixture(scope="module", autouse=True)
def short_chunks():
    """Checkpoints every 8 steps in the interpreter, and parts of 4, so that short sequences have several."""
    with pytest.MonkeyPatch.context() as patch:
        if is_interpreted():
            from ssm_kernels.selective_scan import triton
            from ssm_kernels.selective_scan.triton import backward, forward

            for module in (triton, forward, backward):
                patch.setattr(module, "CHECKPOINT_INTERVAL", 8)
            patch.setattr(backward, "PART_STEPS", 4)
        yield


@pytest.fixture(scope="module")
def backend(compiled_or_not):
    return compiled_or_not


@pytest.fixture(autouse=True)
def default_backend(backend):
    """`auto` is the implementation under test."""
    with use_backend(backend):
        yield


def make(batch=2, length=7, dim=4, n=3, groups=1, dtype=torch.float64, rows=0, seed=0, **without):
    """Tensor arguments for `rows` packed sequences, without those in `without`; B and C always have groups."""
    shape = Shape(batch, length, dim, n, groups=groups)
    options = {"D": True, "z": True, "dt_bias": True, "initial_states": True} | without
    tensors = draw_inputs(Case("selective_scan", shape, sequences=rows, **options), dtype, seed)
    return tensors | {k: tensors[k].view(batch, length, groups, n) for k in ("B", "C")}


@settings(**FEW)
@given(
    batch=st.integers(0, 2),
    length=st.integers(0, LONG),
    groups=st.sampled_from(GROUPS),
    n=st.sampled_from(STATES),
    softplus=st.booleans(),
    optional=st.fixed_dictionaries({k: st.booleans() for k in ("D", "z", "dt_bias", "initial_states")}),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_agrees_with_the_reference(backend, batch, length, groups, n, softplus, optional, dtype, seed):
    tensors = make(batch, length, 4, n, groups, dtype, seed=seed, **optional)
    tensors["dt"] = tensors["dt"] if softplus else tensors["dt"].abs()
    if "dt_bias" in tensors and not softplus:
        tensors["dt_bias"] = tensors["dt_bias"].abs()
    assert_agrees(selective_scan, tensors, {"dt_softplus": softplus}, backend=backend)


PLAIN = {"D": False, "z": False, "dt_bias": False, "initial_states": False}


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_finite_where_two_growing_decays_overflow_together(backend, dtype, constant):
    """Their product is the gradient of an initial state, which is not there: the states before them are 0."""
    tensors = make(batch=1, length=2, n=3, dtype=dtype, **PLAIN)
    tensors["A"], tensors["dt"] = -torch.ones(4, 3, dtype=dtype), torch.empty(1, 2, 4, dtype=dtype)
    tensors["dt"][:] = -0.6 * math.log(torch.finfo(dtype).max)
    if constant:
        tensors |= {"B": torch.randn(4, 3, dtype=dtype), "C": torch.randn(4, 3, dtype=dtype)}
    assert_agrees(selective_scan, tensors, backend=backend)


def test_states_of_zero_stay_zero_while_decays_grow(backend):
    """The product of the decays of a segment is infinite."""
    length = 3 * LONG
    tensors = make(batch=1, length=length, n=3, dtype=torch.float32, **PLAIN) | {"A": -torch.ones(4, 3)}
    tensors["dt"] = torch.full((1, length, 4), -12.0)
    tensors["u"][:, :-2] = 0
    assert_agrees(selective_scan, tensors, backend=backend, gradients=False)
    # In the backward, gradients of states are zero from the last step to the first few.
    tensors["u"][:] = 0
    tensors["dt"][:, :9] = 0.1
    tensors["C"][:, 9:] = 0
    assert_agrees(lambda **arguments: selective_scan(**arguments).y, tensors, backend=backend)


@settings(**FEW)
@given(lengths=st.lists(st.integers(0, LONG // 2), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_packed_sequences_agree_with_the_reference(backend, lengths, seed):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    tensors = make(1, sum(lengths), rows=len(lengths), seed=seed)
    assert_agrees(selective_scan, tensors | {"cu_seqlens": bounds}, {"dt_softplus": True}, backend=backend)


@settings(**FEW)
@given(changes=st.lists(st.booleans(), min_size=6, max_size=6), seed=st.integers(0, 99))
def test_seq_idx_agrees_with_the_reference(backend, changes, seed):
    tensors = make(2, 3, 2, 2, seed=seed)
    seq_idx = torch.tensor(changes).view(2, 3).cumsum(1)
    assert_agrees(selective_scan, tensors | {"seq_idx": seq_idx}, {"dt_softplus": True}, backend=backend)


@pytest.mark.parametrize("constant", [("B",), ("C",), ("B", "C")])
def test_matrices_constant_in_time(backend, constant):
    tensors = make()
    for name in constant:
        tensors[name] = torch.randn_like(tensors["A"])
    assert_agrees(selective_scan, tensors, {"dt_softplus": True}, backend=backend)


def test_ungrouped_and_unequal_groups(backend):
    tensors = make(groups=2)
    tensors["C"] = tensors["C"][:, :, 0]
    assert_agrees(selective_scan, tensors, {"dt_softplus": True}, backend=backend)


def test_strided_inputs(backend):
    tensors = make(2, 9)
    tensors["u"] = torch.randn(2, 4, 9, dtype=torch.float64).transpose(1, 2)
    tensors["z"] = torch.randn(2, 9, 8, dtype=torch.float64)[..., ::2]
    tensors["dt"] = torch.randn(1, 9, 4, dtype=torch.float64).expand(2, 9, 4)
    assert_agrees(selective_scan, tensors, {"dt_softplus": True}, backend=backend)


@pytest.mark.skipif(is_interpreted(), reason="tiles of the kernels are tested below, at less cost")
def test_wide_channels_are_tiled(backend):
    """More channels than one tile of the fast path holds, several sequences, several blocks."""
    tensors = make(3, 40, 256, 128, dtype=torch.float32)
    assert_agrees(selective_scan, tensors, {"dt_softplus": True}, backend=backend, gradients=False)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_two_halves_equal_one_scan(backend):
    tensors = make(2, 19)
    whole = selective_scan(**tensors, dt_softplus=True, backend=backend)
    state, ys = tensors.pop("initial_states"), []
    for part in (slice(0, 9), slice(9, None)):
        cut = {k: v[:, part] if k in ("u", "dt", "B", "C", "z") else v for k, v in tensors.items()}
        y, state = selective_scan(**cut, initial_states=state, dt_softplus=True, backend=backend)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), whole.y)
    torch.testing.assert_close(state, whole.final_states)


def test_permuting_packed_sequences_permutes_the_outputs():
    lengths, order = [5, 17, 1, 9], [2, 0, 3, 1]
    tensors = make(1, sum(lengths), rows=4)
    segments = torch.arange(sum(lengths)).split(lengths)
    permuted = torch.cat([segments[i] for i in order])
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
    good, corrupted = (selective_scan(**t, dt_softplus=True, cu_seqlens=bounds) for t in (tensors, bad))
    torch.testing.assert_close(corrupted.y[:, 5:], good.y[:, 5:])
    torch.testing.assert_close(corrupted.final_states[1], good.final_states[1])


@pytest.mark.parametrize("length", [5, 8])
def test_an_infinity_in_the_last_step_reaches_its_state_and_no_other(length):
    tensors = make(1, length, dtype=torch.float32)
    tensors["B"][:, -1, 0, 0] = torch.inf
    got, want = selective_scan(**tensors), selective_scan(**tensors, backend="reference")
    assert want.final_states[..., 0].isinf().all() and want.final_states[..., 1:].isfinite().all()
    torch.testing.assert_close(got.final_states, want.final_states)


def test_large_steps_stay_finite(backend):
    tensors = make(1, 20, dtype=torch.float32, z=False)
    tensors["dt"] = tensors["dt"].abs() * 1e4
    tensors["A"] = tensors["A"] - 1
    assert_agrees(selective_scan, tensors, backend=backend)


def step_inputs(length, optional, constant, dtype=torch.float64):
    """Arguments of a scan in two groups of B and one of C; and the names of those with a length."""
    tensors = make(2, length, groups=2, D=optional, z=optional, dt_bias=optional, dtype=dtype)
    tensors["C"] = tensors["C"][:, :, :1]
    if constant:
        tensors["B"] = torch.randn_like(tensors["A"])
    return tensors, [k for k, x in tensors.items() if x.shape[:2] == (2, length)]


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("constant", [False, True])
def test_steps_of_the_reference_are_its_scan(optional, constant):
    tensors, in_time = step_inputs(5, optional, constant)
    whole = selective_scan(**tensors, dt_softplus=optional, backend="reference")
    state = tensors.pop("initial_states").clone()
    for t in range(5):
        now = {k: tensors[k][:, t] for k in in_time}
        y = selective_scan_step(state, **(tensors | now), dt_softplus=optional, backend="reference")
        torch.testing.assert_close(y, whole.y[:, t])
    torch.testing.assert_close(state, whole.final_states)


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_step_agrees_with_the_reference(backend, optional, constant, dtype):
    tensors, in_time = step_inputs(1, optional, constant, dtype)
    tensors |= {k: tensors[k][:, 0] for k in in_time}
    state = tensors.pop("initial_states")
    tensors["state"] = state.to(torch.promote_types(dtype, torch.float32))
    assert_agrees(pure(selective_scan_step), tensors, {"dt_softplus": optional}, backend=backend, gradients=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_step_of_any_sizes_and_strides(dtype):
    """Channels and states that fill no power of two; a state and inputs that are views."""
    batch, dim, n = 3, 101, 13
    tensors = make(batch, 1, dim, n, dtype=dtype)
    wide = torch.empty(n, dim, 2 * batch).permute(2, 1, 0)
    state, expected = wide[::2], tensors.pop("initial_states").float()
    state.copy_(expected)
    tensors = {k: x[:, 0] if x.dim() > 2 else x for k, x in tensors.items()}
    tensors["u"] = tensors["u"].T.contiguous().T
    y = selective_scan_step(state, **tensors, dt_softplus=True)
    want = selective_scan_step(expected, **tensors, dt_softplus=True, backend="reference")
    assert y.dtype == dtype
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(state, expected)


def test_gradcheck(backend):
    tensors = make(1, 2, 2, 1)
    inputs = [t.requires_grad_() for t in tensors.values()]
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *a: tuple(selective_scan(**dict(zip(names, a, strict=True)), dt_softplus=True, backend=backend)), inputs
    )


def test_compiles_to_one_graph():
    tensors = {k: v.float() for k, v in make(2, 9).items()}
    compiled = torch.compile(lambda t: selective_scan(**t, dt_softplus=True), fullgraph=True, backend="aot_eager")
    for k in ("u", "dt", "A"):
        tensors[k].requires_grad_()
    torch.testing.assert_close(compiled(tensors).y, selective_scan(**tensors, dt_softplus=True).y)
    compiled(tensors).y.sum().backward()
    assert tensors["A"].grad.abs().sum() > 0


def test_registered_torch_ops_pass_opcheck():
    t = {k: v.float() for k, v in make(2, 9).items()}
    args = (t["u"], t["dt"], t["A"], t["B"], t["C"], t["initial_states"], None, None)
    torch.library.opcheck(torch.ops.ssm_kernels.selective_scan_torch.default, args)
    y, final, checkpoint_states = torch.ops.ssm_kernels.selective_scan_torch(*args)
    args = (*args, checkpoint_states, torch.ones_like(y), torch.ones_like(final))
    torch.library.opcheck(torch.ops.ssm_kernels.selective_scan_torch_backward.default, args)


@pytest.mark.parametrize("packed", [False, True])
def test_registered_kernels_pass_opcheck(backend, packed):
    if backend == "torch":
        pytest.skip("has a test of its own")
    ops = importlib.import_module(f"ssm_kernels.selective_scan.{backend}").kernels
    t = {k: v.float() for k, v in make(1, 9).items()}
    u, dt, z = (t[k].unsqueeze(2) for k in ("u", "dt", "z"))
    bounds = torch.tensor([0, 9], dtype=torch.int32) if packed else None
    initial = t["initial_states"]
    args = (u, dt, t["A"], t["B"], t["C"], t["D"], z, t["dt_bias"], initial, bounds, None)
    torch.library.opcheck(ops.forward_op, (*args, True, [], 1, True))
    y, final, checkpoint_states = ops.forward_op(*args, True, [], 1, True)
    args = (*args, True, [], 1, checkpoint_states, torch.ones_like(y), torch.ones_like(final))
    torch.library.opcheck(ops.backward_op, args, test_utils=("test_schema", "test_faketensor"))
    step = (initial, *(x[:, 0, 0] for x in (u, dt)), t["A"], t["B"][:, 0], t["C"][:, 0], t["D"], z[:, 0, 0], None, True)
    for slots in (None, StateSlots(torch.arange(len(initial)))):
        plan = plan_tensors(plan_step(slots, initial, len(initial), 1))
        torch.library.opcheck(ops.step_op, (*step, *plan, None, None))
    stored, scale = encode_state(initial, torch.int8, None)
    torch.library.opcheck(ops.step_op, (stored, *step[1:], None, None, None, scale, torch.arange(len(initial))))


@pytest.mark.parametrize("n", [1, 5, 12, 20, 40, 130, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_number_of_states(backend, n, dtype):
    """Powers of two or not, in one thread or several, and rows of B and C that are and are not loaded whole."""
    assert_agrees(selective_scan, make(1, 3, 3, n, dtype=dtype), {"dt_softplus": True}, backend=backend)


def test_rows_of_matrices_that_are_not_aligned(backend):
    tensors = make(1, 5, n=8, dtype=torch.bfloat16)
    for name in ("B", "C"):
        wide = torch.randn(1, 5, 1, 11, generator=torch.Generator().manual_seed(1)).bfloat16()
        tensors[name] = wide[..., 1:9]
    assert_agrees(selective_scan, tensors, {"dt_softplus": True}, backend=backend)


def test_more_channels_than_a_tile(backend):
    """Tiles that channels fill in part; their sums of dB and dC are added up."""
    tensors = make(1, 5, 260, 2, 2, dtype=torch.float32)
    assert_agrees(selective_scan, tensors, {"dt_softplus": True}, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("packing", ["dense", "cu_seqlens", "seq_idx"])
def test_sequences_of_several_segments(backend, packing, dtype):
    """Segments of one checkpoint interval, and sequences of several segments, one and none."""
    bounds = torch.tensor([0, 0, 17, 18, 18, 24])
    tensors = make(1, 24, 4, 3, 2, dtype, rows=5 if packing == "cu_seqlens" else 1)
    if packing == "cu_seqlens":
        tensors["cu_seqlens"] = bounds
    elif packing == "seq_idx":
        tensors["seq_idx"] = torch.bucketize(torch.arange(24), bounds[1:-1], right=True)[None]
    assert_agrees(selective_scan, tensors, {"dt_softplus": True}, backend=backend)


@needs_interpreter
def test_segments_of_several_intervals_equal_one_segment(monkeypatch):
    from ssm_kernels.selective_scan.triton import forward

    tensors = {k: v.requires_grad_() for k, v in make(1, 20, 2, 2).items()}

    def run(size):
        monkeypatch.setattr(forward, "_segment_size", lambda *_: size)
        y, state = selective_scan(**tensors, dt_softplus=True)
        return y, state, *torch.autograd.grad(y.square().sum() + state.sum(), list(tensors.values()))

    for whole, cut in zip(run(24), run(16), strict=True):
        torch.testing.assert_close(whole, cut)


@needs_interpreter
def test_states_are_split_over_lanes_before_sequences_are_cut(backend, monkeypatch):
    """Half the channels in a program, where that gives enough programs: one pass over the entire sequence."""
    from ssm_kernels.selective_scan.triton import forward

    segment_sizes, original = [], forward._segment_size
    monkeypatch.setattr(forward, "_segment_size", lambda *a: segment_sizes.append(original(*a)) or segment_sizes[-1])
    tensors = make(2, 11, 40, 16, dtype=torch.float32)
    assert_agrees(selective_scan, tensors, {"dt_softplus": True}, backend=backend, gradients=False)
    assert segment_sizes and all(size >= 11 for size in segment_sizes)


@needs_interpreter
def test_every_program_takes_several_chunks_and_tiles(backend, monkeypatch):
    from ssm_kernels.selective_scan.triton import backward

    monkeypatch.setattr(backward, "PROGRAMS_PER_SM", 1)
    assert_agrees(selective_scan, make(1, 20, 66, 2), {"dt_softplus": True}, backend=backend)


def test_channels_first_stays_so(backend):
    tensors = make(2, 9, 6, groups=2)
    for name in ("u", "dt", "z"):
        tensors[name] = tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert_agrees(selective_scan, tensors, {"dt_softplus": True}, backend=backend)
    if backend == "triton":
        assert selective_scan(**tensors, dt_softplus=True).y.stride() == tensors["u"].stride()


@needs_interpreter
def test_directions_read_and_write_a_grid():
    """Four groups along four directions, on one u that all of them share: the same as to gather, scan and put back."""
    from ssm_kernels.selective_scan import triton

    height, width, channels, n = 3, 4, 2, 3
    t = make(2, height * width, 4 * channels, n, groups=4)
    shared = make(2, height * width, channels)["u"].unsqueeze(2)
    wide = {k: t[k].unflatten(2, (4, channels)) for k in ("dt", "z")} | {k: t[k] for k in ("B", "C")}
    rest = {k: t[k] for k in ("A", "D", "dt_bias", "initial_states")}
    inputs = {"u": shared} | wide | rest
    for x in inputs.values():
        x.requires_grad_()
    order = torch.tensor([positions(r, height, width) for r in CROSS])  # (4, L)
    group = torch.arange(4)[:, None]

    def gathered(x):
        return x[:, order, group].transpose(1, 2)  # (B, L, 4, ...)

    def loss(y, state):
        weights = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)
        return (y * weights).sum() + state.square().sum()

    u = shared.expand(-1, -1, 4, -1)
    y, state = triton.grouped_selective_scan(
        u, dt_softplus=True, cu_seqlens=None, seq_idx=None, directions=range(4), height=height, **wide, **rest
    )
    y2, state2 = selective_scan(
        **{k: gathered(x).flatten(2) for k, x in {"u": u, "dt": wide["dt"], "z": wide["z"]}.items()},
        **{k: gathered(wide[k]) for k in ("B", "C")}, **rest, dt_softplus=True, backend="reference",
    )  # fmt: skip
    back = torch.empty_like(order).scatter_(1, order, torch.arange(height * width).expand(4, -1))
    y2 = y2.unflatten(2, (4, channels))[:, back, group].transpose(1, 2)
    torch.testing.assert_close(y, y2)
    torch.testing.assert_close(state, state2)
    grads, grads2 = (torch.autograd.grad(loss(*o), list(inputs.values())) for o in ((y, state), (y2, state2)))
    for name, one, two in zip(inputs, grads, grads2, strict=True):
        torch.testing.assert_close(one, two, msg=lambda m, name=name: f"gradient of {name}: {m}")


@needs_interpreter
@pytest.mark.parametrize("channels_first", [False, True])
def test_kernels_write_all_of_their_results_and_nothing_else(guarded_memory, channels_first):
    from ssm_kernels.selective_scan.triton.backward import backward
    from ssm_kernels.selective_scan.triton.forward import forward

    t = {k: v.float() for k, v in make(1, 11, 6, 3, 2).items()}
    t |= {k: t[k].unflatten(2, (2, 3)) for k in ("u", "dt", "z")}
    if channels_first:
        t["u"] = t["u"].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    required = [t[k] for k in ("u", "dt", "A", "B", "C")]
    for optional in ([t[k] for k in ("D", "z", "dt_bias", "initial_states")], [None] * 4):
        args = (*required, *optional, None, None)
        y, final_states, checkpoint_states = forward(*args, True, [], 1, True)
        backward(*args, True, [], 1, checkpoint_states, torch.ones_like(t["u"]), torch.ones_like(final_states))


@needs_interpreter
@pytest.mark.parametrize("axis", ["batch", "time", "channels"])
def test_offsets_beyond_32_bits(axis):
    """Elements that lie more than 2**31 apart; the memory between them is never touched."""
    t = make(2, 3, 4, 4, D=False, dt_bias=False, initial_states=False)
    t = {k: v.bfloat16() for k, v in t.items()}
    where = ["batch", "time", "channels"].index(axis)
    far = {}
    for name in ("u", "dt", "z") if axis == "channels" else ("u", "dt", "z", "B", "C"):
        strides = list(t[name].stride())
        strides[where] = 2**31 // (t[name].shape[where] - 1) + 64
        reach = sum((n - 1) * s for n, s in zip(t[name].shape, strides, strict=True))
        storage = torch.empty(reach + 1, dtype=torch.bfloat16)
        far[name] = storage.as_strided(t[name].shape, strides).copy_(t[name])
    one, two = selective_scan(**t, dt_softplus=True), selective_scan(**(t | far), dt_softplus=True)
    assert torch.equal(one.y, two.y) and torch.equal(one.final_states, two.final_states)


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


@pytest.mark.skipif(is_interpreted(), reason="Triton runs in its interpreter here")
def test_triton_needs_a_gpu():
    with pytest.raises(RuntimeError, match="backend='triton' was requested, but"):
        selective_scan(**make(), backend="triton")
