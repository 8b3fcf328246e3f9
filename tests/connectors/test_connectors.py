"""The connectors: names and sizes as published, values as an independent computation gives them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ssm_kernels import causal_conv1d, selective_scan, ssd, use_backend
from vlmamba.connectors import SS2D, ConnectorConfig, GridMamba2, build_connector

KINDS = ["mlp", "vss-mlp", "vss-l2", "mamba2-mlp", "mamba2-basic", "mamba2-advanced"]


def small(kind, scan="bidirectional"):
    torch.manual_seed(0)
    return build_connector(ConnectorConfig(kind, scan, d_state=4, headdim=16), 24, 32).double()


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


@pytest.mark.parametrize("kind", ["vss-mlp", "vss-l2", "mamba2-basic", "mamba2-advanced"])
@pytest.mark.parametrize("scan", ["bidirectional", "cross"])
def test_a_scan_carries_every_patch_to_every_other(kind, scan):
    connector = small(kind, scan)
    x = torch.randn(1, 2, 3, 24, dtype=torch.float64)
    for h, w in ((0, 0), (1, 2), (0, 2)):
        moved = x.clone()
        moved[0, h, w] += 1
        assert ((connector(moved) - connector(x)).abs().amax(-1) > 0).all()


@pytest.mark.parametrize("scan", ["bidirectional", "cross"])
def test_ss2d_is_the_sum_over_routes(scan):
    """Each direction read by a loop over positions, scanned alone, and added where it was read."""
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


def test_ml_mambas_mixer_flips_the_projected_sequence_and_averages():
    torch.manual_seed(0)
    mixer = GridMamba2(16, ConnectorConfig("mamba2-advanced", d_state=4, headdim=8)).double()
    with torch.no_grad():
        for name in ("dt_bias_b", "A_log_b", "D_b"):
            getattr(mixer, name).add_(0.3)
    x = torch.randn(2, 3, 4, 16, dtype=torch.float64)
    u = mixer.in_proj(x).flatten(1, 2)

    def one_way(u, end):
        part = {n: getattr(mixer, n + end) for n in ("conv1d", "dt_bias", "A_log", "D")}
        z, xBC, dt = u.split([32, 32 + 8, 4], dim=-1)
        xBC = causal_conv1d(xBC, part["conv1d"].weight[:, 0], part["conv1d"].bias, backend="reference").y
        inner, B, C = F.silu(xBC).split([32, 4, 4], dim=-1)
        y, _ = ssd(
            inner.unflatten(2, (4, 8)), dt, -part["A_log"].exp(), B.unsqueeze(2), C.unsqueeze(2), part["D"],
            dt_bias=part["dt_bias"], dt_softplus=True, backend="reference",
        )  # fmt: skip
        y = y.flatten(2) * F.silu(z)
        return y / torch.sqrt(y.square().mean(-1, keepdim=True) + 1e-5) * mixer.norm.weight

    want = mixer.out_proj((one_way(u, "") + one_way(u.flip(1), "_b").flip(1)) / 2).unflatten(1, (3, 4))
    torch.testing.assert_close(mixer(x), want, rtol=1e-6, atol=1e-6)


@pytest.mark.triton
@pytest.mark.parametrize("kind", ["vss-l2", "mamba2-basic"])
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


# Width of the language model, and parameters of mlp, bidirectional_mamba and projector, of ML-Mamba's checkpoint
# and its smaller relatives.
PUBLISHED = [
    (768, 1_671_936, 11_095_328, 5_313_024),
    (1024, 2_229_248, 19_527_040, 9_443_328),
    (1536, 3_343_872, 43_492_928, 21_242_880),
    (2048, 4_458_496, 76_928_768, 37_761_024),
    (2560, 5_573_120, 119_834_560, 58_997_760),
]


@pytest.mark.parametrize(("width", "mlp", "scan", "projector"), PUBLISHED)
def test_ml_mambas_parameter_counts(width, mlp, scan, projector):
    with torch.device("meta"):
        connector = build_connector(ConnectorConfig("mamba2-advanced"), 1024 + 1152, width)
    parts = (connector.mlp, connector.bidirectional_mamba, connector.projector)
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [mlp, scan, projector]


def test_ml_mambas_names_and_shapes():
    with torch.device("meta"):
        connector = build_connector(ConnectorConfig("mamba2-advanced"), 2176, 2560)
    shapes = {n: tuple(p.shape) for n, p in connector.named_parameters()}
    want = {"mlp.0.weight": (2560, 2176), "mlp.0.bias": (2560,)}
    for j in range(2):
        layer = f"bidirectional_mamba.layers.{j}."
        want |= {layer + "norm.weight": (2560,), layer + "norm.bias": (2560,)}
        want |= {layer + "mixer.in_proj.weight": (10576, 2560), layer + "mixer.out_proj.weight": (2560, 5120)}
        want |= {layer + "mixer.norm.weight": (5120,)}
        for end in ("", "_b"):
            want |= {f"{layer}mixer.conv1d{end}.weight": (5376, 1, 4), f"{layer}mixer.conv1d{end}.bias": (5376,)}
            want |= {f"{layer}mixer.{n}{end}": (80,) for n in ("dt_bias", "A_log", "D")}
        for w in ("w1", "w2", "w3"):
            want |= {f"{layer}mlp.{w}.weight": (2560, 2560), f"{layer}mlp.{w}.bias": (2560,)}
    want |= {"bidirectional_mamba.norm_f.weight": (2560,), "bidirectional_mamba.norm_f.bias": (2560,)}
    for i, shape in ((0, (10240, 2560)), (2, (2560, 10240)), (4, (2560, 2560))):
        want |= {f"projector.projector.{i}.weight": shape, f"projector.projector.{i}.bias": shape[:1]}
    assert shapes == want


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "ldp"}, "connector kind must be one of mlp, vss-mlp, .*; got 'ldp'"),
        ({"scan": "spiral"}, "scan must be 'bidirectional' or 'cross', got 'spiral'"),
        ({"d_state": 0}, "d_state must be at least 1, got 0"),
        ({"expand": 0}, "expand must be at least 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ConnectorConfig(**settings)


def test_a_head_size_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="headdim must divide expand \\* d_model = 64, got 48"):
        build_connector(ConnectorConfig("mamba2-basic", headdim=48), 24, 32)
