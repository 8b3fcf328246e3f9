"""The papers' models put together from published parts, at full size on the meta device."""

from __future__ import annotations

import pytest
import torch

from vlmamba.connectors import build_connector
from vlmamba.model import VLM, LMConfig, MambaLM
from vlmamba.model.presets import PRESETS, get_preset


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(autouse=True)
def on_meta():
    with torch.device("meta"):
        yield


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_built(name):
    vlm = VLM(PRESETS[name].config)
    pixels = [torch.empty(1, 3, v.encoder.image_size, v.encoder.image_size) for v in vlm.config.vision]
    assert vlm.vision(pixels).shape == (1, *vlm.config.grid, vlm.vision.width)


# Without encoders, tied: WenjunHuang94/ML-Mamba's shapes added up.
@pytest.mark.parametrize(("name", "total"), [("3b", 2_887_005_120), ("1.3b", 1_462_905_600), ("780m", 848_240_960)])
def test_ml_mamba_has_the_released_number_of_parameters(name, total):
    vlm = VLM(get_preset(f"ml-mamba-{name}").config)
    assert count(vlm.connector) + count(vlm.language_model) == total


def test_cobra_has_the_released_number_of_parameters():
    config = get_preset("ml-mamba-3b-mlp").config
    connector = build_connector(config.connector, 1024 + 1152, 2560)
    assert count(connector) + count(MambaLM(LMConfig(2560, 64))) == 2_816_135_168


def test_a_mistyped_preset_gets_a_suggestion():
    with pytest.raises(ValueError, match="no preset 'vl-mamba-2.8'; did you mean 'vl-mamba-2.8b'"):
        VLM.from_preset("vl-mamba-2.8")
