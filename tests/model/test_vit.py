"""The vision encoders against `transformers` on the same random weights, and at the published sizes."""

from __future__ import annotations

import pytest
import torch
import transformers

from vlmamba.model import CLIP_L_336, DINOV2_L_REG_384, SIGLIP_SO400M_384, ViT, ViTConfig
from vlmamba.model.weights import load_into
from vlmamba.model.weights_vision import vit_weights_from_transformers

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 42, "patch_size": 14}


def clip():
    config = transformers.CLIPVisionConfig(**SIZES, intermediate_size=48, hidden_act="quick_gelu")
    ours = ViTConfig(42, 14, 32, 3, 4, 48, "quick_gelu", 1e-5, class_token=True, position_of_class=True,
                     pre_norm=True, patch_bias=False)  # fmt: skip
    return transformers.CLIPVisionModel(config), ours, 1


def siglip():
    config = transformers.SiglipVisionConfig(**SIZES, intermediate_size=48)
    return transformers.SiglipVisionModel(config), ViTConfig(42, 14, 32, 3, 4, 48, "gelu_tanh"), 0


def dinov2():
    config = transformers.Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=4)
    ours = ViTConfig(42, 14, 32, 3, 4, 64, class_token=True, register_tokens=4, layer_scale=True)
    return transformers.Dinov2WithRegistersModel(config), ours, 5


@pytest.fixture(params=[clip, siglip, dinov2], ids=lambda f: f.__name__)
def pair(request):
    torch.manual_seed(0)
    theirs, config, n_prefix = request.param()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return theirs.eval(), config, n_prefix


def ours_of(theirs, config):
    vit = ViT(config).eval()
    load_into(vit, vit_weights_from_transformers(theirs.state_dict()), "transformers")
    return vit


@torch.no_grad()
@pytest.mark.parametrize("size", [(42, 42), (45, 50)])
def test_features_of_the_second_to_last_block_agree(pair, size):
    theirs, config, n_prefix = pair
    pixels = torch.randn(2, 3, *size)
    h, w = size[0] // 14, size[1] // 14
    if (h, w) != (3, 3):
        pytest.skip("a resampled table is compared below")
    want = theirs(pixels[:, :, :42, :42], output_hidden_states=True).hidden_states[-2][:, n_prefix:]
    got = ours_of(theirs, config)(pixels)
    torch.testing.assert_close(got, want.unflatten(1, (h, w)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_resampled_position_table_agrees():
    """DINOv2 in transformers resamples as timm does: bicubic, antialiased, in float32."""
    theirs, config, n_prefix = dinov2()
    pixels = torch.randn(1, 3, 28, 56)
    want = theirs.eval()(pixels, output_hidden_states=True).hidden_states[-2][:, n_prefix:]
    torch.testing.assert_close(ours_of(theirs, config)(pixels), want.unflatten(1, (2, 4)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_last_layer_has_the_final_norm(pair):
    from dataclasses import replace

    theirs, config, n_prefix = pair
    pixels = torch.randn(1, 3, 42, 42)
    got = ours_of(theirs, replace(config, feature_layer=-1))(pixels)
    if config.position_of_class:  # CLIP's own norm is for the class token alone: compare before it
        want = theirs(pixels, output_hidden_states=True).hidden_states[-1]
        want = torch.nn.functional.layer_norm(want, (32,), *norm_of(theirs), eps=1e-5)
    else:
        want = theirs(pixels).last_hidden_state
    torch.testing.assert_close(got.flatten(1, 2), want[:, n_prefix:], rtol=1e-5, atol=1e-5)


def norm_of(clip_model):
    state = {k.removeprefix("vision_model."): v for k, v in clip_model.state_dict().items()}
    return state["post_layernorm.weight"], state["post_layernorm.bias"]


@pytest.mark.parametrize(
    ("config", "patches", "count"),
    [
        (CLIP_L_336, 24, 303_507_456),
        # Published with an attention-pooling head, which features do not need.
        (SIGLIP_SO400M_384, 27, 428_225_600 - 15_238_352),
        # Published with a mask token and a table of 37 x 37 places and the class token's.
        (DINOV2_L_REG_384, 27, 304_372_736 - 1024 - (37 * 37 + 1 - 27 * 27) * 1024),
    ],
)
def test_published_sizes(config, patches, count):
    with torch.device("meta"):
        vit = ViT(config)
    assert config.grid_size == patches
    assert sum(p.numel() for p in vit.parameters()) == count


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match="encoder.strange.weight"):
        vit_weights_from_transformers({"encoder.strange.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(3, 42, 42), r"pixels must have shape \(B, 3, height, width\)"),
        (torch.zeros(1, 1, 42, 42), r"pixels must have shape"),
        (torch.zeros(1, 3, 10, 42), "at least 14 high and wide"),
    ],
)
def test_bad_pixels_are_named(pixels, message):
    with pytest.raises(ValueError, match=message):
        ViT(ViTConfig(42, 14, 32, 3, 4, 48))(pixels)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"heads": 5}, "heads must divide width"), ({"feature_layer": -9}, "feature_layer"), ({"depth": 0}, "depth")],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**({"image_size": 42, "width": 32, "depth": 3, "heads": 4} | change))
