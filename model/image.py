"""Images to the tensors that an encoder expects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor


@dataclass(frozen=True)
class ImageProcessor:
    """Resize to a square and normalise.

    Pixels become RGB by Pillow's own conversion (an alpha channel is dropped), and an orientation tag is not
    applied, both as in the published models' preprocessing.
    """

    size: int = 224
    resize: Literal["naive", "crop", "letterbox"] = "naive"
    """`naive` ignores the aspect ratio; `crop` takes the middle; `letterbox` pads with the mean colour."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        if self.resize not in ("naive", "crop", "letterbox"):
            raise ValueError(f"resize must be 'naive', 'crop' or 'letterbox', got {self.resize!r}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    def __call__(self, image: Image.Image | str | Path) -> Tensor:
        """An image or its path -> (3, size, size) float32.

        Raises:
            FileNotFoundError, ValueError: as `open_image`.
        """
        image = open_image(image) if isinstance(image, str | Path) else image.convert("RGB")
        if self.resize == "letterbox":
            image = _pad_to_square(image, tuple(int(m * 255) for m in self.mean))
        if self.resize == "crop":
            scale = self.size / min(image.size)
            # The longer side is cut down to a whole number of pixels, as torchvision does it.
            image = image.resize(tuple(max(self.size, int(s * scale)) for s in image.size), Image.Resampling.BICUBIC)
            left, top = (round((s - self.size) / 2) for s in image.size)
            image = image.crop((left, top, left + self.size, top + self.size))
        elif image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (pixels - mean) / std


def open_image(path: str | Path) -> Image.Image:
    """Read a whole image file as RGB.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image, or one that is damaged or cut short.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as e:
        raise ValueError(f"{path} is not an image that can be read") from e
    except (OSError, SyntaxError) as e:
        raise ValueError(f"{path} is damaged or cut short: {e}") from e


def _pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, tuple((side - s) // 2 for s in image.size))
    return square
