"""Published vision encoders, loaded from disk, against `transformers` on the same random weights.

`timm` cannot be imported beside a CPU build of PyTorch, since `torchvision` has none. Its layout is therefore written
by hand here, from the names and shapes that it has in its published checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from vlmamba.model import CLIP_L_336, DINOV2_L_REG_384, SIGLIP_SO400M_384, ImageProcessor, VisionConfig, ViT, ViTConfig
from vlmamba.model.formats.vision import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    VISION_ENCODERS,
    PublishedEncoder,
    read_vision_config,
    vision_weights,
)
from vlmamba.model.weights import LazyTensor, Weights

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 42, "patch_size": 14}
TEXT = {
    **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48},
    **{"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2},
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def make(family: str, whole: bool = False, **changes):
    """A small model of `transformers` with random weights."""
    torch.manual_seed(0)
    if family in ("clip", "siglip"):
        settings = SIZES | {"intermediate_size": 48} | changes
        name = {"clip": "CLIP", "siglip": "Siglip"}[family]
        if whole:
            config = getattr(transformers, name + "Config")(vision_config=settings, text_config=TEXT)
            model = getattr(transformers, name + "Model")(config)
        else:
            model = getattr(transformers, name + "VisionModel")(
                getattr(transformers, name + "VisionConfig")(**settings)
            )
    else:
        name = {"dinov2": "Dinov2", "dinov2_reg": "Dinov2WithRegisters"}[family]
        config = getattr(transformers, name + "Config")(**(SIZES | {"mlp_ratio": 2} | changes))
        model = getattr(transformers, name + "Model")(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@torch.no_grad()
def features(model, pixels):
    """The patches of the second-to-last block, (B, h, w, D)."""
    model = getattr(model, "vision_model", model)
    hidden = model(pixels, output_hidden_states=True).hidden_states[-2]
    h, w = (s // model.config.patch_size for s in pixels.shape[2:])
    return hidden[:, -h * w :].unflatten(1, (h, w))


def timm_weights(model) -> dict[str, torch.Tensor]:
    """The weights as `timm` has them on disk."""
    theirs = getattr(model, "vision_model", model).state_dict()
    dinov2 = "Dinov2" in type(model).__name__
    block = "encoder.layer.{}." if dinov2 else "encoder.layers.{}."
    attention = "attention." if dinov2 else "self_attn."
    output = attention + ("o_proj" if dinov2 else "out_proj")
    norm = "norm" if dinov2 else "layer_norm"
    patches = "embeddings.patch_embeddings.projection" if dinov2 else "embeddings.patch_embedding"
    out = {}

    def copy(new, old):
        for kind in ("weight", "bias"):
            if f"{old}.{kind}" in theirs:
                out[f"{new}.{kind}"] = theirs[f"{old}.{kind}"]

    copy("patch_embed.proj", patches)
    copy("norm_pre", "pre_layrnorm")
    copy("norm", "layernorm" if dinov2 else "post_layernorm")
    for i in range(3):
        old, new = block.format(i), f"blocks.{i}."
        for n in "12":
            copy(f"{new}norm{n}", f"{old}{norm}{n}")
            copy(f"{new}mlp.fc{n}", f"{old}mlp.fc{n}")
            if dinov2:
                out[f"{new}ls{n}.gamma"] = theirs[f"{old}layer_scale{n}.lambda1"]
        copy(f"{new}attn.proj", old + output)
        for kind in ("weight", "bias"):
            qkv = [theirs[f"{old}{attention}{p}_proj.{kind}"] for p in "qkv"]
            out[f"{new}attn.qkv.{kind}"] = torch.cat(qkv)
    if dinov2:
        table, token = theirs["embeddings.position_embeddings"], theirs["embeddings.cls_token"]
        if "embeddings.register_tokens" in theirs:
            out["reg_token"] = theirs["embeddings.register_tokens"]
            token, table = token + table[:, :1], table[:, 1:]
        out |= {"cls_token": token, "pos_embed": table}
    else:
        out["pos_embed"] = theirs["embeddings.position_embedding.weight"][None]
        if "embeddings.class_embedding" in theirs:
            out |= {"cls_token": theirs["embeddings.class_embedding"][None, None]}
            out |= {"head.weight": torch.zeros(16, 32), "head.bias": torch.zeros(16)}
        else:
            out |= {"attn_pool.latent": torch.zeros(1, 1, 32), "attn_pool.kv.weight": torch.zeros(64, 32)}
    return {name: t.contiguous() for name, t in out.items()}


ARCHITECTURES = {
    "clip": "vit_large_patch14_clip_quickgelu_336",
    "siglip": "vit_so400m_patch14_siglip_384",
    "dinov2": "vit_large_patch14_dinov2",
    "dinov2_reg": "vit_large_patch14_reg4_dinov2",
}


def timm_config(family: str, model_args=None, **pretrained):
    """`config.json` as `timm` writes it for a small model of a published architecture."""
    mlp_ratio = 2 if family.startswith("dinov2") else 1.5
    args = {"img_size": 42, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": mlp_ratio, "in_chans": 3}
    cfg = {"tag": "x", "input_size": [3, 42, 42], "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
           "mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1], "num_classes": 0}  # fmt: skip
    return {
        "architecture": ARCHITECTURES[family],
        "num_classes": 0,
        "num_features": 32,
        "global_pool": "token",
        "model_args": args | (model_args or {}),
        "pretrained_cfg": cfg | pretrained,
    }


def write_json(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def save(model, folder, layout: str = "transformers", **config):
    """A checkpoint on disk."""
    if layout == "timm":
        family = {"CLIP": "clip", "Sigl": "siglip"}.get(type(model).__name__[:4])
        family = family or ("dinov2_reg" if "Registers" in type(model).__name__ else "dinov2")
        write_json(folder / "config.json", timm_config(family))
        save_file(timm_weights(model), folder / "model.safetensors")
        return folder
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    if layout == "transformers-4":  # encoders alone had the prefix too; a pickle, as OpenAI's repository has
        weights = {n if "Dinov2" in type(model).__name__ else "vision_model." + n: t for n, t in weights.items()}
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    elif layout == "transformers-5":  # as it is in memory
        save_file({n: t.contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("layout", ["transformers", "transformers-4", "transformers-5", "timm"])
@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2", "dinov2_reg"])
@torch.no_grad()
def test_features_agree_from_every_layout(tmp_path, family, layout):
    # timm's SigLIP has the exact GELU.
    theirs = make(family, **({"hidden_act": "gelu"} if (family, layout) == ("siglip", "timm") else {}))
    pixels = torch.randn(2, 3, 42, 42)
    got = ViT.from_pretrained(save(theirs, tmp_path / "encoder", layout))(pixels)
    torch.testing.assert_close(got, features(theirs, pixels), **CLOSE)


@pytest.mark.parametrize("family", ["clip", "siglip"])
@torch.no_grad()
def test_the_image_half_of_a_whole_model(tmp_path, family):
    theirs = make(family, whole=True)
    pixels = torch.randn(2, 3, 42, 42)
    vit = ViT.from_pretrained(save(theirs, tmp_path / "whole"))
    torch.testing.assert_close(vit(pixels), features(theirs, pixels), **CLOSE)


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2_reg"])
@torch.no_grad()
def test_the_last_layer_has_the_final_norm(tmp_path, family):
    theirs = make(family)
    pixels = torch.randn(2, 3, 42, 42)
    folder = save(theirs, tmp_path / "encoder")
    config = read_vision_config(folder)
    config = replace(config, encoder=replace(config.encoder, feature_layer=-1))
    hidden = theirs(pixels, output_hidden_states=True).hidden_states[-1]
    norm = theirs.layernorm if family == "dinov2_reg" else theirs.post_layernorm
    got = ViT.from_pretrained(folder, config=config)(pixels)
    torch.testing.assert_close(got.flatten(1, 2), norm(hidden)[:, -9:], **CLOSE)


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2_reg"])
@torch.no_grad()
def test_bfloat16_agrees_to_its_rounding(tmp_path, family):
    theirs = make(family)
    pixels = torch.randn(2, 3, 42, 42)
    exact = features(theirs, pixels)
    vit = ViT.from_pretrained(save(theirs, tmp_path / "encoder"), dtype=torch.bfloat16)
    assert {p.dtype for p in vit.parameters()} == {torch.bfloat16}
    error = (vit(pixels.bfloat16()) - exact).abs()
    their_error = (features(theirs.bfloat16(), pixels.bfloat16()) - exact).abs()
    assert error.mean() < 1.2 * their_error.mean()
    assert error.max() < 2 * their_error.max()


@torch.no_grad()
def test_clip_from_the_file_for_openclip(tmp_path):
    """OpenAI's own names, with a text tower, beside the config of `timm`."""
    theirs = make("clip")
    folder = save(theirs, tmp_path / "encoder", "timm")
    weights = load_file(folder / "model.safetensors")
    renamed = {"logit_scale": torch.zeros(()), "transformer.resblocks.0.ln_1.weight": torch.zeros(8)}
    renamed |= {"positional_embedding": torch.zeros(4, 8), "text_projection": torch.zeros(8, 8)}
    renamed |= {"token_embedding.weight": torch.zeros(9, 8), "visual.proj": torch.zeros(32, 16)}
    for name, tensor in weights.items():
        new = name.replace("blocks.", "transformer.resblocks.").replace("attn.proj", "attn.out_proj")
        new = new.replace("attn.qkv.", "attn.in_proj_").replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")
        new = new.replace("norm_pre", "ln_pre").replace("norm1", "ln_1").replace("norm2", "ln_2")
        new = {"norm.weight": "ln_post.weight", "norm.bias": "ln_post.bias"}.get(new, new)
        if name in ("cls_token", "pos_embed"):
            new, tensor = {"cls_token": "class_embedding"}.get(name, "positional_embedding"), tensor.squeeze()
        if not name.startswith("head"):
            renamed["visual." + new.replace("patch_embed.proj", "conv1")] = tensor
    (folder / "model.safetensors").unlink()
    save_file(renamed, folder / "open_clip_model.safetensors")
    pixels = torch.randn(2, 3, 42, 42)
    torch.testing.assert_close(ViT.from_pretrained(folder)(pixels), features(theirs, pixels), **CLOSE)


@torch.no_grad()
def test_siglip_from_the_file_for_openclip(tmp_path):
    """`timm`'s names under a prefix, with a text tower."""
    theirs = make("siglip", hidden_act="gelu")
    folder = save(theirs, tmp_path / "encoder", "timm")
    weights = {"visual.trunk." + n: t for n, t in load_file(folder / "model.safetensors").items()}
    weights |= {"text.token_embedding.weight": torch.zeros(9, 8), "logit_bias": torch.zeros(())}
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "open_clip_pytorch_model.bin")
    pixels = torch.randn(2, 3, 42, 42)
    torch.testing.assert_close(ViT.from_pretrained(folder)(pixels), features(theirs, pixels), **CLOSE)


# -- other image sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [28, 70])
@pytest.mark.parametrize("layout", ["transformers", "timm"])
@torch.no_grad()
def test_dinov2_at_another_size(tmp_path, layout, size):
    """`transformers` resamples this encoder's table at every call, as `timm` does once: antialiased, in float32."""
    theirs = make("dinov2_reg")
    pixels = torch.randn(2, 3, size, size)
    config = VisionConfig(replace(small_config("dinov2_reg"), image_size=size), ImageProcessor(size))
    folder = save(theirs, tmp_path / "encoder", layout)
    vit = ViT.from_pretrained(folder, config=config)
    assert vit.pos_embed.shape == (1, (size // 14) ** 2, 32)
    torch.testing.assert_close(vit(pixels), features(theirs, pixels), **CLOSE)
    native = ViT.from_pretrained(folder)
    assert torch.equal(native(pixels), vit(pixels)), "the table resampled in the call must be the one made at loading"


@torch.no_grad()
def test_dinov2_at_a_size_that_is_not_square(tmp_path):
    theirs = make("dinov2_reg")
    pixels = torch.randn(1, 3, 30, 60)
    vit = ViT.from_pretrained(save(theirs, tmp_path / "encoder"))
    torch.testing.assert_close(vit(pixels), features(theirs, pixels), **CLOSE)


@pytest.mark.parametrize("size", [28, 70])
@pytest.mark.parametrize("family", ["clip", "siglip"])
@torch.no_grad()
def test_clip_and_siglip_at_another_size(tmp_path, family, size):
    """The table resampled by Pillow, whose bicubic is the same filter, in a `transformers` model of that size."""
    theirs, larger = make(family), make(family, image_size=size)
    prefix = int(family == "clip")
    table = theirs.state_dict()["embeddings.position_embedding.weight"]
    columns = []
    for column in table[prefix:].T:
        grid = Image.fromarray(column.reshape(3, 3).numpy())
        columns.append(torch.from_numpy(np.array(grid.resize((size // 14,) * 2, Image.Resampling.BICUBIC))).flatten())
    state = theirs.state_dict()
    state["embeddings.position_embedding.weight"] = torch.cat([table[:prefix], torch.stack(columns, dim=1)])
    larger.load_state_dict(state)

    pixels = torch.randn(2, 3, size, size)
    config = VisionConfig(replace(small_config(family), image_size=size), ImageProcessor(size))
    vit = ViT.from_pretrained(save(theirs, tmp_path / "encoder"), config=config)
    torch.testing.assert_close(vit(pixels), features(larger, pixels), **CLOSE)


def small_config(family: str) -> ViTConfig:
    """Return our configuration of a small model."""
    config = {"clip": CLIP_L_336, "siglip": SIGLIP_SO400M_384, "dinov2_reg": DINOV2_L_REG_384}[family]
    mlp_width = 64 if family == "dinov2_reg" else 48
    activation = "gelu_tanh" if family == "siglip" else config.activation
    return replace(config, image_size=42, width=32, depth=3, heads=4, mlp_width=mlp_width, activation=activation)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("clip", {"hidden_act": "gelu"}),
        ("clip", {"hidden_act": "gelu_new"}),
        ("clip", {"layer_norm_eps": 0.1}),
        ("clip", {"patch_size": 7}),
        ("siglip", {"hidden_act": "gelu"}),
        ("siglip", {"hidden_act": "quick_gelu"}),
        ("siglip", {"num_attention_heads": 2}),
        ("dinov2_reg", {"hidden_act": "gelu_pytorch_tanh"}),
        ("dinov2_reg", {"layer_norm_eps": 0.1}),
        ("dinov2_reg", {"num_register_tokens": 2, "mlp_ratio": 3}),
        ("dinov2", {"image_size": 28}),
    ],
)
@torch.no_grad()
def test_settings_of_the_file_are_honored(tmp_path, family, changes):
    theirs = make(family, **changes)
    pixels = torch.randn(1, 3, 28, 28) if "image_size" in changes else torch.randn(1, 3, 42, 42)
    vit = ViT.from_pretrained(save(theirs, tmp_path / "encoder"))
    torch.testing.assert_close(vit(pixels), features(theirs, pixels), **CLOSE)


def test_settings_that_a_file_leaves_out_are_the_defaults(tmp_path):
    """Google's file has neither the activation nor the eps; OpenAI's old ones have the settings twice."""
    published = {"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "model_type": "siglip_vision_model",
                 "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14}  # fmt: skip
    write_json(tmp_path / "config.json", {"model_type": "siglip", "vision_config": published, "text_config": {}})
    assert read_vision_config(tmp_path).encoder == replace(SIGLIP_SO400M_384, activation="gelu_tanh")
    old = {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_attention_heads": 16,
           "num_hidden_layers": 24, "patch_size": 14}  # fmt: skip
    write_json(tmp_path / "config.json", {"model_type": "clip", "vision_config": {}, "vision_config_dict": old})
    assert read_vision_config(tmp_path).encoder == CLIP_L_336
    for model_type in ("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers"):
        write_json(tmp_path / "config.json", {"model_type": model_type})
        config = transformers.AutoConfig.for_model(model_type)
        encoder = read_vision_config(tmp_path).encoder
        assert (encoder.image_size, encoder.patch_size) == (config.image_size, config.patch_size)
        assert (encoder.width, encoder.depth, encoder.heads) == (768, 12, 12)
        assert encoder.norm_eps == config.layer_norm_eps
        assert encoder.mlp_width == 3072
        assert encoder.activation.removesuffix("_tanh") == config.hidden_act.removesuffix("_pytorch_tanh")
        assert encoder.register_tokens == getattr(config, "num_register_tokens", 0)


@pytest.mark.parametrize(
    ("name", "encoder", "image_size", "processor"),
    [
        ("vit_large_patch14_clip_336", CLIP_L_336, 336, ImageProcessor(336, "crop", CLIP_MEAN, CLIP_STD)),
        ("vit_large_patch14_clip_quickgelu_336", CLIP_L_336, 336, ImageProcessor(336, "crop", CLIP_MEAN, CLIP_STD)),
        ("vit_so400m_patch14_siglip_384", SIGLIP_SO400M_384, 384, ImageProcessor(384, "crop", resize_to=426)),
        (
            "vit_large_patch14_reg4_dinov2",
            replace(DINOV2_L_REG_384, image_size=518),
            518,
            ImageProcessor(518, "crop", IMAGENET_MEAN, IMAGENET_STD),
        ),
    ],
)
def test_timm_architectures_are_the_published_encoders(tmp_path, name, encoder, image_size, processor):
    cfg = {"tag": "openai" if "clip" in name else "x", "input_size": [3, image_size, image_size], "crop_pct": 1.0,
           "mean": processor.mean, "std": processor.std, "interpolation": "bicubic", "crop_mode": "center"}  # fmt: skip
    if "siglip" in name:
        cfg["crop_pct"] = 0.9
    write_json(tmp_path / "config.json", {"architecture": name, "num_features": encoder.width, "pretrained_cfg": cfg})
    assert read_vision_config(tmp_path) == VisionConfig(encoder, processor)
    # Files from before timm 0.9 have all in one object.
    write_json(tmp_path / "config.json", {"architecture": name, "num_features": encoder.width} | cfg)
    assert read_vision_config(tmp_path) == VisionConfig(encoder, processor)


def test_quick_gelu_is_for_the_weights_of_openai(tmp_path):
    """`timm`'s plain architecture runs the exact GELU, which OpenAI's weights were not trained with."""
    config = timm_config("clip") | {"architecture": "vit_large_patch14_clip_336"}
    for tag, activation in (("openai", "quick_gelu"), ("laion2b", "gelu")):
        config["pretrained_cfg"]["tag"] = tag
        write_json(tmp_path / "config.json", config)
        assert read_vision_config(tmp_path).encoder.activation == activation


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "vit"},
            "model_type 'vit'; of vision encoders, known are 'clip', 'clip_vision_model', 'siglip'",
        ),
        ({"model_type": "dinov2", "use_swiglu_ffn": True}, "use_swiglu_ffn is True, but only False is supported"),
        ({"model_type": "dinov2", "qkv_bias": False}, "qkv_bias is False, but only True is supported"),
        ({"model_type": "clip", "vision_config": {"hidden_act": "relu"}}, "hidden_act must be one of .* got 'relu'"),
        ({"model_type": "clip_vision_model", "num_channels": 4}, "num_channels is 4, but only 3 is supported"),
        ({"model_type": "siglip_vision_model", "image_size": [28, 42]}, "image_size must be a square's"),
        ({"model_type": "clip_vision_model", "image_size": None}, "image_size must be a square's, got None"),
        ({"architecture": "resnet50", "num_features": 8}, "architecture 'resnet50'; known are vit_large_patch14_clip"),
        (timm_config("clip", {"qk_norm": True}), "qk_norm is True, but only False is supported"),
        (timm_config("clip", {"rope": True}), "model_args has settings that are not known: 'rope'"),
        (timm_config("clip", {"reg_tokens": 4}), "reg_tokens = 4 with no_embed_class = False is not supported"),
        (timm_config("clip", {"act_layer": "relu"}), "act_layer must be .* got 'relu'"),
        (timm_config("clip", interpolation="bilinear"), "interpolation must be 'bicubic', got 'bilinear'"),
        (timm_config("clip", crop_mode="border"), "crop_mode must be 'center' or 'squash', got 'border'"),
        (timm_config("clip", {"img_size": [42, 28]}), "input_size must be a square's"),
        ({"d_model": 8, "n_layer": 1, "ssm_cfg": {}}, "'state-spaces', which has no vision encoder alone"),
    ],
)
def test_settings_that_are_not_supported_are_named(tmp_path, config, message):
    write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match=message):
        read_vision_config(tmp_path)


@pytest.mark.parametrize(
    ("family", "settings", "want"),
    [
        ("clip", {"size": 42, "crop_size": 42}, ImageProcessor(42, "crop-floor", CLIP_MEAN, CLIP_STD)),
        (
            "dinov2_reg",
            {"size": {"shortest_edge": 48}, "crop_size": {"height": 42, "width": 42}, "image_mean": IMAGENET_MEAN},
            ImageProcessor(42, "crop-floor", IMAGENET_MEAN, CLIP_STD, resize_to=48),
        ),
        ("siglip", {"size": {"height": 42, "width": 42}, "do_rescale": True}, ImageProcessor(42)),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_preprocessing_of_the_file(tmp_path, family, settings, want, nested):
    make(family).config.save_pretrained(tmp_path)
    if nested:
        write_json(tmp_path / "processor_config.json", {"image_processor": settings, "processor_class": "X"})
    else:
        write_json(tmp_path / "preprocessor_config.json", settings)
    config = read_vision_config(tmp_path)
    assert config.processor == want
    assert config.encoder == small_config(family)


def test_the_encoder_has_the_size_of_its_images(tmp_path):
    """DINOv2 by `transformers` has a table for 518 pixels and preprocessing that makes 224."""
    make("dinov2_reg").config.save_pretrained(tmp_path)
    write_json(tmp_path / "preprocessor_config.json", {"size": {"shortest_edge": 32}, "crop_size": 28})
    assert read_vision_config(tmp_path).encoder.image_size == 28


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_rescale": False}, "do_rescale is False, but only True is supported"),
        ({"do_pad": True}, "do_pad is True, but only False is supported"),
        ({"resample": 2}, "resample is 2, but only 3 is supported"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor must be 1/255"),
        ({"do_center_crop": False}, "without a center crop gives images that are not square"),
        ({"crop_size": {"height": 28, "width": 42}}, "crop_size must be a square's"),
        ({"size": {"height": 28, "width": 28}}, "size before a center crop must be the shortest edge's"),
        ({"do_center_crop": False, "size": {"longest_edge": 28}}, "size must be a square's"),
        ({"crop_size": 300}, "resize_to must be in .size = 300, 4096., got 224"),
    ],
)
def test_preprocessing_that_is_not_supported_is_named(tmp_path, settings, message):
    make("clip").config.save_pretrained(tmp_path)
    write_json(tmp_path / "preprocessor_config.json", settings)
    with pytest.raises(ValueError, match=message):
        read_vision_config(tmp_path)


# -- published names ---------------------------------------------------------------------------------------------------

FULL = {
    "openai/clip-vit-large-patch14-336": transformers.CLIPVisionConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=336,
        patch_size=14,
    ),
    "google/siglip-so400m-patch14-384": transformers.SiglipVisionConfig(
        hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4304, image_size=384,
        patch_size=14,
    ),
    "facebook/dinov2-with-registers-large": transformers.Dinov2WithRegistersConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "published", "unused"),
    [
        ("openai/clip-vit-large-patch14-336", 303_507_456, 0),
        # The attention-pooling head.
        ("google/siglip-so400m-patch14-384", 428_225_600, 15_238_352),
        # The mask token, and a table of 37 x 37 positions and the class token's in place of 27 x 27.
        ("facebook/dinov2-with-registers-large", 304_372_736, 1024 + (37 * 37 + 1 - 27 * 27) * 1024),
    ],
)
def test_published_sizes_names_and_shapes(name, published, unused):
    with torch.device("meta"):
        theirs = transformers.AutoModel.from_config(FULL[name])
        ours = ViT(VISION_ENCODERS[name].config.encoder)
    assert sum(p.numel() for p in theirs.parameters()) == published
    assert sum(p.numel() for p in ours.parameters()) == published - unused
    loaded = vision_weights(in_memory(theirs.state_dict()), ours.config)
    assert loaded.shapes == {n: t.shape for n, t in ours.state_dict().items()}


def test_published_names_are_run_as_in_the_papers():
    for names, encoder, processor in (
        (
            ("vit_so400m_patch14_siglip_384", "google/siglip-so400m-patch14-384"),
            ViTConfig(384, 14, 1152, 27, 16, 4304, "gelu", 1e-6),
            ImageProcessor(384, "naive", (0.5,) * 3, (0.5,) * 3),
        ),
        (
            ("vit_large_patch14_reg4_dinov2.lvd142m", "facebook/dinov2-with-registers-large"),
            ViTConfig(384, 14, 1024, 24, 16, 4096, class_token=True, register_tokens=4, layer_scale=True),
            ImageProcessor(384, "naive", IMAGENET_MEAN, IMAGENET_STD),
        ),
        (("openai/clip-vit-large-patch14-336",), CLIP_L_336, ImageProcessor(336, "crop-floor", CLIP_MEAN, CLIP_STD)),
        (("vit_large_patch14_clip_336.openai",), CLIP_L_336, ImageProcessor(336, "crop", CLIP_MEAN, CLIP_STD)),
    ):
        for name in names:
            assert VISION_ENCODERS[name].config == VisionConfig(encoder, processor)
    assert all(e.repo == name or e.repo.startswith(f"timm/{name}") for name, e in VISION_ENCODERS.items())


@torch.no_grad()
def test_a_published_name_brings_its_own_settings(tmp_path, monkeypatch):
    """Exact GELU and another size than the file has, as for SigLIP and DINOv2."""
    folder = save(make("siglip"), tmp_path / "encoder")
    config = VisionConfig(replace(small_config("siglip"), image_size=28, activation="gelu"), ImageProcessor(28))
    monkeypatch.setitem(VISION_ENCODERS, "vit_tiny", PublishedEncoder(str(folder), config))
    vit = ViT.from_pretrained("vit_tiny")
    assert (vit.config, vit.processor) == (config.encoder, config.processor)
    pixels = torch.randn(1, 3, 28, 28)
    assert torch.equal(vit(pixels), ViT.from_pretrained(folder, config=config)(pixels))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(vit(pixels), ViT.from_pretrained(folder)(pixels), **CLOSE)


@torch.no_grad()
def test_a_published_name_is_found_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    """Offline, by the folders that the Hub's own client makes; with the preprocessing that lies beside the weights."""
    snapshot = tmp_path / "models--someone--encoder" / "snapshots" / ("0" * 40)
    save(make("clip"), snapshot)
    write_json(snapshot / "preprocessor_config.json", {"size": 48, "crop_size": 42})
    refs = tmp_path / "models--someone--encoder" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    cached = {"cache_dir": tmp_path, "local_files_only": True}
    assert ViT.from_pretrained("someone/encoder", **cached).processor.resize_to == 48
    config = VisionConfig(small_config("clip"), ImageProcessor(42))
    monkeypatch.setitem(VISION_ENCODERS, "vit_tiny", PublishedEncoder("someone/encoder", config))
    assert ViT.from_pretrained("vit_tiny", **cached).processor == config.processor
    with pytest.raises(FileNotFoundError, match="timm/vit_so400m_patch14_siglip_384.webli is not in the local cache"):
        ViT.from_pretrained("vit_so400m_patch14_siglip_384", **cached)


# -- weights -----------------------------------------------------------------------------------------------------------


def in_memory(tensors) -> Weights:
    return Weights({n: LazyTensor(t.shape, t.dtype, lambda t=t: t) for n, t in tensors.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.update({"encoder.strange.weight": torch.zeros(1)}),
            "no known vision encoder has:\n  encoder.s",
        ),
        (lambda w: w.pop("encoder.layers.1.self_attn.k_proj.bias"), "but not blocks.1.attn.k.bias"),
        (lambda w: w.pop("encoder.layers.1.self_attn.q_proj.bias"), "missing: blocks.1.attn.qkv.bias"),
        (lambda w: w.pop("post_layernorm.weight"), "missing: norm.weight"),
        (lambda w: w.update({"embeddings.position_embedding.weight": torch.zeros(9, 32)}), "a position for the class"),
        (lambda w: w.update({"embeddings.position_embedding.weight": torch.zeros(8, 32)}), "a square of positions"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    folder = save(make("clip"), tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        ViT.from_pretrained(folder)


def test_weights_are_not_read_before_they_are_wanted():
    read = []

    def lazy(name, tensor):
        return LazyTensor(tensor.shape, tensor.dtype, lambda: read.append(name) or tensor)

    theirs = make("dinov2_reg").state_dict()
    weights = vision_weights(Weights({n: lazy(n, t) for n, t in theirs.items()}), small_config("dinov2_reg"))
    assert weights.shapes["blocks.0.attn.qkv.weight"] == (96, 32)
    assert not read
    assert torch.equal(weights["blocks.0.attn.qkv.bias"], torch.cat([
        theirs[f"encoder.layer.0.attention.{p}_proj.bias"] for p in "qkv"
    ]))  # fmt: skip
    assert len(read) == 3


@torch.no_grad()
def test_saved_and_loaded_again(tmp_path):
    vit = ViT.from_pretrained(save(make("siglip"), tmp_path / "encoder", "timm"))
    vit.save_pretrained(tmp_path / "own")
    again = ViT.from_pretrained(tmp_path / "own")
    assert (again.config, again.processor) == (vit.config, vit.processor)
    assert again.processor.mean == (0.5, 0.4, 0.3)
    for name, tensor in vit.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


@pytest.mark.parametrize("family", ["clip", "dinov2_reg"])
@pytest.mark.parametrize("layout", ["transformers", "timm"])
def test_a_damaged_setting_is_a_value_error(tmp_path, family, layout):
    """Each setting in turn, with values of every type and size."""
    if layout == "timm":
        files = {"config.json": timm_config(family)}
    else:
        kind = {"clip": "clip_vision_model", "dinov2_reg": "dinov2_with_registers"}[family]
        sizes = SIZES | {"intermediate_size": 48, "mlp_ratio": 2, "model_type": kind}
        processor = {
            "size": {"height": 42, "width": 42},
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "crop_size": 42,
        }
        files = {"config.json": sizes, "preprocessor_config.json": processor}
    for name, whole in files.items():
        for file, data in files.items():
            write_json(tmp_path / file, data)
        for key in [*whole, *(("pretrained_cfg", k) for k in whole.get("pretrained_cfg", ())),
                    *(("model_args", k) for k in whole.get("model_args", ()))]:  # fmt: skip
            for value in (math.nan, "x", [], {}, None, True, -1, 0, 10**9, 10**400, 1e300, [[[]]], {"height": 1}):
                inner, last = key if isinstance(key, tuple) else (None, key)
                part = {**whole[inner], last: value} if inner else value
                write_json(tmp_path / name, {**whole, inner or last: part})
                with contextlib.suppress(ValueError):
                    read_vision_config(tmp_path)
