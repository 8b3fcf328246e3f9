"""A model by name, whatever it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .formats import detect_format, read_json
from .hub import CONFIG, fetch_model
from .lm import MambaLM
from .vit import ViT
from .vlm import VLM
from .weights import DeviceMap


def model_class(folder: Path) -> type[MambaLM | VLM | ViT]:
    """The class that loads a checkpoint, told by its small files.

    Raises:
        FileNotFoundError, ValueError: as `formats.detect_format`.
    """
    layout = detect_format(folder)
    if layout in ("ml-mamba", "cobra"):
        return VLM
    if layout == "timm":
        return ViT
    if layout in ("own", "transformers"):
        data = read_json(folder / CONFIG)
        if "language" in data:
            return VLM
        if "patch_size" in data or "vision_config" in data:
            return ViT
    return MambaLM


def load_model(
    name_or_path: str | Path, *, dtype: torch.dtype | None = None, device_map: DeviceMap = "cpu", **hub: Any
) -> MambaLM | VLM:
    """A language model or a vision-language model, as its own `from_pretrained` loads it.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError, ValueError: as `from_pretrained`; or it is an image
            encoder by itself.
    """
    kind = model_class(fetch_model(name_or_path, **hub))
    if kind is ViT:
        raise ValueError(f"{name_or_path} is an image encoder, which gives no text")
    return kind.from_pretrained(name_or_path, dtype=dtype, device_map=device_map, **hub)
