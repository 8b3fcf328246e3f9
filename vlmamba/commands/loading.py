"""Models and dtypes by the names that commands take."""

from __future__ import annotations

import torch

from ..model.device import device_named
from ..model.lm import MambaLM
from ..model.load import load_model
from ..model.quantize import check_quantization
from ..model.vlm import VLM
from ..train.base_model import saved_model
from .options import DtypeName, Loading

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def torch_dtype(name: DtypeName | None) -> torch.dtype | None:
    """The dtype of that name; None, the checkpoint's own, stays None."""
    return None if name is None else DTYPES[name]


def load(name: str, options: Loading) -> MambaLM | VLM:
    """Load a model.

    Raises:
        ValueError: there is no such model or device; or see `load_model`.
        ModuleNotFoundError, OSError: as `from_pretrained`.
    """
    place = device_named(options.device)
    # Before a name is looked up, which may take minutes.
    check_quantization(options.quantize)
    return load_model(saved_model(name), dtype=torch_dtype(options.dtype), device_map=place, quantize=options.quantize)


def load_with_tokenizer(name: str, options: Loading) -> MambaLM | VLM:
    """Load a model that takes and returns text.

    Raises:
        ValueError: the model has no tokenizer; or see `load`.
        ModuleNotFoundError, OSError: see `load`.
    """
    model = load(name, options)
    if model.tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, so it cannot be prompted with text")
    return model
