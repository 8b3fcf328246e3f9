"""mamba_ssm's language model: its calls, its values step by step in float64, and its checkpoints."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import ssm_kernels.compat
from vlmamba.model import LMConfig, MambaLM
from vlmamba.model import mamba_ssm as theirs
from vlmamba.model.convert import convert
from vlmamba.model.generation import cuda_graph
from vlmamba.model.mamba_ssm import (
    InferenceParams,
    MambaConfig,
    MambaLMHeadModel,
    MixerModel,
    decode,
    generation,
    sample,
)

ATTENTION = {"num_heads": 4, "num_heads_kv": 2, "head_dim": 8, "causal": True, "d_conv": 4, "rotary_emb_dim": 4}
ATTENTION |= {"out_proj_bias": False, "qkv_proj_bias": False}
MAMBA2 = {"layer": "Mamba2", "d_state": 8, "headdim": 8, "ngroups": 2}
MODELS = {
    "mamba": {"ssm_cfg": {"d_state": 8}},
    "mamba, layer norm": {"ssm_cfg": {"d_state": 8, "expand": 1.5}, "rms_norm": False, "tie_embeddings": False},
    "mamba2": {"ssm_cfg": MAMBA2},
    "mamba2, options": {"ssm_cfg": MAMBA2 | {"d_ssm": 32, "D_has_hdim": True, "norm_before_gate": True, "bias": True}},
    "mamba2, not fused": {"ssm_cfg": MAMBA2 | {"rmsnorm": False, "dt_limit": [0.01, 0.3]}, "fused_add_norm": False},
    "hybrid": {"ssm_cfg": MAMBA2, "attn_layer_idx": [1], "attn_cfg": ATTENTION, "d_intermediate": 48},
}
IDS = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))


def make(name, **more):
    """A model none of whose parameters is at a special value."""
    torch.manual_seed(0)
    config = MambaConfig(d_model=32, n_layer=3, vocab_size=50, **(MODELS[name] | more))
    model = MambaLMHeadModel(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


# --- the model, one token after the other -------------------------------------------------------------------------


def step_by_step(model, ids):
    memory = [{} for _ in model.backbone.layers]
    return torch.stack([one_token(model, ids[:, t], t, memory) for t in range(ids.shape[1])], 1)


def one_token(model, token, t, memory):
    stream = model.backbone.embedding.weight[token]
    for layer, remembered in zip(model.backbone.layers, memory, strict=True):
        mixer = {"Mamba": mamba, "Mamba2": mamba2, "MHA": attention}[type(layer.mixer).__name__]
        stream = stream + mixer(layer.mixer, normed(layer.norm, stream), t, remembered)
        if layer.mlp is not None:
            y, gate = (normed(layer.norm2, stream) @ layer.mlp.fc1.weight.T).chunk(2, -1)
            stream = stream + (y * silu(gate)) @ layer.mlp.fc2.weight.T
    return normed(model.backbone.norm_f, stream) @ model.lm_head.weight.T


def silu(x):
    return x / (1 + torch.exp(-x))


def linear(layer, x):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def normed(norm, x):
    x = x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + (0 if norm.bias is None else norm.bias)


def convolved(conv, x, remembered):
    window = [*remembered.get("window", [torch.zeros_like(x)] * 3), x]
    remembered["window"] = window[1:]
    return sum(w * conv.weight[:, 0, k] for k, w in enumerate(window)) + conv.bias


def mamba(m, u, t, remembered):
    x, z = linear(m.in_proj, u).chunk(2, -1)
    x = silu(convolved(m.conv1d, x, remembered))
    low, B, C = linear(m.x_proj, x).split([m.dt_rank, 8, 8], -1)
    dt = torch.log1p(torch.exp(linear(m.dt_proj, low)))
    h = remembered.get("h", 0) * torch.exp(dt[..., None] * -torch.exp(m.A_log)) + (dt * x)[..., None] * B[:, None]
    remembered["h"] = h
    return linear(m.out_proj, ((h * C[:, None]).sum(-1) + m.D * x) * silu(z))


def mamba2(m, u, t, remembered):
    H, P, G, N = m.nheads, m.headdim, m.ngroups, m.d_state
    mlp = m.d_inner - H * P
    gate, up, z, xBC, dt = linear(m.in_proj, u).split([mlp, mlp, H * P, H * P + 2 * G * N, H], -1)
    x, B, C = silu(convolved(m.conv1d, xBC, remembered)).split([H * P, G * N, G * N], -1)
    x = x.unflatten(-1, (H, P))
    B, C = (b.unflatten(-1, (G, N)).repeat_interleave(H // G, 1)[:, :, None] for b in (B, C))
    dt = torch.log1p(torch.exp(dt + m.dt_bias)).clamp(*m.dt_limit)
    decay = torch.exp(dt * -torch.exp(m.A_log))[..., None, None]
    h = remembered["h"] = remembered.get("h", 0) * decay + (dt[..., None] * x)[..., None] * B
    y = ((h * C).sum(-1) + (m.D.view(H, P) if m.D_has_hdim else m.D[:, None]) * x).flatten(1)
    if m.rmsnorm:
        y = (y if m.norm_before_gate else y * silu(z)).unflatten(-1, (G, -1))
        y = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(1) * m.norm.weight
    if not m.rmsnorm or m.norm_before_gate:
        y = y * silu(z)
    return linear(m.out_proj, torch.cat([silu(gate) * up, y], -1))


def attention(m, u, t, remembered):
    qkv = convolved(m.conv1d, linear(m.in_proj, u), remembered).unflatten(-1, (-1, 8))  # (B, 4 + 2 + 2, 8)
    q, k, v = qkv.split([4, 2, 2], 1)
    turn = torch.stack([t * 10000.0 ** -(torch.arange(2, dtype=torch.float64) / 2)] * 2).flatten()
    q, k = (torch.cat([r[..., :4] * turn.cos() + quarter(r[..., :4]) * turn.sin(), r[..., 4:]], -1) for r in (q, k))
    past = remembered.setdefault("past", [])
    past.append((k, v))
    outs = []
    for head in range(4):
        scores = torch.stack([(q[:, head] * k[:, head // 2]).sum(-1) / math.sqrt(8) for k, _ in past])
        weights = torch.exp(scores) / torch.exp(scores).sum(0)
        outs.append(sum(w[:, None] * v[:, head // 2] for w, (_, v) in zip(weights, past, strict=True)))
    return linear(m.out_proj, torch.cat(outs, -1))


def quarter(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_the_steps(name):
    model = make(name)
    got, want = model(IDS).logits, step_by_step(model, IDS)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # A is computed from A_log in float32
    for p, a, b in zip(
        model.parameters(), *(torch.autograd.grad(y.square().mean(), list(model.parameters())) for y in (got, want)),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * p.abs().max().item())


@pytest.mark.parametrize("layer", ["mamba", "mamba2"])
def test_it_is_the_model_of_transformers(layer, tmp_path):
    torch.manual_seed(0)
    config = {
        "mamba": lambda: transformers.MambaConfig(
            vocab_size=56, hidden_size=32, state_size=8, num_hidden_layers=2, use_mambapy=False, pad_token_id=0
        ),
        "mamba2": lambda: transformers.Mamba2Config(
            vocab_size=56, hidden_size=32, state_size=8, head_dim=8, num_heads=8, n_groups=2, num_hidden_layers=2,
            chunk_size=8, tie_word_embeddings=True, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        ),
    }[layer]()  # fmt: skip
    other = transformers.AutoModelForCausalLM.from_config(config).eval()
    other.save_pretrained(tmp_path)
    model = MambaLMHeadModel.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, other(IDS).logits, rtol=1e-5, atol=1e-5)
        want = other.generate(IDS[:1, :5], max_new_tokens=9, min_new_tokens=9, do_sample=False, pad_token_id=0)
        model.lm_head = nn.Linear(32, 56, bias=True)
        model.lm_head.weight, model.lm_head.bias.data[:] = model.backbone.embedding.weight, 0
        model.lm_head.bias.data[0] = -1e9  # theirs may not end before
    assert model.generate(IDS[:1, :5], 14).equal(want)


# --- calls ----------------------------------------------------------------------------------------------------------

SIGNATURES = {
    MambaLMHeadModel: "config initializer_cfg device dtype",
    MambaLMHeadModel.forward: "self input_ids position_ids inference_params num_last_tokens mixer_kwargs",
    MambaLMHeadModel.allocate_inference_cache: "self batch_size max_seqlen dtype kwargs",
    MambaLMHeadModel.generate: "self input_ids max_length top_k top_p min_p temperature return_dict_in_generate "
    "output_scores kwargs",
    MambaLMHeadModel.save_pretrained: "self save_directory",
    MixerModel: "d_model n_layer d_intermediate vocab_size ssm_cfg attn_layer_idx attn_cfg norm_epsilon rms_norm "
    "initializer_cfg fused_add_norm residual_in_fp32 device dtype",
    theirs.create_block: "d_model d_intermediate ssm_cfg attn_layer_idx attn_cfg norm_epsilon rms_norm "
    "residual_in_fp32 fused_add_norm layer_idx device dtype",
    theirs._init_weights: "module n_layer initializer_range rescale_prenorm_residual n_residuals_per_layer",
    sample: "logits top_k top_p min_p temperature",
    theirs.update_graph_cache: "model cache batch_size seqlen_og max_seqlen decoding_seqlens dtype n_warmups",
    theirs.load_state_dict_hf: "model_name device dtype",
}


@pytest.mark.parametrize("of", SIGNATURES)
def test_arguments_come_in_the_original_order(of):
    assert list(inspect.signature(of).parameters) == SIGNATURES[of].split()


def test_arguments_of_decode_and_loading_are_in_the_original_order():
    assert (
        list(inspect.signature(decode).parameters)
        == (
            "input_ids model max_length top_k top_p min_p temperature repetition_penalty eos_token_id teacher_outputs "
            "vocab_size cg enable_timing streamer"
        ).split()
    )
    assert list(inspect.signature(MambaLMHeadModel.from_pretrained).parameters)[:3] == [
        "pretrained_model_name", "device", "dtype",
    ]  # fmt: skip
    assert [f.name for f in fields(MambaConfig)] == (
        "d_model d_intermediate n_layer vocab_size ssm_cfg attn_layer_idx attn_cfg rms_norm residual_in_fp32 "
        "fused_add_norm pad_vocab_size_multiple tie_embeddings"
    ).split()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_forward_returns_the_requested_outputs(name):
    model = make(name)
    whole = model(IDS)
    assert whole.logits.shape == (2, 12, 56) and whole[0] is whole.logits and whole._fields == ("logits",)
    hidden = model.backbone(IDS)
    torch.testing.assert_close(hidden @ model.lm_head.weight.T, whole.logits)
    for last in (1, 3):
        torch.testing.assert_close(model(IDS, num_last_tokens=last).logits, whole.logits[:, -last:])
    assert model(IDS, position_ids=IDS, inference_params=None).logits.equal(whole.logits)
    model.tie_weights()
    assert (model.lm_head.weight is model.backbone.embedding.weight) is model.config.tie_embeddings


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("given", [True, False])
@torch.no_grad()
def test_decoding_by_caches_is_the_full_forward(name, given):
    model = make(name)
    params = InferenceParams(max_seqlen=12, max_batch_size=2)
    if given:
        params.key_value_memory_dict = model.allocate_inference_cache(2, 12, dtype=torch.float64)
    outs = [model(IDS[:, :5], inference_params=params).logits]
    for t in range(5, 12):
        params.seqlen_offset = t
        outs.append(model(IDS[:, t : t + 1], inference_params=params, num_last_tokens=1).logits)
    torch.testing.assert_close(torch.cat(outs, 1), model(IDS).logits, rtol=1e-10, atol=1e-10)
    assert sorted(params.key_value_memory_dict) == [0, 1, 2]


@pytest.mark.parametrize("cg", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_scores_with_a_teacher_are_the_logits(name, cg):
    model = make(name)
    for _ in range(2):  # a graph's caches are used again
        out = model.generate(
            input_ids=IDS[:, :5], max_length=12, output_scores=True, return_dict_in_generate=True, cg=cg,
            teacher_outputs=IDS,
        )  # fmt: skip
        torch.testing.assert_close(torch.stack(out.scores, 1), model(IDS).logits[:, 4:-1], rtol=1e-10, atol=1e-10)
        assert out.sequences.equal(IDS)


@torch.no_grad()
def test_packed_prompts_are_gone_on_with_together():
    model, lengths = make("mamba2"), [4, 7, 1]
    rows = [torch.randint(50, (1, n + 5), generator=torch.Generator().manual_seed(n)) for n in lengths]
    ids = torch.cat([row[:, :n] for row, n in zip(rows, lengths, strict=True)], 1)
    seq_idx = torch.tensor([[i for i, n in enumerate(lengths) for _ in range(n)]], dtype=torch.int32)
    bounds = F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    want = torch.cat([model(row).logits[:, -6:-1] for row in rows])
    params = InferenceParams(max_seqlen=20, max_batch_size=3)
    first = model(ids, inference_params=params, seq_idx=seq_idx, cu_seqlens=bounds).logits
    outs = [first[0, bounds[1:] - 1].unsqueeze(1)]
    for t in range(4):
        params.seqlen_offset += 1
        tokens = torch.cat([row[:, n + t : n + t + 1] for row, n in zip(rows, lengths, strict=True)])
        outs.append(model(tokens, inference_params=params, num_last_tokens=1).logits)
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=1e-10, atol=1e-10)
    with pytest.raises(TypeError, match="seq_idx"):
        make("hybrid")(ids, seq_idx=seq_idx)


def greedy(model, ids, length, penalty=1.0, vocab_size=56):
    """By the whole forward for each token."""
    while ids.shape[1] < length:
        logits = model(ids).logits[:, -1, :vocab_size]
        for row, seen in zip(logits, ids, strict=True):
            for token in set(seen[seen < vocab_size].tolist()):
                row[token] = row[token] * penalty if row[token] < 0 else row[token] / penalty
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("cg", [False, True])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
@torch.no_grad()
def test_greedy_tokens_are_those_of_the_full_forward(cg, penalty):
    model = make("hybrid")
    want = greedy(model, IDS[:, :5], 20, penalty, 45)
    got = model.generate(IDS[:, :5], 20, repetition_penalty=penalty, vocab_size=45, cg=cg)
    assert got.equal(want) and got[:, 5:].max() < 45
    assert model.generate(IDS[:, :5], 20, 1, 0.9, 0.1, 0.0, repetition_penalty=penalty, vocab_size=45).equal(want)


def test_all_sequences_end_together():
    model = make("mamba")
    long = model.generate(IDS[:, :5], 30)
    eos = long[0, 9].item()
    got = model.generate(IDS[:1, :5], 30, eos_token_id=eos)
    first = long[0, 5:].tolist().index(eos)
    assert got.equal(long[:1, : 6 + first])
    together = model.generate(IDS[:, :5], 30, eos_token_id=eos)
    ends = (long[:, 5:] == eos).all(0)
    assert together.equal(long[:, : 6 + ends.int().argmax()] if ends.any() else long)


def test_the_returned_values():
    model = make("mamba")
    assert model.generate(IDS, 14).shape == (2, 14)
    out = model.generate(IDS, max_length=14, return_dict_in_generate=True)
    assert out.scores is None and out[0] is out["sequences"] is out.sequences
    out = model.generate(IDS, max_length=14, return_dict_in_generate=True, output_scores=True)
    assert len(out.scores) == 2 and out.scores[0].shape == (2, 56) and out[1] is out.scores


def test_a_streamer_sees_tokens_as_they_come(capsys):
    class Streamer:
        seen, ended = (), 0

        def put(self, value):
            self.seen += (value.clone(),)

        def end(self):
            self.ended += 1

    streamer = Streamer()
    out = make("mamba").generate(IDS[:1], 15, streamer=streamer, enable_timing=True)
    assert [t.shape for t in streamer.seen] == [(1, 12), (1, 1), (1, 1), (1, 1)] and streamer.ended == 1
    assert torch.cat(streamer.seen, 1).equal(out) and "decoding time" in capsys.readouterr().out


def test_missing_graphs_are_logged_once(caplog):
    cuda_graph._warned.clear()
    model = make("mamba")
    for _ in range(2):
        model.generate(IDS, 14, cg=True)
    assert [r.message for r in caplog.records] == ["cg=True changes nothing on cpu, which has no CUDA graphs"]
    cache = model._decoding_cache
    assert theirs.update_graph_cache(model, cache, 2, 5, 14) is cache
    assert theirs.update_graph_cache(model, cache, 1, 5, 14) is not cache
    assert theirs.update_graph_cache(model, cache, 2, 5, 15) is not cache


@pytest.fixture
def captures(monkeypatch):
    """A CPU taken for a GPU with streams: a capture keeps nothing, a replay runs the step. Gives the captured steps."""
    steps = []

    def capture(step, device):
        steps.append(step)
        static = torch.full_like(step(), torch.nan)
        return lambda: static.copy_(step()), static

    monkeypatch.setattr(generation, "has_graphs", lambda device: True)
    monkeypatch.setattr(generation, "warm_up", lambda step, device: step())
    monkeypatch.setattr(generation, "capture", capture)
    monkeypatch.setattr(cuda_graph, "_warned", set())
    return steps


def test_another_stream_gets_caches_and_graphs_of_its_own(captures, monkeypatch):
    model, places = make("hybrid"), []
    want = model.generate(IDS, 20)
    for stream in (1, 1, 2):
        monkeypatch.setattr(cuda_graph, "current_stream", lambda device, stream=stream: stream)
        assert model.generate(IDS, 20, cg=True).equal(want)
        layers = model._decoding_cache.params.key_value_memory_dict.values()
        places.append({t.data_ptr() for layer in layers for t in layer})
    assert len(captures) == 2
    assert places[0] == places[1] and not places[0] & places[2]


def test_two_calls_at_once_do_not_share_caches(captures):
    model = make("mamba")
    one, two = IDS[:1], IDS[1:]
    want = [model.generate(ids, 20) for ids in (one, two)]

    class Streamer:
        tokens = 0

        def put(self, value):
            self.tokens += value.shape[1]
            if self.tokens == 15:
                assert model.generate(two, 20, cg=True).equal(want[1])

        def end(self):
            pass

    assert model.generate(one, 20, cg=True, streamer=Streamer()).equal(want[0])


def test_no_graph_under_autocast(captures, monkeypatch, caplog):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    model = make("mamba")
    model.generate(IDS, 14, cg=True)
    assert not captures
    assert [r.message.split(",")[0] for r in caplog.records] == ["cg=True changes nothing under autocast"]


def test_a_copied_model_does_not_run_the_steps_of_the_one_before():
    model = make("hybrid")
    model.generate(IDS, 20, cg=True)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in copied.parameters():
            p.mul_(1.5)
    assert copied.generate(IDS, 20, cg=True).equal(copied.generate(IDS, 20))
    assert not copied.generate(IDS, 20).equal(model.generate(IDS, 20))


def test_a_model_that_decoded_on_caches_is_pickled():
    model = make("mamba")
    tokens = model.generate(IDS, 20, cg=True)
    assert pickle.loads(pickle.dumps(model)).generate(IDS, 20, cg=True).equal(tokens)


def drawn(logits, n=3000, **options):
    torch.manual_seed(0)
    tokens = sample(torch.tensor([logits]).expand(n, -1), **options)
    return torch.bincount(tokens, minlength=len(logits)) / n


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 0}, [0, 1, 2, 3]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9, "top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_k": 0, "top_p": 0.85}, [1, 2, 3]),  # 0.5 + 0.3 + 0.15
        ({"top_k": 0, "top_p": 0.4}, [1]),
        ({"top_k": 3, "top_p": 0.6}, [1, 3]),
        ({"top_k": 0, "min_p": 0.25}, [1, 2, 3]),
        ({"top_k": 0, "min_p": 0.5, "temperature": 5.0}, [1, 3]),
        ({"top_k": 3, "min_p": 0.5}, [1, 3]),
        ({"top_k": 0, "temperature": 0.5}, [0, 1, 2, 3]),
        ({}, [1]),
    ],
)
def test_draws_come_from_the_tokens_that_are_kept(options, kept):
    p = torch.tensor([0.05, 0.5, 0.15, 0.3])
    want = torch.zeros(4)
    want[kept] = p[kept] ** (1 / options.get("temperature", 1.0))
    got = drawn(p.log().tolist(), **options)
    assert (got > 0).equal(want > 0)
    torch.testing.assert_close(got, want / want.sum(), rtol=0, atol=0.04)


def test_filters_are_the_originals():
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    for change, kept in (
        (lambda x: theirs.modify_logits_for_top_k_filtering(x, 2), [1, 3]),
        (lambda x: theirs.modify_logits_for_top_p_filtering(x, 0.7), [1, 3]),
        (lambda x: theirs.modify_logits_for_min_p_filtering(x, 0.1), [1, 2, 3]),
        (lambda x: theirs.modify_logits_for_top_p_filtering(x, 0.0), [0, 1, 2, 3]),
    ):
        x = logits.clone()
        change(x)
        assert x.isfinite()[0].nonzero().flatten().tolist() == kept


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (ValueError, "max_length", lambda m: m.generate(IDS, 12)),
        (ValueError, "input_ids", lambda m: m.generate(IDS[0], 20)),
        (ValueError, "top_k", lambda m: m.generate(IDS, 20, top_k=-1)),
        (ValueError, "top_p", lambda m: m.generate(IDS, 20, top_p=1.5)),
        (ValueError, "min_p", lambda m: m.generate(IDS, 20, min_p=-0.1)),
        (ValueError, "temperature", lambda m: m.generate(IDS, 20, top_k=0, temperature=0.0)),
        (ValueError, "repetition_penalty", lambda m: m.generate(IDS, 20, repetition_penalty=0)),
        (ValueError, "teacher_outputs", lambda m: m.generate(IDS, 20, teacher_outputs=IDS[:1])),
        (TypeError, "num_beams", lambda m: m.generate(IDS, 20, num_beams=2)),
        (ValueError, "layer", lambda m: MambaLMHeadModel(MambaConfig(32, 0, 1, 9, {"layer": "Mamba4"}))),
        (TypeError, "d_stat", lambda m: MambaLMHeadModel(MambaConfig(32, 0, 1, 9, {"d_stat": 8}))),
        (ValueError, "attn_layer_idx", lambda m: MambaLMHeadModel(MambaConfig(32, 0, 1, 9, attn_layer_idx=[1]))),
        (TypeError, "initial_range", lambda m: MambaLMHeadModel(m.config, {"initial_range": 0.1})),
    ],
)
def test_unsupported_arguments_are_refused_by_name(error, name, call):
    with pytest.raises(error, match=name):
        call(make("mamba"))


# --- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_rates_and_skip_weights_are_float32_however_the_model_is_made(name, tmp_path):
    config = MambaConfig(d_model=32, n_layer=3, vocab_size=50, **MODELS[name])
    made = MambaLMHeadModel(config, dtype=torch.bfloat16)
    made.save_pretrained(tmp_path)
    loaded = MambaLMHeadModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for model in (made, loaded):
        wide = {n.split(".")[-1] for n, p in model.named_parameters() if p.dtype == torch.float32}
        assert wide == {"A_log", "D"} and {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
        assert model(IDS).logits.dtype == torch.bfloat16
    marked = {n.split(".")[-1] for n, p in loaded.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "D"} | (set() if name.startswith("mamba,") or name == "mamba" else {"dt_bias"})
    assert {p.dtype for p in MambaLMHeadModel.from_pretrained(tmp_path).parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["mamba", "hybrid"])
def test_weights_are_drawn_as_in_the_original(name):
    torch.manual_seed(0)
    config = MambaConfig(d_model=64, n_layer=3, vocab_size=500, **MODELS[name])
    model = MambaLMHeadModel(config, {"initializer_range": 0.1})
    assert 0.095 < model.backbone.embedding.weight.std() < 0.105
    residuals = 3 * (2 if config.d_intermediate else 1)
    for layer in model.backbone.layers:
        scaled = [layer.mixer.out_proj] + ([layer.mlp.fc2] if layer.mlp else [])
        for linear in scaled:
            bound = linear.in_features**-0.5 / residuals**0.5  # kaiming_uniform_ with a = sqrt(5)
            assert 0.95 * bound < linear.weight.abs().max() <= bound
        if name == "mamba":
            steps = F.softplus(layer.mixer.dt_proj.bias)
            assert 1e-3 <= steps.min() < 5e-3 and 0.03 < steps.max() <= 0.1
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            assert getattr(module.bias, "_no_reinit", False) or not module.bias.any()
    plain = MambaLMHeadModel(config, {"rescale_prenorm_residual": False}).backbone.layers[0].mixer.out_proj.weight
    assert plain.abs().max() > 0.95 * plain.shape[1] ** -0.5


def test_the_hybrid_of_the_original_has_its_parameters():
    """`state-spaces/mamba2attn-2.7b`: shapes by its config.json."""
    config = MambaConfig(
        d_model=2560, d_intermediate=0, n_layer=64, vocab_size=50277, ssm_cfg={"layer": "Mamba2"},
        attn_layer_idx=[9, 18, 27, 36, 45, 56],
        attn_cfg={
            "causal": True, "d_conv": 4, "head_dim": 128, "num_heads": 30, "out_proj_bias": False,
            "qkv_proj_bias": False, "rotary_emb_dim": 64,
        },
        pad_vocab_size_multiple=16,
    )  # fmt: skip
    shapes = {n: tuple(t.shape) for n, t in MambaLMHeadModel(config, device="meta").state_dict().items()}
    assert {n.removeprefix("backbone.layers.9."): s for n, s in shapes.items() if "layers.9." in n} == {
        "norm.weight": (2560,), "mixer.in_proj.weight": (11520, 2560), "mixer.conv1d.weight": (11520, 1, 4),
        "mixer.conv1d.bias": (11520,), "mixer.out_proj.weight": (2560, 3840),
    }  # fmt: skip
    assert {n.removeprefix("backbone.layers.8."): s for n, s in shapes.items() if "layers.8." in n} == {
        "norm.weight": (2560,), "mixer.dt_bias": (80,), "mixer.A_log": (80,), "mixer.D": (80,),
        "mixer.in_proj.weight": (10576, 2560), "mixer.conv1d.weight": (5376, 1, 4), "mixer.conv1d.bias": (5376,),
        "mixer.norm.weight": (5120,), "mixer.out_proj.weight": (2560, 5120),
    }  # fmt: skip
    assert shapes["lm_head.weight"] == shapes["backbone.embedding.weight"] == (50288, 2560)


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_is_the_originals_and_comes_back(name, tmp_path):
    model = make(name)
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "pytorch_model.bin", "notes.txt"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert MambaConfig(**config) == model.config == MambaConfig(**theirs.load_config_hf(tmp_path))
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert list(state) == list(model.state_dict())
    again = MambaLMHeadModel.from_pretrained(tmp_path, "cpu", torch.float64)
    assert all(a.equal(b) for a, b in zip(again.parameters(), model.double().parameters(), strict=True))
    loaded = theirs.load_state_dict_hf(tmp_path, device="cpu", dtype=torch.float16)
    assert loaded.keys() == state.keys() and {t.dtype for t in loaded.values()} == {torch.float16}


@pytest.mark.parametrize("layer", ["mamba", "mamba2", "mamba3"])
def test_models_of_this_library_move_both_ways(layer, tmp_path):
    lm = MambaLM(LMConfig(32, 2, 50, layer, d_state=8, headdim=16)).eval()
    lm.save_pretrained(tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "theirs", "state-spaces")
    want = lm(IDS).logits
    for folder in ("own", "theirs"):
        model = MambaLMHeadModel.from_pretrained(str(tmp_path / folder), device="cpu", dtype=torch.float32)
        torch.testing.assert_close(model(IDS).logits, want)
    model.save_pretrained(tmp_path / "back")
    torch.testing.assert_close(MambaLM.from_pretrained(tmp_path / "back")(IDS).logits, want)


@pytest.mark.parametrize("name", ["hybrid", "mamba, layer norm", "mamba2, options"])
def test_the_other_language_model_names_this_one_for_what_it_cannot_load(name, tmp_path):
    make(name, ssm_cfg={k: v for k, v in MODELS[name]["ssm_cfg"].items() if k != "expand"}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load it with vlmamba.model.mamba_ssm.MambaLMHeadModel"):
        MambaLM.from_pretrained(tmp_path)
    assert MambaLMHeadModel.from_pretrained(tmp_path)(IDS).logits.shape == (2, 12, 56)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    model = make("mamba")
    with torch.no_grad():
        model.lm_head = nn.Linear(32, 56, bias=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tie_embeddings is true, but lm_head.weight and backbone.embedding.weight"):
        MambaLMHeadModel.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 2, "tie_embeddings": False}))
    with pytest.raises(ValueError, match=r"unexpected: backbone.layers.2"):
        MambaLMHeadModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": 9}))
    with pytest.raises(ValueError, match="not known: sliding_window"):
        MambaLMHeadModel.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder at"):
        MambaLMHeadModel.from_pretrained(tmp_path / "nowhere")


def test_old_frequencies_of_rotary_embeddings_are_left_out(tmp_path):
    model = make("hybrid")
    model.save_pretrained(tmp_path)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    state["backbone.layers.1.mixer.rotary_emb.inv_freq"] = torch.ones(2)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with torch.no_grad():
        got = MambaLMHeadModel.from_pretrained(tmp_path, dtype=torch.float64)(IDS).logits
        torch.testing.assert_close(got, model(IDS).logits)


def test_a_subclass_is_loaded_as_one(tmp_path):
    class Ours(MambaLMHeadModel):
        def __init__(self, config, initializer_cfg=None, device=None, dtype=None, scale=1):
            super().__init__(config, initializer_cfg, device, dtype)
            self.register_buffer("scale", torch.tensor(scale), persistent=False)

    make("mamba").save_pretrained(tmp_path)
    model = Ours.from_pretrained(tmp_path, scale=3, initializer_cfg={"initializer_range": 1.0})
    assert type(model) is Ours and model.scale == 3


# --- code of others, as it is ---------------------------------------------------------------------------------------


@pytest.fixture
def installed():
    ssm_kernels.compat.install()
    yield
    ssm_kernels.compat.uninstall()


def test_the_originals_own_test_of_generation(installed):
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel, MixerModel, _init_weights, create_block
    from mamba_ssm.modules.block import Block
    from mamba_ssm.modules.mha import MHA
    from mamba_ssm.modules.mlp import GatedMLP
    from mamba_ssm.utils.generation import GenerationMixin, InferenceParams, sample, update_graph_cache
    from mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf

    assert all((MixerModel, _init_weights, create_block, Block, MHA, GatedMLP, sample, update_graph_cache))
    assert all((load_config_hf, load_state_dict_hf, InferenceParams)) and issubclass(MambaLMHeadModel, GenerationMixin)
    torch.manual_seed(2357)
    config = MambaConfig(d_model=64, n_layer=2, vocab_size=50, ssm_cfg=dict(layer="Mamba2"), rms_norm=True,
                         residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=16)  # fmt: skip
    model = MambaLMHeadModel(config, device="cpu", dtype=torch.float32)
    want = model(IDS).logits
    out = model.generate(
        input_ids=IDS[:, :5], max_length=12, output_scores=True, return_dict_in_generate=True, cg=True,
        teacher_outputs=IDS,
    )  # fmt: skip
    torch.testing.assert_close(torch.stack(out.scores, dim=1), want[:, 4:-1])


def test_lm_eval_runs_its_class_of_the_original(installed, tmp_path):
    pytest.importorskip("accelerate", reason="lm-eval's classes for models of the Hub need it")
    from lm_eval.api.instance import Instance
    from lm_eval.models.mamba_lm import MambaLMWrapper
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "a", "b", "c", "d", "."]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token=".", unk_token="<pad>"
    ).save_pretrained(tmp_path / "words")
    torch.manual_seed(0)
    config = MambaConfig(d_model=32, n_layer=2, vocab_size=6, ssm_cfg=MAMBA2)
    model = MambaLMHeadModel(config, {"initializer_range": 1.0})
    model.save_pretrained(tmp_path / "model")
    lm = MambaLMWrapper(
        pretrained=str(tmp_path / "model"), tokenizer=str(tmp_path / "words"), device="cpu", dtype="float32",
        max_length=64, batch_size=2,
    )  # fmt: skip
    assert type(lm.model).__name__ == "MambaLMHeadModel" and lm.model.lm_head.weight.dtype == torch.float32

    requests = [("a b c", " d"), ("b", " a b")]
    got = lm.loglikelihood([Instance("loglikelihood", {}, arguments, i) for i, arguments in enumerate(requests)])
    for (context, answer), (value, _) in zip(requests, got, strict=True):
        ids = torch.tensor([[words.index(w) for w in (context + answer).split()]])
        n = len(answer.split())
        logs = model(ids[:, :-1]).logits.log_softmax(-1)[0, -n:]
        assert math.isclose(value, logs.gather(1, ids[0, -n:, None]).sum().item(), rel_tol=1e-4)

    options = {"until": ["."], "max_gen_toks": 6, "do_sample": False, "temperature": 0.0}
    asked = [Instance("generate_until", {}, (context, options), i) for i, (context, _) in enumerate(requests)]
    texts = lm.generate_until(asked)
    for (context, _), text in zip(requests, texts, strict=True):
        ids = torch.tensor([[words.index(w) for w in context.split()]])
        want = [words[i] for i in model.generate(ids, ids.shape[1] + 6)[0, ids.shape[1] :] if i < 6]
        want = want[: want.index(".")] if "." in want else want
        assert text.split()[: len(want)] == [w for w in want if w != "<pad>"][: len(text.split())]
