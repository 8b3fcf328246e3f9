"""Other libraries' models give the same on our ops as on their own: outputs, gradients, caches, tokens."""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

from ssm_kernels.compat import mamba_ssm as compat
from ssm_kernels.integrations import transformers as integration

transformers = pytest.importorskip("transformers", minversion="5.23")

COMMON = {"vocab_size": 32, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48}
HEADS = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 4}
CONFIGS = {
    "mamba": ("Mamba", {"state_size": 8, "num_hidden_layers": 2}),
    "falcon_mamba": ("FalconMamba", {"state_size": 8, "num_hidden_layers": 2}),
    "jamba": (
        "Jamba",
        {
            **ATTENTION, "num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
            "mamba_d_state": 8,
        },
    ),
    "zamba": (
        "Zamba",
        {
            "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "hybrid"], "mamba_d_state": 8, "n_mamba_heads": 2,
            "mamba_dt_rank": 4, "attention_head_dim": 32,
        },
    ),
    "falcon_h1": (
        "FalconH1",
        {
            **ATTENTION, "num_hidden_layers": 2, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64,
            "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 4,
        },
    ),
    "mamba2": (
        "Mamba2",
        {
            "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 4, "num_hidden_layers": 2,
            "time_step_limit": (0.01, 0.5),
        },
    ),
    "bamba": ("Bamba", {**ATTENTION, **HEADS, "num_hidden_layers": 2, "attn_layer_indices": [1]}),
    "zamba2": (
        "Zamba2",
        {
            "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 2,
            "layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_ngroups": 2,
            "chunk_size": 4, "adapter_rank": 4,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {
            **ATTENTION, "head_dim": 16, "layers_block_type": ["mamba", "attention"], "ssm_state_size": 8,
            "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 4,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            **ATTENTION, **HEADS, "num_hidden_layers": 2, "layer_types": ["mamba", "attention"],
            "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 16,
        },
    ),
}  # fmt: skip
TOKENS = torch.randint(3, 32, (2, 11), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(TOKENS)
PADDED[0, :3] = 0


def tiny(model_type, **more):
    name, settings = CONFIGS[model_type]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**COMMON | settings | more)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():  # so that biases and norms matter
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def both(compute, monkeypatch, *names):
    """Compute on the library's ops and on ours, and assert that exactly the named ones of ours ran."""
    integration.disable()
    theirs, called = compute(), set()

    class Spy:
        def __getattr__(self, name):
            called.add(name)
            return getattr(compat, name)

    monkeypatch.setattr(integration, "ops", Spy())
    with integration.enabled():
        ours = compute()
    assert called == set(names)
    return theirs, ours


def scan_of(model_type):
    return (
        "selective_scan_fn"
        if model_type in ("mamba", "falcon_mamba", "jamba", "zamba")
        else "mamba_chunk_scan_combined"
    )


def assert_close(theirs, ours):
    """To 1e-4 of the largest element."""
    assert theirs.shape == ours.shape and theirs.abs().max() > 0
    assert (theirs - ours).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_logits_and_gradients_are_equal(model_type, mask, training, monkeypatch):
    model = tiny(model_type).train(training)

    def compute():
        model.zero_grad()
        out = model(TOKENS, attention_mask=mask, labels=TOKENS, use_cache=False)
        out.loss.backward()
        return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    (theirs, their_grads), (ours, our_grads) = both(compute, monkeypatch, "causal_conv1d_fn", scan_of(model_type))
    assert_close(theirs, ours)
    assert their_grads.keys() == our_grads.keys() and any("conv1d" in name for name in our_grads)
    largest = max(g.abs().max() for g in their_grads.values())
    for name, grad in their_grads.items():
        scale = max(grad.abs().max(), 1e-3 * largest)
        assert (grad - our_grads[name]).abs().max() <= 1e-4 * scale, name


def cache_name(model) -> str:
    """The argument and output that holds the states; `cache_params` is `cache` from transformers 5.24 on."""
    parameters = inspect.signature(model.forward).parameters
    return next(n for n in ("cache", "cache_params", "past_key_values") if n in parameters)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_caches_and_generated_tokens_are_equal(model_type, monkeypatch):
    model = tiny(model_type)
    names = ("causal_conv1d_fn", "causal_conv1d_update", scan_of(model_type), "selective_state_update")
    cache = cache_name(model)

    @torch.no_grad()
    def compute():
        out = model(TOKENS[:, :6], use_cache=True)
        logits = [out.logits]
        for t in range(6, 9):
            out = model(TOKENS[:, t : t + 1], use_cache=True, **{cache: out[cache]})
            logits.append(out.logits)
        logits.append(model(TOKENS[:, 9:], use_cache=True, **{cache: out[cache]}).logits)
        tokens = model.generate(TOKENS, attention_mask=PADDED, max_new_tokens=6, do_sample=False, eos_token_id=None)
        return torch.cat(logits, 1), tokens

    (theirs, their_tokens), (ours, our_tokens) = both(compute, monkeypatch, *names)
    assert_close(theirs, ours)
    assert their_tokens.shape[1] == TOKENS.shape[1] + 6 and their_tokens.equal(our_tokens)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_a_decoding_step_with_gradients_is_the_librarys(model_type, monkeypatch):
    """Its backward fails, since the cache is updated in place. Ours would leave the gradients out without a word."""
    model = tiny(model_type)
    with torch.no_grad():
        name = cache_name(model)
        cache = model(TOKENS[:, :6], use_cache=True)[name]

    def compute():
        out = model(TOKENS[:, 6:7], use_cache=True, **{name: copy.deepcopy(cache)})
        with pytest.raises(RuntimeError, match="inplace"):
            out.logits.sum().backward()
        return out.logits.detach()

    assert_close(*both(compute, monkeypatch))


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_another_activation_is_the_librarys(model_type, monkeypatch):
    model = tiny(model_type, hidden_act="gelu").train()
    assert_close(*both(lambda: model(TOKENS, use_cache=False).logits.detach(), monkeypatch, scan_of(model_type)))


def test_packed_sequences_are_kept_apart_or_refused():
    seq_idx = torch.tensor([[0] * 4 + [1] * 7], dtype=torch.int32)
    with integration.enabled(), torch.no_grad():
        model = tiny("mamba2").backbone
        packed = model(TOKENS[:1], seq_idx=seq_idx, use_cache=False)[0]
        alone = [model(part, use_cache=False)[0] for part in (TOKENS[:1, :4], TOKENS[:1, 4:])]
        assert_close(torch.cat(alone, 1), packed)
        with pytest.raises(ValueError, match="cu_seqlens"):
            model(TOKENS[:1], cu_seqlens=torch.tensor([0, 4, 11]), use_cache=False)
        with pytest.raises(ValueError, match="seq_idx"):
            tiny("mamba").backbone.layers[0].mixer(torch.ones(1, 11, 32), seq_idx=seq_idx)


CUT = 4
POSITIONS = torch.cat([torch.arange(CUT), torch.arange(TOKENS.shape[1] - CUT)]).unsqueeze(0)
SEQ_IDX = (torch.arange(TOKENS.shape[1]) >= CUT).int().unsqueeze(0)


def error_of(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


@torch.no_grad()
def error_in_pack(model, **packing):
    """Largest difference of two sequences in one row from each alone, as a share of the largest logit."""
    alone = [model(part, use_cache=False).logits for part in (TOKENS[:1, :CUT], TOKENS[:1, CUT:])]
    return error_of(model(TOKENS[:1], use_cache=False, **packing).logits, torch.cat(alone, 1))


@pytest.mark.parametrize("model_type", CONFIGS)
def test_by_positions_alone_the_library_mixes_packed_sequences_and_so_it_stays(model_type):
    model = tiny(model_type)
    integration.disable()
    theirs = error_in_pack(model, position_ids=POSITIONS)
    with integration.enabled():
        assert error_in_pack(model, position_ids=POSITIONS) == pytest.approx(theirs, rel=1e-3)
    assert theirs > 1e-3


@pytest.mark.parametrize("model_type", ["bamba", "falcon_h1", "zamba2", "nemotron_h"])
def test_with_seq_idx_and_positions_packed_sequences_are_kept_apart(model_type):
    model = tiny(model_type)
    integration.disable()
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        error_in_pack(model, position_ids=POSITIONS, seq_idx=SEQ_IDX)
    with integration.enabled():
        assert error_in_pack(model, position_ids=POSITIONS, seq_idx=SEQ_IDX) < 1e-6


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba", "jamba", "mamba2", "granitemoehybrid"])
def test_with_seq_idx_these_still_mix_packed_sequences(model_type):
    """The documentation lists these models; a version of the library that passes seq_idx on will fail here."""
    with integration.enabled():
        assert error_in_pack(tiny(model_type), position_ids=POSITIONS, seq_idx=SEQ_IDX) > 1e-3


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_prompt_in_segments_is_as_wrong_as_the_librarys(model_type):
    model = tiny(model_type)
    cache = "cache_params" if model_type in ("mamba", "mamba2", "falcon_mamba") else "past_key_values"

    @torch.no_grad()
    def compute():
        first = model(TOKENS[:, :5], use_cache=True)
        return first.logits, model(TOKENS[:, 5:], use_cache=True, **{cache: first[cache]}).logits

    integration.disable()
    with torch.no_grad():
        whole = model(TOKENS, use_cache=False).logits
    theirs = torch.cat(compute(), 1)
    with integration.enabled():
        assert_close(theirs, torch.cat(compute(), 1))
    if model_type == "zamba":  # too little, here, of what its scan forgets arrives at the logits
        return
    wrong = model_type in ("mamba", "falcon_mamba", "jamba", "bamba")
    assert (error_of(theirs, whole) > 1e-4) == wrong


def test_every_model_type_with_these_functions_is_covered_or_named():
    found = set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        if re.search(r"^def (causal_conv1d_|mamba2?_(selective|chunk|split|inner))", path.read_text(), re.M):
            found.add(path.stem.removeprefix("modeling_"))
    scans = set(integration.MODEL_TYPES)
    assert scans <= found <= scans | set(integration.CONVOLUTION_ALONE)
    assert set(CONFIGS) == scans


def functions():
    modules = (importlib.import_module(f"transformers.models.{t}.modeling_{t}") for t in integration.MODEL_TYPES)
    return {(m.__name__, n): v for m in modules for n, v in vars(m).items()}


def test_it_is_undone_exactly_and_twice_is_once():
    integration.disable()
    before = functions()
    integration.enable()
    once = functions()
    changed = {key for key in before if before[key] is not once[key]}
    assert changed == {
        (f"transformers.models.{t}.modeling_{t}", name)
        for t, names in integration.MODEL_TYPES.items()
        for name in names
    }
    integration.enable()
    assert functions() == once
    with integration.enabled():
        pass
    assert functions() == once  # what was on before stays on
    integration.disable()
    assert functions() == before
    integration.disable()
    with pytest.raises(KeyError), integration.enabled():
        raise KeyError
    assert functions() == before


def test_a_version_that_is_not_known_is_refused_and_left_alone(monkeypatch):
    from transformers.models.bamba import modeling_bamba

    integration.disable()
    monkeypatch.delattr(modeling_bamba, "mamba2_chunk_scan")
    before = functions()
    with pytest.raises(RuntimeError, match=rf"{transformers.__version__}.*modeling_bamba\.mamba2_chunk_scan"):
        integration.enable()
    assert functions() == before
