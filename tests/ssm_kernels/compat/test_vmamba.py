"""VMamba's scans over images: each direction written out, in every layout, with gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from ssm_kernels import use_backend
from ssm_kernels.compat import vmamba
from ssm_kernels.compat.mamba_ssm import selective_scan_ref

pytestmark = pytest.mark.triton

BATCH, CHANNELS, HEIGHT, WIDTH = 2, 3, 4, 5
LAYOUTS = list(itertools.product([True, False], [True, False]))


def directions(scans: int) -> list:
    rows = [h * WIDTH + w for h in range(HEIGHT) for w in range(WIDTH)]
    columns = [h * WIDTH + w for w in range(WIDTH) for h in range(HEIGHT)]
    return {
        0: [rows, columns, rows[::-1], columns[::-1]],
        1: [rows] * 4,
        2: [rows, rows, rows[::-1], rows[::-1]],
    }[scans]


def assert_same(got, want, *inputs):
    torch.testing.assert_close(got, want)
    weights = torch.cos(torch.arange(got.numel(), dtype=got.dtype)).view(got.shape)
    for g, w in zip(*(torch.autograd.grad((t * weights).sum(), inputs) for t in (got, want)), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("scans", [0, 1, 2])
@pytest.mark.parametrize(("in_first", "out_first"), LAYOUTS)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_scan_and_merge(backend, scans, in_first, out_first, one_by_one):
    x = torch.randn(BATCH, 4, CHANNELS, HEIGHT, WIDTH, requires_grad=True)
    grids = x if one_by_one else x[:, :1].expand(-1, 4, -1, -1, -1)
    read = [grids[:, k].flatten(2)[..., direction] for k, direction in enumerate(directions(scans))]
    want = torch.stack(read, 1)  # (B, 4, C, L)
    given = x if one_by_one else x[:, 0]
    given = given if in_first else given.movedim((-2, -1), (1, 2))
    options = {"in_channel_first": in_first, "out_channel_first": out_first, "one_by_one": one_by_one, "scans": scans}
    with use_backend(backend):
        got = vmamba.cross_scan_fn(given, **options)
    assert_same(got, want if out_first else want.movedim(-1, 1), x)

    y = torch.randn(BATCH, 4, CHANNELS, HEIGHT * WIDTH, requires_grad=True)
    empty = torch.zeros(BATCH, CHANNELS, HEIGHT * WIDTH)
    places = [empty.index_copy(2, torch.tensor(direction), y[:, k]) for k, direction in enumerate(directions(scans))]
    want = torch.stack(places, 1) if one_by_one else sum(places)
    given = y.unflatten(-1, (HEIGHT, WIDTH))
    with use_backend(backend):
        got = vmamba.cross_merge_fn(given if out_first else given.movedim((-2, -1), (1, 2)), **options)
    assert_same(got, want if in_first else want.movedim(-1, 1), y)


def test_the_functions_of_the_first_release(backend):
    x = torch.randn(BATCH, CHANNELS, HEIGHT, WIDTH)
    with use_backend(backend):
        ys = vmamba.CrossScan.apply(x)
        assert ys.equal(torch.stack([x.flatten(2)[..., direction] for direction in directions(0)], 1))
        merged = vmamba.CrossMerge.apply(ys.unflatten(-1, (HEIGHT, WIDTH)))
    torch.testing.assert_close(merged, 4 * x.flatten(2))


@pytest.mark.parametrize("oflex", [False, True])
def test_scan_of_all_directions(backend, oflex):
    n, length, dim = 2, 6, 4 * CHANNELS
    u, delta = torch.randn(BATCH, dim, length).bfloat16(), torch.randn(BATCH, dim, length)
    A, B, C = -torch.rand(dim, n), torch.randn(BATCH, 4, n, length), torch.randn(BATCH, 4, n, length)
    D, bias = torch.randn(dim), torch.randn(dim)
    inputs = [t.requires_grad_() for t in (u, delta, A, B, C, D, bias)]
    with use_backend(backend):
        got = vmamba.selective_scan_fn(*inputs, oflex=oflex)
    assert got.dtype == (torch.float32 if oflex else torch.bfloat16)
    want = selective_scan_ref(*inputs[:6], None, bias, True)
    torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-2)
    got.float().sum().backward()
    assert all(t.grad.isfinite().all() for t in inputs)


def test_other_scans_are_refused():
    for function in (vmamba.cross_scan_fn, vmamba.cross_merge_fn):
        with pytest.raises(ValueError, match="scans must be 0, 1 or 2, got 3"):
            function(torch.ones(1, 4, 2, 3, 3), scans=3)
