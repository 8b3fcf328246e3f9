"""Modules of mamba_ssm: attributes, dtypes, and decoding with caches, against formulas written out in float64."""

from __future__ import annotations

import inspect
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssm_kernels.compat import mamba_ssm as compat
from ssm_kernels.compat.mamba_ssm import MHA, Block, GatedMLP, InferenceParams, Mamba, Mamba2, Mamba2Simple
from ssm_kernels.compat.mamba_ssm.layer_norm import RMSNorm
from ssm_kernels.modules import is_plain
from tests.ssm_kernels.makers import random_tensor

WIDTH = 16
EXACT = {"rtol": 1e-10, "atol": 1e-10}
MIXERS = {
    "mamba": partial(Mamba, WIDTH, 4, layer_idx=3),
    "mamba, 1.5 times wide": partial(Mamba, WIDTH, 4, 3, 1.5, layer_idx=3, bias=True),
    "mamba2": partial(Mamba2, WIDTH, 4, headdim=8, ngroups=2, layer_idx=3),
    "mamba2, MLP beside": partial(Mamba2, WIDTH, 4, headdim=8, d_ssm=16, D_has_hdim=True, layer_idx=3),
    "mamba2, no norm": partial(Mamba2, WIDTH, 4, headdim=8, rmsnorm=False, dt_limit=(0.01, 0.5), layer_idx=3),
    "mamba2, gate after": partial(Mamba2, WIDTH, 4, headdim=8, norm_before_gate=True, bias=True, layer_idx=3),
}


def drawn(make):
    """A module in float64 whose parameters are none of them at a special value."""
    torch.manual_seed(0)
    module = make().double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def channels(mixer):
    return mixer.conv1d.in_channels


def inputs_of_the_convolution(mixer, u):
    projected = u @ mixer.in_proj.weight.T + (0 if mixer.in_proj.bias is None else mixer.in_proj.bias)
    first = 0 if isinstance(mixer, Mamba) else 2 * mixer.d_mlp + mixer.d_ssm
    return projected[..., first : first + channels(mixer)]


SIGNATURES = {
    Mamba2Simple: "d_model d_state d_conv conv_init expand headdim ngroups A_init_range dt_min dt_max dt_init_floor "
    "dt_limit learnable_init_states activation bias conv_bias chunk_size use_mem_eff_path deterministic layer_idx "
    "device dtype",
    MHA: "embed_dim num_heads num_heads_kv head_dim mlp_dim qkv_proj_bias out_proj_bias softmax_scale causal layer_idx "
    "d_conv rotary_emb_dim rotary_emb_base rotary_emb_interleaved device dtype",
    GatedMLP: "in_features hidden_features out_features activation bias multiple_of device dtype",
    Block: "dim mixer_cls mlp_cls norm_cls fused_add_norm residual_in_fp32",
    InferenceParams: "max_seqlen max_batch_size seqlen_offset batch_size_offset key_value_memory_dict "
    "lengths_per_sample",
    Mamba.step: "self hidden_states conv_state ssm_state",
    Mamba2.step: "self hidden_states conv_state ssm_state",
    Mamba2.forward: "self u seqlen seq_idx cu_seqlens inference_params",
    Mamba.allocate_inference_cache: "self batch_size max_seqlen dtype kwargs",
    Mamba2._get_states_from_cache: "self inference_params batch_size initialize_states",
    Block.forward: "self hidden_states residual inference_params mixer_kwargs",
    MHA.forward: "self x inference_params",
}


@pytest.mark.parametrize("of", SIGNATURES)
def test_arguments_come_in_the_original_order(of):
    assert list(inspect.signature(of).parameters) == SIGNATURES[of].split()


def test_attributes_are_the_originals():
    m = Mamba(WIDTH, 4, 3, 1.5, layer_idx=7, use_fast_path=False)
    assert (m.d_model, m.d_state, m.d_conv, m.expand, m.d_inner, m.dt_rank, m.layer_idx) == (16, 4, 3, 1.5, 24, 1, 7)
    assert m.activation == "silu" and isinstance(m.act, nn.SiLU) and m.use_fast_path is False
    m.use_fast_path = True
    assert m.use_mem_eff_path and m.conv1d.padding == (2,) and m.conv1d.kernel_size == (3,)
    m = Mamba2(WIDTH, 4, 4, 0.1, headdim=8, d_ssm=16, D_has_hdim=True, layer_idx=7)
    assert (m.d_inner, m.d_ssm, m.headdim, m.nheads, m.ngroups, m.chunk_size, m.layer_idx) == (32, 16, 8, 2, 1, 256, 7)
    assert (m.rmsnorm, m.norm_before_gate, m.D_has_hdim, m.conv_init) == (True, False, True, 0.1)
    assert (m.process_group, m.sequence_parallel, m.world_size, m.local_rank) == (None, True, 1, 0)
    assert m.activation == "silu" and isinstance(m.act, nn.SiLU) and m.dt_limit == (0.0, math.inf)
    assert 0 < m.conv1d.weight.abs().max() <= 0.1 and m.conv1d.padding == (3,)
    m = Mamba2Simple(WIDTH, 4, headdim=8, learnable_init_states=True)
    assert m.learnable_init_states and m.activation == "swish" and m.init_states._no_weight_decay
    assert "rmsnorm" not in m.state_dict() and {"init_states", "norm.weight", "dt_bias"} <= m.state_dict().keys()


@pytest.mark.parametrize("name", MIXERS)
def test_rates_and_skip_weights_are_float32_whatever_the_dtype(name):
    mixer = MIXERS[name](dtype=torch.bfloat16)
    assert {n for n, p in mixer.named_parameters() if p.dtype == torch.float32} == {"A_log", "D"}
    assert mixer.A_log._no_weight_decay and mixer.D._no_weight_decay
    assert {p.dtype for p in mixer.to(torch.bfloat16).parameters()} == {torch.bfloat16}  # as in the originals


def test_modules_are_made_on_the_requested_device():
    for make in (*MIXERS.values(), partial(MHA, WIDTH, 2, d_conv=4), partial(Mamba2Simple, WIDTH, headdim=8)):
        assert {p.device.type for p in make(device="meta").parameters()} == {"meta"}


@pytest.mark.parametrize("prompt", [1, 2, 4, 6])
@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_decoding_is_the_full_forward(name, prompt):
    mixer, u = drawn(MIXERS[name]), random_tensor(2, 9, WIDTH)
    params = InferenceParams(max_seqlen=9, max_batch_size=2)
    outs = [mixer(u[:, :prompt], inference_params=params)]
    caches = params.key_value_memory_dict[3]
    before = [c.data_ptr() for c in caches]
    for t in range(prompt, 9):
        params.seqlen_offset = t
        outs.append(mixer(u[:, t : t + 1], inference_params=params))
    torch.testing.assert_close(torch.cat(outs, 1), mixer(u), **EXACT)
    assert params.key_value_memory_dict[3] is caches and [c.data_ptr() for c in caches] == before
    want = inputs_of_the_convolution(mixer, u)[:, -mixer.d_conv :].transpose(1, 2)
    torch.testing.assert_close(caches[0], want, **EXACT)


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_a_prompt_resets_the_caches(name):
    mixer, u = drawn(MIXERS[name]), random_tensor(2, 2, WIDTH)
    params = InferenceParams(9, 2)
    params.key_value_memory_dict[3] = mixer.allocate_inference_cache(2, 9)
    for cache in params.key_value_memory_dict[3]:
        cache.normal_()
    first = mixer(u, inference_params=params)
    filled = [c.clone() for c in params.key_value_memory_dict[3]]
    assert first.equal(mixer(u, inference_params=params))
    conv_state, ssm_state = mixer._get_states_from_cache(params, 2)
    assert conv_state.equal(filled[0]) and ssm_state.equal(filled[1])
    assert not conv_state[..., : mixer.d_conv - 2].any() and conv_state[..., -2:].all()
    assert all(not c.any() for c in mixer._get_states_from_cache(params, 2, initialize_states=True))
    assert not conv_state.any()


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_a_step_updates_the_caches_that_it_is_given(name):
    mixer, u = drawn(MIXERS[name]).float(), random_tensor(2, 5, WIDTH).float()
    want = mixer(u)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        conv_state, ssm_state = mixer.allocate_inference_cache(2, 5, dtype=dtype)
        assert conv_state.dtype == ssm_state.dtype == dtype and conv_state.shape == (2, channels(mixer), mixer.d_conv)
        outs = []
        for t in range(5):
            out, *states = mixer.step(u[:, t : t + 1], conv_state, ssm_state)
            assert states[0] is conv_state and states[1] is ssm_state
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 1), want, rtol=near, atol=near)


@pytest.mark.parametrize("name", [n for n in MIXERS if n.startswith("mamba2")])
@pytest.mark.parametrize("padding", [0, 2])
@torch.no_grad()
def test_packed_prompts_decode_as_each_alone(name, padding):
    mixer, lengths = drawn(MIXERS[name]), [5, 1, 3]
    prompts = [random_tensor(1, n, WIDTH, seed=i) for i, n in enumerate(lengths)]
    new = random_tensor(3, 4, WIDTH, seed=9)
    bounds = F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    seq_idx = torch.tensor([[0] * 5 + [1] + [2] * 3 + [-1] * padding], dtype=torch.int32)
    packed = torch.cat([*prompts, random_tensor(1, padding, WIDTH)], 1)
    params = InferenceParams(20, 3)
    prefilled = mixer(packed, seq_idx=seq_idx, cu_seqlens=bounds, inference_params=params)
    torch.testing.assert_close(mixer(packed, seq_idx=seq_idx)[:, :9], prefilled[:, :9], **EXACT)
    params.seqlen_offset = 1
    steps = torch.cat([mixer(new[:, t : t + 1], inference_params=params) for t in range(4)], 1)
    for i, prompt in enumerate(prompts):
        whole = mixer(torch.cat([prompt, new[i : i + 1]], 1))
        torch.testing.assert_close(prefilled[:, bounds[i] : bounds[i + 1]], whole[:, : lengths[i]], **EXACT)
        torch.testing.assert_close(steps[i : i + 1], whole[:, lengths[i] :], **EXACT)


def test_padding_gives_zero_and_takes_no_gradient():
    mixer, u = drawn(MIXERS["mamba2, gate after"]), random_tensor(2, 6, WIDTH).requires_grad_()
    seq_idx = torch.tensor([[0, 0, 1, 1, -1, -1], [0, 1, 1, 1, 1, -1]])
    out = mixer(u, seq_idx=seq_idx)
    assert not out[seq_idx < 0].any()
    out.square().sum().backward()
    assert not u.grad[seq_idx < 0].any() and u.grad[seq_idx >= 0].all()


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_mamba2_simple_is_its_function(lean, packed):
    make = partial(Mamba2Simple, WIDTH, 4, headdim=8, ngroups=2, learnable_init_states=True, use_mem_eff_path=lean)
    mixer, u = drawn(make), random_tensor(2, 7, WIDTH).requires_grad_()
    seq_idx = torch.tensor([[0] * 7, [0] * 3 + [1] * 4]) if packed else None
    function = partial(
        compat.mamba_split_conv1d_scan_combined, conv1d_weight=mixer.conv1d.weight[:, 0],
        conv1d_bias=mixer.conv1d.bias, dt_bias=mixer.dt_bias, A=-mixer.A_log.exp(), D=mixer.D, chunk_size=4,
        rmsnorm_weight=mixer.norm.weight, rmsnorm_eps=1e-5, outproj_weight=mixer.out_proj.weight, headdim=8, ngroups=2,
        norm_before_gate=False,
    )  # fmt: skip
    wanted = [u, *mixer.parameters()]

    def of(rows, init):
        if lean:
            return function(mixer.in_proj(rows), initial_states=init)
        # The original's other path: one norm over all channels, of what is gated.
        gated = function(mixer.in_proj(rows), initial_states=init, rmsnorm_weight=None, outproj_weight=None)
        return F.rms_norm(gated, (32,), mixer.norm.weight, 1e-5) @ mixer.out_proj.weight.T

    init = mixer.init_states.unsqueeze(0)
    if packed:
        second = torch.cat([of(u[1:, :3], init), of(u[1:, 3:], None)], 1)
        want = torch.cat([of(u[:1], init), second])
    else:
        want = of(u, init.expand(2, -1, -1, -1))
    got = mixer(u, seq_idx=seq_idx)
    torch.testing.assert_close(got, want, **EXACT)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    plain = drawn(partial(Mamba2Simple, WIDTH, 4, headdim=8))
    torch.testing.assert_close(plain(u), Mamba2.forward(plain, u))


ATTENTION = {
    "plain": {"qkv_proj_bias": False},
    "causal": {"causal": True},
    "grouped": {"causal": True, "num_heads_kv": 2, "head_dim": 6, "softmax_scale": 0.7},
    "rotary": {"causal": True, "rotary_emb_dim": 4},
    "rotary of all, interleaved": {"causal": True, "rotary_emb_dim": 4, "rotary_emb_interleaved": True,
                                   "rotary_emb_base": 100.0},
    "convolution and MLP": {"causal": True, "d_conv": 4, "mlp_dim": 200, "num_heads_kv": 1},
    "mamba2attn": {"causal": True, "d_conv": 4, "head_dim": 8, "out_proj_bias": False, "qkv_proj_bias": False,
                   "rotary_emb_dim": 4},
}  # fmt: skip


def attention(m: MHA, x):
    """Softmax attention, one head and one query at a time."""
    length, P, G, H = x.shape[1], m.head_dim, m.num_heads_kv, m.num_heads
    projected = x @ m.in_proj.weight.T + (0 if m.in_proj.bias is None else m.in_proj.bias)
    qkv, mlp = projected[..., : P * (H + 2 * G)], projected[..., P * (H + 2 * G) :]
    if m.d_conv:
        padded = F.pad(qkv.transpose(1, 2), (m.d_conv - 1, 0))
        qkv = F.conv1d(padded, m.conv1d.weight, m.conv1d.bias, groups=qkv.shape[-1]).transpose(1, 2)
    heads = list(qkv.unflatten(-1, (-1, P)).unbind(2))
    if m.rotary_emb_dim:
        heads[: H + G] = [turned(m, h) for h in heads[: H + G]]
    scale = P**-0.5 if m.softmax_scale is None else m.softmax_scale
    outs = []
    for h in range(H):
        k, v = heads[H + h // (H // G)], heads[H + G + h // (H // G)]
        rows = []
        for t in range(length):
            end = t + 1 if m.causal else length
            weights = torch.softmax(scale * (k[:, :end] * heads[h][:, t : t + 1]).sum(-1), -1)
            rows.append((weights[..., None] * v[:, :end]).sum(1))
        outs.append(torch.stack(rows, 1))
    if m.mlp_dim:
        up, gate = mlp.chunk(2, -1)
        outs.append(up * gate * torch.sigmoid(gate))
    y = torch.cat(outs, -1) @ m.out_proj.weight.T
    return y if m.out_proj.bias is None else y + m.out_proj.bias


def turned(m: MHA, x):
    size, out = m.rotary_emb_dim, x.clone()
    for i in range(size // 2):
        a, b = (2 * i, 2 * i + 1) if m.rotary_emb_interleaved else (i, i + size // 2)
        for t in range(x.shape[1]):
            angle = t * m.rotary_emb_base ** (-2 * i / size)
            cos, sin = math.cos(angle), math.sin(angle)
            out[:, t, a], out[:, t, b] = x[:, t, a] * cos - x[:, t, b] * sin, x[:, t, a] * sin + x[:, t, b] * cos
    return out


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_its_formula(name):
    m, x = drawn(partial(MHA, WIDTH, 4, **ATTENTION[name])), random_tensor(2, 6, WIDTH).requires_grad_()
    want, got, wanted = attention(m, x), m(x), [x, *m.parameters()]
    torch.testing.assert_close(got, want, **EXACT)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in ATTENTION if n != "plain"])
@pytest.mark.parametrize("prompt", [1, 3, 5])
@pytest.mark.parametrize("by_lengths", [False, True])
@torch.no_grad()
def test_attention_decodes_as_the_full_forward(name, prompt, by_lengths):
    m, x = drawn(partial(MHA, WIDTH, 4, layer_idx=1, **ATTENTION[name])), random_tensor(2, 8, WIDTH)
    lengths = torch.zeros(2, dtype=torch.int32) if by_lengths else None
    params = InferenceParams(10, 2, lengths_per_sample=lengths)
    outs = [m(x[:, :prompt], params)]
    cache = params.key_value_memory_dict[1][0]
    for t in range(prompt, 8):
        params.seqlen_offset = t
        if by_lengths:
            lengths.fill_(t)
        outs.append(m(x[:, t : t + 1], params))
    torch.testing.assert_close(torch.cat(outs, 1), m(x), **EXACT)
    assert params.key_value_memory_dict[1][0] is cache and cache.shape == (2, 10, 2, m.num_heads_kv, m.head_dim)
    assert cache[:, :8].all() and not cache[:, 8:].any()


@torch.no_grad()
def test_attention_continues_by_several_tokens_and_in_some_rows():
    m, x = drawn(partial(MHA, WIDTH, 4, layer_idx=0, causal=True, rotary_emb_dim=4)), random_tensor(3, 8, WIDTH)
    params = InferenceParams(8, 3)
    params.key_value_memory_dict[0] = m.allocate_inference_cache(3, 8)
    for first, rows in ((0, x[:1]), (1, x[1:])):
        params.batch_size_offset, params.seqlen_offset = first, 0
        outs = [m(rows[:, :3], params)]
        params.seqlen_offset = 3
        outs.append(m(rows[:, 3:], params))
        torch.testing.assert_close(torch.cat(outs, 1), m(rows), **EXACT)
    assert params.key_value_memory_dict[0][0].all()


@torch.no_grad()
def test_sequences_of_several_lengths_attend_each_to_its_own():
    m, x = drawn(partial(MHA, WIDTH, 4, layer_idx=0, causal=True, rotary_emb_dim=4)), random_tensor(2, 6, WIDTH)
    params = InferenceParams(8, 2)
    m(x[:, :5], params)  # of row 0 only 2 count
    params.lengths_per_sample, params.seqlen_offset = torch.tensor([2, 5]), 5
    new = torch.stack([x[0, 2], x[1, 5]]).unsqueeze(1)
    want = torch.stack([m(x[:1, :3])[0, -1], m(x[1:, :6])[0, -1]]).unsqueeze(1)
    torch.testing.assert_close(m(new, params), want, **EXACT)


def test_the_gated_mlp_is_its_formula():
    m, x = drawn(partial(GatedMLP, 6, 100, 5, bias=True)), random_tensor(3, 6)
    assert m.fc1.out_features == 256 and GatedMLP(48).fc1.out_features == 256
    y, gate = (x @ m.fc1.weight.T + m.fc1.bias).chunk(2, -1)
    torch.testing.assert_close(m(x), (y * gate * torch.sigmoid(gate)) @ m.fc2.weight.T + m.fc2.bias, **EXACT)
    assert torch.equal(GatedMLP(6, 8, activation=torch.zeros_like)(x.float()), torch.zeros(3, 6))


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mlp", [True, False])
@pytest.mark.parametrize("hooked", [True, False])
def test_a_block_is_its_formula(rms, fused, mlp, hooked):
    norm = partial(RMSNorm if rms else nn.LayerNorm, eps=0.01)
    mlp_cls = partial(GatedMLP, hidden_features=8) if mlp else nn.Identity
    block = drawn(lambda: Block(WIDTH, lambda d: Mamba(d, 4), mlp_cls, norm, fused, True))
    x, residual = random_tensor(2, 5, WIDTH), random_tensor(2, 5, WIDTH, seed=1)
    if hooked:
        block.norm.register_forward_hook(lambda m, i, o: None)

    def normed(n, t):
        centered = t if rms else t - t.mean(-1, keepdim=True)
        y = centered / (centered.square().mean(-1, keepdim=True) + 0.01).sqrt() * n.weight
        return y if n.bias is None else y + n.bias

    for before in (None, residual):
        total = x if before is None else x + before
        out = block.mixer(normed(block.norm, total))
        if mlp:
            total = total + out
            out = block.mlp(normed(block.norm2, total))
        got = block(x, before)
        torch.testing.assert_close(got[0], out, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(got[1], total, **EXACT)


@pytest.mark.parametrize("fused", [True, False])
def test_the_residual_stream_is_float32_on_request(fused):
    for wide in (True, False):
        block = Block(WIDTH, lambda d: Mamba(d, 4), norm_cls=RMSNorm, fused_add_norm=fused, residual_in_fp32=wide)
        out, residual = block.bfloat16()(torch.randn(1, 3, WIDTH).bfloat16())
        assert (out.dtype, residual.dtype) == (torch.bfloat16, torch.float32 if wide else torch.bfloat16)
    conv_state, ssm_state = block.allocate_inference_cache(2, 7, dtype=torch.float32)
    assert conv_state.shape == (2, 32, 4) and ssm_state.shape == (2, 32, 4) and ssm_state.dtype == torch.float32


def test_inference_params_can_be_reset():
    params = InferenceParams(8, 2, 5, key_value_memory_dict={0: "caches"}, lengths_per_sample=torch.tensor([5, 5]))
    params.reset(6, 1)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (6, 1, 0)
    assert not params.lengths_per_sample.any() and params.key_value_memory_dict == {0: "caches"}


def at(offset, layer_idx=0, batch=1):
    params = InferenceParams(4, batch, offset)
    params.key_value_memory_dict[layer_idx] = Mamba2(WIDTH, 4, headdim=8).allocate_inference_cache(batch, 4)
    return params


U = torch.zeros(1, 2, WIDTH)
HOOKED = MHA(WIDTH, 2, d_conv=3)
HOOKED.conv1d.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (ValueError, "dt_init", lambda: Mamba(8, dt_init="zero")),
        (NotImplementedError, "process_group", lambda: Mamba2(64, process_group=object())),
        (NotImplementedError, "activation", lambda: Mamba2Simple(64, activation="relu")),
        (ValueError, "d_ssm", lambda: Mamba2(WIDTH, headdim=8, d_ssm=48)),
        (ValueError, "layer_idx", lambda: Mamba(WIDTH)(U, InferenceParams(4, 1))),
        (ValueError, "layer_idx", lambda: MHA(WIDTH, 2)(U, InferenceParams(4, 1))),
        (ValueError, "hidden_states", lambda: Mamba2(WIDTH, 4, headdim=8, layer_idx=0)(U, inference_params=at(1))),
        (
            ValueError,
            "caches of layer 0",
            lambda: Mamba2(WIDTH, 4, headdim=8, layer_idx=0)(U, inference_params=at(1, batch=3)),
        ),
        (
            ValueError,
            "seq_idx needs cu_seqlens",
            lambda: Mamba2(WIDTH, 4, headdim=8, layer_idx=0)(
                U, seq_idx=torch.zeros(1, 2, dtype=torch.int32), inference_params=at(0)
            ),
        ),
        (ValueError, "cu_seqlens needs seq_idx", lambda: Mamba2(WIDTH, headdim=8)(U, cu_seqlens=torch.tensor([0, 2]))),
        (ValueError, "num_heads_kv", lambda: MHA(WIDTH, 4, 3)),
        (ValueError, "num_heads must divide", lambda: MHA(WIDTH, 3)),
        (ValueError, "rotary_emb_dim", lambda: MHA(WIDTH, 4, rotary_emb_dim=3)),
        (ValueError, "max_seqlen", lambda: MHA(WIDTH, 4, layer_idx=0)(U, InferenceParams(1, 1))),
        (TypeError, "seq_idx", lambda: MHA(WIDTH, 4)(U, seq_idx=U)),
        (TypeError, "conv1d", lambda: HOOKED(U)),
        (ValueError, "fused_add_norm", lambda: Block(8, Mamba, norm_cls=lambda d: nn.Identity(), fused_add_norm=True)),
    ],
)  # fmt: skip
def test_unsupported_arguments_are_refused_by_name(error, name, call):
    with pytest.raises(error, match=name):
        call()


def test_norms_of_blocks_are_read_past_only_where_that_is_all_they_do():
    assert is_plain(RMSNorm(4), RMSNorm) and not is_plain(nn.Sequential(RMSNorm(4)), RMSNorm)
