"""A decoding step of all layers by one compiled kernel."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ssm_kernels import use_backend
from ssm_kernels._numba import threads
from ssm_kernels.modules import Mamba, Mamba2, QuantizedLinear, RMSNorm, fuse_step, obstacle_to_fusing

pytest.importorskip("numba")

# Sizes of whole vectors; and of none, with what is optional.
MAMBA = [
    {"d_model": 32, "d_state": 16},
    {"d_model": 21, "d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 7, "conv_bias": False, "bias": True,
     "dt_bc_norm_eps": 1e-3},
]  # fmt: skip
MAMBA2 = [
    {"d_model": 32, "d_state": 16, "headdim": 16},
    {"d_model": 21, "d_state": 5, "d_conv": 2, "headdim": 7, "ngroups": 2, "conv_bias": False, "bias": True,
     "dt_limit": (0.01, 0.05), "norm_before_gate": True},
    {"d_model": 24, "d_state": 5, "headdim": 4, "D_has_hdim": True, "rmsnorm": False},
]  # fmt: skip
CASES = [(Mamba, options) for options in MAMBA] + [(Mamba2, options) for options in MAMBA2]


def make(kind, options, dtype=torch.float32, vocabulary=37):
    """Two layers with random weights: norm and mixer of each, the last norm, and the head."""
    torch.manual_seed(0)
    width = options["d_model"]
    layers = [(RMSNorm(width), kind(**options)) for _ in range(2)]
    norm, head = RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
    for module in (norm, head, *(m for layer in layers for m in layer)):
        module.to(dtype).requires_grad_(False)
        for p in module.parameters():
            p += 0.05 * torch.randn_like(p)
    return layers, norm, head


def step_by_layers(layers, norm, head, states, embeddings):
    """The step by the modules: embeddings (B, D) -> logits (B, V)."""
    residual = embeddings.unsqueeze(1).float()
    for (layer_norm, mixer), state in zip(layers, states, strict=True):
        hidden = layer_norm(residual).to(head.weight.dtype)
        residual = residual + mixer(hidden, state)
    return head(norm(residual).to(head.weight.dtype))[:, 0].float()


# The modules round to bfloat16 after every op, the fused step does not.
TOLERANCE = {torch.float32: {"rtol": 2e-5, "atol": 2e-5}, torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_several_tokens_are_those_of_single_steps(kind, options, dtype):
    """Bit for bit, from the state in the first row of each sequence; and each row keeps the state after its token."""
    layers, norm, head = model = make(kind, options, dtype)
    tokens, sequences = 3, 2
    embeddings = torch.randn(4, sequences, tokens, options["d_model"]).to(dtype)
    one, several = ([m.new_state(b) for _, m in layers] for b in (sequences, sequences * tokens))
    step, step_several = fuse_step(*model, one), fuse_step(*model, several, tokens)
    for turn in embeddings:
        logits = step_several(turn.flatten(0, 1)).clone().unflatten(0, (sequences, tokens))
        for t in range(tokens):
            assert torch.equal(logits[:, t], step(turn[:, t]))
            for a, b in zip(one, several, strict=True):
                assert torch.equal(a.conv, b.conv[t::tokens]) and torch.equal(a.ssm, b.ssm[t::tokens])
        for state in several:
            for part in state:
                part[::tokens] = part[tokens - 1 :: tokens]
    with pytest.raises(ValueError, match="tokens must divide the 6 rows of the states, got 4"):
        fuse_step(*model, several, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_steps_are_those_of_the_modules(kind, options, dtype, monkeypatch):
    monkeypatch.setattr(threads, "MIN_WORK", 1)
    model = make(kind, options, dtype)
    layers, _, head = model
    states, expected_states = ([m.new_state(3) for _, m in layers] for _ in range(2))
    step = fuse_step(*model, states)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad(), use_backend("reference"):
            for _ in range(4):
                embeddings = torch.randn(3, options["d_model"]).to(dtype)
                expected = step_by_layers(*model, expected_states, embeddings)
                torch.testing.assert_close(step(embeddings), expected, **TOLERANCE[dtype])
    finally:
        torch.set_num_threads(before)
    for got, want in zip(states, expected_states, strict=True):
        torch.testing.assert_close(got.conv, want.conv, **TOLERANCE[dtype])
        torch.testing.assert_close(got.ssm, want.ssm, **TOLERANCE[dtype])


def quantize(layer, bits):
    """A quantized layer with random integers, and weights of the size of the layer's."""
    new = QuantizedLinear(layer.in_features, layer.out_features, bits, layer.bias is not None)
    new.qdata.data = torch.randint(-127 if bits == 8 else 0, 128 if bits == 8 else 256, new.qdata.shape).to(new.qdata)
    new.scale.data = (torch.rand(new.scale.shape) * (0.004 if bits == 8 else 0.06)).to(new.scale)
    if layer.bias is not None:
        new.bias = layer.bias
    return new


@pytest.mark.parametrize(
    ("kind", "options", "bits"), [(Mamba, {"d_model": 21, "d_state": 5, "bias": True}, 8), (Mamba2, MAMBA2[0], 4)]
)
def test_quantized_weights_are_read_as_they_are(kind, options, bits):
    """In bfloat16 with A_log, D and the bias of dt in float32, as a checkpoint is loaded."""
    layers, norm, head = make(kind, options, torch.bfloat16)
    for _, mixer in layers:
        for name in ("in_proj", "x_proj", "out_proj"):
            if hasattr(mixer, name):
                setattr(mixer, name, quantize(getattr(mixer, name), bits))
        for p in (mixer.A_log, mixer.D, mixer.dt_proj.bias if kind is Mamba else mixer.dt_bias):
            p.data = p.data.float()
    head = quantize(head, bits)
    states = [m.new_state(1) for _, m in layers]
    step = fuse_step(layers, norm, head, states)
    # The modules in float32: they round nothing in between either.
    exact = [(copy.deepcopy(n).float(), copy.deepcopy(m).float()) for n, m in layers]
    exact_states = [m.new_state(1) for _, m in exact]
    for _ in range(3):
        embeddings = torch.randn(1, options["d_model"]).bfloat16()
        with torch.no_grad(), use_backend("reference"):
            residual = embeddings.unsqueeze(1).float()
            for (layer_norm, mixer), state in zip(exact, exact_states, strict=True):
                residual = residual + mixer(layer_norm(residual), state)
            expected = head(copy.deepcopy(norm).float()(residual))[:, 0]
        torch.testing.assert_close(step(embeddings), expected, rtol=3e-2, atol=3e-2)
    layers[0][1].in_proj = quantize(nn.Linear(64, layers[0][1].in_proj.out_features), 12 - bits)
    assert "bits of quantized weights" in obstacle_to_fusing(layers, norm, head)


@pytest.mark.parametrize("kind", [Mamba, Mamba2])
def test_the_number_of_threads_changes_no_bit(kind, monkeypatch):
    monkeypatch.setattr(threads, "MIN_WORK", 1)
    options = (MAMBA if kind is Mamba else MAMBA2)[0]
    model = make(kind, options, vocabulary=500)
    results = []
    before = torch.get_num_threads()
    for n in (1, 3):
        torch.set_num_threads(n)
        torch.manual_seed(1)
        states = [m.new_state(1) for _, m in model[0]]
        step = fuse_step(*model, states)
        with torch.no_grad():
            results.append([step(torch.randn(1, 32)).clone() for _ in range(20)])
    torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


def test_changes_in_place_count_and_moved_weights_are_noticed():
    model = make(Mamba, MAMBA[0])
    layers, norm, head = model
    step = fuse_step(*model, [m.new_state(1) for _, m in layers])
    x = torch.randn(1, 32)
    with torch.no_grad():
        head.weight.mul_(0)
        assert not step(x).any()
        layers[1][1].x_proj.weight.data = layers[1][1].x_proj.weight.clone()
        assert step(x) is None


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def _adapt(layers, norm, head):
    layers[1][1].x_proj = Adapted(64, 34, bias=False)


def _hook(layers, norm, head):
    layers[0][1].out_proj.register_forward_hook(lambda *_: None)


def _parametrize(layers, norm, head):
    nn.utils.parametrize.register_parametrization(head, "weight", nn.Identity())


def _mix_dtypes(layers, norm, head):
    layers[0][1].A_log.data = layers[0][1].A_log.double()


def _mix_sizes(layers, norm, head):
    layers[0] = (layers[0][0], Mamba(32, d_state=8))


def _transpose(layers, norm, head):
    head.weight = nn.Parameter(torch.randn(32, 37).T)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_adapt, "Adapted is adapted"),
        (_hook, "Linear is adapted, quantized, hooked"),
        (_parametrize, "ModuleDict is adapted"),
        (_mix_dtypes, "float32, torch.float64, not all"),
        (_mix_sizes, "not all Mamba or all Mamba2, of the same sizes"),
        (_transpose, "not all plain contiguous"),
    ],
)
def test_layers_that_would_be_bypassed_are_an_obstacle(change, reason):
    model = make(Mamba, MAMBA[0])
    assert obstacle_to_fusing(*model) is None
    change(*model)
    assert reason in obstacle_to_fusing(*model)
    with pytest.raises(ValueError, match="layers must be ones that can be fused, but"):
        fuse_step(*model, [m.new_state(1) for _, m in model[0]])


def test_an_mlp_in_the_mixer_and_a_state_of_another_dtype_are_refused():
    assert "have an MLP" in obstacle_to_fusing(*make(Mamba2, {"d_model": 32, "d_ssm": 32, "headdim": 16, "d_state": 8}))
    model = make(Mamba, MAMBA[0])
    states = [m.new_state(1) for _, m in model[0]]
    states[1] = states[1]._replace(conv=states[1].conv.double())
    with pytest.raises(ValueError, match="states must be contiguous, in torch.float32 and torch.float32"):
        fuse_step(*model, states)
