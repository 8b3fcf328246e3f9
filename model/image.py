"""Images to the tensors that an encoder expects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor


@dataclass(frozen=True)
class ImageProcessor:
    """Resize to a square and normalise, to the pixel as the published models do it.

    Pixels become RGB by Pillow's own conversion: an alpha channel is dropped, 16-bit values above 255 become 255,
    and an orientation tag is not applied. The code of CLIP, Cobra and ML-Mamba does the same.
    """

    size: int = 224
    resize: Literal["naive", "crop", "crop-floor", "letterbox"] = "naive"
    """`naive` ignores the aspect ratio; `crop` brings the shorter side to `size` and takes the middle; `letterbox`
    first adds borders of the mean colour. They are Cobra's three, by torchvision's rounding. `crop-floor` is `crop` by
    the rounding of `transformers`: where an odd number of pixels is cut away, the middle may lie a pixel higher."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resize_to: int | None = None
    """Side to resize to before the middle `size` pixels are taken; None is `size`."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        if self.resize not in (known := ("naive", "crop", "crop-floor", "letterbox")):
            raise ValueError(f"resize must be one of {', '.join(map(repr, known))}; got {self.resize!r}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        if self.resize_to is not None and self.resize_to < self.size:
            raise ValueError(f"resize_to must be at least size = {self.size}, got {self.resize_to}")

    def __call__(self, image: Image.Image | str | Path) -> Tensor:
        """An image or its path -> (3, size, size) float32.

        Raises:
            FileNotFoundError, ValueError: as `open_image`.
        """
        pixels = torch.from_numpy(np.array(self.pixels(image))).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (pixels - mean) / std

    def pixels(self, image: Image.Image | str | Path) -> Image.Image:
        """What the encoder sees: RGB, `size` pixels high and wide.

        Raises:
            FileNotFoundError, ValueError: as `open_image`.
        """
        image = open_image(image) if isinstance(image, str | Path) else image.convert("RGB")
        if self.resize == "letterbox":
            image = _letterbox(image, tuple(int(m * 255) for m in self.mean))
        side = self.resize_to or self.size
        target = (side, side) if self.resize == "naive" else _with_shorter_side(image.size, side)
        if image.size != target:
            image = image.resize(target, Image.Resampling.BICUBIC)
        excess = [s - self.size for s in image.size]
        # Python rounds a half to the even number, and so does torchvision, which is written in it.
        left, top = (e // 2 if self.resize == "crop-floor" else round(e / 2) for e in excess)
        return image.crop((left, top, left + self.size, top + self.size)) if any(excess) else image


def open_image(path: str | Path) -> Image.Image:
    """Read a whole image file as RGB.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image, or one that is damaged, cut short, or has more pixels than Pillow takes for safe.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}")
    return decode_image(path, str(path))


def decode_image(file: Path | BinaryIO, name: str) -> Image.Image:
    """Read a whole image as RGB from an open file; `name` stands for it in errors.

    Raises:
        ValueError: as `open_image`.
    """
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as e:
        raise ValueError(f"{name} is not an image that can be read") from e
    except Image.DecompressionBombError as e:
        raise ValueError(f"{name} is too large: {e}") from e
    except (OSError, SyntaxError) as e:
        raise ValueError(f"{name} is damaged or cut short: {e}") from e


def _with_shorter_side(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height with the same aspect ratio; the longer side is cut down to a whole number of pixels."""
    short, long = min(size), max(size)
    longer = int(side * long / short)
    return (side, longer) if size[0] == short else (longer, side)


def _letterbox(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Equal borders on both sides: where they would differ by a pixel, what comes out is that pixel short of square."""
    width, height = image.size
    across, down = ((max(image.size) - s) // 2 for s in image.size)
    padded = Image.new("RGB", (width + 2 * across, height + 2 * down), colour)
    padded.paste(image, (across, down))
    return padded
