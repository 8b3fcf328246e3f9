"""ML-Mamba's scan: an independent computation, and the names and sizes of its checkpoint."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ssm_kernels import causal_conv1d, ssd
from vlmamba.connectors import ConnectorConfig, GridMamba2, build_connector


def test_ml_mambas_mixer_flips_the_projected_sequence_and_averages():
    torch.manual_seed(0)
    mixer = GridMamba2(16, ConnectorConfig("mamba2-advanced", d_state=4, headdim=8)).double()
    with torch.no_grad():
        for name in ("dt_bias_b", "A_log_b", "D_b"):
            getattr(mixer, name).add_(0.3)
    x = torch.randn(2, 3, 4, 16, dtype=torch.float64)
    u = mixer.in_proj(x).flatten(1, 2)

    def one_direction(u, suffix):
        part = {n: getattr(mixer, n + suffix) for n in ("conv1d", "dt_bias", "A_log", "D")}
        z, xBC, dt = u.split([32, 32 + 8, 4], dim=-1)
        xBC = causal_conv1d(xBC, part["conv1d"].weight[:, 0], part["conv1d"].bias, backend="reference").y
        inner, B, C = F.silu(xBC).split([32, 4, 4], dim=-1)
        y, _ = ssd(
            inner.unflatten(2, (4, 8)), dt, -part["A_log"].exp(), B.unsqueeze(2), C.unsqueeze(2), part["D"],
            dt_bias=part["dt_bias"], dt_softplus=True, backend="reference",
        )  # fmt: skip
        y = y.flatten(2) * F.silu(z)
        return y / torch.sqrt(y.square().mean(-1, keepdim=True) + 1e-5) * mixer.norm.weight

    want = mixer.out_proj((one_direction(u, "") + one_direction(u.flip(1), "_b").flip(1)) / 2).unflatten(1, (3, 4))
    torch.testing.assert_close(mixer(x), want, rtol=1e-6, atol=1e-6)


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


def test_a_head_size_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="headdim must divide expand \\* d_model = 64, got 48"):
        build_connector(ConnectorConfig("mamba2-basic", headdim=48), 24, 32)
