"""The models in `transformers`: the same weights, values and answers, by the auto classes, pipelines, Trainer, PEFT."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

import vlmamba.transformers
from tests.makers import BLUE, RED, VISION, language_config, shape_tokenizer, sharpened_lm, sharpened_vlm
from vlmamba.connectors import ConnectorConfig
from vlmamba.model import (
    VLM,
    GenerationConfig,
    ImageProcessor,
    MambaLM,
    TilesConfig,
    Turn,
    VisionConfig,
    ViTConfig,
    VLMConfig,
    collate,
    load_model,
)
from vlmamba.model.convert import convert
from vlmamba.model.formats import detect_format
from vlmamba.transformers import (
    MambaLMConfig,
    MambaLMForCausalLM,
    VLMambaConfig,
    VLMambaForConditionalGeneration,
    VLMambaProcessor,
)
from vlmamba.transformers.quantizer import VLMambaQuantizationConfig

TOKENIZER = shape_tokenizer()
QUESTIONS = ["what color is the shape?", "a red", "blue triangle or circle, what is it?"]
PROJECTIONS = ["in_proj", "x_proj", "dt_proj", "out_proj"]
TILES = TilesConfig(((1, 2), (2, 1)), "spatial_unpad")
SECOND = VisionConfig(ViTConfig(24, 6, 16, 2, 2, 32), ImageProcessor(24))
"""An encoder of another size with the same grid of patches as `VISION`."""
LMS = {
    "mamba": language_config("mamba", TOKENIZER.vocab_size),
    "mamba2": replace(language_config("mamba2", TOKENIZER.vocab_size), tie_embeddings=True),
}
# The vocabulary has 292 tokens: with a multiple of 4 there is no padding row.
VLMS = {
    "plain": VLMConfig(replace(LMS["mamba"], pad_vocab_size_multiple=4), (VISION,), template="qa"),
    "two encoders": VLMConfig(LMS["mamba"], (VISION, SECOND), ConnectorConfig("mlp"), "zephyr"),
    "tiles": VLMConfig(LMS["mamba2"], (VISION,), ConnectorConfig("mlp"), "vicuna", TILES),
}


def message(role, *parts):
    """Make a message of texts and images."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": role, "content": content}


CONVERSATIONS = [
    [message("user", RED, "what color is the shape?")],
    [message("user", "a red circle?")],
    [message("user", RED, "or", BLUE, "?"), message("assistant", "a red circle"), message("user", BLUE, "what?")],
]
TURNS = [
    [Turn("user", "what color is the shape?")],
    [Turn("user", "a red circle?")],
    [Turn("user", "<image>or<image>?"), Turn("assistant", "a red circle"), Turn("user", "<image>what?")],
]
IMAGES = [RED, None, [RED, BLUE, BLUE]]


@pytest.fixture(scope="module", params=LMS)
def lm(request):
    return sharpened_lm(LMS[request.param], TOKENIZER)


@pytest.fixture(scope="module")
def lm_folder(lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    lm.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=VLMS)
def vlm(request):
    return sharpened_vlm(VLMS[request.param], TOKENIZER)


@pytest.fixture(scope="module")
def vlm_folder(vlm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    vlm.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    sharpened_vlm(VLMS["plain"], TOKENIZER).save_pretrained(folder)
    return folder


def same_weights(one, other):
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(t, states[1][n]) for n, t in states[0].items())


def padded(tokenizer, texts, **options):
    return tokenizer(texts, padding=True, return_tensors="pt", **options)


# -- loading and saving ------------------------------------------------------------------------------------------------


def test_a_language_model_has_the_same_weights_and_logits(lm, lm_folder):
    assert AutoConfig.from_pretrained(lm_folder).own == lm.config
    for auto in (AutoModel, AutoModelForCausalLM):
        model = auto.from_pretrained(lm_folder)
        assert isinstance(model, MambaLMForCausalLM) and not model.training
        assert same_weights(model, lm)
    ids = torch.randint(1, 290, (3, 9))
    assert torch.equal(model(ids).logits, lm(ids).logits)
    assert torch.equal(model(ids, logits_to_keep=2).logits, lm(ids, logits_at=torch.tensor([7, 8])).logits)
    assert torch.equal(model(inputs_embeds=lm.embed(ids)).logits, lm(ids).logits)
    assert (model.lm_head.weight is model.backbone.embedding.weight) == lm.config.tie_embeddings


def test_a_vision_language_model_has_the_same_weights_and_logits(vlm, vlm_folder):
    model = AutoModelForImageTextToText.from_pretrained(vlm_folder)
    assert isinstance(model, VLMambaForConditionalGeneration) and model.config.own == vlm.config
    assert same_weights(model, vlm) and same_weights(AutoModel.from_pretrained(vlm_folder), vlm)
    processor = AutoProcessor.from_pretrained(vlm_folder)
    inputs = processor.apply_chat_template(
        CONVERSATIONS, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    samples = [vlm.prepare(turns, image) for turns, image in zip(TURNS, IMAGES, strict=True)]
    batch = collate(samples)
    with torch.no_grad():
        out = vlm.language_model(inputs_embeds=vlm.embed(batch), cu_seqlens=batch.cu_seqlens)
        logits = model(**inputs).logits
    n = out.logits.shape[-1]
    assert torch.equal(logits[inputs["attention_mask"].bool()][:, :n], out.logits[0])
    assert logits.shape[-1] > model.config.image_token_id  # of which a repetition penalty reads the column


def test_transformers_saves_the_same_files(vlm, vlm_folder, tmp_path):
    model, processor = AutoModel.from_pretrained(vlm_folder), AutoProcessor.from_pretrained(vlm_folder)
    model.config.use_cache = False  # a setting of the run, which scripts set
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (vlm_folder / "model.safetensors").read_bytes()
    assert detect_format(tmp_path) == "own"
    again = load_model(tmp_path)
    assert isinstance(again, VLM) and again.config == vlm.config and same_weights(again, vlm)
    config = GenerationConfig(max_new_tokens=4)
    assert again.generate(TURNS, IMAGES, config) == vlm.generate(TURNS, IMAGES, config)
    assert same_weights(AutoModel.from_pretrained(tmp_path), vlm)


def test_a_saved_language_model_is_ours_too(lm, lm_folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(lm_folder).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (lm_folder / "model.safetensors").read_bytes()
    assert same_weights(MambaLM.from_pretrained(tmp_path), lm)


def test_a_folder_of_ours_replaces_what_transformers_saved(vlm, vlm_folder, tmp_path):
    AutoProcessor.from_pretrained(vlm_folder).save_pretrained(tmp_path)
    assert (tmp_path / "processor_config.json").exists()
    MambaLM(LMS["mamba"]).save_pretrained(tmp_path)
    assert not (tmp_path / "processor_config.json").exists() and not (tmp_path / "tokenizer.json").exists()


def test_a_new_model_is_drawn_as_ours():
    config = MambaLMConfig.of(LMS["mamba"])
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(3)
    assert same_weights(model, MambaLM(LMS["mamba"]))


def test_in_half_precision_the_scan_keeps_float32(vlm_folder):
    model = AutoModel.from_pretrained(vlm_folder, dtype=torch.bfloat16)
    ours = VLM.from_pretrained(vlm_folder, dtype=torch.bfloat16)
    assert {n: t.dtype for n, t in model.state_dict().items()} == {n: t.dtype for n, t in ours.state_dict().items()}
    assert same_weights(model, ours)
    assert {t.dtype for t in model.state_dict().values()} == {torch.bfloat16, torch.float32}


def test_the_dtype_of_a_file_is_kept(lm_folder, tmp_path):
    convert(lm_folder, tmp_path / "half", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert same_weights(model, MambaLM.from_pretrained(tmp_path / "half"))
    assert model.dtype == torch.bfloat16


def test_a_converted_model_is_loaded_by_name(vlm, vlm_folder, tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "old" / name).write_bytes((vlm_folder / name).read_bytes())
    convert(tmp_path / "old", tmp_path / "new")
    assert same_weights(AutoModel.from_pretrained(tmp_path / "new"), vlm)
    processor = AutoProcessor.from_pretrained(tmp_path / "new")
    assert processor.tokenizer.eos_token_id == TOKENIZER.eos_id


def test_weights_that_do_not_fit_are_an_error(lm_folder, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((lm_folder / name).read_bytes())
    weights = load_file(lm_folder / "model.safetensors")
    weights["other"] = weights.pop("backbone.layers.1.norm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"(?s)missing: backbone.layers.1.norm.weight.*unexpected: other"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.slow
def test_quantized_language_models_give_our_texts(lm_folder, tmp_path, quantize):
    pytest.importorskip("torchao")
    convert(lm_folder, tmp_path / "lean", quantize=quantize)
    lean = MambaLM.from_pretrained(tmp_path / "lean")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "lean"), AutoTokenizer.from_pretrained(lm_folder)
    same_quantized(model, lean)
    ids = padded(tokenizer, QUESTIONS)
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids["input_ids"][:1]).logits, lean(ids["input_ids"][:1]).logits, rtol=0, atol=0
        )
    out = model.generate(**ids, max_new_tokens=6, do_sample=False)
    texts = tokenizer.batch_decode(out[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert texts == lean.generate(QUESTIONS, GenerationConfig(6))
    # What transformers saves is ours, too.
    model.save_pretrained(tmp_path / "again")
    same_quantized(
        AutoModelForCausalLM.from_pretrained(tmp_path / "again"), MambaLM.from_pretrained(tmp_path / "again")
    )
    same_quantized(model, MambaLM.from_pretrained(tmp_path / "again"))
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "lean", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and model.dtype == torch.float32
    same_quantized(half, MambaLM.from_pretrained(tmp_path / "lean", dtype=torch.bfloat16))


def same_quantized(model, ours):
    """Check that a model of transformers holds the tensors of one of ours: integers, scales and all others."""
    own = ours.state_dict()
    assert any(name.endswith(".qdata") for name in own)
    got = model.state_dict()
    assert got.keys() == own.keys()
    for name, t in own.items():
        assert got[name].dtype == t.dtype and torch.equal(got[name], t), name
    lm = model._lm
    assert (lm.lm_head.qdata is lm.backbone.embedding.qdata) == lm.config.tie_embeddings
    trainable = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (model, ours)]
    assert trainable[0] == trainable[1]


def test_quantized_vision_language_models_give_our_answers(vlm_folder, tmp_path):
    pytest.importorskip("torchao")
    convert(vlm_folder, tmp_path / "lean", quantize="int4")
    lean = VLM.from_pretrained(tmp_path / "lean")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "lean")
    same_quantized(model, lean)
    processor = AutoProcessor.from_pretrained(tmp_path / "lean")
    inputs = processor.apply_chat_template(CONVERSATIONS[0], tokenize=True, return_dict=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    text = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [text] == lean.generate([QUESTIONS[0]], [RED], GenerationConfig(6))


def test_quantized_weights_are_refused_by_the_trainer(plain_folder, tmp_path):
    pytest.importorskip("torchao")
    convert(plain_folder, tmp_path / "lean", quantize="int8")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "lean")
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        train(model, AutoProcessor.from_pretrained(plain_folder), tmp_path / "out")


@pytest.mark.parametrize("quantize, bits", [("int8", 8), ("int4", 4)])
def test_an_adapter_of_peft_on_quantized_weights_is_an_error_that_names_their_layer(
    lm_folder, tmp_path, quantize, bits
):
    pytest.importorskip("torchao")
    convert(lm_folder, tmp_path / "lean", quantize=quantize)
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "lean"),
        MambaLM.from_pretrained(lm_folder, quantize=quantize),
    ):
        with pytest.raises(ValueError, match=rf"QuantizedLinear\(\d+, \d+, bits={bits}\) is not supported"):
            peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["in_proj", "out_proj"]))


def test_quantized_weights_without_their_mark_are_an_error(lm_folder, tmp_path):
    pytest.importorskip("torchao")
    convert(lm_folder, tmp_path / "lean", quantize="int8")
    path = tmp_path / "lean" / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("quantization_config") == {"quant_method": "vlmamba"}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json has no quantization_config: vlmamba convert .*lean NEW_FOLDER"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "lean")
    convert(tmp_path / "lean", tmp_path / "new")
    same_quantized(AutoModelForCausalLM.from_pretrained(tmp_path / "new"), MambaLM.from_pretrained(tmp_path / "lean"))
    with pytest.raises(ValueError, match="quantization_config is for folders that are quantized already"):
        AutoModelForCausalLM.from_pretrained(lm_folder, quantization_config=VLMambaQuantizationConfig())


def test_a_wrong_setting_is_an_error(lm_folder, tmp_path):
    data = json.loads((lm_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | {"n_layer": -1}))
    with pytest.raises(ValueError, match="n_layer must be in"):
        AutoConfig.from_pretrained(tmp_path)


REMOTE = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
lm, vlm = sys.argv[1:]
try:
    AutoConfig.from_pretrained(lm, trust_remote_code=False)
    raise SystemExit("code was run without being trusted")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
assert "vlmamba" not in sys.modules
model = AutoModelForImageTextToText.from_pretrained(vlm, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(vlm, trust_remote_code=True)
print(type(model).__name__, type(processor).__name__)
model.save_pretrained(vlm + "-again")
print(type(AutoModelForCausalLM.from_pretrained(lm, trust_remote_code=True)).__name__)
"""


@pytest.mark.slow
def test_code_of_the_folder_loads_it_in_a_process_without_ours(plain_folder, tmp_path):
    sharpened_lm(LMS["mamba"], TOKENIZER).save_pretrained(tmp_path / "lm")
    root = Path(vlmamba.transformers.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, str(tmp_path / "lm"), str(plain_folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["VLMambaForConditionalGeneration", "VLMambaProcessor", "MambaLMForCausalLM"]
    files = {p.name for p in Path(f"{plain_folder}-again").iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors", "modeling_vlmamba.py"}


@pytest.mark.parametrize("version, message", [("5.19.4", "5.20 or later, and 5.19.4"), (None, "pip install")])
def test_a_missing_or_old_transformers_is_an_error(monkeypatch, version, message):
    real = importlib.metadata.version

    def of(name):
        if name == "transformers" and version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version if name == "transformers" else real(name)

    for name in [n for n in sys.modules if n.startswith("vlmamba.transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.metadata, "version", of)
    with pytest.raises(ImportError, match=message):
        importlib.import_module("vlmamba.transformers")


# -- generation --------------------------------------------------------------------------------------------------------


def answers(model, decoder, inputs, **options):
    """Generate greedily, and decode the new tokens."""
    out = model.generate(**inputs, max_new_tokens=10, do_sample=False, **options)
    return decoder.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_generate_gives_our_texts_with_padding_on_the_left(lm, lm_folder):
    tokenizer, model = AutoTokenizer.from_pretrained(lm_folder), AutoModelForCausalLM.from_pretrained(lm_folder)
    inputs = padded(tokenizer, QUESTIONS)
    assert (inputs["attention_mask"][:, 0] == 0).any()
    texts = lm.generate(QUESTIONS, GenerationConfig(max_new_tokens=10))
    assert answers(model, tokenizer, inputs) == texts and len(set(texts)) == 3
    # Without a cache every step runs the whole text again.
    assert answers(model, tokenizer, inputs, use_cache=False) == texts
    # A penalty counts the tokens of padding here, so that texts are alone.
    penalized = [answers(model, tokenizer, padded(tokenizer, [q]), repetition_penalty=1.3)[0] for q in QUESTIONS]
    assert penalized == lm.generate(QUESTIONS, GenerationConfig(max_new_tokens=10, repetition_penalty=1.3))


def test_generate_gives_our_answers(vlm, vlm_folder):
    processor, model = AutoProcessor.from_pretrained(vlm_folder), AutoModel.from_pretrained(vlm_folder)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(CONVERSATIONS, padding=True, **options)
    ours = vlm.generate(TURNS, IMAGES, GenerationConfig(max_new_tokens=10))
    assert answers(model, processor, inputs) == ours and len(set(ours)) > 1
    assert answers(model, processor, inputs, use_cache=False) == ours
    # Each conversation has its images, however often it is repeated.
    repeated = answers(model, processor, inputs, num_beams=2, num_return_sequences=2)
    again = answers(model, processor, inputs, num_beams=2, num_return_sequences=2, use_cache=False)
    assert repeated == again and len(repeated) == 6
    alone = processor.apply_chat_template(CONVERSATIONS[2], **options)
    penalized = vlm.generate(TURNS[2:], IMAGES[2:], GenerationConfig(max_new_tokens=10, repetition_penalty=1.3))
    assert answers(model, processor, alone, repetition_penalty=1.3) == penalized


def test_texts_are_streamed_and_end_at_stop_strings(plain_folder):
    processor, model = AutoProcessor.from_pretrained(plain_folder), AutoModel.from_pretrained(plain_folder)
    prompt = processor.apply_chat_template(CONVERSATIONS[0], tokenize=True, return_dict=True, return_tensors="pt")
    (text,) = answers(model, processor, prompt)
    streamer = transformers.TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answers(model, processor, prompt, streamer=streamer)
    assert "".join(streamer) == text
    # A copy has modules of its own.
    again = copy.deepcopy(model)
    again.language_model.lm_head = torch.nn.Identity()
    assert again.vlm.language_model.lm_head is again.language_model.lm_head is not model.language_model.lm_head
    letter = next(c for c in text[1:] if c.isascii())
    (cut,) = answers(model, processor, prompt, stop_strings=[letter], tokenizer=processor.tokenizer)
    assert letter in cut and text.startswith(cut) and len(cut) < len(text)


def test_a_harness_gives_our_scores(lm, lm_folder):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    from vlmamba.model.harness.lm_eval import HarnessLM

    theirs = huggingface.HFLM(pretrained=str(lm_folder), device="cpu", batch_size=2, max_length=64)
    ours = HarnessLM(lm, batch_size=2)
    pairs = [("what color is", " the shape?"), ("a red", " circle"), ("a blue triangle", " or a red circle")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found, known = theirs.loglikelihood(requests), ours.loglikelihood(requests)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in known]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in known], rel=1e-4)


def test_padding_rows_are_never_chosen(lm_folder):
    model = AutoModelForCausalLM.from_pretrained(lm_folder)
    rows = model.config.own.padded_vocab_size
    assert rows > model.config.vocab_size
    with torch.no_grad():
        # The last rows have the largest logits, with either sign of the hidden state.
        model.lm_head.weight[model.config.vocab_size :] = 1e4 * torch.randn(rows - model.config.vocab_size, 32)
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=True, eos_token_id=None)
    assert out.max() < model.config.vocab_size


def test_a_cache_continues_a_text(lm, lm_folder):
    model, ids = AutoModelForCausalLM.from_pretrained(lm_folder), torch.randint(1, 290, (2, 9))
    with torch.no_grad():
        first = model(ids[:, :4], use_cache=True)
        rest = model(ids[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), lm(ids).logits)
    assert rest.past_key_values.get_seq_length() == 9
    # With gradients, through the state.
    first = model(ids[:, :4], use_cache=True)
    model(ids[:, 4:5], past_key_values=first.past_key_values).logits.sum().backward()
    assert model.backbone.layers[0].mixer.A_log.grad.abs().sum() > 0
    whole = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    start = model.generate(ids[:, :5], max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
    cache = start.past_key_values
    assert cache.get_seq_length() == 5
    again = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(again, whole.sequences)


def test_padding_changes_no_logits(lm, lm_folder):
    tokenizer, model = AutoTokenizer.from_pretrained(lm_folder), AutoModelForCausalLM.from_pretrained(lm_folder)
    for side in ("left", "right"):
        inputs = padded(tokenizer, QUESTIONS, padding_side=side)
        mask = inputs["attention_mask"].bool()
        logits = model(**inputs).logits
        assert not logits[~mask].any()
        for ids, row, kept in zip(inputs["input_ids"], logits, mask, strict=True):
            torch.testing.assert_close(row[kept], lm(ids[kept][None]).logits[0])
    with pytest.raises(ValueError, match="padding_side='left'"):
        model.generate(**inputs, max_new_tokens=2)


def test_pipelines_give_our_texts(lm, lm_folder, vlm, vlm_folder, caplog):
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    config = GenerationConfig(max_new_tokens=8)
    with caplog.at_level(logging.ERROR, logger="transformers"):
        pipe = transformers.pipeline("text-generation", model=str(lm_folder))
        texts = [out[0]["generated_text"] for out in pipe(QUESTIONS, batch_size=3, **options)]
        assert texts == lm.generate(QUESTIONS, config)
        pipe = transformers.pipeline("image-text-to-text", model=str(vlm_folder))
        given = [pipe(text=c, generate_kwargs={"do_sample": False}, max_new_tokens=8) for c in CONVERSATIONS]
        assert [out[0]["generated_text"][-1]["content"] for out in given] == vlm.generate(TURNS, IMAGES, config)
        # A prompt in text, without a template of its own.
        (out,) = pipe(text="<image>what color?\n", images=RED, max_new_tokens=8, return_full_text=False)
        if vlm.config.template == "qa":
            assert [out["generated_text"]] == vlm.generate(["what color?"], [RED], config)
    assert not caplog.records


# -- processing --------------------------------------------------------------------------------------------------------


def test_a_processor_gives_the_tokens_of_the_template(vlm, vlm_folder):
    processor = AutoProcessor.from_pretrained(vlm_folder)
    assert isinstance(processor, VLMambaProcessor)
    inputs = processor.apply_chat_template(
        CONVERSATIONS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    place = vlm.config.language.vocab_size
    for i, (turns, image) in enumerate(zip(TURNS, IMAGES, strict=True)):
        sample = vlm.prepare(turns, image)
        assert inputs["input_ids"][i] == [place if t == -200 else t for t in sample.input_ids]
        assert inputs["assistant_masks"][i] == [int(t != -100) for t in sample.labels]
    # The text of a prompt has the same tokens.
    texts = processor.apply_chat_template(CONVERSATIONS)
    again = processor(text=texts, images=[[RED], [], [RED, BLUE, BLUE]])
    assert again["input_ids"] == inputs["input_ids"]
    assert torch.equal(again["pixel_values"], inputs["pixel_values"])
    flat = processor(text=texts, images=[RED, RED, BLUE, BLUE])
    assert torch.equal(flat["image_layouts"], inputs["image_layouts"])


def test_a_processor_is_saved_by_itself(plain_folder, tmp_path):
    processor = AutoProcessor.from_pretrained(plain_folder)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, VLMambaProcessor) and again.config == processor.config
    assert again(text="red", images=RED)["input_ids"] == processor(text="red", images=RED)["input_ids"]


def test_images_come_in_any_form(plain_folder, tmp_path):
    processor = AutoProcessor.from_pretrained(plain_folder)
    RED.save(tmp_path / "red.png")
    url = "data:image/png;base64," + __import__("base64").b64encode((tmp_path / "red.png").read_bytes()).decode()
    parts = [
        {"type": "image", "image": RED},
        {"type": "image", "path": str(tmp_path / "red.png")},
        {"type": "image", "url": url},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "video", "video": [RED]},
    ]
    options = {"tokenize": True, "return_dict": True}
    found = [
        processor.apply_chat_template([{"role": "user", "content": [p, {"type": "text", "text": "what?"}]}], **options)
        for p in parts
    ]
    for one in found:
        assert one["input_ids"] == found[0]["input_ids"]
        assert torch.equal(one["pixel_values"], found[0]["pixel_values"])


def test_an_answer_is_continued(plain_folder):
    processor = AutoProcessor.from_pretrained(plain_folder)
    messages = [message("user", RED, "what?"), message("assistant", "a red")]
    whole = processor.apply_chat_template(messages, tokenize=True)[0]
    assert processor.apply_chat_template(messages, tokenize=True, continue_final_message=True)[0] == whole[:-1]
    assert processor.apply_chat_template(messages, continue_final_message=True).endswith("a red")
    pipe = transformers.pipeline("image-text-to-text", model=str(plain_folder))
    (out,) = pipe(text=messages, max_new_tokens=3)
    assert out["generated_text"][-1]["content"][-1]["text"].startswith("a red")


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda p: p(images=RED), "text must be a prompt"),
        (lambda p: p(text="<image><image>", images=RED), "there must be a mark <image> for each image, got 2 marks"),
        (
            lambda p: p(text=["<image>", "red"], images=[RED, RED]),
            "text must have a mark <image> for each image, got 1",
        ),
        (lambda p: p(text=["a", "b"], images=[[RED]]), "images must have a list for each of 2 texts, got 1"),
        (lambda p: p(text="red", truncation=True), "truncation is not supported by VLMambaProcessor, got True"),
        (lambda p: p(text="red", padding="max_length"), "padding must be True, False"),
        (lambda p: p(text="red", return_tensors="np"), "return_tensors must be 'pt' or None, got 'np'"),
        (lambda p: p(text=["red", "a red circle"], return_tensors="pt"), "unequal length need padding=True"),
        (lambda p: p.apply_chat_template([message("system", "be brief")]), "must be by the user, got 'system'"),
        (lambda p: p.apply_chat_template([message("user", "hi")], tools=[{}]), "tools is not supported"),
        (lambda p: p.apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}]), "a part of type 'audio'"),
        (lambda p: p.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}]), "without a picture"),
        (lambda p: VLMambaProcessor(p.tokenizer), "config must be that of the model"),
        (lambda p: VLMambaProcessor(p.tokenizer, p.config, "{{ x }}"), "chat_template must be None"),
    ],
)
def test_a_processor_names_what_is_wrong(plain_folder, call, error):
    with pytest.raises(ValueError, match=error):
        call(AutoProcessor.from_pretrained(plain_folder))


@pytest.mark.parametrize(
    "options, error",
    [
        ({"output_hidden_states": True}, "output_hidden_states is not supported by VLMambaForConditionalGeneration"),
        ({"position_ids": torch.arange(3)[None]}, "position_ids is not supported"),
        ({"attention_mask": torch.ones(1, 2)}, r"attention_mask must have shape \(1, 3\)"),
        ({"pixel_values": torch.zeros(1, 1, 3, 32, 32)}, "pixel_values needs image_layouts"),
        ({"input_ids": torch.tensor([[1, 292, 2]])}, "1 places for image features, but there is no image"),
    ],
)
def test_a_model_names_what_is_wrong(plain_folder, options, error):
    model = AutoModel.from_pretrained(plain_folder)
    with pytest.raises(ValueError, match=error):
        model(**{"input_ids": torch.tensor([[1, 2, 3]]), **options})


def test_a_vocabulary_is_not_resized(plain_folder):
    with pytest.raises(ValueError, match="vocab_size"):
        AutoModel.from_pretrained(plain_folder).resize_token_embeddings(400)


# -- training ----------------------------------------------------------------------------------------------------------


def targets(processor, conversations):
    """Make a batch with labels, as the page of the docs does."""
    batch = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", padding=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    batch["labels"] = batch["input_ids"].masked_fill(batch.pop("assistant_masks") == 0, -100)
    return batch


ANSWERED = [[*c, message("assistant", a)] for c, a in zip(CONVERSATIONS, ["red", "no", "a blue circle"], strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_ours(vlm, vlm_folder, side):
    processor, model = AutoProcessor.from_pretrained(vlm_folder), AutoModel.from_pretrained(vlm_folder)
    processor.tokenizer.padding_side = side
    turns = [[*t, Turn("assistant", a)] for t, a in zip(TURNS, ["red", "no", "a blue circle"], strict=True)]
    ours = vlm(collate([vlm.prepare(t, i) for t, i in zip(turns, IMAGES, strict=True)]))
    batch = targets(processor, ANSWERED)
    out = model(**batch)
    torch.testing.assert_close(out.loss, ours.loss)
    torch.testing.assert_close(model(**batch, num_items_in_batch=2).loss, ours.loss * ours.n_targets / 2)
    ours.loss.backward()
    out.loss.backward()
    for name, parameter in vlm.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, msg=name)
    vlm.zero_grad()


def test_the_loss_of_a_text_leaves_padding_out(lm, lm_folder):
    tokenizer, model = AutoTokenizer.from_pretrained(lm_folder), AutoModelForCausalLM.from_pretrained(lm_folder)
    inputs = padded(tokenizer, QUESTIONS)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    ids = [tokenizer(q, return_tensors="pt")["input_ids"] for q in QUESTIONS]
    logits = torch.cat([lm(i).logits[0, :-1] for i in ids])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, torch.cat([i[0, 1:] for i in ids])))


def train(model, processor, folder, steps=12):
    arguments = transformers.TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=3, learning_rate=1e-2, logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=ANSWERED, data_collator=lambda rows: targets(processor, rows),
        processing_class=processor,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_trainer_trains_and_its_folder_is_ours(tmp_path):
    torch.manual_seed(0)
    VLM(VLMS["plain"], TOKENIZER).save_pretrained(tmp_path / "start")
    model, processor = AutoModel.from_pretrained(tmp_path / "start"), AutoProcessor.from_pretrained(tmp_path / "start")
    losses = train(model, processor, tmp_path / "trained")
    assert losses[-1] < losses[0] / 2
    trained = VLM.from_pretrained(tmp_path / "trained")
    assert same_weights(trained, model) and not same_weights(trained, VLM.from_pretrained(tmp_path / "start"))
    question = ["what color is the shape?"]
    assert trained.generate(question, [RED]) == ["red"]


def adapted(model):
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=PROJECTIONS, init_lora_weights=False))


def test_adapters_are_trained_merged_and_saved_alone(plain_folder, tmp_path):
    before = (plain_folder / "model.safetensors").read_bytes()
    model, processor = AutoModel.from_pretrained(plain_folder), AutoProcessor.from_pretrained(plain_folder)
    start = {n: p.clone() for n, p in model.named_parameters()}
    batch = targets(processor, ANSWERED)
    plain = model(**batch).logits
    tuned = adapted(model)
    names = {n.split(".lora_")[0].rpartition(".")[2] for n, p in tuned.named_parameters() if p.requires_grad}
    assert names == set(PROJECTIONS)
    losses = train(tuned, processor, tmp_path / "adapter")
    assert losses[-1] < losses[0]
    # The weights below the adapters have not moved; every adapter has.
    below = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in tuned.named_parameters()}
    assert all(torch.equal(below[n], p) for n, p in start.items())
    tuned(**batch).loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in tuned.named_parameters() if "lora_" in n)
    logits = tuned.eval()(**batch).logits
    assert not torch.allclose(logits, plain)
    # The adapters alone are saved, and join the weights again.
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(plain_folder), tmp_path / "adapter")
    torch.testing.assert_close(again.eval()(**batch).logits, logits)
    options = {"max_new_tokens": 6, "do_sample": False}
    prompt = processor.apply_chat_template(CONVERSATIONS[0], tokenize=True, return_dict=True, return_tensors="pt")
    generated = tuned.generate(**prompt, **options)
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(merged.generate(**prompt, **options), generated)
    merged.save_pretrained(tmp_path / "merged")
    assert same_weights(VLM.from_pretrained(tmp_path / "merged"), merged)
    assert (plain_folder / "model.safetensors").read_bytes() == before


def test_an_adapter_at_the_head_is_in_both_modules(lm_folder):
    model = AutoModelForCausalLM.from_pretrained(lm_folder)
    head = model.lm_head
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["lm_head"]))
    assert model.lm.lm_head is model.lm_head is not head
    ids = torch.tensor([[1, 2, 3]])
    tuned(ids, labels=ids).loss.backward()
    assert any(p.grad is not None for n, p in tuned.named_parameters() if "lora_" in n)


def test_layers_of_mamba2_take_adapters(tmp_path):
    model = MambaLMForCausalLM(MambaLMConfig.of(LMS["mamba2"]))
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["in_proj", "out_proj"]))
    ids = torch.randint(1, 290, (2, 6))
    tuned(input_ids=ids, labels=ids).loss.backward()
    assert sum("lora_" in n for n, _ in tuned.named_parameters()) == 8


def test_a_wrong_kind_of_config_is_an_error():
    with pytest.raises(TypeError, match="config"):
        MambaLMForCausalLM(LMS["mamba"])
    with pytest.raises(ValueError, match="template"):
        VLMambaConfig(template="unheard")
