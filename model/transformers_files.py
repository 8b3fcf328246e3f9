"""Saved models for `transformers`: keys in `config.json`, a module that names the classes, and settings.

`vlmamba.transformers` has the classes. With them imported, or with `trust_remote_code=True`, the auto classes load the
folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from .config import LMConfig, ViTConfig, VLMConfig
from .config_io import MODEL_TYPES, save_config, to_json_dict
from .files import write_atomic
from .formats.language import EMBEDDING
from .tokenizer import Tokenizer

CODE = "modeling_vlmamba.py"
"""Module beside the weights that `transformers` runs with `trust_remote_code=True`."""
GENERATION = "generation_config.json"
QUANT_METHOD = "vlmamba"
"""Name by which `transformers` finds the classes that load quantized weights."""
CLASSES: dict[str, dict[str, str]] = {
    "vlmamba": {
        "AutoConfig": "VLMambaConfig",
        "AutoModel": "VLMambaForConditionalGeneration",
        "AutoModelForImageTextToText": "VLMambaForConditionalGeneration",
        "AutoProcessor": "VLMambaProcessor",
    },
    "vlmamba_lm": {
        "AutoConfig": "MambaLMConfig",
        "AutoModel": "MambaLMForCausalLM",
        "AutoModelForCausalLM": "MambaLMForCausalLM",
    },
}
"""Classes of `vlmamba.transformers` by auto class, for each `model_type`."""
_TEXT = '''"""Classes of the package vl-mamba, with which `transformers` loads this model by trust_remote_code=True."""

try:
    from vlmamba.transformers import *  # noqa: F403
except ImportError as error:
    raise ImportError(f"this model needs the package vl-mamba: pip install . in a checkout of it ({error})") from error
'''


def save_model_config(
    config: LMConfig | ViTConfig | VLMConfig, folder: Path, dtypes: Mapping[str, torch.dtype]
) -> None:
    """Write `config.json`; for a model that generates text, with the keys that `transformers` reads, and `CODE`.

    Args:
        config: of the model.
        folder: to write to.
        dtypes: of its weights by name.
    """
    if isinstance(config, ViTConfig):
        save_config(config, folder / "config.json")
        return
    model_type = MODEL_TYPES[isinstance(config, LMConfig)]
    # The dtype of a model that is loaded with none given; quantized embeddings have no floating-point one.
    prefix = "language_model." if model_type == "vlmamba" else ""
    dtype = next(dtypes[prefix + n] for n in (EMBEDDING, "backbone.norm_f.weight") if prefix + n in dtypes)
    keys = {
        "model_type": model_type,
        "architectures": [CLASSES[model_type]["AutoModel"]],
        "auto_map": auto_map(model_type),
        "dtype": str(dtype).removeprefix("torch."),
    }
    if any(name.endswith(".qdata") for name in dtypes):
        keys["quantization_config"] = {"quant_method": QUANT_METHOD}
    text = json.dumps(keys | to_json_dict(config), indent=2, allow_nan=False) + "\n"
    write_atomic(folder / "config.json", text)
    write_code(folder)


def auto_map(model_type: str) -> dict[str, str]:
    """Return the classes in `CODE` by auto class."""
    return {auto: f"{Path(CODE).stem}.{name}" for auto, name in CLASSES[model_type].items()}


def write_code(folder: Path) -> None:
    """Write `CODE`.

    Args:
        folder: to write to, made where it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / CODE, _TEXT)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer with its settings, and `GENERATION` with its end-of-text token, which also pads.

    Args:
        tokenizer: of the model.
        folder: to write to.
    """
    tokenizer.save(folder / "tokenizer.json")
    save_special_tokens(tokenizer, folder)


def save_special_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `GENERATION` for a tokenizer."""
    ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    write_atomic(folder / GENERATION, json.dumps(ids, indent=2) + "\n")
