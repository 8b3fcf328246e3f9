"""Loading of any model by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .formats import detect_format, read_json
from .hub import CONFIG, fetch_model
from .lm import MambaLM
from .quantize import Quantization
from .vit import ViT
from .vlm import VLM
from .weights import DeviceMap


def model_class(folder: Path) -> type[MambaLM | VLM | ViT]:
    """Determine the class of a checkpoint from its small files.

    Args:
        folder: of the checkpoint.

    Returns:
        The class that loads it.

    Raises:
        FileNotFoundError, ValueError: see `formats.detect_format`.
    """
    layout = detect_format(folder)
    if layout in ("ml-mamba", "cobra"):
        return VLM
    # timm's repositories that are known have encoders only.
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
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device_map: DeviceMap = "cpu",
    quantize: Quantization | None = None,
    **hub: Any,
) -> MambaLM | VLM:
    """Load a language model or a vision-language model by its own `from_pretrained`.

    Args:
        name_or_path, dtype, device_map, quantize, hub: see `HubModel.from_pretrained`.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError, ValueError: see `HubModel.from_pretrained`; or it is a
            vision encoder.
    """
    kind = model_class(fetch_model(name_or_path, **hub))
    if issubclass(kind, ViT):
        raise ValueError(f"{name_or_path} is a vision encoder, which generates no text")
    return kind.from_pretrained(name_or_path, dtype=dtype, device_map=device_map, quantize=quantize, **hub)
