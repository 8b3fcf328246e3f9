"""The papers' recipes: what the papers say, and names that exist."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vlmamba.model.config import LMConfig, VLMConfig
from vlmamba.model.presets import PRESETS
from vlmamba.model.prompt import TEMPLATES
from vlmamba.train.recipes import RECIPES, recipe_for, recipe_named, tiny_config


def settings(stage):
    return stage.lr, stage.batch_size, stage.epochs, stage.warmup_ratio, stage.weight_decay, stage.precision


def test_vl_mamba_is_trained_as_llava():
    recipe = RECIPES["vl-mamba"]
    assert settings(recipe.align) == (1e-3, 256, 1, 0.03, 0, "bf16")
    assert settings(recipe.finetune) == (2e-5, 128, 1, 0.03, 0, "bf16")
    assert [f.n_records for f in (*recipe.align_data, *recipe.finetune_data)] == [558_128, 665_298]


def test_ml_mamba_is_trained_by_its_paper():
    recipe = RECIPES["ml-mamba"]
    assert settings(recipe.align) == (1e-3, 256, 1, 0.03, 0, "bf16")
    assert settings(recipe.finetune) == (2e-5, 64, 2, 0.03, 0.1, "bf16")
    assert [f.n_records for f in recipe.finetune_data] == [665_298]
    other = RECIPES["ml-mamba-1231k"]
    assert "lvis4v_lrv" in other.finetune_data[0].annotations
    assert replace(other, finetune_data=recipe.finetune_data) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_align_trains_the_connector_alone_and_finetune_the_language_model_too(name):
    recipe = RECIPES[name]
    assert recipe.align.trainable == ("connector",)
    assert recipe.finetune.trainable == ("connector", "language_model")
    assert recipe.model is None or recipe.model in PRESETS
    assert recipe.align_template is None or recipe.align_template in TEMPLATES


def test_each_preset_has_the_recipe_of_its_paper():
    for name, preset in PRESETS.items():
        assert recipe_for(preset.config) == name[:8]
    assert recipe_for(tiny_config("vl-mamba", 100)) == recipe_for(tiny_config("ml-mamba", 100)) == "small"
    assert recipe_for(VLMConfig(LMConfig(257, 1, layer="mamba"))) == "vl-mamba"


def test_an_unknown_recipe_gets_a_suggestion():
    with pytest.raises(ValueError, match="no recipe 'vlmamba'; did you mean 'vl-mamba'"):
        recipe_named("vlmamba")
    with pytest.raises(ValueError, match="known are vl-mamba, ml-mamba, ml-mamba-1231k, small"):
        recipe_named("x")
