"""The released checkpoints of Cobra and ML-Mamba, written by hand with the keys that their code saves."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vlmamba.connectors import ConnectorConfig
from vlmamba.model import VLM, ImageProcessor, LMConfig, MambaLM, Tokenizer, VisionConfig, ViT, ViTConfig, VLMConfig
from vlmamba.model.convert import convert
from vlmamba.model.formats import detect_format, vision
from vlmamba.model.formats.vlm import open_released
from vlmamba.model.inspect import inspect
from vlmamba.model.load import load_model
from vlmamba.model.presets import PRESETS
from vlmamba.model.weights import open_weights

DINO, SIGLIP = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_384"
CONFIGS = {
    DINO: VisionConfig(ViTConfig(28, 14, 16, 3, 2, 32, class_token=True, register_tokens=4, layer_scale=True),
                       ImageProcessor(28, "naive", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
    SIGLIP: VisionConfig(ViTConfig(28, 14, 24, 3, 2, 32), ImageProcessor(28)),
}  # fmt: skip
TOKENIZER = Tokenizer.train(["what color is the shape?", "a red circle"] * 5, 300)


@pytest.fixture(autouse=True)
def small_encoders(tmp_path, monkeypatch):
    """The encoders' names stand for small ones in folders, in `timm`'s names."""
    torch.manual_seed(0)
    known = {}
    for name, config in CONFIGS.items():
        vit = ViT(config.encoder)
        vit.processor = config.processor
        vit.save_pretrained(tmp_path / "encoders" / name)
        known[name] = vision.PublishedEncoder(str(tmp_path / "encoders" / name), config)
    for name, published in known.items():
        monkeypatch.setitem(vision.VISION_ENCODERS, name, published)
    # No tokenizer by the Hub.
    monkeypatch.setattr("vlmamba.model.vlm.neox_tokenizer", lambda **hub: TOKENIZER)
    monkeypatch.setattr("vlmamba.model.convert.neox_tokenizer", lambda **hub: TOKENIZER)
    return known


def settings(**changes):
    model = {
        "model_id": "cobra+3b", "arch_specifier": "no-align+fused-gelu-mlp", "image_resize_strategy": "resize-naive",
        "vision_backbone_id": "dinosiglip-vit-so-384px", "llm_backbone_id": "mamba-2.8b-zephyr", "llm_max_length": 2048,
    }  # fmt: skip
    return {"model": model | changes, "seed": 7}


def random_like(names):
    return OrderedDict((name, torch.randn(shape) * 0.1) for name, shape in names.items())


def linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def mamba2_mixer(width, inner, n, heads):
    channels = inner + 2 * n
    return {
        "in_proj.weight": (inner + channels + heads, width), "conv1d.weight": (channels, 1, 4),
        "conv1d.bias": (channels,), "dt_bias": (heads,), "A_log": (heads,), "D": (heads,), "norm.weight": (inner,),
        "out_proj.weight": (width, inner),
    }  # fmt: skip


def ml_mamba(folder, width=32, heads=4, n=8, vocab=50288, **changes):
    inner = 2 * width
    llm = {"backbone.embedding.weight": (vocab, width), "backbone.norm_f.weight": (width,)}
    scan = {"norm_f.weight": (width,), "norm_f.bias": (width,)}
    for i in range(2):
        mixer = mamba2_mixer(width, inner, n, heads)
        llm[f"backbone.layers.{i}.norm.weight"] = (width,)
        llm |= {f"backbone.layers.{i}.mixer.{k}": v for k, v in mixer.items()}
        reverse = {k.replace("conv1d.", "conv1d_b."): v for k, v in mixer.items() if k.startswith("conv1d")}
        reverse |= {f"{k}_b": mixer[k] for k in ("dt_bias", "A_log", "D")}
        scan |= {f"layers.{i}.mixer.{k}": v for k, v in (mixer | reverse).items()}
        scan |= {f"layers.{i}.norm.weight": (width,), f"layers.{i}.norm.bias": (width,)}
        for w in ("w1", "w2", "w3"):
            scan |= linear(f"layers.{i}.mlp.{w}", width, width)
    llm = random_like(llm)
    llm["lm_head.weight"] = llm["backbone.embedding.weight"]
    projector = linear("projector.0", 4 * width, width) | linear("projector.2", width, 4 * width)
    model = {
        "llm_backbone": llm, "mlp": random_like(linear("0", width, 40)), "bidirectional_mamba": random_like(scan),
        "projector": random_like(projector | linear("projector.4", width, width)),
    }  # fmt: skip
    folder.mkdir()
    torch.save({"model": model}, folder / "latest-checkpoint.pt")
    if changes.pop("config", True):
        (folder / "config.json").write_text(json.dumps(settings(llm_backbone_id="mamba2-2.7b", **changes)))
    return model


def cobra(folder, width=32, rank=2, n=4, layers=3, head=None, **changes):
    inner = 2 * width
    llm = {"llm.backbone.embedding.weight": (50280, width), "llm.backbone.norm_f.weight": (width,)}
    for i in range(2):
        llm[f"llm.backbone.layers.{i}.norm.weight"] = (width,)
        llm |= {f"llm.backbone.layers.{i}.mixer.{k}": v for k, v in {
            "in_proj.weight": (2 * inner, width), "conv1d.weight": (inner, 1, 4), "conv1d.bias": (inner,),
            "x_proj.weight": (rank + 2 * n, inner), "dt_proj.weight": (inner, rank), "dt_proj.bias": (inner,),
            "A_log": (inner, n), "D": (inner,), "out_proj.weight": (width, inner),
        }.items()}  # fmt: skip
    llm = random_like(llm)
    llm["llm.lm_head.weight"] = llm["llm.backbone.embedding.weight"].clone() if head is None else head
    seen = 40 if "vision_backbone_id" not in changes else 24
    sizes = [(4 * seen, seen), (width, 4 * seen), (width, width)] if layers == 3 else [(width, seen), (width, width)]
    projector = {}
    for i, (out, into) in enumerate(sizes):
        projector |= linear(f"projector.{2 * i}", out, into)
    model = {"projector": random_like(projector), "llm_backbone": llm}
    inside = folder / "cobra+3b"  # as on the Hub
    (inside / "checkpoints").mkdir(parents=True)
    torch.save({"model": model}, inside / "checkpoints" / "latest-checkpoint.pt")
    (inside / "config.json").write_text(json.dumps(settings(**changes)))
    return model


def features(known, names, pixels):
    """Compute the features of the second-to-last block by the encoders alone."""
    return torch.cat([ViT.from_pretrained(known[name].repo)(pixels) for name in names], -1).flatten(1, 2)


def mlp(weights, prefix, x):
    """Linear layers with GELU between them, by their numbers."""
    numbers = sorted({int(name.split(".")[-2]) for name in weights})
    for i in numbers:
        x = F.linear(x, weights[f"{prefix}{i}.weight"], weights[f"{prefix}{i}.bias"])
        x = F.gelu(x) if i != numbers[-1] else x
    return x


@torch.no_grad()
def test_cobra_is_its_parts(tmp_path, small_encoders):
    model = cobra(tmp_path / "cobra")
    vlm = VLM.from_pretrained(tmp_path / "cobra")
    assert detect_format(tmp_path / "cobra") == "cobra"
    assert vlm.config.template == "zephyr" and vlm.tokenizer is TOKENIZER
    want = LMConfig(32, 2, 50277, "mamba", d_state=4, dt_rank=2)
    assert vlm.config.language == want and vlm.config.connector == ConnectorConfig("mamba2-mlp")
    assert [v.processor.resize for v in vlm.config.vision] == ["naive", "naive"]

    pixels = torch.randn(2, 3, 28, 28)
    seen = features(small_encoders, (DINO, SIGLIP), pixels)
    got = vlm.connector(vlm.vision((pixels, pixels)))
    torch.testing.assert_close(got, mlp(model["projector"], "projector.", seen), rtol=1e-5, atol=1e-5)
    lm = MambaLM(want).eval()
    lm.load_state_dict({k.removeprefix("llm."): v for k, v in model["llm_backbone"].items()})
    ids = torch.randint(0, 50277, (1, 9))
    torch.testing.assert_close(vlm.language_model(ids).logits, lm(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_ml_mamba_maps_every_weight(tmp_path, small_encoders):
    model = ml_mamba(tmp_path / "ml")
    vlm = VLM.from_pretrained(tmp_path / "ml")
    assert vlm.config.language == LMConfig(
        32, 2, 50277, "mamba2", d_state=8, headdim=16, chunk_size=256, pad_vocab_size_multiple=16
    )
    assert vlm.config.connector == ConnectorConfig(
        "mamba2-advanced", "bidirectional", d_state=8, headdim=16, n_layer=2, chunk_size=256
    )
    assert vlm.config.template == "zephyr"
    own = vlm.state_dict()
    for part in ("mlp", "bidirectional_mamba", "projector"):
        for name, tensor in model[part].items():
            assert torch.equal(own[f"connector.{part}.{name}"], tensor)
    for name, tensor in model["llm_backbone"].items():
        assert torch.equal(own[f"language_model.{name}"], tensor)
    pixels = torch.randn(1, 3, 28, 28)
    seen = features(small_encoders, (DINO, SIGLIP), pixels)
    x = F.gelu(F.linear(seen, model["mlp"]["0.weight"], model["mlp"]["0.bias"]))
    x = vlm.connector.bidirectional_mamba(x.unflatten(1, (2, 2))).flatten(1, 2)
    want = mlp(model["projector"], "projector.", x)
    torch.testing.assert_close(vlm.connector(vlm.vision((pixels, pixels))), want, rtol=1e-5, atol=1e-5)


def test_ml_mamba_without_a_config_is_known_by_its_file(tmp_path):
    ml_mamba(tmp_path / "ml", config=False)
    assert detect_format(tmp_path / "ml") == "ml-mamba"
    assert isinstance(load_model(tmp_path / "ml"), VLM)


def test_variants_of_cobra(tmp_path):
    cobra(tmp_path / "base", llm_backbone_id="mamba-2.8b-slimpj", image_resize_strategy="letterbox")
    config, _ = open_released(tmp_path / "base")
    assert config.template == "in-out" and config.vision[0].processor.resize == "letterbox"
    cobra(tmp_path / "siglip", layers=2, vision_backbone_id="siglip-vit-so400m-384px")
    config, _ = open_released(tmp_path / "siglip")
    assert config.connector.kind == "mlp" and config.vision == (CONFIGS[SIGLIP],)


def test_a_head_of_its_own_is_kept(tmp_path):
    cobra(tmp_path / "cobra", head=torch.ones(50280, 32))
    vlm = VLM.from_pretrained(tmp_path / "cobra")
    assert not vlm.config.language.tie_embeddings and (vlm.language_model.lm_head.weight == 1).all()


@pytest.mark.parametrize("make", [cobra, ml_mamba])
def test_there_and_back(tmp_path, make):
    make(tmp_path / "a")
    config, weights = open_released(tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "own", "own") == config
    convert(tmp_path / "own", tmp_path / "b", "released")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["model"]["model_id"] == "b"
    again, back = open_released(tmp_path / "b")
    assert again == config and sorted(back) == sorted(weights)
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    assert VLM.from_pretrained(tmp_path / "own").tokenizer.vocab_size == TOKENIZER.vocab_size
    [first] = (tmp_path / "a").rglob("latest-checkpoint.pt")
    [second] = (tmp_path / "b").rglob("latest-checkpoint.pt")
    assert open_weights(first).shapes == open_weights(second).shapes


def test_its_own_layout_after_the_released_one(tmp_path):
    ml_mamba(tmp_path / "ml")
    vlm = VLM.from_pretrained(tmp_path / "ml")
    vlm.save_pretrained(tmp_path / "own")
    again = VLM.from_pretrained(tmp_path / "own")
    assert again.config == vlm.config
    assert all(torch.equal(a, b) for a, b in zip(vlm.state_dict().values(), again.state_dict().values(), strict=True))
    report = inspect(tmp_path / "ml")
    assert sum(report.parameters.values()) == sum(p.numel() for p in vlm.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_backbone_id": "dinosiglip"}, "vision_backbone_id must be one of .*got 'dinosiglip'"),
        ({"image_resize_strategy": "pad"}, "image_resize_strategy must be one of"),
    ],
)
def test_unknown_settings_are_named(tmp_path, changes, message):
    ml_mamba(tmp_path / "x", **changes)
    with pytest.raises(ValueError, match=message):
        VLM.from_pretrained(tmp_path / "x")


def test_unknown_connectors_are_named(tmp_path):
    cobra(tmp_path / "x", arch_specifier="no-align+fused-ldpnet")
    [path] = (tmp_path / "x").rglob("latest-checkpoint.pt")
    model = torch.load(path)
    model["model"]["projector"]["ldp.0.weight"] = torch.ones(3)
    torch.save(model, path)
    with pytest.raises(ValueError, match=r"arch_specifier 'no-align\+fused-ldpnet'.*not supported"):
        VLM.from_pretrained(tmp_path / "x")


def test_several_models_in_a_folder_are_named(tmp_path):
    cobra(tmp_path / "x")
    (tmp_path / "x" / "other").mkdir()
    (tmp_path / "x" / "other" / "config.json").write_text(json.dumps(settings()))
    with pytest.raises(ValueError, match="several models: give the folder of one"):
        VLM.from_pretrained(tmp_path / "x")


@torch.no_grad()
def test_a_preset_joins_pretrained_parts(tmp_path, monkeypatch):
    lm = MambaLM(LMConfig(32, 2, 300, "mamba2", d_state=8, headdim=16), TOKENIZER)
    lm.save_pretrained(tmp_path / "lm")
    tiny = replace(PRESETS["ml-mamba-3b"], language=str(tmp_path / "lm"))
    monkeypatch.setitem(PRESETS, "tiny", replace(tiny, connector=ConnectorConfig("mamba2-advanced", headdim=16)))
    vlm = VLM.from_preset("tiny", seed=1, dtype=torch.bfloat16)
    for name, tensor in lm.state_dict().items():
        kept = vlm.language_model.state_dict()[name]
        assert torch.equal(kept, tensor.to(kept.dtype))
    assert vlm.language_model.lm_head.weight.dtype == torch.bfloat16
    assert isinstance(vlm.config, VLMConfig) and vlm.config.template == "zephyr"
    one, other = VLM.from_preset("tiny", seed=1), VLM.from_preset("tiny", seed=2)
    same = [torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)]
    assert not all(same)
    for a, b in zip(one.parameters(), VLM.from_preset("tiny", seed=1).parameters(), strict=True):
        assert torch.equal(a, b)
    answer = one.generate(["what color is the shape?"], [None])
    assert isinstance(answer[0], str)


def test_layouts_are_for_what_they_are_for(tmp_path):
    ml_mamba(tmp_path / "ml")
    with pytest.raises(ValueError, match="to = 'transformers' is for a language model"):
        convert(tmp_path / "ml", tmp_path / "x", "transformers")
    MambaLM(LMConfig(16, 1, 300)).save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="to = 'released' is for a vision-language model"):
        convert(tmp_path / "lm", tmp_path / "x", "released")
    assert not (tmp_path / "x").exists()
