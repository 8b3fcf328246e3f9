"""SS2D: the sum of selective scans in each direction, with VMamba's parameter names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ssm_kernels import selective_scan
from vlmamba.connectors import SS2D, ConnectorConfig, DirectionalMamba


@pytest.mark.parametrize("scan", ["bidirectional", "cross"])
def test_ss2d_is_the_sum_over_directions(scan):
    """Gather each direction by a loop over positions, scan it alone, and scatter it back."""
    torch.manual_seed(0)
    directions = ConnectorConfig(scan=scan).directions
    module = SS2D(8, directions, d_state=3).double()
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)

    inner, z = (x @ module.in_proj.weight.T).split(16, dim=-1)
    inner = F.silu(
        F.conv2d(inner.permute(0, 3, 1, 2), module.conv2d.weight, module.conv2d.bias, padding=1, groups=16)
    ).permute(0, 2, 3, 1)
    order = {
        "rows": [(h, w) for h in range(3) for w in range(4)],
        "columns": [(h, w) for w in range(4) for h in range(3)],
    }
    order |= {f"{k}_reversed": v[::-1] for k, v in order.items()}
    total = torch.zeros_like(inner)
    for k, direction in enumerate(directions):
        path = torch.stack([inner[:, h, w] for h, w in order[direction]], 1)
        dt, B, C = (path @ module.x_proj_weight[k].T).split([module.rank, 3, 3], dim=-1)
        y, _ = selective_scan(
            path,
            dt @ module.dt_projs_weight[k].T,
            -module.A_logs[k * 16 : (k + 1) * 16].exp(),
            B,
            C,
            module.Ds[k * 16 : (k + 1) * 16],
            dt_bias=module.dt_projs_bias[k],
            dt_softplus=True,
            backend="reference",
        )
        for t, (h, w) in enumerate(order[direction]):
            total[:, h, w] += y[:, t]
    want = (module.out_norm(total) * F.silu(z)) @ module.out_proj.weight.T
    torch.testing.assert_close(module(x), want, rtol=1e-6, atol=1e-6)  # A is taken in float32


def test_vss_names_are_vmambas():
    with torch.device("meta"):
        module = SS2D(64, ConnectorConfig(scan="cross").directions)
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {
        "in_proj.weight": (256, 64),
        "conv2d.weight": (128, 1, 3, 3),
        "conv2d.bias": (128,),
        "x_proj_weight": (4, 4 + 32, 128),
        "dt_projs_weight": (4, 128, 4),
        "dt_projs_bias": (4, 128),
        "A_logs": (512, 16),
        "Ds": (512,),
        "out_norm.weight": (128,),
        "out_norm.bias": (128,),
        "out_proj.weight": (64, 128),
    }


def test_directional_mamba_is_the_sum_of_one_mixer_along_each_direction():
    """Gather each direction by a loop over positions, mix it alone, and scatter it back."""
    torch.manual_seed(0)
    module = DirectionalMamba(8, ConnectorConfig(scan="cross").directions, 3, 2, 4).double()
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    rows = [(h, w) for h in range(3) for w in range(4)]
    columns = [(h, w) for w in range(4) for h in range(3)]
    want = torch.zeros_like(x)
    for path in (rows, rows[::-1], columns, columns[::-1]):
        y = module.mamba(torch.stack([x[:, h, w] for h, w in path], 1))
        for t, (h, w) in enumerate(path):
            want[:, h, w] += y[:, t]
    torch.testing.assert_close(module(x), want, rtol=1e-10, atol=1e-12)
