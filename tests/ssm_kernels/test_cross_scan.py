"""Cross scan: every backend against the tables of positions, and the two directions against each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_kernels import (
    BIDIRECTIONAL,
    CROSS,
    cross_causal_conv1d,
    cross_merge,
    cross_scan,
    cross_selective_scan,
    cross_ssd,
)
from ssm_kernels.testing import assert_agrees, is_interpreted

pytestmark = pytest.mark.triton

needs_interpreter = pytest.mark.skipif(not is_interpreted(), reason="the kernels need Triton's interpreter here")
FEWER = settings(max_examples=3 if is_interpreted() else 15)  # each program is slow in the interpreter
GRIDS = {
    "batch": st.integers(0, 2),
    "height": st.integers(1, 5),
    "width": st.integers(1, 5),
    "directions": st.lists(st.sampled_from(CROSS), min_size=1, max_size=5),
}
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(**GRIDS, dtype=DTYPES)
def test_agrees_with_the_reference(backend, batch, height, width, directions, dtype):
    x = randn(batch, height, width, 3, dtype=dtype)
    assert_agrees(cross_scan, {"x": x}, {"directions": directions}, backend=backend)
    y = randn(batch, len(directions), height * width, 3, dtype=dtype)
    assert_agrees(cross_merge, {"y": y}, {"height": height, "width": width, "directions": directions}, backend=backend)


@pytest.mark.parametrize("dim", [1, 260])
def test_large_grids_of_any_strides_agree(backend, dim):
    """Several tiles of positions and of channels, and images whose channels are not contiguous."""
    x = randn(2, dim, 5, 7, dtype=torch.float32).permute(0, 2, 3, 1)
    assert_agrees(cross_scan, {"x": x}, backend=backend)
    y = randn(2, 35, dim, 4, dtype=torch.float32).permute(0, 3, 1, 2)
    assert_agrees(cross_merge, {"y": y}, {"height": 5, "width": 7}, backend=backend)


@given(**GRIDS)
def test_merge_is_the_adjoint_of_scan(backend, batch, height, width, directions):
    x = randn(batch, height, width, 3)
    y = randn(batch, len(directions), height * width, 3)
    one = (cross_scan(x, directions, backend=backend) * y).sum()
    two = (x * cross_merge(y, height, width, directions, backend=backend)).sum()
    torch.testing.assert_close(one, two)


def test_directions_of_a_small_grid(backend):
    x = torch.arange(6.0).view(1, 2, 3, 1)  # 0 1 2 / 3 4 5
    rows, columns, rows_reversed, columns_reversed = cross_scan(x, CROSS, backend=backend)[0, :, :, 0].tolist()
    assert rows == [0, 1, 2, 3, 4, 5]
    assert columns == [0, 3, 1, 4, 2, 5]
    assert rows_reversed == rows[::-1]
    assert columns_reversed == columns[::-1]
    assert cross_scan(x, BIDIRECTIONAL, backend=backend)[0, :, :, 0].tolist() == [rows, rows_reversed]


ALONG = {
    "cross_causal_conv1d": (cross_causal_conv1d, {"activation": "silu"}),
    "cross_selective_scan": (cross_selective_scan, {"dt_softplus": True}),
    "cross_ssd": (cross_ssd, {"dt_softplus": True, "dt_limit": (0.2, 2.0), "chunk_size": 16}),
}


def make(name, batch, height, width, k, dtype=torch.float64, seed=0, heads=4, groups=2, optional=True):
    """The tensor arguments of an op along directions."""
    grid = (batch, height, width)
    if name == "cross_causal_conv1d":
        t = {"x": randn(*grid, 6, dtype=dtype, seed=seed), "weight": randn(k, 6, 4, dtype=dtype, seed=seed + 1)}
        return t | ({"bias": randn(k, 6, dtype=dtype, seed=seed + 2)} if optional else {})
    if name == "cross_selective_scan":
        shapes = {"u": (*grid, 6), "dt": (*grid, k, 6), "A": (k, 6, 3), "B": (*grid, k, 3), "C": (*grid, k, 3)}
        shapes |= {"D": (k, 6), "dt_bias": (k, 6)} if optional else {}
    else:
        shapes = {"x": (*grid, k, heads, 5), "dt": (*grid, k, heads), "A": (k, heads)}
        shapes |= {"B": (*grid, k, groups, 3), "C": (*grid, k, groups, 3)}
        shapes |= {"D": (k, heads), "dt_bias": (k, heads)} if optional else {}
    t = {n: randn(*shape, dtype=dtype, seed=seed + i) for i, (n, shape) in enumerate(shapes.items())}
    return t | {"A": -t["A"].abs()}


@pytest.fixture(scope="module")
def kernels(compiled_or_not):
    """Every implementation of the ops along directions; cross-scan itself has none in numba."""
    return compiled_or_not


@pytest.mark.parametrize("name", ALONG)
@FEWER
@given(**GRIDS, dtype=DTYPES, optional=st.booleans(), seed=st.integers(0, 99))
def test_ops_along_directions_agree_with_the_reference(
    kernels, name, batch, height, width, directions, dtype, optional, seed
):
    op, options = ALONG[name]
    tensors = make(name, batch, height, width, len(directions), dtype, seed, optional=optional)
    assert_agrees(op, tensors, options | {"directions": directions}, backend=kernels)


@pytest.mark.parametrize("name", ALONG)
def test_ops_along_directions_agree_over_several_segments(kernels, name):
    op, options = ALONG[name]
    tensors = make(name, 1, *((12, 25) if name == "cross_causal_conv1d" else (7, 10)), 4, torch.float32)
    first = next(iter(tensors))
    tensors[first] = tensors[first].movedim(-1, 1).contiguous().movedim(1, -1)  # channels are not contiguous
    assert_agrees(op, tensors, options, backend=kernels)


@pytest.mark.parametrize("name", ALONG)
def test_ops_along_directions_compile_to_one_graph(kernels, name):
    op, options = ALONG[name]
    t = make(name, 1, 3, 4, 4, torch.float64)
    grads = []
    for compile in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        inputs = {k: v.clone().requires_grad_() for k, v in t.items()}
        loss = compile(lambda t: op(**t, **options, backend=kernels).square().sum())(inputs)
        grads.append(torch.autograd.grad(loss, list(inputs.values())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck(backend):
    x, y = randn(1, 2, 3, 2).requires_grad_(), randn(1, 4, 6, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cross_scan(x, backend=backend), (x,))
    assert torch.autograd.gradcheck(lambda y: cross_merge(y, 2, 3, backend=backend), (y,))


def test_offsets_beyond_32_bits(backend):
    """Memory that is not touched is not mapped."""
    x = torch.empty(2 * (2**31 + 64), dtype=torch.bfloat16).as_strided((2, 2, 3, 4), (2**31 + 64, 12, 4, 1))
    x.copy_(randn(2, 2, 3, 4))
    assert torch.equal(cross_scan(x, backend=backend), cross_scan(x.clone(memory_format=torch.contiguous_format)))
    y = x.flatten(2).view(2, 2, 6, 2)
    dense = y.clone(memory_format=torch.contiguous_format)
    assert torch.equal(cross_merge(y, 2, 3, BIDIRECTIONAL, backend=backend), cross_merge(dense, 2, 3, BIDIRECTIONAL))


@needs_interpreter
def test_registered_ops_pass_opcheck():
    from ssm_kernels.cross_scan import triton

    torch.library.opcheck(triton._scan_op, (torch.randn(2, 3, 4, 5), [0, 1, 2, 3]))
    torch.library.opcheck(triton._merge_op, (torch.randn(2, 2, 12, 5), 3, 4, [1, 3]))


@needs_interpreter
@pytest.mark.parametrize("dim", [3, 130])
def test_kernels_write_all_of_their_results_and_nothing_else(guarded_memory, dim):
    from ssm_kernels.cross_scan.triton.backward import merge
    from ssm_kernels.cross_scan.triton.forward import scan

    scan(torch.randn(2, 5, 7, dim), [0, 1, 2, 3])
    merge(torch.randn(2, 4, 35, dim), 5, 7, [0, 1, 2, 3])


def test_bad_arguments_are_named(backend):
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="directions must be a sequence of names among"):
        cross_scan(x, ["diagonal"])
    with pytest.raises(ValueError, match="directions must be"):
        cross_scan(x, "rows")
    with pytest.raises(ValueError, match=r"y must have shape \(B, 4, 9, D\)"):
        cross_merge(torch.zeros(1, 4, 6, 4), 3, 3)


WRONG = [
    ("cross_causal_conv1d", {"weight": torch.zeros(3, 6, 4)}, r"weight must have shape \(4, 6, W\)"),
    ("cross_causal_conv1d", {"bias": torch.zeros(6)}, r"bias must have shape \(4, 6\)"),
    ("cross_causal_conv1d", {"activation": "relu"}, "activation must be None or 'silu'"),
    ("cross_selective_scan", {"dt": torch.zeros(1, 2, 3, 6)}, r"dt must have shape \(1, 2, 3, 4, 6\)"),
    ("cross_selective_scan", {"C": torch.zeros(1, 2, 3, 4, 2)}, r"C must have shape \(1, 2, 3, 4, 3\)"),
    ("cross_selective_scan", {"D": torch.zeros(24)}, r"D must have shape \(4, 6\)"),
    ("cross_ssd", {"x": torch.zeros(1, 2, 3, 2, 4, 5)}, r"x must have shape \(B, height, width, 4, H, P\)"),
    ("cross_ssd", {"A": torch.zeros(16)}, r"A must have shape \(4, 4\)"),
    ("cross_ssd", {"B": torch.zeros(1, 2, 3, 4, 3, 3)}, "G, the fifth size of B, must divide H"),
    ("cross_ssd", {"dt_limit": (1.0, 0.5)}, "dt_limit must be"),
    ("cross_ssd", {"chunk_size": 0}, "chunk_size must be an integer of at least 1"),
    ("cross_ssd", {"dt": torch.full((1, 2, 3, 4, 4), torch.nan)}, "dt must not hold NaN"),
]


@pytest.mark.parametrize(("name", "wrong", "message"), WRONG)
def test_bad_arguments_of_ops_along_directions_are_named(name, wrong, message):
    with pytest.raises(ValueError, match=message):
        ALONG[name][0](**(make(name, 1, 2, 3, 4, torch.float32) | wrong))
