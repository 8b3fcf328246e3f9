"""The model that a training starts from: its config and checkpoint, read without loading weights."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..model.config import VLMConfig
from ..model.hub import fetch_model
from ..model.lm import neox_tokenizer
from ..model.load import model_class
from ..model.presets import PRESETS, is_preset
from ..model.prompt import get_template
from ..model.vlm import VLM
from ..model.weights import Weights, check_fit
from .config import StageConfig
from .recipes import RECIPES, Recipe


def named_model(name: str) -> str:
    """Look up the name of a model as commands take it.

    Args:
        name: a folder, a name on the Hub, a preset, or a recipe, which stands for the model of its paper. A folder
            comes before the others of its name.

    Returns:
        The name, or the preset of a recipe.

    Raises:
        ValueError: there is none of that name; the message has the nearest.
    """
    if not Path(name).is_dir():
        if name in RECIPES and RECIPES[name].model is not None:
            return str(RECIPES[name].model)
        # A name with a slash may be on the Hub; any other would have to be a folder.
        if name not in PRESETS and "/" not in name:
            near = difflib.get_close_matches(name, [*PRESETS, *RECIPES], n=1)
            hint = f"did you mean {near[0]!r}?" if near else "a name on the Hugging Face Hub has the form owner/model"
            raise ValueError(f"no folder, preset or recipe {name!r}; {hint}")
    return name


def saved_model(name: str) -> str:
    """Look up the name of a model that has weights.

    Raises:
        ValueError: there is none of that name, or it is a preset, whose connector is not trained.
    """
    found = named_model(name)
    if is_preset(found):
        raise ValueError(
            f"{name} is a preset: pretrained parts and a connector without weights. `vlmamba train {name} ...` trains "
            f"it, `vlmamba inspect {name}` describes it"
        )
    return found


def model_config(name: str) -> VLMConfig:
    """Read the config of a preset or a saved model; no weights are read.

    Raises:
        ValueError: it is not a vision-language model.
        FileNotFoundError, PermissionError, ConnectionError: as `hub.fetch_model`.
    """
    return PRESETS[name].config if is_preset(name) else _open(name)[0]


def model_without_weights(name: str, **hub: Any) -> VLM:
    """Build a model on the meta device, with its tokenizer where that is available."""
    if is_preset(name):
        with torch.device("meta"):
            return VLM(PRESETS[name].config, neox_tokenizer(**hub))
    config, _, folder = _open(name)
    with torch.device("meta"):
        model = VLM(config)
    model.load_extras(folder)
    return model


def check_checkpoint(name: str, model: VLM) -> list[str]:
    """Compare the names and shapes of a checkpoint's weights, as far as they are on this machine, with its model.

    Returns:
        What could not be checked.

    Raises:
        ValueError: weights and config do not agree, or a file is damaged.
    """
    # A saved model is on this machine, or was just downloaded.
    if not is_preset(name):
        check_fit(model, _open(name)[1], name)
        return []
    preset = PRESETS[name]
    try:
        config, weights = preset.open(local_files_only=True)
    except FileNotFoundError:
        return [f"the weights of {preset.language} and its encoders are not all here; training downloads them"]
    if config != model.config:
        raise ValueError(f"the files of {preset.language} are not those that preset {name} expects")
    # A preset's connector is untrained: only language model and encoders have weights to compare.
    for part in (model.language_model, model.vision):
        prefix = "language_model." if part is model.language_model else "vision."
        inner = weights.renamed(lambda n, p=prefix: n.removeprefix(p) if n.startswith(p) else None)
        check_fit(part, inner, f"preset {name}")
    return []


@contextlib.contextmanager
def template_of(recipe: Recipe, stage: StageConfig, model: VLM) -> Iterator[None]:
    """Set the prompt template of a stage on a model, and restore the model's own afterwards."""
    own = model.template
    if stage.name == "align" and recipe.align_template is not None:
        model.template = get_template(recipe.align_template)
    try:
        yield
    finally:
        model.template = own


def _open(name: str) -> tuple[VLMConfig, Weights, Path]:
    folder = fetch_model(name)
    if model_class(folder) is not VLM:
        raise ValueError(
            f"{name} is not a vision-language model: name one, or a preset, which combines pretrained parts"
        )
    return *VLM.open_checkpoint(folder), folder
