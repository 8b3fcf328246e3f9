"""Models and dtypes by the names that commands take."""

from __future__ import annotations

import torch

from ..model.device import device_named
from ..model.lm import MambaLM
from ..model.load import load_model
from ..model.vlm import VLM
from ..train.base_model import saved_model
from .options import DtypeName

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def torch_dtype(name: DtypeName | None) -> torch.dtype | None:
    """The dtype of that name; None, the checkpoint's own, stays None."""
    return None if name is None else DTYPES[name]


def load_with_tokenizer(name: str, dtype: DtypeName | None, device: str) -> MambaLM | VLM:
    """Load a model that takes and returns text.

    Raises:
        ValueError: there is no such model or device, or the model has no tokenizer.
        OSError: as `from_pretrained`.
    """
    place = device_named(device)
    model = load_model(saved_model(name), dtype=torch_dtype(dtype), device_map=place)
    if model.tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, so it cannot be prompted with text")
    return model
