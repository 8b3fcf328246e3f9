"""The whole model: training batches, generation, saving and loading."""

from __future__ import annotations

import errno
import json
from dataclasses import replace

import pytest
import torch

from tests.makers import BLUE, RED, VISION, language_config, shape_tokenizer, sharpened_vlm
from vlmamba.connectors import ConnectorConfig
from vlmamba.model import (
    VLM,
    Batch,
    GenerationConfig,
    ImageProcessor,
    LMConfig,
    MambaLM,
    Turn,
    VisionConfig,
    VLMConfig,
    collate,
    hub,
    weights,
)
from vlmamba.model.config_io import from_json_dict, to_json_dict
from vlmamba.model.generation.generate import Completion

TOKENIZER = shape_tokenizer()
CONFIGS = {
    "vl-mamba": VLMConfig(
        language_config("mamba"),
        (VISION,),
        ConnectorConfig("vss-l2", d_state=4),
        template="qa",
    ),
    "ml-mamba": VLMConfig(
        language_config("mamba2"),
        (VISION, replace(VISION, encoder=replace(VISION.encoder, width=24))),
        ConnectorConfig("mamba2-advanced", "cross", d_state=8, headdim=16),
        template="zephyr",
    ),
}


@pytest.fixture(params=CONFIGS)
def vlm(request):
    return sharpened_vlm(CONFIGS[request.param], TOKENIZER)


def conversation(question, answer):
    return [Turn("user", question), Turn("assistant", answer)]


def test_packed_samples_give_the_mean_of_each_alone(vlm):
    samples = [
        vlm.prepare(conversation("what color?", "red"), RED),
        vlm.prepare(conversation("what is the shape in the image?", "a blue triangle"), BLUE),
        vlm.prepare(conversation("no image", "a red circle")),
    ]
    together = vlm(collate(samples))
    alone = [vlm(collate([s])) for s in samples]
    assert together.n_targets == sum(a.n_targets for a in alone)
    mean = sum(a.loss * a.n_targets for a in alone) / together.n_targets
    torch.testing.assert_close(together.loss, mean)
    grads = torch.autograd.grad(together.loss, list(vlm.connector.parameters()))
    alone_grads = torch.autograd.grad(mean, list(vlm.connector.parameters()))
    for a, b in zip(grads, alone_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_the_image_matters_and_gradients_reach_the_connector(vlm):
    one, two = (vlm.prepare(conversation("what color?", "red"), image) for image in (RED, BLUE))
    assert vlm(collate([one])).loss != vlm(collate([two])).loss
    vlm(collate([one])).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vlm.connector.parameters())


def test_a_conversation_in_two_parts_has_the_state_and_gradients_of_the_whole(vlm):
    sample = vlm.double().prepare(conversation("what is the shape in the image?", "a blue triangle"), BLUE)
    whole = collate([replace(sample, images=tuple(image.to(torch.float64) for image in sample.images))])
    cut = whole.n_tokens - 3
    first, second = (
        Batch(whole.input_ids[run], whole.labels[run], torch.tensor([0, end]).int(), images)
        for run, end, images in ((slice(cut), cut, whole.images), (slice(cut, None), 3, ()))
    )
    want = vlm(whole, return_state=True).state
    got = vlm(second, vlm(first, return_state=True).state, return_state=True).state
    parameters = list(vlm.connector.parameters())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    grads = (torch.autograd.grad(sum(layer.ssm.square().sum() for layer in state), parameters) for state in (got, want))
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()


QUESTIONS = ["what color?", "what is the shape in the image, tell me please", "a"]
PICTURES = [RED, None, BLUE]


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(12),
        GenerationConfig(12, repetition_penalty=1.5),
        GenerationConfig(12, temperature=0.9, top_k=20, top_p=0.9, seed=5),
        GenerationConfig(12, temperature=2.0, repetition_penalty=1.2, seed=1),
    ],
)
def test_answers_do_not_depend_on_the_batch(vlm, config):
    together = vlm.generate(QUESTIONS, PICTURES, config)
    alone = [vlm.generate([q], [p], config)[0] for q, p in zip(QUESTIONS, PICTURES, strict=True)]
    assert together == alone
    assert ["".join(vlm.stream(q, p, config)) for q, p in zip(QUESTIONS, PICTURES, strict=True)] == alone
    assert len(set(together)) > 1


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 5, 16, 21])
def test_prefill_chunks_may_split_images_and_prompts(vlm, size):
    samples = [vlm.prepare([Turn("user", q)], p) for q, p in zip(QUESTIONS, PICTURES, strict=True)]
    embed, bounds = vlm.packed(samples)
    total = int(bounds[-1])
    whole = vlm.embed(collate(samples))
    cut = torch.cat([embed(i, min(i + size, total)) for i in range(0, total, size)], 1)
    assert torch.equal(cut, whole)
    config = GenerationConfig(12, prefill_chunk=size)
    assert vlm.generate(QUESTIONS, PICTURES, config) == vlm.generate(QUESTIONS, PICTURES, GenerationConfig(12))


def test_sampling_is_reproducible_and_depends_on_the_seed(vlm):
    answers = [vlm.generate(["what?"], [RED], GenerationConfig(12, temperature=1.5, seed=s))[0] for s in (0, 0, 1)]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("before", [[], conversation("what color?", "red")], ids=["one turn", "three turns"])
def test_greedy_generation_follows_the_logits(vlm, before):
    turns = [*before, Turn("user", "and the shape?")]
    sample = vlm.prepare(turns, RED)
    ids = []
    for _ in range(6):
        batch = collate([replace(sample, input_ids=sample.input_ids + ids, labels=sample.labels + ids)])
        with torch.no_grad():
            logits = vlm.language_model(inputs_embeds=vlm.embed(batch)).logits[0, -1, : TOKENIZER.vocab_size]
        ids.append(int(logits.argmax()))
    assert vlm.generate([turns], [RED], GenerationConfig(6)) == [TOKENIZER.decode(ids)]


def test_no_tokens_and_no_conversations(vlm):
    assert vlm.generate(["what?"], [None], GenerationConfig(0)) == [""]
    assert vlm.generate([], []) == []


def test_stop_texts_end_the_answer_and_are_never_shown():
    answer = Completion(TOKENIZER, ("cle", "xyz"))
    shown = []
    for token in [TOKENIZER.encode(c)[0] for c in "a red circle and more"]:
        if not answer.finished:
            answer.push(token)
            shown.append(answer.text)
    assert answer.finished
    assert answer.text == "a red cir"
    assert all("a red cir".startswith(s) for s in shown)
    ended = Completion(TOKENIZER, ("cle",))
    for token in [*(TOKENIZER.encode(c)[0] for c in "abc"), TOKENIZER.eos_id]:
        ended.push(token)
    assert (ended.text, ended.finished) == ("abc", True)  # the c was not the beginning of a stop text after all


def test_saved_and_loaded_it_is_the_same(vlm, tmp_path):
    vlm.save_pretrained(tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_vlmamba.py",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    again = VLM.from_pretrained(tmp_path / "model")
    assert again.config == vlm.config
    assert not again.training
    for (name, p), q in zip(vlm.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert again.generate(QUESTIONS, PICTURES) == vlm.generate(QUESTIONS, PICTURES)
    half = VLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    exact = ("A_log", "Ds", "D", "dt_bias", "dt_projs_bias")  # each with the suffix of its direction
    for name, p in half.named_parameters():
        kept = name.rsplit(".", 1)[-1].startswith(exact) or name.endswith("dt_proj.bias")
        assert p.dtype == (torch.float32 if kept else torch.bfloat16), name
    assert isinstance(half.generate(["what?"], [RED], GenerationConfig(3))[0], str)


def test_language_models_are_saved_too(tmp_path):
    lm = MambaLM(LMConfig(16, 1, 50))
    lm.save_pretrained(tmp_path / "lm")
    again = MambaLM.from_pretrained(str(tmp_path / "lm"))
    assert again.lm_head.weight is again.backbone.embedding.weight
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(lm(ids).logits, again(ids).logits)


def test_a_checkpoint_that_does_not_fit_lists_every_name(vlm, tmp_path):
    vlm.save_pretrained(tmp_path)
    state = {name: t.clone() for name, t in weights.open_weights(tmp_path).items()}
    state["connector.extra"] = torch.zeros(2)
    missing = next(n for n in state if n.startswith("connector."))
    del state[missing]
    state["language_model.backbone.norm_f.weight"] = torch.zeros(7)
    weights.save_weights(state, tmp_path)
    with pytest.raises(ValueError, match="does not fit VLM") as error:
        VLM.from_pretrained(tmp_path)
    for line in (
        f"missing: {missing}",
        "unexpected: connector.extra",
        "shape of language_model.backbone.norm_f.weight: (7,) in the file, (32,) in the model",
    ):
        assert line in str(error.value)


def test_damaged_and_missing_files_are_named(vlm, tmp_path):
    vlm.save_pretrained(tmp_path)
    data = (tmp_path / weights.WEIGHTS).read_bytes()
    (tmp_path / weights.WEIGHTS).write_bytes(data[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged or incomplete"):
        VLM.from_pretrained(tmp_path)
    (tmp_path / weights.WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="has no weights: none of model.safetensors"):
        VLM.from_pretrained(tmp_path)
    (tmp_path / hub.CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        VLM.from_pretrained(tmp_path)


def test_a_full_disk_leaves_the_model_saved_before(vlm, tmp_path, monkeypatch):
    target = tmp_path / "model"
    vlm.save_pretrained(target)
    before = {p.name: p.read_bytes() for p in target.iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="could not save .*model, which is as it was before: No space left"):
        vlm.save_pretrained(target)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_push_to_hub_sends_the_saved_folder(vlm, tmp_path, monkeypatch):
    sent = {}
    api = "huggingface_hub.hub_mixin.HfApi"
    monkeypatch.setattr(f"{api}.create_repo", lambda self, repo_id, **kw: type("Url", (), {"repo_id": repo_id}))

    def upload(self, repo_id, folder_path, **kw):
        from pathlib import Path

        sent[repo_id] = {p.name for p in Path(folder_path).iterdir()}

    monkeypatch.setattr(f"{api}.upload_folder", upload)
    vlm.push_to_hub("someone/model")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= sent["someone/model"]


def test_configs_survive_json():
    for config in CONFIGS.values():
        text = json.dumps(to_json_dict(config), allow_nan=False)
        assert from_json_dict(VLMConfig, json.loads(text)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"langauge": {}}, "VLMConfig has no setting 'langauge'; did you mean 'language'"),
        ({"language": {"d_modl": 3}}, r"VLMConfig.language has no setting 'd_modl'; did you mean 'd_model'"),
        ({"language": {"d_model": "wide"}}, "VLMConfig.language.d_model must be int, got 'wide'"),
        (
            {"language": {"layer": "rwkv"}},
            "VLMConfig.language.layer must be one of 'mamba', 'mamba2', 'mamba3'; got 'rwkv'",
        ),
        ({"language": {"dt_limit": [1]}}, "dt_limit must have 2 entries, got 1"),
        ({"vision": 3}, "VLMConfig.vision must be a list, got 3"),
        ({"template": "chatml"}, None),
    ],
)
def test_bad_configs_are_named(change, message):
    data = to_json_dict(CONFIGS["vl-mamba"]) | change
    with pytest.raises(ValueError, match=message or "template must be one of"):
        VLM(from_json_dict(VLMConfig, data))


def test_bad_input_is_named(vlm):
    with pytest.raises(ValueError, match="images must have one entry a conversation"):
        vlm.generate(["a", "b"], [None])
    with pytest.raises(FileNotFoundError, match="no image at nowhere.png"):
        vlm.generate(["a"], ["nowhere.png"])
    sample = vlm.prepare(conversation("a", "b"), RED)
    with pytest.raises(ValueError, match="16 places for image features, but there is no image"):
        vlm(collate([replace(sample, images=())]))
    with pytest.raises(ValueError, match="the images have 16 features, but input_ids has 15 places"):
        vlm(collate([replace(sample, input_ids=sample.input_ids[1:], labels=sample.labels[1:])]))
    with pytest.raises(ValueError, match="no target"):
        vlm(collate([vlm.prepare([Turn("user", "a")])]))
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        VLM(vlm.config).prepare([Turn("user", "a")])
    with pytest.raises(ValueError, match="top_p must be in"):
        GenerationConfig(top_p=0.0)
    with pytest.raises(ValueError, match="processor.size must be the encoder's image_size 32, got 48"):
        VisionConfig(VISION.encoder, ImageProcessor(48))
