"""SSD: every backend compared with the step-by-step reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_kernels import CROSS, StateSlots, encode_state, selective_scan, ssd, ssd_step
from ssm_kernels._triton.segment_table import build_segment_table
from ssm_kernels.testing import assert_agrees, is_interpreted
from tests.ssm_kernels.makers import draw_inputs, pure
from vlmamba.benchmarks.cases import Case, Shape

pytestmark = pytest.mark.triton
needs_interpreter = pytest.mark.skipif(not is_interpreted(), reason="the kernels need Triton's interpreter here")


@pytest.fixture(scope="module")
def backend(compiled_or_not):
    return compiled_or_not


TIME_ARGUMENTS = ("x", "dt", "B", "C", "z")
"""Arguments with a length."""

few_examples = settings(max_examples=2 if is_interpreted() else 25)  # each program is slow in the interpreter


def make_inputs(
    batch=2, length=7, heads=4, headdim=3, d_state=5, groups=1, dtype=torch.float64, rows=0, seed=0, **without
):
    """Tensor arguments of `ssd` for `rows` packed sequences, without those that `without` names as False."""
    shape = Shape(batch, length, heads=heads, headdim=headdim, d_state=d_state, groups=groups)
    options = {"D": True, "wide_D": True, "z": True, "dt_bias": True, "initial_states": True} | without
    return draw_inputs(Case("ssd", shape, sequences=rows, **options), dtype, seed)


def scan_arguments(tensors):
    """Arguments of the Triton ops, from float32 inputs."""
    from ssm_kernels.ssd.arguments import ScanArguments

    names = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_states")
    return ScanArguments(
        **{name: tensors[name] for name in names}, dt_softplus=True, dt_min=0.0, dt_max=float("inf"), chunk_size=16,
        cu_seqlens=None, seq_idx=None, directions=[], height=1, out_dtype=torch.float32,
        input_weights=None,
    )  # fmt: skip


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
def test_agrees_with_the_reference(
    backend, batch, length, groups, chunk_size, limit, d_per_head, optional, dtype, seed
):
    tensors = make_inputs(batch, length, groups=groups, dtype=dtype, seed=seed, **optional)
    if "D" in tensors and d_per_head:
        tensors["D"] = tensors["D"][:, 0].clone()
    options = {"dt_softplus": True, "dt_limit": limit, "chunk_size": chunk_size}
    assert_agrees(ssd, tensors, options, backend=backend)


@few_examples
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    chunk_size=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 99),
)
def test_packed_sequences_agree_with_the_reference(backend, lengths, chunk_size, seed):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    tensors = make_inputs(1, sum(lengths), rows=len(lengths), seed=seed)
    options = {"dt_softplus": True, "chunk_size": chunk_size}
    assert_agrees(ssd, tensors | {"cu_seqlens": bounds}, options, backend=backend)


@few_examples
@given(changes=st.lists(st.booleans(), min_size=20, max_size=20), seed=st.integers(0, 99))
def test_seq_idx_agrees_with_the_reference(backend, changes, seed):
    seq_idx = torch.tensor(changes).view(2, 10).cumsum(1)
    options = {"dt_softplus": True, "chunk_size": 4}
    assert_agrees(ssd, make_inputs(2, 10, seed=seed) | {"seq_idx": seq_idx}, options, backend=backend)


def test_many_chunks_pass_several_checkpoints(backend):
    # Compiled chunks have a size of their own.
    tensors = make_inputs(1, 291, heads=6, groups=1) if backend == "numba" else make_inputs(2, 83)
    assert_agrees(ssd, tensors, {"dt_softplus": True, "chunk_size": 2}, backend=backend)


@pytest.mark.parametrize("lengths", [None, [5, 0, 19]])
@pytest.mark.parametrize("result", [0, 1])
def test_gradients_of_one_result_are_those_with_zeros_for_the_other(backend, result, lengths):
    tensors = make_inputs(1 if lengths else 2, 24, rows=len(lengths or []), z=False)
    options = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)} if lengths else {}
    found = []
    for with_zeros in (False, True):
        inputs = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        results = ssd(**inputs, **options, dt_softplus=True, chunk_size=4, backend=backend)
        loss = results[result].square().sum()
        if with_zeros:
            loss = loss + 0.0 * results[1 - result].sum()
        found.append(torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True))
    for one, both in zip(*found, strict=True):
        assert torch.equal(one, both)


def test_strided_inputs(backend):
    tensors = make_inputs(2, 9)
    tensors["x"] = torch.randn(2, 4, 9, 3, dtype=torch.float64).transpose(1, 2)
    tensors["B"] = torch.randn(2, 9, 1, 10, dtype=torch.float64)[..., 5:]
    assert_agrees(ssd, tensors, {"dt_softplus": True}, backend=backend)


def test_two_halves_equal_one_scan(backend):
    tensors = make_inputs(2, 37)
    one = ssd(**tensors, dt_softplus=True, chunk_size=8, backend=backend)
    state, ys = tensors.pop("initial_states"), []
    for part in (slice(0, 13), slice(13, None)):
        half = {k: v[:, part] if k in TIME_ARGUMENTS else v for k, v in tensors.items()}
        y, state = ssd(**half, initial_states=state, dt_softplus=True, chunk_size=8, backend=backend)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), one.y)
    torch.testing.assert_close(state, one.final_states)


def test_permuting_packed_sequences_permutes_the_outputs(backend):
    lengths, order = [5, 17, 1, 9], [2, 0, 3, 1]
    tensors = make_inputs(1, sum(lengths), rows=4)
    positions = torch.arange(sum(lengths)).split(lengths)
    permutation = torch.cat([positions[i] for i in order])
    permuted = {k: v[:, permutation] if k in TIME_ARGUMENTS else v for k, v in tensors.items()}
    permuted["initial_states"] = tensors["initial_states"][order]
    bounds, permuted_bounds = (torch.tensor([0, *n]).cumsum(0) for n in (lengths, [lengths[i] for i in order]))
    expected = ssd(**tensors, cu_seqlens=bounds, chunk_size=4, backend=backend)
    found = ssd(**permuted, cu_seqlens=permuted_bounds, chunk_size=4, backend=backend)
    torch.testing.assert_close(found.y, expected.y[:, permutation])
    torch.testing.assert_close(found.final_states, expected.final_states[order])


def test_nothing_crosses_a_boundary(backend):
    tensors = make_inputs(1, 12, rows=2)
    with_inf = {k: v.clone() for k, v in tensors.items()}
    with_inf["x"][:, :5] = torch.inf
    good, corrupted = (
        ssd(**t, dt_softplus=True, cu_seqlens=torch.tensor([0, 5, 12]), backend=backend) for t in (tensors, with_inf)
    )
    torch.testing.assert_close(corrupted.y[:, 5:], good.y[:, 5:])
    torch.testing.assert_close(corrupted.final_states[1], good.final_states[1])


def test_large_steps_stay_finite(backend):
    tensors = make_inputs(1, 50, dtype=torch.float32, z=False)
    tensors["dt"] = tensors["dt"].abs() * 1e4
    tensors["A"] = tensors["A"] - 1
    assert_agrees(ssd, tensors, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decays_that_grow_agree_within_range(backend, dtype):
    growth = 70.0  # the sum of the log decays of a chunk
    tensors = make_inputs(1, 64, heads=1, dtype=dtype, D=False, z=False, dt_bias=False, initial_states=False)
    tensors |= {"A": torch.ones(1, dtype=dtype), "dt": torch.full((1, 64, 1), growth / 64, dtype=dtype)}
    assert_agrees(ssd, tensors, backend=backend)


def test_decays_that_grow_beyond_the_largest_number_are_not_silently_wrong(backend):
    """The states are zero until the last steps, so that the reference is finite."""
    tensors = make_inputs(1, 100, heads=1, dtype=torch.float32, D=False, z=False, dt_bias=False, initial_states=False)
    tensors |= {"A": torch.ones(1), "dt": torch.full((1, 100, 1), 2.0)}
    tensors["x"][:, :90] = 0
    want, got = (ssd(**tensors, backend=name).y for name in ("reference", backend))
    assert want.isfinite().all()
    wrong = (got - want).abs() > 1e-4 * want.abs().max()
    assert not (wrong & got.isfinite()).any()


@needs_interpreter
@pytest.mark.parametrize("packed", [False, True])
def test_segments_of_sequences_join(monkeypatch, packed):
    """Segments for a device that one program a head would not fill, and scratch for one checkpoint of the backward."""
    from ssm_kernels.ssd.triton import backward, chunk, forward

    tables = []

    def build_and_record(*args):
        tables.append(build_segment_table(*args))
        return tables[-1]

    monkeypatch.setattr(forward, "num_sms", lambda device: 64)
    monkeypatch.setattr(backward, "num_sms", lambda device: 64)
    monkeypatch.setattr(backward, "MAX_CHECKPOINT_BYTES", 0)
    monkeypatch.setattr(backward, "MAX_CHECKPOINT_RATIO", 0)
    monkeypatch.setattr(chunk, "build_segment_table", build_and_record)
    tensors = make_inputs(1, 150, heads=2, rows=4 if packed else 1, dtype=torch.float32)
    if packed:
        tensors["cu_seqlens"] = torch.tensor([0, 70, 70, 71, 150])
    assert_agrees(ssd, tensors, {"dt_softplus": True, "chunk_size": 16}, backend="triton")
    assert max(table.first_segment.diff().max() for table in tables) > 1


@needs_interpreter
@pytest.mark.parametrize(("headdim", "d_state"), [(20, 5), (3, 20), (40, 33)])
def test_sizes_that_fill_no_tile_agree(headdim, d_state):
    """Several tiles of P, N beyond a power of two, and B and C of different strides."""
    tensors = make_inputs(1, 37, heads=2, headdim=headdim, d_state=d_state, groups=2, dtype=torch.float32)
    tensors["B"] = torch.randn(37, 1, 2, d_state + 3)[..., 3:].transpose(0, 1)
    assert_agrees(ssd, tensors, {"dt_softplus": True, "chunk_size": 16}, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[37], [0, 5, 1, 20]])
def test_weights_of_inputs_apart_from_decays(backend, lengths, dtype):
    length, rows = sum(lengths) + 2, len(lengths) if len(lengths) > 1 else 0
    tensors = make_inputs(1, length, groups=2, rows=rows, dtype=dtype)
    tensors["input_weights"] = torch.randn(1, length, 4).to(dtype)  # of both signs
    tensors["dt"][:, ::5] = -1000.0  # a decay of 1: no weight can be a multiple of its step size
    bounds = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)} if rows else {}
    assert_agrees(ssd, tensors | bounds, {"dt_softplus": True, "chunk_size": 16}, backend=backend)


@needs_interpreter
def test_scan_directions_over_a_grid_agree():
    """A run of groups along its direction equals a scan of permuted inputs, permuted back."""
    from ssm_kernels.cross_scan.reference import positions
    from ssm_kernels.ssd import triton

    height, width = 3, 5
    tensors = make_inputs(2, height * width, heads=8, groups=4, z=False, initial_states=False)
    leaves = [t.requires_grad_() for t in tensors.values()]

    def found_and_expected(x, dt, A, B, C, D, dt_bias):
        limit, codes = (0.0, float("inf")), (3, 0, 2, 1)
        rest = (True, limit, None, None, None, 16)
        y, final = triton.ssd(x, dt, A, B, C, D, None, dt_bias, *rest, codes, height)
        ys, finals = [], []
        for k, code in enumerate(codes):
            order = positions(CROSS[code], height, width)
            inverse = torch.tensor(order).argsort()
            h, g = slice(2 * k, 2 * k + 2), slice(k, k + 1)
            out = ssd(
                x[:, order, h], dt[:, order, h], A[h], B[:, order, g], C[:, order, g], D[h], None, dt_bias[h], True,
                backend="reference",
            )  # fmt: skip
            ys.append(out.y[:, inverse])
            finals.append(out.final_states)
        return (y, final), (torch.cat(ys, 2), torch.cat(finals, 1))

    found, expected = found_and_expected(*leaves)
    torch.testing.assert_close(found, expected)
    douts = [torch.randn_like(t) for t in expected]
    found_grads, expected_grads = (torch.autograd.grad(outs, leaves, douts) for outs in (found, expected))
    torch.testing.assert_close(found_grads, expected_grads)


@needs_interpreter
def test_kernels_write_all_of_their_results_and_nothing_else(guarded_memory):
    from ssm_kernels.ssd.triton.backward import backward
    from ssm_kernels.ssd.triton.forward import forward
    from ssm_kernels.ssd.triton.step import step

    t = {k: v.float() for k, v in make_inputs(2, 64, headdim=20, d_state=16, z=False).items()}
    arguments = scan_arguments(t)
    y, final_states = forward(*arguments)
    backward(torch.ones_like(y), torch.ones_like(final_states), *arguments)
    step(
        t["initial_states"],
        *(t[k] for k in ("x", "dt", "A", "B", "C", "D")),
        None,
        t["dt_bias"],
        True,
        0.0,
        float("inf"),
        *[None] * 6,
    )


@needs_interpreter
def test_offsets_beyond_32_bits():
    """A batch stride of more than 2**31 elements; the memory between the rows is never touched."""
    tensors = {k: v.half() for k, v in make_inputs(2, 5, z=False).items()}
    spread = torch.empty(2**31 + 1024, dtype=torch.float16).as_strided(tensors["x"].shape, (2**31 + 64, 12, 3, 1))
    tensors["x"] = spread.copy_(tensors["x"])
    assert_agrees(ssd, tensors, {"dt_softplus": True}, backend="triton")


def test_equals_the_selective_scan_with_one_rate_a_head(backend):
    """A scalar rate a head is a special case of Mamba-1's recurrence."""
    tensors = make_inputs(2, 20, heads=2, headdim=3, d_state=4, D=False, z=False, dt_bias=False)
    y, final = ssd(**tensors, dt_softplus=True, backend=backend)
    scan = selective_scan(
        tensors["x"].flatten(2),
        tensors["dt"].repeat_interleave(3, dim=2),
        tensors["A"].repeat_interleave(3)[:, None].expand(6, 4),
        tensors["B"],
        tensors["C"],
        initial_states=tensors["initial_states"].flatten(1, 2),
        dt_softplus=True,
        backend="torch",
    )
    torch.testing.assert_close(scan.y, y.flatten(2))
    torch.testing.assert_close(scan.final_states, final.flatten(1, 2))


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("optional", [True, False])
def test_steps_of_the_reference_are_its_scan(tokens, optional):
    tensors = make_inputs(2, 8, groups=2, D=optional, z=optional, dt_bias=optional)
    options = {"dt_softplus": True, "dt_limit": (0.1, 2.0), "backend": "reference"}
    scan = ssd(**tensors, **options)
    state = tensors.pop("initial_states").clone()
    for t in range(0, 8, tokens):
        index = t if tokens == 1 else slice(t, t + tokens)
        inputs = {k: v[:, index] if k in TIME_ARGUMENTS else v for k, v in tensors.items()}
        torch.testing.assert_close(ssd_step(state, **inputs, **options), scan.y[:, index])
    torch.testing.assert_close(state, scan.final_states)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_steps_agree_with_the_reference(backend, tokens, optional, dtype):
    tensors = make_inputs(2, tokens, groups=2, D=optional, z=optional, dt_bias=optional, dtype=dtype)
    tensors["state"] = tensors.pop("initial_states").to(torch.promote_types(dtype, torch.float32))
    if tokens == 1:
        tensors |= {k: tensors[k][:, 0] for k in TIME_ARGUMENTS if k in tensors}
    options = {"dt_softplus": optional, "dt_limit": (0.1, 2.0)}
    assert_agrees(pure(ssd_step), tensors, options, backend=backend, gradients=False)


@pytest.mark.parametrize("slots", [False, True])
def test_steps_with_weights_of_their_own_are_the_scan(backend, slots):
    tensors = {k: v.float() for k, v in make_inputs(2, 3).items()}
    weights = torch.rand(tensors["dt"].shape, generator=torch.Generator().manual_seed(0))
    options: dict = {"dt_softplus": True, "input_weights": weights}
    want = ssd(**tensors, **options, backend="reference")
    state = tensors.pop("initial_states").clone()
    options |= {"slots": StateSlots(torch.arange(2))} if slots else {}
    y = ssd_step(state, **tensors, **options, backend=backend)
    torch.testing.assert_close((y, state), tuple(want))


def test_a_step_advances_a_state_that_is_not_contiguous(backend):
    tensors = make_inputs(2, 1)
    expected = tensors.pop("initial_states")
    state = expected.transpose(2, 3).contiguous().transpose(2, 3)
    y = ssd_step(state, **tensors, dt_softplus=True, backend=backend)
    torch.testing.assert_close(y, ssd_step(expected, **tensors, dt_softplus=True, backend="reference"))
    torch.testing.assert_close(state, expected)


def test_gradcheck(backend):
    tensors = make_inputs(1, 5, 2, 2, 2)
    inputs = [t.requires_grad_() for t in tensors.values()]
    names = list(tensors)

    def run(*values):
        return tuple(ssd(**dict(zip(names, values, strict=True)), dt_softplus=True, chunk_size=2, backend=backend))

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 4, 9])])
def test_compiles_to_one_graph(backend, cu_seqlens):
    tensors = {k: v.float() for k, v in make_inputs(2 if cu_seqlens is None else 1, 9, rows=2).items()}
    options = {"dt_softplus": True, "cu_seqlens": cu_seqlens, "backend": backend}
    compiled = torch.compile(lambda t: ssd(**t, **options), fullgraph=True, backend="aot_eager")
    tensors["A"].requires_grad_()
    torch.testing.assert_close(compiled(tensors).y, ssd(**tensors, **options).y)
    compiled(tensors).y.sum().backward()
    assert tensors["A"].grad.abs().sum() > 0


@needs_interpreter
def test_triton_ops_pass_opcheck():
    from ssm_kernels.ssd import triton

    t = {k: v.float() for k, v in make_inputs(2, 9).items()}
    arguments = scan_arguments(t)
    torch.library.opcheck(triton._forward_op, arguments)
    dy, dfinal_states = torch.ones_like(t["x"]), torch.ones_like(t["initial_states"])
    torch.library.opcheck(triton._backward_op, (dy, dfinal_states, *arguments))
    required = arguments._replace(D=None, dt_bias=None, initial_states=None, dt_softplus=False, dt_max=1.0)
    torch.library.opcheck(triton._backward_op, (dy, None, *required))
    inputs = [t[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    step = (t["initial_states"], *inputs, True, 0.0, float("inf"), *[None] * 6)
    torch.library.opcheck(triton.step_kernel.op, step)
    torch.library.opcheck(triton.step_kernel.op, int8_step(step))


@pytest.mark.skipif(is_interpreted(), reason="Triton's interpreter has no part in them")
def test_numba_ops_pass_opcheck():
    pytest.importorskip("numba")
    from ssm_kernels.ssd import numba

    t = {k: v.float() for k, v in make_inputs(2, 9).items()}
    arguments = scan_arguments(t)
    torch.library.opcheck(numba._forward_op, (*arguments, True))
    y, final_states, checkpoint_states = numba._forward_op(*arguments, True)
    gradients = (torch.ones_like(y), torch.ones_like(final_states), checkpoint_states)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(numba._backward_op, (*gradients, *arguments), test_utils=checks)
    step = (
        *(t[k] for k in ("initial_states", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")),
        True,
        0.0,
        2.0,
        *[None] * 6,
    )
    torch.library.opcheck(numba.step_kernel.op, step)
    torch.library.opcheck(numba.step_kernel.op, int8_step(step))


def int8_step(step: tuple) -> tuple:
    """The arguments of a step op, with the state in int8, input weights and seeds."""
    state, x, dt, *others = step
    stored, scale = encode_state(state, torch.int8, None)
    return stored, x, dt, *others[:-6], dt.abs(), *others[-5:-2], scale, torch.arange(x.shape[0] * x.shape[1])


def test_registered_ops_pass_opcheck():
    t = {k: v.float() for k, v in make_inputs(2, 9).items()}
    inputs, packing = [*(t[k] for k in ("x", "dt", "A", "B", "C")), t["dt"].abs()], (None, None)
    args = (*inputs, t["initial_states"], *packing, 4)
    torch.library.opcheck(torch.ops.ssm_kernels.ssd_torch.default, args)
    y, final_states, checkpoint_states = torch.ops.ssm_kernels.ssd_torch(*args)
    dy, dfinal_states = torch.ones_like(y), torch.ones_like(final_states)
    args = (*args, checkpoint_states, dy, dfinal_states)
    torch.library.opcheck(torch.ops.ssm_kernels.ssd_torch_backward.default, args)


def test_autocast_changes_nothing(backend):
    tensors = make_inputs(2, 20, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ssd(**tensors, dt_softplus=True, backend=backend)
    assert torch.equal(inside.y, ssd(**tensors, dt_softplus=True, backend=backend).y)


def test_two_runs_are_equal_to_the_bit(backend):
    tensors = {k: v.requires_grad_() for k, v in make_inputs(2, 40, groups=2, dtype=torch.float32).items()}
    runs = []
    for _ in range(2):
        out = ssd(**tensors, dt_softplus=True, chunk_size=16, backend=backend)
        runs.append([*out, *torch.autograd.grad(out.y.square().sum(), tensors.values())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


WRONG = [
    ({"x": torch.zeros(2, 7)}, ValueError, "x must have shape"),
    ({"dt": torch.zeros(2, 6, 4)}, ValueError, r"dt must have shape \(2, 7, 4\), got \(2, 6, 4\)"),
    ({"dt": torch.full((2, 7, 4), torch.nan)}, ValueError, "dt must not hold NaN"),
    ({"A": torch.zeros(4, 5)}, ValueError, "A must have shape"),
    ({"B": torch.zeros(2, 7, 3, 5)}, ValueError, "must divide H"),
    ({"C": torch.zeros(2, 7, 1, 9)}, ValueError, "C must have shape"),
    ({"D": torch.zeros(3)}, ValueError, "D must have shape"),
    ({"dt_limit": (1.0, 0.5)}, ValueError, "dt_limit must be"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be an integer of at least 1"),
    ({"initial_states": torch.zeros(1, 4, 3, 5)}, ValueError, "initial_states must have shape"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
def test_bad_arguments_are_named(wrong, error, message):
    with pytest.raises(error, match=message):
        ssd(**(make_inputs() | wrong))


def test_steps_of_very_different_size_do_not_cost_digits(backend):
    """A decay over small steps is not the difference of two sums that hold a large step before them."""
    tensors = make_inputs(2, 40, z=False, D=False, dtype=torch.float32)
    tensors["dt"] = tensors["dt"].abs() * 0.1
    tensors["dt"][:, ::7] *= 1e5
    assert_agrees(ssd, tensors, {"chunk_size": 64}, backend=backend)


def test_the_gradient_of_a_decay_is_no_difference_of_larger_terms(backend):
    """Little of the state passes through a long step; the large terms after it are no part of its gradient."""
    tensors = make_inputs(
        1, 2, heads=1, headdim=16, d_state=1, dtype=torch.float32, z=False, D=False, initial_states=False
    )
    tensors["dt"], tensors["dt_bias"] = torch.full((1, 2, 1), 0.5), torch.zeros(1)
    tensors["A"] = torch.tensor([-30.0])
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    for inputs, chosen in ((tensors, backend), (wide, "reference")):
        ssd(**inputs, backend=chosen).final_states.sum().backward()
    torch.testing.assert_close(tensors["A"].grad.double(), wide["A"].grad, rtol=1e-5, atol=0)


BEYOND_FLOAT16 = {
    "states": ({"initial_states": 1e6, "C": 1e-4}, 1e-3, 1e-3),
    "scores": ({"B": 300, "C": 300, "x": 1e-3}, 1e-2, 1e-2),
    "weighted inputs": ({"x": 1e4, "dt_bias": 30, "A": 1e-2, "B": 1e-4}, 1e-3, 1e-3),
    "gated gradients": ({"z": 1e4, "x": 1e-3, "B": 1e-2, "C": 1e-2, "D": 1e-3}, 10, 1),
    "gradients of states": ({"initial_states": 1e-4, "x": 1e-4, "B": 1e-4}, 1, 1e6),
    "gradients of scores": ({"x": 300, "B": 1e-3, "C": 1e-3, "D": 1e-3}, 100, 1),
}
"""Values of a call that no operand in float16 holds, while inputs, results and gradients are within its range.

Factors of some inputs, of y and of the final states; the latter two are those of their gradients.
"""


@pytest.mark.ptx
@pytest.mark.skipif(is_interpreted(), reason="the interpreter has no products of float16")
@pytest.mark.parametrize("name", BEYOND_FLOAT16)
@pytest.mark.parametrize("target", ["sm_90"])
def test_float16_takes_values_beyond_its_range(name, target):
    pytest.importorskip("triton")
    from vlmamba.benchmarks.ptx import emulated

    factors, y_factor, state_factor = BEYOND_FLOAT16[name]
    z = "z" in factors
    tensors = make_inputs(1, 40, heads=1, headdim=16, d_state=16, dtype=torch.float16, z=z, wide_D=False)
    for argument in ("A", "D", "dt_bias", "initial_states"):
        tensors[argument] = tensors[argument].float()
    for argument, factor in factors.items():
        tensors[argument] = tensors[argument] * factor
    tensors["dt_bias"] = tensors["dt_bias"].abs()
    assert all(t.isfinite().all() for t in tensors.values())

    def scaled(backend, **arguments):
        out = ssd(backend=backend, **arguments)
        return out._replace(y=out.y * y_factor, final_states=out.final_states * state_factor)

    with emulated(target) as report:
        assert_agrees(scaled, tensors, {"dt_softplus": True, "chunk_size": 16}, backend="triton")
    report.assert_clean()
