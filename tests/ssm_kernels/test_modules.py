"""Mixers as modules: marks and attributes that other code reads, and layers put in the place of theirs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssm_kernels import causal_conv1d
from ssm_kernels.modules import Mamba, Mamba2, RMSNorm, conv_weight, is_plain

MIXERS = [
    (Mamba, {"d_state": 4}),
    (Mamba2, {"d_state": 4, "headdim": 8}),
    (Mamba2, {"d_state": 4, "headdim": 8, "d_ssm": 16}),
]
PROJECTIONS = {Mamba: ["in_proj", "x_proj", "dt_proj", "out_proj"], Mamba2: ["in_proj", "out_proj"]}


class Adapter(nn.Module):
    """A low-rank change around a layer, in the style of `peft`: `base_layer`, and its weight and bias as properties."""

    def __init__(self, base_layer: nn.Linear, dropout: float = 0.0, dtype: torch.dtype | None = None):
        super().__init__()
        self.base_layer, self.calls = base_layer, 0
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False, dtype=dtype)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False, dtype=dtype)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        self.calls += 1
        change = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))))
        y = self.base_layer(x)
        return y + change.to(y.dtype)


def merged(adapter: Adapter) -> nn.Linear:
    layer = copy.deepcopy(adapter.base_layer)
    with torch.no_grad():
        layer.weight += adapter.lora_B.weight @ adapter.lora_A.weight
    return layer


def gradients(mixer, x):
    y = mixer(x)
    y.square().sum().backward()
    return y


@pytest.mark.parametrize(("kind", "options"), MIXERS)
def test_parameters_have_the_marks_that_training_code_reads(kind, options):
    mixer = kind(16, **options)
    marked = {n for n, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "D"} | ({"dt_bias"} if kind is Mamba2 else set())
    kept = {n for n, p in mixer.named_parameters() if getattr(p, "_no_reinit", False)}
    assert kept == ({"dt_proj.bias"} if kind is Mamba else set())


def test_mixers_show_their_sizes():
    mixer = Mamba(16, d_state=4, d_conv=3, expand=1.5)
    assert (mixer.d_model, mixer.d_inner, mixer.d_state, mixer.d_conv, mixer.expand) == (16, 24, 4, 3, 1.5)
    assert mixer(torch.randn(2, 5, 16)).shape == (2, 5, 16)
    mixer = Mamba2(16, 4, 3, headdim=8, d_ssm=16, D_has_hdim=True, norm_before_gate=True)
    assert (mixer.d_model, mixer.d_inner, mixer.d_ssm, mixer.d_conv, mixer.expand) == (16, 32, 16, 3, 2)
    assert (mixer.D_has_hdim, mixer.rmsnorm, mixer.norm_before_gate) == (True, True, True)
    assert mixer.conv1d.padding == (2,) and mixer.D.shape == (16,)


@pytest.mark.parametrize(("kind", "options"), MIXERS)
def test_the_convolution_called_as_a_module_is_the_one_of_the_op(kind, options):
    conv = kind(16, **options).conv1d
    x = torch.randn(2, 9, conv.in_channels)
    weight, bias = conv_weight("conv1d", conv)
    want = causal_conv1d(x, weight, bias).y
    torch.testing.assert_close(conv(x.transpose(1, 2))[..., :9].transpose(1, 2), want)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"d_ssm": 40}, "d_ssm must be in"),
        ({"d_ssm": 12}, "headdim must divide d_ssm"),
        ({"headdim": 5}, "headdim must divide expand"),
        ({"ngroups": 3}, "ngroups"),
        ({"expand": 1.3}, "expand"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, name):
    with pytest.raises(ValueError, match=name):
        Mamba2(16, 4, **{"headdim": 8, **options})


@pytest.mark.parametrize("rmsnorm", [True, False])
@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("d_ssm", [None, 16])
@pytest.mark.parametrize("D_has_hdim", [True, False])
@pytest.mark.parametrize("lean", [True, False])
def test_mamba2_with_every_option_is_its_formula(rmsnorm, norm_before_gate, d_ssm, D_has_hdim, lean):
    torch.manual_seed(0)
    options = {"rmsnorm": rmsnorm, "norm_before_gate": norm_before_gate, "d_ssm": d_ssm, "D_has_hdim": D_has_hdim}
    mixer = Mamba2(16, 4, headdim=8, ngroups=2, use_mem_eff_path=lean, **options).double()
    with torch.no_grad():
        mixer.D.normal_()
        if rmsnorm:
            mixer.norm.weight.normal_()
    u = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    wanted = [u, *mixer.parameters()]
    want, got = step_by_step(mixer, u), mixer(u)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)  # the decay is computed from A_log in float32
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        state = mixer.new_state(2)
        steps = [mixer(u[:, :3], state), *(mixer(u[:, t : t + 1], state) for t in range(3, 7))]
    torch.testing.assert_close(torch.cat(steps, 1), got.detach(), rtol=1e-10, atol=1e-10)


def step_by_step(m: Mamba2, u):
    """Section 7 of arXiv 2405.21060, one step after the other."""
    G, N, H, P = m.ngroups, m.d_state, m.nheads, m.headdim
    mlp = m.d_inner - m.d_ssm
    gate, up, z, xBC, dt = (u @ m.in_proj.weight.T).split([mlp, mlp, m.d_ssm, m.d_ssm + 2 * G * N, H], -1)
    xBC = F.silu(F.conv1d(F.pad(xBC.transpose(1, 2), (3, 0)), m.conv1d.weight, m.conv1d.bias, groups=xBC.shape[-1]))
    x, B, C = xBC.transpose(1, 2).split([m.d_ssm, G * N, G * N], -1)
    x = x.unflatten(-1, (H, P))
    B, C = (t.unflatten(-1, (G, N)).repeat_interleave(H // G, 2) for t in (B, C))
    dt, A = F.softplus(dt + m.dt_bias), -m.A_log.exp()
    D = m.D.view(H, P) if m.D_has_hdim else m.D[:, None]
    h, ys = 0, []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        ys.append((h * C[:, t, :, None]).sum(-1) + D * x[:, t])
    y, silu = torch.stack(ys, 1).flatten(2), F.silu(z)
    if m.rmsnorm:
        y = y if m.norm_before_gate else y * silu
        y = y.unflatten(-1, (G, -1))
        y = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * m.norm.weight
        y = y * silu if m.norm_before_gate else y
    else:
        y = y * silu
    return torch.cat([F.silu(gate) * up, y], -1) @ m.out_proj.weight.T


@pytest.mark.parametrize("global_hook", [False, True])
@pytest.mark.parametrize(("kind", "options"), MIXERS)
def test_hooks_of_every_projection_run_once_and_change_no_gradient(kind, options, global_hook):
    torch.manual_seed(0)
    mixer, x = kind(16, **options), torch.randn(2, 5, 16, requires_grad=True)
    want = gradients(mixer, x)
    grads = {n: p.grad.clone() for n, p in mixer.named_parameters()}
    mixer.zero_grad()
    forward, backward = [], []
    names = {m: n for n, m in mixer.named_modules()}
    watched = [m for m in mixer.modules() if isinstance(m, nn.Linear | RMSNorm)]
    handles = []
    if global_hook:
        register = nn.modules.module.register_module_forward_hook
        handles.append(register(lambda m, i, o: forward.append(names[m]) if m in watched else None))
    else:
        for m in watched:
            handles.append(m.register_forward_hook(lambda m, i, o: forward.append(names[m])))
            handles.append(m.register_full_backward_hook(lambda m, i, o: backward.append(names[m])))
    try:
        y = gradients(mixer, x)
    finally:
        for handle in handles:
            handle.remove()
    expected = sorted(PROJECTIONS[kind] + (["norm"] if kind is Mamba2 else []))
    assert sorted(forward) == expected and (global_hook or sorted(backward) == expected)
    torch.testing.assert_close(y, want)
    for name, p in mixer.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], msg=name)


def test_a_hook_may_change_the_step_sizes():
    mixer, x = Mamba(16, 4), torch.randn(2, 5, 16)
    plain = mixer(x)
    mixer.dt_proj.register_forward_hook(lambda m, i, o: o + 1)
    changed = mixer(x)
    mixer.dt_proj._forward_hooks.clear()
    with torch.no_grad():
        mixer.dt_proj.bias += 1
    torch.testing.assert_close(changed, mixer(x))
    assert not torch.allclose(changed, plain)


@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize(("kind", "options"), MIXERS)
def test_an_adapter_on_any_projection_is_the_layer_with_merged_weights(kind, options, step):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for name in PROJECTIONS[kind]:
        mixer = kind(16, **options).double()
        whole = copy.deepcopy(mixer)
        adapter = Adapter(getattr(mixer, name), dtype=torch.float64)
        setattr(mixer, name, adapter)
        setattr(whole, name, merged(adapter))
        if step:
            with torch.no_grad():
                states = mixer.new_state(2), whole.new_state(2)
                for t in range(5):
                    got, want = (m(x[:, t : t + 1], s) for m, s in zip((mixer, whole), states, strict=True))
                    torch.testing.assert_close(got, want, msg=name)
            continue
        torch.testing.assert_close(gradients(mixer, x), gradients(whole, x), msg=name)
        assert adapter.calls == 1
        want = getattr(whole, name).weight.grad
        torch.testing.assert_close(adapter.base_layer.weight.grad, want, msg=name)
        torch.testing.assert_close(adapter.lora_A.weight.grad, adapter.lora_B.weight.T @ want, msg=name)


@pytest.mark.parametrize(("kind", "options"), MIXERS)
def test_dropout_of_adapters_is_drawn_once_for_forward_and_backward(kind, options):
    """A recomputation in the backward draws no new dropout: the gradient is that of the loss."""
    torch.manual_seed(0)
    mixer = kind(16, **options).double()
    for name in PROJECTIONS[kind]:
        setattr(mixer, name, Adapter(getattr(mixer, name), 0.5, torch.float64))
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    direction = {n: torch.randn_like(p) for n, p in mixer.named_parameters()}

    def loss(step):
        moved = copy.deepcopy(mixer)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                p += step * direction[name]
        torch.manual_seed(1)
        return moved, moved(x).square().sum()

    moved, value = loss(0.0)
    torch.rand(7)  # the random state goes on between forward and backward
    value.backward()
    slope = sum((p.grad * direction[n]).sum() for n, p in moved.named_parameters())
    torch.testing.assert_close(slope.item(), (loss(1e-5)[1] - loss(-1e-5)[1]).item() / 2e-5, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("kind", "options"), [*MIXERS, (Mamba, {"d_state": 4, "dt_bc_norm_eps": 1e-6})])
def test_adapters_and_hooks_in_bfloat16(kind, options, autocast):
    """With the bias of the step sizes in float32, as a model in half precision is loaded."""
    torch.manual_seed(0)
    mixer, x = kind(32, **options), torch.randn(2, 9, 32)
    if not autocast:
        mixer, x = mixer.bfloat16(), x.bfloat16()
        if kind is Mamba:
            mixer.dt_proj.bias.data = mixer.dt_proj.bias.data.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want = mixer(x)
    for name in PROJECTIONS[kind]:
        adapter = Adapter(getattr(mixer, name), dtype=torch.float32)
        nn.init.zeros_(adapter.lora_B.weight)
        setattr(mixer, name, adapter)
        adapter.register_forward_hook(lambda m, i, o: None)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = mixer(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want.float(), rtol=0.05, atol=0.02)
    got.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.filterwarnings("ignore")  # PyTorch moves its quantization to another package
@pytest.mark.parametrize(("kind", "options"), MIXERS)
def test_dynamically_quantized_mixers_run(kind, options):
    torch.manual_seed(0)
    mixer, x = kind(16, **options).eval(), torch.randn(2, 5, 16)
    quantized = torch.ao.quantization.quantize_dynamic(mixer, {nn.Linear}, dtype=torch.qint8)
    assert all(not isinstance(getattr(quantized, n), nn.Linear) for n in PROJECTIONS[kind])
    with torch.no_grad():
        want, got = mixer(x), quantized(x)
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.05 * want.abs().max().item())
        state = quantized.new_state(2)
        steps = torch.cat([quantized(x[:, t : t + 1], state) for t in range(5)], 1)
    torch.testing.assert_close(steps, got, rtol=0.1, atol=0.05 * want.abs().max().item())


@pytest.mark.parametrize(("kind", "options"), MIXERS)
def test_a_convolution_that_would_be_passed_by_is_refused(kind, options):
    mixer, x = kind(16, **options), torch.randn(1, 3, 16)
    want = mixer(x)
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        handle = getattr(mixer.conv1d, register)(lambda *arguments: None)
        with pytest.raises(TypeError, match="conv1d must be a plain torch.nn.Conv1d.*got one with hooks"):
            mixer(x)
        handle.remove()
    conv = mixer.conv1d
    conv.forward = conv.forward
    with pytest.raises(TypeError, match="got one with a forward of its own"):
        mixer(x)
    del conv.forward
    mixer.conv1d = nn.Sequential(conv)
    with pytest.raises(TypeError, match="conv1d must be a plain torch.nn.Conv1d.*got torch.nn.*Sequential"):
        mixer(x)
    mixer.conv1d = conv
    assert mixer(x).equal(want)


def test_a_parametrised_weight_is_computed_anew():
    class Twice(nn.Module):
        def forward(self, w):
            return 2 * w

    mixer, x = Mamba(16, 4), torch.randn(1, 3, 16)
    whole = copy.deepcopy(mixer)
    for name in ("conv1d", "dt_proj", "in_proj"):
        torch.nn.utils.parametrize.register_parametrization(getattr(mixer, name), "weight", Twice())
        with torch.no_grad():
            getattr(whole, name).weight *= 2
    assert is_plain(mixer.conv1d, nn.Conv1d) and is_plain(mixer.dt_proj, nn.Linear)
    torch.testing.assert_close(mixer(x), whole(x))


def test_layers_that_are_called_compile_as_one_graph():
    torch.manual_seed(0)
    mixer, x = Mamba(16, 4), torch.randn(2, 5, 16)
    mixer.dt_proj = Adapter(mixer.dt_proj)
    got = torch.compile(mixer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, mixer(x))


def test_initial_step_sizes_survive_an_initialization_that_reads_the_mark():
    def initialize(module):
        if isinstance(module, nn.Linear) and module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)

    mixer = Mamba(64, bias=True)
    mixer.apply(initialize)
    steps = F.softplus(mixer.dt_proj.bias.detach())
    assert 1e-4 <= steps.min() and steps.max() <= 0.1 + 1e-6 and not mixer.in_proj.bias.any()
