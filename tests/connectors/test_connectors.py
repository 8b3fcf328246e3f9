"""All kinds of connectors: shapes, gradients, reach of the scan, and agreement of the backends."""

from __future__ import annotations

import pytest
import torch

from ssm_kernels import use_backend
from vlmamba.connectors import ConnectorConfig, build_connector

SCANS = ["vss-mlp", "vss-l2", "vss-mlp, mamba", "vss-l2, mamba", "mamba2-basic", "mamba2-advanced"]
KINDS = ["mlp", "mamba2-mlp", *SCANS]


def small(kind, scan="bidirectional"):
    torch.manual_seed(0)
    kind, _, vss = kind.partition(", ")
    return build_connector(ConnectorConfig(kind, scan, vss or "ss2d", d_state=4, headdim=16), 24, 32).double()


@pytest.mark.parametrize("scan", ["bidirectional", "cross"])
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_gradients_on_a_grid_that_is_not_square(kind, scan):
    connector = small(kind, scan)
    x = torch.randn(2, 3, 5, 24, dtype=torch.float64, requires_grad=True)
    y = connector(x)
    assert y.shape == (2, 15, 32)
    y.square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert [n for n, p in connector.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("kind", ["mlp", "mamba2-mlp"])
def test_an_mlp_treats_each_patch_alone_and_keeps_their_order(kind):
    connector = small(kind)
    x = torch.randn(1, 3, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(connector(x)[0, 2 * 5 + 3], connector(x[:, 2:3, 3:4])[0, 0])


@pytest.mark.parametrize("kind", SCANS)
@pytest.mark.parametrize("scan", ["bidirectional", "cross"])
def test_a_scan_carries_every_patch_to_every_other(kind, scan):
    connector = small(kind, scan)
    x = torch.randn(1, 2, 3, 24, dtype=torch.float64)
    for h, w in ((0, 0), (1, 2), (0, 2)):
        moved = x.clone()
        moved[0, h, w] += 1
        assert ((connector(moved) - connector(x)).abs().amax(-1) > 0).all()


@pytest.mark.triton
@pytest.mark.parametrize("kind", ["vss-l2", "vss-l2, mamba", "mamba2-basic"])
def test_every_backend_gives_the_same(backend, kind):
    connector = small(kind, "cross")
    results = []
    for name in ("reference", backend):
        x = torch.randn(1, 2, 3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        with use_backend(name):
            y = connector(x.requires_grad_())
            results.append((y, *torch.autograd.grad(y.square().sum(), [x, *connector.parameters()])))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
