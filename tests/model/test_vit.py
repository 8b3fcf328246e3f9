"""The vision encoder by itself; `test_formats_vision.py` holds it against the published ones."""

from __future__ import annotations

import pytest
import torch

from vlmamba.model import ViT, ViTConfig

CONFIG = ViTConfig(42, 14, 32, 3, 4, 48)


@torch.no_grad()
def test_pixels_beyond_the_patches_are_ignored():
    vit = ViT(CONFIG).eval()
    pixels = torch.randn(1, 3, 47, 50)
    assert vit(pixels).shape == (1, 3, 3, 32)
    torch.testing.assert_close(vit(pixels), vit(pixels[:, :, :42, :42]))


@torch.no_grad()
def test_a_feature_layer_leaves_out_what_comes_after_it():
    vit = ViT(CONFIG).eval()
    pixels = torch.randn(1, 3, 42, 42)
    want = vit(pixels)
    for p in (*vit.blocks[-1].parameters(), *vit.norm.parameters()):
        p.fill_(torch.nan)
    assert torch.equal(vit(pixels), want)


def test_saved_and_loaded_again_without_a_processor(tmp_path):
    vit = ViT(CONFIG)
    vit.save_pretrained(tmp_path / "vit")
    again = ViT.from_pretrained(tmp_path / "vit")
    assert again.config == CONFIG
    assert again.processor.size == 42
    assert all(torch.equal(a, b) for a, b in zip(vit.parameters(), again.parameters(), strict=True))


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
        ViT(CONFIG)(pixels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "heads must divide width"),
        ({"feature_layer": -9}, "feature_layer"),
        ({"depth": 0}, "depth"),
        ({"activation": "relu"}, "activation must be one of .* got 'relu'"),
        ({"position_of_class": True}, "position_of_class must be False where class_token is"),
        ({"register_tokens": -1}, "register_tokens must be in .* got -1"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**({"image_size": 42, "width": 32, "depth": 3, "heads": 4} | change))
