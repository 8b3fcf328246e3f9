"""VL-Mamba and ML-Mamba: language models, vision encoders, and the models that join them.

Names are imported when they are first used, so that what needs no torch does not wait for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import Batch, Sample, collate
    from .chat import Conversation
    from .config import (
        CLIP_L_336,
        DINOV2_L_REG_384,
        SIGLIP_SO400M_384,
        LMConfig,
        TilesConfig,
        VisionConfig,
        ViTConfig,
        VLMConfig,
    )
    from .formats.vision import VISION_ENCODERS
    from .generation.config import GenerationConfig
    from .image import ImageProcessor, as_rgb, open_image
    from .lm import LMOutput, MambaLM
    from .load import load_model
    from .presets import PRESETS
    from .prompt import IGNORE, IMAGE_TOKEN, Turn
    from .tokenizer import Tokenizer
    from .video import Video
    from .vit import ViT
    from .vlm import VLM, VLMOutput

__all__ = [
    "CLIP_L_336",
    "DINOV2_L_REG_384",
    "IGNORE",
    "IMAGE_TOKEN",
    "PRESETS",
    "SIGLIP_SO400M_384",
    "VISION_ENCODERS",
    "VLM",
    "Batch",
    "Conversation",
    "GenerationConfig",
    "ImageProcessor",
    "LMConfig",
    "LMOutput",
    "MambaLM",
    "Sample",
    "TilesConfig",
    "Tokenizer",
    "Turn",
    "VLMConfig",
    "VLMOutput",
    "ViT",
    "ViTConfig",
    "Video",
    "VisionConfig",
    "as_rgb",
    "collate",
    "load_model",
    "open_image",
]

_MODULE_OF = {
    "CLIP_L_336": "config",
    "DINOV2_L_REG_384": "config",
    "IGNORE": "prompt",
    "IMAGE_TOKEN": "prompt",
    "PRESETS": "presets",
    "SIGLIP_SO400M_384": "config",
    "VISION_ENCODERS": "formats.vision",
    "VLM": "vlm",
    "Batch": "batch",
    "Conversation": "chat",
    "GenerationConfig": "generation.config",
    "ImageProcessor": "image",
    "LMConfig": "config",
    "LMOutput": "lm",
    "MambaLM": "lm",
    "Sample": "batch",
    "TilesConfig": "config",
    "Tokenizer": "tokenizer",
    "Turn": "prompt",
    "VLMConfig": "config",
    "VLMOutput": "vlm",
    "ViT": "vit",
    "ViTConfig": "config",
    "Video": "video",
    "VisionConfig": "config",
    "as_rgb": "image",
    "collate": "batch",
    "load_model": "load",
    "open_image": "image",
}
"""The module that each name of `__all__` is in."""


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
