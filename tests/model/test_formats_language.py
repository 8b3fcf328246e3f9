"""Published language models: files as `transformers` or `mamba_ssm` write them, loaded by path, against the original.

`transformers` is the oracle: the two formats of `mamba_ssm` differ from its own in names, which are written here by
hand as published.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace

import pytest
import torch
import transformers

from tests.model.originals import random_original
from vlmamba.model import LMConfig, MambaLM, Tokenizer
from vlmamba.model.convert import convert
from vlmamba.model.formats import detect_format
from vlmamba.model.formats.language import (
    PUBLISHED,
    from_mistral,
    from_state_spaces,
    from_transformers,
    open_language_model,
    to_state_spaces,
    to_transformers,
    transformers_name,
)
from vlmamba.model.weights import open_weights

IDS = torch.randint(0, 60, (2, 21), generator=torch.Generator().manual_seed(1))
TOKENS = {"bos_token_id": 0, "eos_token_id": 5, "pad_token_id": 3}
# Small models, and each setting that changes the numbers away from its default at least once.
ORIGINALS = {
    "mamba": transformers.MambaConfig(
        vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=3, time_step_rank=5, **TOKENS
    ),
    "mamba with biases": transformers.MambaConfig(
        vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2, expand=3, conv_kernel=3, use_bias=True,
        use_conv_bias=False, layer_norm_epsilon=1e-2, residual_in_fp32=False, tie_word_embeddings=False, **TOKENS,
    ),
    "mamba2": transformers.Mamba2Config(
        vocab_size=64, hidden_size=32, state_size=16, head_dim=16, num_heads=4, n_groups=1, num_hidden_layers=3,
        chunk_size=8, tie_word_embeddings=True, **TOKENS,
    ),
    "codestral": transformers.Mamba2Config(
        vocab_size=64, hidden_size=32, state_size=8, head_dim=8, num_heads=8, n_groups=4, num_hidden_layers=2,
        chunk_size=8, layer_norm_epsilon=1e-3, use_bias=True, norm_before_gate=True, **TOKENS,
    ),
    "mamba2 with bounded steps": transformers.Mamba2Config(
        vocab_size=64, hidden_size=32, state_size=8, head_dim=8, num_heads=8, n_groups=2, num_hidden_layers=2,
        chunk_size=8, use_conv_bias=False, time_step_limit=(0.05, 0.3), **TOKENS,
    ),
    "falcon": transformers.FalconMambaConfig(
        vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2, expand=16, intermediate_size=64,
        mixer_rms_eps=1e-2, tie_word_embeddings=False, **TOKENS,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def original(request, tmp_path_factory, skip_ignored_norm_groups):
    """A model of `transformers`, and its folder, in shards."""
    skip_ignored_norm_groups(ORIGINALS[request.param])
    model = random_original(ORIGINALS[request.param])
    folder = tmp_path_factory.mktemp("original") / "model"
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    (folder / "generation_config.json").unlink(missing_ok=True)  # what it says is in config.json too
    return model, folder


every_original = pytest.mark.parametrize("original", ORIGINALS, indirect=True)


def layers_of(lm: MambaLM, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The residual stream after each layer, what the last norm makes of it, and the logits."""
    added = []
    hooks = [
        layer.mixer.register_forward_hook(lambda module, args, out: added.append(out)) for layer in lm.backbone.layers
    ]
    out = lm(ids)
    for hook in hooks:
        hook.remove()
    stream, streams = lm.embed(ids), []
    for mixed in added:
        stream = stream + mixed
        streams.append(stream)
    return [*streams, out.hidden], out.logits


@every_original
@torch.no_grad()
def test_every_layer_and_the_logits_agree(original):
    theirs, folder = original
    ours = MambaLM.from_pretrained(folder)
    want = theirs(IDS, output_hidden_states=True)
    hidden, logits = layers_of(ours, IDS)
    torch.testing.assert_close(logits, want.logits, rtol=1e-5, atol=1e-5)
    for got, expected in zip(hidden, want.hidden_states, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@every_original
@torch.no_grad()
def test_decoding_step_by_step_agrees(original):
    theirs, folder = original
    ours = MambaLM.from_pretrained(folder)
    state = ours.new_state(2)
    steps = [ours(IDS[:, :9], state=state).logits] + [ours(IDS[:, t : t + 1], state=state).logits for t in range(9, 21)]
    # The whole sequence: with a cache `transformers` leaves time_step_limit out of account.
    torch.testing.assert_close(torch.cat(steps, 1), theirs(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("original", [n for n in ORIGINALS if "bounded" not in n], indirect=True)
@torch.no_grad()
def test_cached_decoding_and_greedy_tokens_agree(original):
    theirs, folder = original
    ours = MambaLM.from_pretrained(folder)
    # `generate` steps with the cache; scores are the logits of each step.
    made = theirs.generate(
        IDS[:1, :7], max_new_tokens=15, min_new_tokens=15, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    state, ids = ours.new_state(1), IDS[:1, :7]
    for token, want in zip(made.sequences[0, 7:].tolist(), made.logits, strict=True):
        logits = ours(ids, state=state).logits[:, -1]
        torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)
        logits[:, TOKENS["eos_token_id"]] = -torch.inf  # theirs may not end before
        ids = logits.argmax(-1, keepdim=True)
        assert int(ids) == token


@every_original
@torch.no_grad()
def test_bfloat16_is_as_near_to_the_exact_model_as_theirs(original):
    """At most twice the error of `transformers` in bfloat16, and one rounding of the largest logit."""
    theirs, folder = original
    exact = theirs(IDS).logits
    half = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ours = MambaLM.from_pretrained(folder, dtype=torch.bfloat16)
    their_error = (half(IDS).logits.float() - exact).abs().max()
    our_error = (ours(IDS).logits - exact).abs().max()
    assert our_error <= 2 * their_error + exact.abs().max() * 2**-8


@torch.no_grad()
@pytest.mark.parametrize("original", ["mamba2"], indirect=True)
def test_the_dtype_of_the_file_is_kept_but_for_what_a_scan_needs(original, tmp_path):
    theirs, _ = original
    random_original(theirs.config).bfloat16().save_pretrained(tmp_path / "half")
    lm = MambaLM.from_pretrained(tmp_path / "half")
    kinds = {name: p.dtype for name, p in lm.backbone.layers[0].named_parameters()}
    assert {n for n, d in kinds.items() if d == torch.float32} == {"mixer.A_log", "mixer.D", "mixer.dt_bias"}
    assert set(kinds.values()) == {torch.float32, torch.bfloat16}
    assert {p.dtype for p in MambaLM.from_pretrained(tmp_path / "half", dtype=torch.float64).parameters()} == {
        torch.float64
    }


def write_by_hand(folder, theirs, layout, *, head=True, shared=False):
    """The model in the layout of `mamba_ssm` or of Codestral, with the published keys."""
    c = theirs.config
    state = {n.replace("embeddings.", "embedding."): p.detach().clone() for n, p in theirs.state_dict().items()}
    if not head:
        del state["lm_head.weight"]
    elif shared:
        state["lm_head.weight"] = state["backbone.embedding.weight"]
    folder.mkdir()
    if layout == "mistral":
        data = {
            "dim": c.hidden_size, "n_layers": c.num_hidden_layers, "vocab_size": c.vocab_size, "n_groups": c.n_groups,
            "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 1,
            "tie_embeddings": False, "model_type": "mamba",
        }  # fmt: skip
        (folder / "params.json").write_text(json.dumps(data))
        from safetensors.torch import save_file

        save_file({f"model.{n}": t for n, t in state.items()}, folder / "consolidated.safetensors")
        return
    data = {
        "d_model": c.hidden_size, "n_layer": c.num_hidden_layers, "vocab_size": 61, "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": True,
    }  # fmt: skip
    if c.model_type == "mamba":
        data |= {"ssm_cfg": {"d_state": c.state_size, "dt_rank": c.time_step_rank}, "pad_vocab_size_multiple": 8}
    else:
        data |= {
            "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "pad_vocab_size_multiple": 16,
            "tie_embeddings": c.tie_word_embeddings,
            "ssm_cfg": {"layer": "Mamba2", "d_state": c.state_size, "headdim": c.head_dim, "ngroups": c.n_groups},
        }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(data))
    torch.save(state, folder / "pytorch_model.bin")


@pytest.mark.parametrize("original", ["mamba", "mamba2"], indirect=True)
@pytest.mark.parametrize("stored", [{"head": False}, {"shared": True}, {}], ids=["no head", "shared head", "head"])
@torch.no_grad()
def test_the_original_format_agrees(original, stored, tmp_path):
    theirs, _ = original
    write_by_hand(tmp_path / "original", theirs, "state-spaces", **stored)
    assert detect_format(tmp_path / "original") == "state-spaces"
    ours = MambaLM.from_pretrained(tmp_path / "original")
    assert (ours.config.vocab_size, ours.config.padded_vocab_size) == (61, 64)
    assert ours.lm_head.weight is ours.backbone.embedding.weight
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_codestral_in_its_own_layout_agrees(tmp_path, skip_ignored_norm_groups):
    config = transformers.Mamba2Config(
        vocab_size=64, hidden_size=128, state_size=128, head_dim=64, num_heads=4, n_groups=2, num_hidden_layers=2,
        chunk_size=8, **TOKENS,
    )  # fmt: skip
    skip_ignored_norm_groups(config)
    theirs = random_original(config)
    write_by_hand(tmp_path / "codestral", theirs, "mistral")
    assert detect_format(tmp_path / "codestral") == "mistral"
    ours = MambaLM.from_pretrained(tmp_path / "codestral")
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=2e-5)


def test_a_head_that_is_tied_by_the_config_but_differs_is_an_error(tmp_path):
    theirs = random_original(ORIGINALS["mamba"])
    theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.detach() + 1)
    write_by_hand(tmp_path / "untied", theirs, "state-spaces")
    with pytest.raises(ValueError, match=r"embedding.weight and lm_head.weight are tied in the model but differ"):
        MambaLM.from_pretrained(tmp_path / "untied")
    with pytest.raises(ValueError, match="the head is to be the embedding by the config, but differs"):
        convert(tmp_path / "untied", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def tensors(folder):
    return {name: (t.dtype, t.clone()) for name, t in open_weights(folder).items()}


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for name, (dtype, tensor) in one.items():
        assert dtype == other[name][0], name
        assert torch.equal(tensor, other[name][1]), name


@every_original
@torch.no_grad()
def test_there_and_back_is_the_same(original, tmp_path):
    """And `transformers` loads what comes back, with the same logits."""
    theirs, folder = original
    config = convert(folder, tmp_path / "own", to="own")
    assert detect_format(tmp_path / "own") == "own"
    assert convert(tmp_path / "own", tmp_path / "back", to="transformers") == config
    assert_same_tensors(tensors(folder), tensors(tmp_path / "back"))
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(back) is type(theirs)
    torch.testing.assert_close(back(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    settings = back.config.to_dict() | {"time_step_limit": list(getattr(back.config, "time_step_limit", ()))}
    for name, value in theirs.config.to_dict().items():
        # What Falcon's expand says does not count, and neither does what transformers does not read.
        unread = ("expand", "intermediate_size", "chunk_size", "norm_before_gate", "_name_or_path", "dtype")
        if name not in (*unread, "architectures", "transformers_version"):
            assert settings[name] == value, name
    convert(tmp_path / "back", tmp_path / "again", to="own")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "own" / "config.json").read_text()
    assert_same_tensors(tensors(tmp_path / "own"), tensors(tmp_path / "again"))


@pytest.mark.parametrize("original", ["mamba", "mamba2"], indirect=True)
@torch.no_grad()
def test_the_original_format_there_and_back_is_the_same(original, tmp_path):
    theirs, _ = original
    source = tmp_path / "source"
    write_by_hand(source, theirs, "state-spaces", shared=True)
    for to in ("own", "transformers"):
        convert(source, tmp_path / to, to=to)
        convert(tmp_path / to, tmp_path / f"{to}-back", to="state-spaces")
        assert_same_tensors(tensors(source), tensors(tmp_path / f"{to}-back"))
        files = [json.loads((f / "config.json").read_text()) for f in (source, tmp_path / f"{to}-back")]
        if theirs.config.model_type == "mamba2":
            files[1]["ssm_cfg"]["ngroups"] = 1  # the default, which is not written
        assert files[0] == files[1]
        # mamba_ssm reads all of the file, so a tensor that is there twice is stored once.
        assert (tmp_path / f"{to}-back" / "pytorch_model.bin").stat().st_size < source.stat().st_size + (
            1.1 * (source / "pytorch_model.bin").stat().st_size
        )
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "transformers").eval()
    torch.testing.assert_close(back(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("original", ["falcon"], indirect=True)
def test_convert_to_another_dtype(original, tmp_path):
    _, folder = original
    convert(folder, tmp_path / "half", to="transformers", dtype=torch.bfloat16)
    kinds = open_weights(tmp_path / "half").dtypes
    exact = {n.rsplit("mixer.", 1)[-1] for n, d in kinds.items() if d == torch.float32}
    assert exact == {"A_log", "D", "dt_proj.bias"}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="'state-spaces' has no place for dt_bc_norm_eps 0.01"):
        convert(folder, tmp_path / "original", to="state-spaces")
    assert not (tmp_path / "original").exists()


def test_convert_leaves_nothing_half_done(tmp_path, monkeypatch):
    MambaLM(LMConfig(16, 1, 50)).save_pretrained(tmp_path / "lm")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlmamba.model.weights.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        convert(tmp_path / "lm", tmp_path / "dst", to="transformers")
    assert [p.name for p in tmp_path.iterdir()] == ["lm"]
    with pytest.raises(FileExistsError, match="lm exists and is not empty"):
        convert(tmp_path / "lm", tmp_path / "lm", to="transformers")
    with pytest.raises(ValueError, match="to must be one of 'own', .*'released'; got 'gguf'"):
        convert(tmp_path / "lm", tmp_path / "dst", to="gguf")


def test_the_tokenizer_is_saved_too(tmp_path, caplog):
    tokenizer = Tokenizer.train(["a red circle"], 280)
    MambaLM(LMConfig(16, 1, 280), tokenizer).save_pretrained(tmp_path / "lm")
    assert {p.name for p in (tmp_path / "lm").iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_vlmamba.py",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    convert(tmp_path / "lm", tmp_path / "theirs", to="transformers")
    again = MambaLM.from_pretrained(tmp_path / "theirs")
    assert again.tokenizer.encode("a red circle") == tokenizer.encode("a red circle")
    assert not caplog.records
    (tmp_path / "theirs" / "tokenizer.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert MambaLM.from_pretrained(tmp_path / "theirs").tokenizer is None
    assert [r.getMessage() for r in caplog.records] == [f"no tokenizer: {tmp_path / 'theirs'} has no tokenizer.json"]


@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>", "lstrip": False}])
def test_another_end_of_text_is_read_and_kept(eos, tmp_path):
    inner = Tokenizer.train(["a red circle"], 280).inner
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert tokenizer.eos_id == inner.token_to_id("</s>")
    MambaLM(LMConfig(16, 1, 290), tokenizer).save_pretrained(tmp_path / "lm")
    assert MambaLM.from_pretrained(tmp_path / "lm").tokenizer.eos_id == tokenizer.eos_id


STATE_SPACES = to_state_spaces(PUBLISHED["state-spaces/mamba-130m"].config)
STATE_SPACES_2 = to_state_spaces(PUBLISHED["state-spaces/mamba2-130m"].config)
TRANSFORMERS = to_transformers(PUBLISHED["state-spaces/mamba-130m-hf"].config)
TRANSFORMERS_2 = to_transformers(PUBLISHED["AntonV/mamba2-130m-hf"].config)
MISTRAL = {
    "dim": 4096, "n_layers": 64, "vocab_size": 32768, "n_groups": 8, "rms_norm": True, "residual_in_fp32": True,
    "fused_add_norm": True, "pad_vocab_size_multiple": 1, "tie_embeddings": False, "model_type": "mamba",
}  # fmt: skip


@pytest.mark.parametrize(
    ("reader", "data", "change", "message"),
    [
        (from_state_spaces, STATE_SPACES_2, {"attn_layer_idx": [9, 18]}, r"attn_layer_idx is \[9, 18\]"),
        (from_state_spaces, STATE_SPACES_2, {"d_intermediate": 512}, "d_intermediate is 512, but only 0"),
        (from_state_spaces, STATE_SPACES, {"rms_norm": False}, "rms_norm is False, but only True"),
        (from_state_spaces, STATE_SPACES, {"n_head": 3}, "settings that are not known: 'n_head'"),
        (from_state_spaces, STATE_SPACES, {"ssm_cfg": {"headdim": 3}}, "ssm_cfg has settings .* 'headdim'"),
        (from_state_spaces, STATE_SPACES, {"ssm_cfg": {"layer": "Mamba9"}}, "ssm_cfg.layer must be .* got 'Mamba9'"),
        (from_state_spaces, STATE_SPACES_2, {"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "rmsnorm is False"),
        (
            from_state_spaces,
            STATE_SPACES_2,
            {"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}},
            "ssm_cfg: norm_before_gate is True, but only False",
        ),
        (from_state_spaces, STATE_SPACES_2, {"ssm_cfg": {"layer": "Mamba2", "d_ssm": 64}}, "d_ssm is 64"),
        (from_state_spaces, STATE_SPACES_2, {"ssm_cfg": {"layer": "Mamba2", "dt_limit": 3}}, "bounds of dt .* got 3"),
        (from_state_spaces, STATE_SPACES, {"n_layer": "24"}, "n_layer must be int, got '24'"),
        (from_state_spaces, STATE_SPACES, {"ssm_cfg": {"dt_rank": "half"}}, "rank of dt .* got 'half'"),
        (from_transformers, TRANSFORMERS, {"model_type": "jamba"}, "model_type must be .* got 'jamba'"),
        (from_transformers, TRANSFORMERS, {"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        (from_transformers, TRANSFORMERS, {"intermediate_size": 1000}, "a multiple of hidden_size 768, got 1000"),
        (from_transformers, TRANSFORMERS, {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        (from_transformers, TRANSFORMERS_2, {"num_heads": 25}, r"num_heads \* head_dim must be .* got 25 \* 64"),
        (from_transformers, TRANSFORMERS_2, {"rms_norm": False}, "rms_norm is False"),
        (from_transformers, TRANSFORMERS, {"use_bias": 1}, "use_bias must be bool, got 1"),
        (from_mistral, MISTRAL, {"rms_norm": False}, "rms_norm is False"),
        (from_mistral, MISTRAL, {"n_heads": 8}, "settings that are not known: 'n_heads'"),
    ],
)
def test_settings_that_are_not_supported_are_refused_by_name(reader, data, change, message):
    reader(data)
    with pytest.raises(ValueError, match=message):
        reader(data | change)


def test_settings_that_a_format_cannot_hold_are_refused_by_name():
    with pytest.raises(ValueError, match="'state-spaces' has no place for norm_eps 0.001; it is always 1e-05"):
        to_state_spaces(LMConfig(norm_eps=1e-3))


@pytest.mark.parametrize(
    "config",
    [
        LMConfig(32, 2, 61, d_state=4, d_conv=3, expand=4, dt_rank=7, bias=True, conv_bias=False, tie_embeddings=False),
        LMConfig(32, 2, 61, "mamba2", d_state=4, headdim=8, ngroups=2, dt_limit=(0.1, 0.5), residual_in_fp32=False),
        LMConfig(32, 2, 61, "mamba2", dt_limit=(0.1, math.inf), pad_vocab_size_multiple=16),
    ],
)
def test_configs_there_and_back_are_the_same(config):
    assert from_state_spaces(json.loads(json.dumps(to_state_spaces(config)))) == config
    theirs = replace(config, norm_eps=1e-3, dt_bc_norm_eps=1e-4 if config.layer == "mamba" else None)
    assert from_transformers(json.loads(json.dumps(to_transformers(theirs), allow_nan=False))) == theirs


def test_published_configs_are_those_of_the_table():
    """The files as they are on the Hub."""
    for repo, published in PUBLISHED.items():
        c = published.config
        if published.format == "state-spaces":
            data = {
                "d_model": c.d_model, "n_layer": c.n_layer, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True,
                "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
            }  # fmt: skip
            if c.layer == "mamba2":
                data |= {
                    "d_intermediate": 0, "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "attn_cfg": {},
                    "pad_vocab_size_multiple": 16, "tie_embeddings": True,
                }  # fmt: skip
            assert from_state_spaces(data) == c, repo
            assert to_state_spaces(c) == data, repo
    assert from_mistral(MISTRAL) == PUBLISHED["mistralai/Mamba-Codestral-7B-v0.1"].config
    hf = {
        "bos_token_id": 0, "chunk_size": 256, "conv_kernel": 4, "eos_token_id": 0, "expand": 2, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 8192, "layer_norm_epsilon": 1e-05,
        "model_type": "mamba2", "n_groups": 8, "norm_before_gate": True, "num_heads": 128, "num_hidden_layers": 64,
        "residual_in_fp32": True, "rms_norm": True, "state_size": 128, "tie_word_embeddings": False,
        "time_step_limit": [0.0, math.inf], "time_step_rank": 256, "use_bias": False, "use_conv_bias": True,
        "vocab_size": 32768,
    }  # fmt: skip
    assert from_transformers(hf) == PUBLISHED["mistralai/Mamba-Codestral-7B-v0.1"].config
    falcon = {
        "conv_kernel": 4, "expand": 16, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 8192,
        "layer_norm_epsilon": 1e-05, "model_type": "falcon_mamba", "num_hidden_layers": 64, "residual_in_fp32": True,
        "state_size": 16, "tie_word_embeddings": False, "time_step_rank": 256, "use_bias": False,
        "use_conv_bias": True, "vocab_size": 65024,
    }  # fmt: skip
    assert from_transformers(falcon) == PUBLISHED["tiiuae/falcon-mamba-7b"].config


def of_layer(c: LMConfig) -> dict[str, tuple[int, ...]]:
    """The published names and shapes of one layer."""
    d, e = c.d_model, c.expand * c.d_model
    if c.layer == "mamba":
        rank = math.ceil(d / 16)
        mixer = {
            "in_proj.weight": (2 * e, d), "conv1d.weight": (e, 1, 4), "conv1d.bias": (e,),
            "x_proj.weight": (rank + 32, e), "dt_proj.weight": (e, rank), "dt_proj.bias": (e,), "A_log": (e, 16),
            "D": (e,), "out_proj.weight": (d, e),
        }  # fmt: skip
    else:
        heads, channels = e // 64, e + 2 * c.ngroups * 128
        mixer = {
            "in_proj.weight": (e + channels + heads, d), "conv1d.weight": (channels, 1, 4), "conv1d.bias": (channels,),
            "dt_bias": (heads,), "A_log": (heads,), "D": (heads,), "norm.weight": (e,), "out_proj.weight": (d, e),
        }  # fmt: skip
    return {"norm.weight": (d,)} | {f"mixer.{name}": shape for name, shape in mixer.items()}


@pytest.mark.parametrize("repo", PUBLISHED)
def test_published_models_have_their_names_shapes_and_counts(repo):
    c = PUBLISHED[repo].config
    with torch.device("meta"):
        lm = MambaLM(replace(c, n_layer=1))
    parameters = dict(lm.named_parameters())
    want = {"backbone.embedding.weight": (c.padded_vocab_size, c.d_model), "backbone.norm_f.weight": (c.d_model,)}
    want |= {f"backbone.layers.0.{name}": shape for name, shape in of_layer(c).items()}
    if not c.tie_embeddings:
        want["lm_head.weight"] = (c.padded_vocab_size, c.d_model)
    assert {name: tuple(p.shape) for name, p in parameters.items()} == want
    one_layer = sum(p.numel() for p in lm.backbone.layers[0].parameters())
    count = sum(p.numel() for p in parameters.values()) + (c.n_layer - 1) * one_layer
    assert count == PUBLISHED[repo].parameters


@pytest.mark.parametrize(
    "repo",
    [
        "state-spaces/mamba-2.8b-hf",
        "AntonV/mamba2-2.7b-hf",
        "tiiuae/falcon-mamba-7b",
        "mistralai/Mamba-Codestral-7B-v0.1",
    ],
)
def test_published_models_have_the_names_and_shapes_that_transformers_gives_them(repo):
    c = PUBLISHED[repo].config
    theirs = transformers.AutoConfig.for_model(**to_transformers(c))
    theirs.num_hidden_layers = 1
    with torch.device("meta"):
        ours = MambaLM(replace(c, n_layer=1))
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    want = {name: p.shape for name, p in model.named_parameters()}
    assert {transformers_name(name): p.shape for name, p in ours.named_parameters()} == want


def test_the_format_is_detected_from_small_files(tmp_path):
    def seen(files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, data in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(data if isinstance(data, str) else json.dumps(data))
        return detect_format(folder)

    prismatic = {"model": {"type": "x", "llm_backbone_id": "mamba2-2.7b"}}
    assert seen({"config.json": {"architecture": "vit_so400m", "num_features": 3}}) == "timm"
    assert seen({"config.json": prismatic, "latest-checkpoint.pt": ""}) == "ml-mamba"
    prismatic["model"]["llm_backbone_id"] = "mamba-2.8b-zephyr"
    assert seen({"config.json": prismatic, "checkpoints/latest-checkpoint.pt": ""}) == "cobra"
    assert seen({"config.json": {"language": {}, "vision": []}}) == "own"
    with pytest.raises(ValueError, match=r"config.json is of no known format: it has a, b. Known are\n  own:"):
        seen({"config.json": {"a": 1, "b": 2}})
    with pytest.raises(ValueError, match="params.json is of no known format: it has dim, n_heads"):
        seen({"params.json": {"dim": 1, "n_heads": 2}})
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        seen({"config.json": "{"})
    with pytest.raises(FileNotFoundError, match="has no config.json, so what model it holds is unknown"):
        seen({"README.md": ""})


def test_other_models_are_no_language_models(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit", "num_features": 3}))
    with pytest.raises(ValueError, match="is no language model: its format is 'timm', known are"):
        open_language_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"language": {}, "vision": [], "connector": {}}))
    with pytest.raises(ValueError, match="holds another model of this library, not a language model"):
        MambaLM.from_pretrained(tmp_path)
