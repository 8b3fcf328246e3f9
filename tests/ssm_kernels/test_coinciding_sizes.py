"""Every size the same, so that a shape alone tells nothing: the meaning must come from the number of dimensions."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_kernels import (
    causal_conv1d,
    cross_causal_conv1d,
    cross_selective_scan,
    cross_ssd,
    rms_norm,
    selective_scan,
    selective_scan_step,
    ssd,
    ssd_step,
)
from ssm_kernels.testing import assert_agrees

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("default_backend")]
SIZES = [2, 3]


def draw(*sizes: int) -> Tensor:
    return torch.rand(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(sizes)))


def scanned(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """u, dt (B, L, D); A (D, N); B, C (B, L, D, N); h (B, D, N): the recurrence, written for this test."""
    ys = []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t]
        ys.append(torch.einsum("bdn,bdn->bd", h, C[:, t]))
    return torch.stack(ys, 1), h


def each_channel(m: Tensor, n: int) -> Tensor:
    """B or C of a scan as (B, L, D, N)."""
    if m.dim() == 2:  # (D, N)
        return m.expand(n, n, n, n)
    return m[:, :, None].expand(n, n, n, n) if m.dim() == 3 else m  # (B, L, N), or (B, L, G, N) with G = D


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...], inputs: list[Tensor]) -> None:
    """Outputs and gradients."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(sum((t * t.detach().cos()).sum() for t in out), inputs) for out in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("ranks", list(itertools.product((2, 3, 4), repeat=2)))
def test_selective_scan(n, ranks):
    u, dt, A, h = draw(n, n, n), draw(n, n, n) + 1, -draw(n, n), draw(n, n, n) - 1
    B, C = (draw(*[n] * rank) - 0.5 for rank in ranks)
    inputs = [t.requires_grad_() for t in (u, dt, A, B, C, h)]
    got = selective_scan(u, dt, A, B, C, initial_states=h)
    same(got, scanned(u, dt, A, each_channel(B, n), each_channel(C, n), h), inputs)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("ranks", list(itertools.product((2, 3), repeat=2)))
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_selective_scan_step(n, ranks, backend):
    u, dt, A, state = draw(n, n), draw(n, n) + 1, -draw(n, n), draw(n, n, n)
    B, C = (draw(*[n] * rank) - 0.5 for rank in ranks)  # (D, N), or (B, G, N) with G = D
    steps = [m.expand(n, 1, n, n) if m.dim() == 2 else m.unsqueeze(1) for m in (B, C)]
    want, after = scanned(u.unsqueeze(1), dt.unsqueeze(1), A, *steps, state.clone())
    torch.testing.assert_close(selective_scan_step(state, u, dt, A, B, C, backend=backend), want[:, 0])
    torch.testing.assert_close(state, after)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("wide_D", [False, True])
def test_ssd_and_its_steps(n, wide_D):
    """H heads of P channels are H * P channels of the scan above."""
    x, dt, A, B, C = draw(n, n, n, n), draw(n, n, n) + 1, -draw(n), draw(n, n, n, n), draw(n, n, n, n) - 0.5
    D, h = draw(*[n] * (1 + wide_D)), draw(n, n, n, n)
    inputs = [t.requires_grad_() for t in (x, dt, A, B, C, D, h)]
    channels = (m.repeat_interleave(n, 2) for m in (dt, B, C))  # (B, L, H * P, ...)
    dt_, B_, C_ = channels
    y, after = scanned(x.flatten(2), dt_, A.repeat_interleave(n)[:, None].expand(-1, n), B_, C_, h.flatten(1, 2))
    y = y.unflatten(2, (n, n)) + (D if wide_D else D[:, None]) * x
    same(ssd(x, dt, A, B, C, D, initial_states=h), (y, after.unflatten(1, (n, n))), inputs)

    x, dt, A, B, C, D, y, after = (t.detach() for t in (x, dt, A, B, C, D, y, after.unflatten(1, (n, n))))
    state = h.detach().clone()
    torch.testing.assert_close(ssd_step(state, x, dt, A, B, C, D), y)  # n tokens at once
    torch.testing.assert_close(state, after)
    state = h.detach().clone()
    for t in range(n):
        torch.testing.assert_close(ssd_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D), y[:, t])
    torch.testing.assert_close(state, after)


@pytest.mark.parametrize("n", SIZES)
def test_causal_conv1d(n):
    """A window of n + 1, so that its n earlier inputs coincide with the rest."""
    x, weight, bias, before = draw(n, n, n), draw(n, n + 1) - 0.5, draw(n), draw(n, n, n) - 0.5
    inputs = [t.requires_grad_() for t in (x, weight, bias, before)]
    line = torch.cat([before, x], 1)  # (B, K - 1 + L, D)
    y = F.conv1d(line.mT, weight.unsqueeze(1), bias, groups=n).mT
    same(causal_conv1d(x, weight, bias, initial_states=before), (y, line[:, -n:]), inputs)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("group_size", [1, None])
def test_rms_norm(n, group_size):
    x, weight, z = (t.requires_grad_() for t in (draw(n, n, n) - 0.5, draw(n), draw(n, n, n)))
    gated = x * F.silu(z)
    square = gated.square() if group_size == 1 else gated.square().mean(-1, keepdim=True)
    want = gated / (square + 1e-5).sqrt() * weight
    same((rms_norm(x, weight, z=z, group_size=group_size),), (want,), [x, weight, z])


@pytest.mark.parametrize("n", SIZES)
def test_ops_along_directions_agree_with_the_reference(n, backend):
    """Batch, height, width, directions, channels and the rest."""
    directions = {"directions": ("rows", "columns_reversed", "columns")[:n]}
    grid, places = draw(n, n, n, n) - 0.5, draw(n, n, n, n, n)
    assert_agrees(
        cross_causal_conv1d, {"x": grid, "weight": draw(n, n, n), "bias": draw(n, n)}, directions, backend=backend
    )
    scan = {"u": grid, "dt": places, "A": -draw(n, n, n), "B": places - 0.5, "C": places, "D": draw(n, n)}
    assert_agrees(cross_selective_scan, scan, directions, backend=backend)
    heads = draw(n, n, n, n, n, n) - 0.5
    scan = {"x": heads, "dt": places, "A": -draw(n, n), "B": heads, "C": heads + 0.25}
    for D in (draw(n, n), draw(n, n, n)):
        assert_agrees(cross_ssd, scan | {"D": D}, directions, backend=backend)
