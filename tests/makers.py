"""Small models and inputs that several test files share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image

from vlmamba.model import VLM, ImageProcessor, LMConfig, MambaLM, Tokenizer, VisionConfig, ViTConfig, VLMConfig

RED, BLUE = Image.new("RGB", (50, 40), "red"), Image.new("RGB", (32, 32), "blue")
VISION = VisionConfig(ViTConfig(32, 8, 16, 2, 2, 32), ImageProcessor(32))
"""An encoder of two layers for images of 32 by 32 pixels: 16 patches of width 16."""
LAYERS = {"mamba": {"d_state": 4}, "mamba2": {"d_state": 8, "headdim": 16}}
"""State sizes of the small language models by kind of layer."""


def shape_tokenizer() -> Tokenizer:
    """Train a tokenizer of 320 tokens on questions and answers about colored shapes."""
    return Tokenizer.train(["what color is the shape?", "a red circle", "a blue triangle"] * 5, 320)


def language_config(layer: str, vocab_size: int = 320) -> LMConfig:
    """Return a language model of two layers and width 32, with an output head of its own."""
    return LMConfig(32, 2, vocab_size, layer, tie_embeddings=False, **LAYERS[layer])


def sharpen(lm: MambaLM, embedding: float = 20, out_proj: float = 20) -> None:
    """Scale the weights so that answers differ and depend on more than the last tokens."""
    with torch.no_grad():
        lm.backbone.embedding.weight.mul_(embedding)
        if not lm.config.tie_embeddings:
            lm.lm_head.weight.mul_(embedding)
        for layer in lm.backbone.layers:
            layer.mixer.out_proj.weight.mul_(out_proj)
            if hasattr(layer.mixer, "A_log"):
                layer.mixer.A_log.sub_(4)  # a slow decay: the first tokens still count at the end


def sharpened_lm(config: LMConfig, tokenizer: Tokenizer | None = None, **scales: float) -> MambaLM:
    """Build the language model from seed 0, for inference, with weights that `sharpen` scaled."""
    torch.manual_seed(0)
    lm = MambaLM(config, tokenizer).eval()
    sharpen(lm, **scales)
    return lm


def sharpened_vlm(config: VLMConfig, tokenizer: Tokenizer) -> VLM:
    """Build the model from seed 0, for inference, with a language model that `sharpen` scaled."""
    torch.manual_seed(0)
    vlm = VLM(config, tokenizer).eval()
    sharpen(vlm.language_model)
    return vlm


def random_prompts(lengths: Sequence[int], vocab_size: int = 300) -> list[list[int]]:
    """Draw a prompt of each length, the same one for the same length; token 0 is left out."""
    return [torch.randint(1, vocab_size, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]


def save_images(folder: Path, colors: Iterable[str], size: tuple[int, int] = (40, 30)) -> list[Path]:
    """Save an image of each color alone as `<color>.png` in the folder, and return their paths."""
    paths = [folder / f"{color}.png" for color in colors]
    for path in paths:
        Image.new("RGB", size, path.stem).save(path)
    return paths
