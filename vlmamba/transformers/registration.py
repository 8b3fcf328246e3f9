"""Registration with the auto classes and pipelines of `transformers`."""

from __future__ import annotations

import transformers
from transformers.models.auto import modeling_auto

from ..model.transformers_files import CLASSES
from . import configs, models, processor


def register() -> None:
    """Register the classes of `CLASSES`. A second call has no effect."""
    found = vars(configs) | vars(models) | vars(processor)
    for model_type, classes in CLASSES.items():
        config = found[classes["AutoConfig"]]
        transformers.AutoConfig.register(model_type, config, exist_ok=True)
        for auto, name in classes.items():
            if auto != "AutoConfig":
                getattr(transformers, auto).register(config, found[name], exist_ok=True)
    # Pipelines and the Trainer look for names of classes here.
    for auto, names in (
        ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("AutoModelForImageTextToText", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    ):
        names.update({model_type: classes[auto] for model_type, classes in CLASSES.items() if auto in classes})
