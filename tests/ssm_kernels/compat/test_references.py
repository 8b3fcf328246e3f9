"""Functions whose names end in `_ref`, and what is held against them: complex A, norms, packs, Vim's mixers."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssm_kernels.compat import mamba_ssm as compat
from ssm_kernels.compat.mamba_ssm import layer_norm, layernorm_gated, ssd
from ssm_kernels.compat.mamba_ssm import selective_scan as scans
from tests.ssm_kernels.makers import leaf, negative_leaf

BATCH, LENGTH, DIM, STATE, WIDTH = 2, 7, 6, 3, 4
HEADS, HEADDIM, GROUPS = 4, 3, 2


def gradients(output, inputs):
    weights = torch.cos(torch.arange(output.numel(), dtype=torch.float64)).view(output.shape)
    return torch.autograd.grad((output * weights).sum(), inputs, allow_unused=True, retain_graph=True)


def assert_same(got, want, *inputs):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    inputs = [t for t in inputs if t is not None]
    for g, w in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-8)


@pytest.fixture
def complex_A():
    return torch.complex(negative_leaf(DIM, STATE).detach(), leaf(DIM, STATE, seed=1).detach()).requires_grad_()


@pytest.mark.parametrize("kind", ["constant", "shared", "groups"])
@pytest.mark.parametrize("full", [False, True])
def test_a_scan_with_a_complex_A(complex_A, kind, full):
    """Against the same scan written with real numbers: each complex state is a rotated and scaled pair."""
    u, delta = leaf(BATCH, DIM, LENGTH), leaf(BATCH, DIM, LENGTH, seed=1)
    shapes = {"constant": (DIM, STATE, 2), "shared": (BATCH, STATE, LENGTH, 2), "groups": (BATCH, 2, STATE, LENGTH, 2)}
    parts = [leaf(*shapes[kind], seed=s) for s in (2, 3)]
    given = [torch.view_as_complex(p) if kind == "constant" else p.flatten(-2) for p in parts]
    D, z, bias = (leaf(DIM), leaf(BATCH, DIM, LENGTH, seed=4), leaf(DIM, seed=5)) if full else (None,) * 3
    y, last = compat.selective_scan_fn(u, delta, complex_A, *given, D, z, bias, full, return_last_state=True)

    def each(p):  # (B, D, N, L, 2)
        if kind == "constant":
            return p[None, :, :, None].expand(BATCH, -1, -1, LENGTH, -1)
        p = p.unsqueeze(1) if kind == "shared" else p
        return p.repeat_interleave(DIM // p.shape[1], 1)

    dt = delta if bias is None else delta + bias[:, None]
    dt = F.softplus(dt) if full else dt
    (b_re, b_im), (c_re, c_im) = (each(p).unbind(-1) for p in parts)
    re = im = torch.zeros(BATCH, DIM, STATE, dtype=torch.float64)
    ys = []
    for t in range(LENGTH):
        step = dt[..., t, None]
        size, angle = torch.exp(step * complex_A.real), step * complex_A.imag
        re, im = (
            size * (re * torch.cos(angle) - im * torch.sin(angle)) + step * u[..., t, None] * b_re[..., t],
            size * (re * torch.sin(angle) + im * torch.cos(angle)) + step * u[..., t, None] * b_im[..., t],
        )
        ys.append(2 * (re * c_re[..., t] - im * c_im[..., t]).sum(-1))
    want = torch.stack(ys, -1)
    if full:
        want = (want + D[:, None] * u) * F.silu(z)
    assert_same(y, want, u, delta, complex_A, *parts, D, z, bias)
    torch.testing.assert_close(last, torch.complex(re, im))


def test_a_complex_A_is_logged_as_slow_once(complex_A, caplog, monkeypatch):
    monkeypatch.setattr(scans, "_already_logged", set())
    u, B = leaf(1, DIM, 2), leaf(1, STATE, 4)
    with caplog.at_level(logging.WARNING, "ssm_kernels"):
        for _ in range(2):
            y = compat.selective_scan_fn(u.float(), u.float(), complex_A.to(torch.complex64), B.float(), B.float())
    assert len(caplog.messages) == 1 and "complex A" in caplog.messages[0]
    assert y.dtype == torch.float32


@pytest.fixture
def mixer():
    rank = 2
    xz, conv, bias = leaf(BATCH, 2 * DIM, LENGTH), leaf(DIM, 1, WIDTH), leaf(DIM)
    x_proj, dt_proj, out = leaf(rank + 2 * STATE, DIM), leaf(DIM, rank), leaf(5, DIM)
    return [xz, conv, bias, x_proj, dt_proj, out, None]


def test_the_mixer_with_a_complex_A(mixer, complex_A):
    """A complex A whose imaginary parts are zero, with real B and C, gives twice what the real A gives."""
    real = complex_A.real.detach().requires_grad_()
    y = compat.mamba_inner_fn(*mixer, real, delta_bias=leaf(DIM, seed=7))
    x_proj = mixer[3].detach()
    twice = torch.stack([x_proj[2:], torch.zeros_like(x_proj[2:])], 1).flatten(0, 1)  # imaginary parts between
    mixer[3] = torch.cat([x_proj[:2], twice])
    got = compat.mamba_inner_fn(*mixer, torch.complex(real, torch.zeros_like(real)), delta_bias=leaf(DIM, seed=7))
    assert_same(got, 2 * y, mixer[0], real)


@pytest.mark.parametrize("given", [False, True])
def test_norms_of_the_mixer(mixer, given):
    """B and C that are given are normalized too where they change in time."""
    B = C = None
    if given:
        B, C = leaf(BATCH, 1, STATE, LENGTH, seed=8), leaf(BATCH, 1, STATE, LENGTH, seed=9)
    weights = {"b_rms_weight": leaf(STATE), "c_rms_weight": leaf(STATE, seed=2), "dt_rms_weight": leaf(DIM, seed=3)}
    arguments = (*mixer, negative_leaf(DIM, STATE), B, C, leaf(DIM, seed=4), leaf(DIM, seed=5))
    got, want = (f(*arguments, **weights) for f in (compat.mamba_inner_fn, compat.mamba_inner_ref))
    assert_same(got, want, *arguments, *weights.values())


def test_the_mixers_of_vim(mixer):
    A, A_b, D, bias = negative_leaf(DIM, STATE), negative_leaf(DIM, STATE, seed=1), leaf(DIM, seed=4), leaf(DIM, seed=5)
    y = compat.mamba_inner_fn_no_out_proj(*mixer[:5], A, D=D, delta_bias=bias)
    assert y.shape == (BATCH, DIM, LENGTH)
    whole = compat.mamba_inner_fn(*mixer, A, D=D, delta_bias=bias)
    torch.testing.assert_close(F.linear(y.transpose(1, 2), mixer[5]), whole)
    biases = {"B_proj_bias": leaf(STATE, seed=6), "C_proj_bias": leaf(STATE, seed=7)}
    got, want = (
        f(*mixer, A, A_b, D=D, delta_bias=bias, **biases) for f in (compat.bimamba_inner_fn, compat.bimamba_inner_ref)
    )
    assert_same(got, want, *mixer, A, A_b, D, bias, *biases.values())
    with pytest.raises(NotImplementedError, match="B must be None"):
        compat.bimamba_inner_fn(*mixer, A, A_b, B=A)


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_convolutions(states, activation):
    x, weight, bias = leaf(BATCH, DIM, LENGTH), leaf(DIM, WIDTH), leaf(DIM)
    before = leaf(BATCH, DIM, WIDTH - 1) if states else None
    options = {"initial_states": before, "return_final_states": True, "activation": activation}
    got, want = (f(x, weight, bias, **options) for f in (compat.causal_conv1d_fn, compat.causal_conv1d_ref))
    assert_same(got[0], want[0], x, weight, bias, before)
    torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("shape", [(BATCH, DIM), (BATCH, DIM, 1), (BATCH, DIM, 5)])
def test_steps_of_the_convolution(ring, shape):
    x, weight, bias = (leaf(*s).detach() for s in (shape, (DIM, WIDTH), (DIM,)))
    state = leaf(BATCH, DIM, WIDTH, seed=3).detach()
    seen = torch.tensor([2, 5]) if ring else None
    other = state.clone()
    got = compat.causal_conv1d_update(x, state, weight, bias, "silu", seen)
    torch.testing.assert_close(got, compat.causal_conv1d_update_ref(x, other, weight, bias, "silu", seen))
    torch.testing.assert_close(state, other)


@pytest.mark.parametrize("state_len", [1, 3, 5])
def test_states_of_a_pack(state_len):
    x, bounds = leaf(9, DIM), torch.tensor([0, 2, 2, 7, 9], dtype=torch.int32)
    got = compat.causal_conv1d_varlen_states(x, bounds, state_len)
    assert got.equal(compat.causal_conv1d_varlen_states_ref(x, bounds, state_len))
    assert got[3, :, -1].equal(x[8]) and not got[1].any()
    assert compat.causal_conv1d_varlen_states(x[:0], bounds[:1].repeat(2), 3).equal(x.new_zeros(1, DIM, 3))
    # A decoding step continues from it.
    state = got[2:3].detach().clone()
    if state_len >= WIDTH - 1:
        weight, new = leaf(DIM, WIDTH).detach(), leaf(1, DIM, seed=5).detach()
        whole = torch.cat([x[2:7].detach(), new]).T.unsqueeze(0)
        want = compat.causal_conv1d_fn(whole, weight)[..., -1]
        torch.testing.assert_close(compat.causal_conv1d_update(new, state, weight), want)


@pytest.mark.parametrize("heads", [False, True])
def test_steps_of_the_scan(heads):
    each, groups = ((HEADS, HEADDIM), (GROUPS,)) if heads else ((DIM,), ())
    state = leaf(BATCH, *each, STATE).detach()
    x, dt, z = (leaf(BATCH, *each, seed=s).detach() for s in (1, 2, 3))
    A, B, C = negative_leaf(*each, STATE).detach(), *(leaf(BATCH, *groups, STATE, seed=s).detach() for s in (4, 5))
    D, bias = (leaf(*each, seed=s).detach() for s in (6, 7))
    other = state.clone()
    got = compat.selective_state_update(state, x, dt, A, B, C, D, z, bias, True)
    torch.testing.assert_close(got, compat.selective_state_update_ref(other, x, dt, A, B, C, D, z, bias, True))
    torch.testing.assert_close(state, other)


@pytest.mark.parametrize("full", [False, True])
def test_the_scan_of_mamba2(full):
    x, dt, A = leaf(BATCH, LENGTH, HEADS, HEADDIM), leaf(BATCH, LENGTH, HEADS, seed=1), negative_leaf(HEADS)
    B, C = (leaf(BATCH, LENGTH, GROUPS, STATE, seed=s) for s in (2, 3))
    D, z, bias = (leaf(HEADS, HEADDIM), leaf(*x.shape, seed=4), leaf(HEADS, seed=5)) if full else (None,) * 3
    softplus = full
    dt = dt if full else dt.detach().abs().requires_grad_()
    want = compat.ssd_chunk_scan_combined_ref(x, dt, A, B, C, 4, D, z, bias, softplus)
    got = compat.mamba_chunk_scan(x, dt, A, B, C, 4, D, z, bias, softplus)
    assert_same(got, want, x, dt, A, B, C, D, z, bias)
    assert_same(compat.ssd_selective_scan(x, dt, A, B, C, D, z, bias, softplus), want, x, dt, A, B, C, D, z, bias)
    got = compat.mamba_chunk_scan_combined(
        x, dt, A, B, C, 4, D, z, bias, dt_softplus=softplus, state_dtype=torch.float64, return_final_states=True
    )
    torch.testing.assert_close(got[0], want)
    assert got[1].dtype == torch.float64


def test_a_scan_whose_channels_have_their_own_steps():
    x, dt = leaf(BATCH, LENGTH, HEADS, HEADDIM), leaf(BATCH, LENGTH, HEADS, HEADDIM, seed=1)
    A, bias = negative_leaf(HEADS * HEADDIM, STATE), leaf(HEADS, HEADDIM, seed=2)
    B, C = (leaf(BATCH, LENGTH, GROUPS, STATE, seed=s) for s in (3, 4))
    got = compat.ssd_selective_scan(x, dt, A, B, C, dt_bias=bias, dt_softplus=True, dt_limit=(0.2, 1.0))
    for h in range(HEADS):
        for p in range(HEADDIM):
            rate = A[h * HEADDIM + p].detach()
            state, group = torch.zeros(BATCH, STATE, dtype=torch.float64), h // (HEADS // GROUPS)
            for t in range(LENGTH):
                step = F.softplus(dt[:, t, h, p] + bias[h, p]).clamp(0.2, 1.0)[:, None]
                state = torch.exp(step * rate) * state + step * x[:, t, h, p, None] * B[:, t, group]
                torch.testing.assert_close(got[:, t, h, p], (state * C[:, t, group]).sum(-1))


@pytest.mark.parametrize("norm", ["none", "before", "after"])
def test_the_mixer_of_mamba2(norm):
    inner, channels = HEADS * HEADDIM, HEADS * HEADDIM + 2 * GROUPS * STATE
    zxbcdt, conv, conv_bias = leaf(BATCH, LENGTH, inner + channels + HEADS), leaf(channels, WIDTH), leaf(channels)
    dt_bias, A, D, out = leaf(HEADS, seed=1), negative_leaf(HEADS), leaf(HEADS, seed=2), leaf(5, inner)
    weight = None if norm == "none" else leaf(inner)
    options = {"rmsnorm_weight": weight, "outproj_weight": out, "headdim": HEADDIM, "ngroups": GROUPS}
    options |= {"dt_limit": (0.1, 2.0), "norm_before_gate": norm == "before"}
    arguments = (zxbcdt, conv, conv_bias, dt_bias, A, D)
    got = compat.mamba_split_conv1d_scan_combined(*arguments, 4, **options, state_dtype=torch.float32)
    want = compat.mamba_split_conv1d_scan_ref(*arguments, 4, **options)
    assert_same(got, want, *arguments, weight, out)


@pytest.mark.parametrize("initial", [False, True])
def test_the_minimal_scan_of_mamba2(initial):
    X, dt, A = leaf(BATCH, 8, HEADS, HEADDIM), leaf(BATCH, 8, HEADS, seed=1).detach().abs(), negative_leaf(HEADS)
    B, C = (leaf(BATCH, 8, HEADS, STATE, seed=s) for s in (2, 3))
    before = leaf(BATCH, HEADS, HEADDIM, STATE) if initial else None
    want = compat.mamba_chunk_scan_combined(
        X, dt, A, B, C, 4, initial_states=before, return_final_states=True
    )  # fmt: skip
    start = before.unsqueeze(1) if initial else None
    got = compat.ssd_minimal_discrete(X * dt.unsqueeze(-1), A * dt, B, C, 2, start)
    assert_same(got[0], want[0], X, A, B, C, before)
    torch.testing.assert_close(got[1], want[1])
    sums = ssd.segsum(torch.tensor([1.0, 2.0, 4.0]))
    assert sums.tolist() == [[0, -math.inf, -math.inf], [2, 0, -math.inf], [6, 4, 0]]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", ["no", "before", "after"])
@pytest.mark.parametrize("group_size", [None, 3])
@pytest.mark.parametrize("rms", [False, True])
def test_gated_norms(bias, gate, group_size, rms):
    x, weight = leaf(BATCH, LENGTH, DIM), leaf(DIM)
    bias, z = leaf(DIM, seed=1) if bias else None, None if gate == "no" else leaf(BATCH, LENGTH, DIM, seed=2)
    options = (z, 0.01, group_size, gate == "after")
    got = layernorm_gated.layernorm_fn(x, weight, bias, *options, is_rms_norm=rms)
    if rms:
        want = layernorm_gated.rms_norm_ref(x, weight, bias, *options)
    else:
        y = x * F.silu(z) if gate == "before" else x
        y = y.unflatten(-1, (-1, group_size or DIM))
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 0.01).sqrt()
        want = y.flatten(-2) * weight + (0 if bias is None else bias)
        want = want * F.silu(z) if gate == "after" else want
    assert_same(got, want, x, weight, bias, z)


def test_modules_of_gated_norms():
    x, z = torch.randn(2, 5, DIM), torch.randn(2, 5, DIM)
    norm = layernorm_gated.LayerNorm(DIM, group_size=3, norm_before_gate=False)
    assert {n: p.shape for n, p in norm.named_parameters()} == {"weight": (DIM,), "bias": (DIM,)}
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    assert norm(x, z).equal(layernorm_gated.layernorm_fn(x, norm.weight, norm.bias, z, 1e-5, 3, False))
    norm = layernorm_gated.RMSNorm(DIM, eps=0.1, dtype=torch.bfloat16)
    assert [n for n, _ in norm.named_parameters()] == ["weight"] and norm.weight.dtype == torch.bfloat16
    assert norm(x, z).equal(layernorm_gated.rmsnorm_fn(x, norm.weight, None, z, 0.1))


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_norms_of_the_residual_sum(rms, second):
    x, weight, bias, residual = leaf(2, 5, DIM), leaf(DIM), leaf(DIM, seed=1), leaf(2, 5, DIM, seed=2)
    pair = (leaf(2, 5, DIM, seed=3), leaf(DIM, seed=4), leaf(DIM, seed=5)) if second else (None,) * 3
    arguments = (x, weight, bias, residual, *pair)
    *got, mask, mask1 = layer_norm.layer_norm_fn(
        *arguments, eps=0.01, dropout_p=0.5, prenorm=True, is_rms_norm=rms, return_dropout_mask=True
    )
    reference = layer_norm.rms_norm_ref if rms else layer_norm.layer_norm_ref
    want = reference(*arguments, eps=0.01, dropout_p=0.5, prenorm=True, dropout_mask=mask, dropout_mask1=mask1)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


def test_the_first_forms_of_the_norms():
    x, weight, bias, residual = (leaf(*s).detach() for s in ((5, DIM), (DIM,), (DIM,), (5, DIM)))
    for fn in (layer_norm.layer_norm_fn, layer_norm.layer_norm_fn_v1):
        y, total = fn(x, weight, bias, residual, eps=0.1, prenorm=True)
        torch.testing.assert_close(y, layer_norm.layer_norm_ref(x, weight, bias, residual, eps=0.1))
        assert total.equal(x + residual)
    got = layer_norm.rms_norm_fn_v1(x, weight, None, residual, False, False, 0.1)
    assert got.equal(layer_norm.layer_norm_fn_v1(x, weight, None, residual, 0.1, False, False, True))
    norm = layer_norm.RMSNorm(DIM, eps=0.1).double()
    y, total = norm(x.float(), residual.float(), prenorm=True, residual_in_fp32=True)
    torch.testing.assert_close(y, F.rms_norm(total, (DIM,), norm.weight.float(), 0.1))
    linear, shift = leaf(4, DIM).detach(), leaf(4).detach()
    got, total = layer_norm.layer_norm_linear_fn(x, weight, bias, linear, shift, residual, prenorm=True)
    torch.testing.assert_close(got, F.linear(layer_norm.layer_norm_fn(x, weight, bias, residual), linear, shift))
    assert total.equal(x + residual)


def test_dropout_of_the_norm_is_for_training():
    norm, x = layer_norm.RMSNorm(64, dropout_p=0.5), torch.ones(8, 64)
    _, total = norm(x, prenorm=True)
    assert set(total.unique().tolist()) == {0.0, 2.0}
    assert norm.eval()(x, prenorm=True)[1].equal(x)
