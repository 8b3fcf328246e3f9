"""Images as a model reads them: preprocessed for each vision encoder, with the number of tokens that they take."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import VLMConfig
from .image import ImageLike, as_rgb


@dataclass(frozen=True)
class ProcessedImage:
    """An image preprocessed for each vision encoder."""

    pixels: tuple[Tensor, ...]
    """For each encoder, (views, 3, height, width)."""
    n_tokens: int
    """Number of tokens of the language model that the image takes."""

    def to(self, dtype: torch.dtype) -> ProcessedImage:
        """Convert the pixels to a dtype."""
        return replace(self, pixels=tuple(p.to(dtype) for p in self.pixels))


class ImagePreprocessor:
    """Preprocessing of a model's images. It has no weights, so that workers can have a copy.

    Args:
        config: of the model; its `vision` lists encoders and processors.
    """

    def __init__(self, config: VLMConfig):
        self.config = config

    def __call__(self, image: ImageLike) -> ProcessedImage:
        """Preprocess an image.

        Args:
            image: in any form that `image.as_rgb` takes.

        Returns:
            The image for each encoder.

        Raises:
            FileNotFoundError, TypeError, ValueError: see `image.as_rgb`.
        """
        rgb = as_rgb(image)
        pixels = tuple(v.processor(rgb).unsqueeze(0) for v in self.config.vision)  # (1, 3, height, width) each
        rows, columns = self.config.grid
        return ProcessedImage(pixels, rows * columns)
