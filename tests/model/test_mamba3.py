"""Language models of Mamba-3 layers: packing, generation, the published layout."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ssm_kernels import use_backend
from ssm_kernels.compat.mamba_ssm import InferenceParams, Mamba3
from tests.makers import random_prompts, sharpened_lm
from vlmamba.model import GenerationConfig, LMConfig, MambaLM, Tokenizer
from vlmamba.model.convert import convert
from vlmamba.model.formats.language import from_state_spaces, to_state_spaces, to_transformers
from vlmamba.model.generation.decoding import state_bytes
from vlmamba.model.generation.generate import generate_tokens
from vlmamba.model.generation.prefill import packed_tokens, prefill
from vlmamba.model.inspect import flops_per_token, inspect
from vlmamba.model.mamba_ssm import MambaLMHeadModel

TOKENIZER = Tokenizer.train(["once upon a time there was a state", "and it did not grow"] * 5, 300)
SIZES = {"d_state": 8, "headdim": 16, "chunk_size": 8}
CONFIGS = {
    "siso": LMConfig(32, 2, 300, "mamba3", **SIZES),
    "mimo": LMConfig(32, 2, 300, "mamba3", **SIZES, mimo_rank=3, is_outproj_norm=True, rope_fraction=1.0),
}
PROMPTS = random_prompts((5, 1, 23, 17))


@pytest.fixture(params=CONFIGS)
def lm(request):
    return sharpened_lm(CONFIGS[request.param], TOKENIZER, embedding=30, out_proj=10)


@torch.no_grad()
def test_packed_prompts_in_prefill_chunks_are_prompts(lm):
    embeds, cu_seqlens = packed_tokens(lm, PROMPTS)
    whole, cut = lm.new_state(len(PROMPTS)), lm.new_state(len(PROMPTS))
    want = prefill(lm, embeds, cu_seqlens, whole, 10_000)
    torch.testing.assert_close(prefill(lm, embeds, cu_seqlens, cut, 7), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close([s.ssm for s in cut], [s.ssm for s in whole], rtol=1e-4, atol=1e-5)
    for i, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(want[i], lm(torch.tensor([prompt])).logits[0, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generated_tokens_are_those_of_the_whole_text(lm):
    embeds, cu_seqlens = packed_tokens(lm, PROMPTS)
    texts = [list(p) for p in PROMPTS]
    for tokens, _ in generate_tokens(lm, embeds, cu_seqlens, [[]] * len(PROMPTS), GenerationConfig(6), 300):
        for text, token in zip(texts, tokens, strict=True):
            assert token == int(lm(torch.tensor([text])).logits[0, -1].argmax())
            text.append(token)
    assert [len(t) - len(p) for t, p in zip(texts, PROMPTS, strict=True)] == [6] * len(PROMPTS)


def test_saved_in_either_layout_it_is_the_same_model(lm, tmp_path):
    ids = torch.tensor([PROMPTS[2]])
    lm.save_pretrained(tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "published", to="state-spaces")
    ssm_cfg = json.loads((tmp_path / "published" / "config.json").read_text())["ssm_cfg"]
    assert ssm_cfg["layer"] == "Mamba3" and ssm_cfg.get("is_mimo", False) == (lm.config.mimo_rank is not None)
    for folder in ("own", "published"):
        loaded = MambaLM.from_pretrained(tmp_path / folder, dtype=torch.bfloat16)
        kept = {n.rsplit(".", 1)[-1] for n, p in loaded.named_parameters() if p.dtype == torch.float32}
        assert kept - {"mimo_x", "mimo_z", "mimo_o"} == {"dt_bias", "B_bias", "C_bias", "D"}
        assert torch.equal(MambaLM.from_pretrained(tmp_path / folder)(ids).logits, lm(ids).logits)
    assert inspect(tmp_path / "published").state_bytes == state_bytes(lm.new_state(1))


@torch.no_grad()
def test_a_published_checkpoint_runs_in_the_class_of_mamba_ssm(lm, tmp_path):
    lm.save_pretrained(tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "published", to="state-spaces")
    model = MambaLMHeadModel.from_pretrained(tmp_path / "published").eval()
    assert {type(layer.mixer) for layer in model.backbone.layers} == {Mamba3}
    ids = torch.tensor([PROMPTS[3], PROMPTS[3][::-1]])
    want = lm(ids).logits
    torch.testing.assert_close(model(ids).logits, want)
    out = model.generate(ids[:, :5], 17, teacher_outputs=ids, output_scores=True, return_dict_in_generate=True)
    torch.testing.assert_close(torch.stack(out.scores, 1), want[:, 4:-1], rtol=1e-4, atol=1e-4)
    for cache_dtype, tolerance in ((None, 1e-4), (torch.bfloat16, 0.3)):
        params = InferenceParams(17, 2, key_value_memory_dict=model.allocate_inference_cache(2, 17, cache_dtype))
        model(ids[:, :16], inference_params=params)
        params.seqlen_offset = 16
        last = model(ids[:, 16:], inference_params=params).logits[:, 0]
        torch.testing.assert_close(last, want[:, -1], rtol=tolerance, atol=tolerance)

    # Packed prompts, and a step after them.
    bounds = torch.tensor([0, 5, 12])
    packed = torch.cat([ids[0, :5], ids[1, :7]]).unsqueeze(0)
    params = InferenceParams(17, 2)
    first = model(packed, inference_params=params, cu_seqlens=bounds).logits[0, bounds[1:] - 1]
    torch.testing.assert_close(first, torch.stack([want[0, 4], want[1, 6]]), rtol=1e-4, atol=1e-4)
    params.seqlen_offset = 5
    second = model(torch.stack([ids[0, 5:6], ids[1, 7:8]]), inference_params=params).logits[:, 0]
    torch.testing.assert_close(second, torch.stack([want[0, 5], want[1, 7]]), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="seq_idx needs cu_seqlens"):
        model(packed, seq_idx=torch.zeros(1, 12, dtype=torch.int32))

    model.save_pretrained(tmp_path / "back")
    assert torch.equal(MambaLM.from_pretrained(tmp_path / "back")(ids).logits, want)
    low = MambaLMHeadModel(model.config, dtype=torch.bfloat16)
    wide = {n.rsplit(".", 1)[-1] for n, p in low.named_parameters() if p.dtype == torch.float32}
    assert wide - {"mimo_x", "mimo_z", "mimo_o"} == {"dt_bias", "B_bias", "C_bias", "D"}
    assert low(ids).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_configs_there_and_back_are_the_same(config):
    config = LMConfig(**(vars(config) | {"chunk_size": 64}))  # which the published layout does not hold
    assert from_state_spaces(json.loads(json.dumps(to_state_spaces(config)))) == config
    with pytest.raises(ValueError, match="'transformers' has no model type for Mamba-3"):
        to_transformers(config)


def test_the_published_defaults_are_the_mixers():
    config = from_state_spaces({"d_model": 64, "n_layer": 1, "ssm_cfg": {"layer": "Mamba3", "is_mimo": True}})
    assert (config.d_state, config.headdim, config.mimo_rank, config.rope_fraction) == (128, 64, 4, 0.5)
    with pytest.raises(ValueError, match="ssm_cfg has settings that are not known: 'd_conv'"):
        from_state_spaces({"ssm_cfg": {"layer": "Mamba3", "d_conv": 4}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": True}, "bias must be False for 'mamba3'"),
        ({"rope_fraction": 0.75}, "rope_fraction must be 0.5 or 1, got 0.75"),
        ({"layer": "mamba2", "mimo_rank": 4}, "mimo_rank is for Mamba-3 layers only, got 4 for 'mamba2'"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LMConfig(**({"layer": "mamba3"} | changes))


@torch.no_grad()
def test_operations_are_those_that_are_counted_in_a_run():
    config = CONFIGS["siso"]
    lm = MambaLM(config).eval()
    with use_backend("torch"), FlopCounterMode(display=False) as counter:
        lm(torch.ones(1, 64, dtype=torch.int64), logits_at=torch.tensor([63]))
    prefill, head = flops_per_token(config, prefill=True), flops_per_token(config, prefill=False).head
    assert counter.get_total_flops() == 64 * prefill.projections + head  # the scan is an op that is not seen
    assert prefill.convolution == 0
