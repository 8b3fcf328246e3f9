"""VL-Mamba and ML-Mamba: language models, vision encoders, and the models that join them."""

from .batch import Batch, Sample, collate
from .chat import Conversation
from .config import LMConfig, VisionConfig, VLMConfig
from .formats.vision import VISION_ENCODERS
from .generate import GenerationConfig
from .image import ImageProcessor, open_image
from .lm import LMOutput, MambaLM
from .load import load_model
from .presets import PRESETS
from .prompt import IGNORE, IMAGE_TOKEN, Turn
from .tokenizer import Tokenizer
from .vit import CLIP_L_336, DINOV2_L_REG_384, SIGLIP_SO400M_384, ViT, ViTConfig
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
    "Tokenizer",
    "Turn",
    "VLMConfig",
    "VLMOutput",
    "ViT",
    "ViTConfig",
    "VisionConfig",
    "collate",
    "load_model",
    "open_image",
]
