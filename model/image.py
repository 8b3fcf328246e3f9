"""Image files and preprocessing for vision encoders."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .limits import MAX_ENCODER_SIDE, MAX_FILE_BYTES, MAX_IMAGE_SIDE
from .resample import Placement, resize_window

Resize = Literal["naive", "crop", "crop-floor", "letterbox"]
ImageLike = Image.Image | np.ndarray | str | Path | bytes
"""A Pillow image, a uint8 array (H, W, 3), or a file as its path or its bytes."""

FORMATS = ("AVIF", "BMP", "DDS", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
"""Raster formats that are read, by Pillow's names. Others may start programs: EPS runs Ghostscript."""

MAX_RESIZED_PIXELS = 1 << 24
"""Largest resized image or canvas that is computed entirely, in pixels of four bytes."""


@dataclass(frozen=True)
class ImageProcessor:
    """Resize to a square and normalize, equal to the pixel to the published models.

    Pixels become RGB by Pillow's own conversion: an alpha channel is dropped, 16-bit values above 255 become 255,
    and an orientation tag is not applied. The code of CLIP, Cobra and ML-Mamba does the same. Memory does not grow with
    an image's aspect ratio: of a long thin image, only the crop is computed.
    """

    size: int = 224
    resize: Resize = "naive"
    """`naive` ignores the aspect ratio; `crop` brings the shorter side to `size` and crops the center; `letterbox`
    first adds borders of the mean color. They are Cobra's three, by torchvision's rounding. `crop-floor` is `crop` by
    the rounding of `transformers`: where an odd number of pixels is cut away, the center may be one pixel higher."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resize_to: int | None = None
    """Side to resize to before the center crop of `size` pixels; None is `size`."""

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_ENCODER_SIDE:
            raise ValueError(f"size must be in [1, {MAX_ENCODER_SIDE}], got {self.size}")
        if self.resize not in (known := get_args(Resize)):
            raise ValueError(f"resize must be one of {', '.join(map(repr, known))}; got {self.resize!r}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        if self.resize_to is not None and not self.size <= self.resize_to <= MAX_ENCODER_SIDE:
            raise ValueError(f"resize_to must be in [size = {self.size}, {MAX_ENCODER_SIDE}], got {self.resize_to}")

    def __call__(self, image: ImageLike) -> Tensor:
        """Preprocess an image.

        Args:
            image: in any form that `as_rgb` takes.

        Returns:
            (3, size, size) float32.

        Raises:
            FileNotFoundError, TypeError, ValueError: see `as_rgb`.
        """
        pixels = torch.from_numpy(np.array(self.pixels(image))).permute(2, 0, 1).float() / 255  # (3, size, size)
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))  # (3, 1, 1) each
        return (pixels - mean) / std

    def pixels(self, image: ImageLike) -> Image.Image:
        """Resize and crop an image.

        Args:
            image: in any form that `as_rgb` takes.

        Returns:
            RGB image that the encoder sees, `size` high and wide.

        Raises:
            FileNotFoundError, TypeError, ValueError: see `as_rgb`.
        """
        image = as_rgb(image)
        # Width and height after the letterbox, and after resizing.
        borders = _letterbox_borders(image.size) if self.resize == "letterbox" else (0, 0)
        width, height = (s + 2 * border for s, border in zip(image.size, borders, strict=True))
        side = self.resize_to or self.size
        target = (side, side) if self.resize == "naive" else _with_shorter_side((width, height), side)
        # Pixels to crop away on each axis.
        excess = [s - self.size for s in target]
        # Python rounds a half to the even number, and so does torchvision.
        left, top = (e // 2 if self.resize == "crop-floor" else round(e / 2) for e in excess)
        color = tuple(int(m * 255) for m in self.mean)
        if max(width * height, target[0] * target[1]) > max(MAX_RESIZED_PIXELS, 4 * image.width * image.height):
            # Only the crop of a very long image is computed, with equal pixels.
            placement = Placement((width, height), borders, target, (left, top), self.size)
            return Image.fromarray(resize_window(np.asarray(image), placement, color))
        if any(borders):
            # Letterbox borders have the mean color.
            canvas = Image.new("RGB", (width, height), color)
            canvas.paste(image, borders)
            image = canvas
        if image.size != target:
            image = image.resize(target, Image.Resampling.BICUBIC)
        return image.crop((left, top, left + self.size, top + self.size)) if any(excess) else image


def as_rgb(image: ImageLike) -> Image.Image:
    """Convert an image to RGB.

    Args:
        image: a Pillow image, a uint8 array (H, W, 3), or a file as its path or its bytes.

    Returns:
        RGB image.

    Raises:
        FileNotFoundError, ValueError: see `open_image`; or an image without pixels, or an array of another shape.
        TypeError: it is no image, or an array of another dtype.
    """
    if isinstance(image, str | Path):
        return open_image(image)
    if isinstance(image, bytes):
        return decode_image(io.BytesIO(image), "the image")
    if isinstance(image, np.ndarray):
        # Floats could be in [0, 1] or in [0, 255]: not guessed.
        if image.dtype != np.uint8:
            raise TypeError(f"an image as an array must be uint8, got {image.dtype}")
        if image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"an image as an array must have shape (H, W, 3), got {image.shape}")
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise TypeError(
            "an image must be a Pillow image, a uint8 array of shape (H, W, 3), a path or bytes, "
            f"got {type(image).__name__}"
        )
    return _convert(image, str(getattr(image, "filename", "") or "the image"))


def open_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB.

    Args:
        path: of the file.

    Returns:
        RGB image, decoded entirely.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be opened; its content is in none of `FORMATS`; it is damaged or cut short; or it is
            larger than `MAX_FILE_BYTES`, longer than `MAX_IMAGE_SIDE`, or has more pixels than Pillow takes for safe.
            The path is named.
    """
    with _open(Path(path)) as file:
        return decode_image(file, str(path))


def _open(path: Path) -> BinaryIO:
    """Open an image file whose size is within the limit."""
    try:
        if not path.is_file():
            raise FileNotFoundError
        file = open(path, "rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"no image at {path}") from None
    except (OSError, ValueError) as e:  # a name that is too long, or has a null character
        raise ValueError(f"{str(path)!r} cannot be opened: {e}") from e
    size = os.fstat(file.fileno()).st_size
    if size > MAX_FILE_BYTES:
        file.close()
        raise ValueError(f"{path} is too large: {size:,} bytes, where {MAX_FILE_BYTES:,} are the most")
    return file


def decode_image(file: BinaryIO, name: str) -> Image.Image:
    """Read an image as RGB from an open file.

    Args:
        file: opened for reading bytes.
        name: names the file in errors.

    Returns:
        RGB image, decoded entirely.

    Raises:
        ValueError: see `open_image`.
    """
    with _read_header(file, name) as image:
        return _convert(image, name)


@contextlib.contextmanager
def open_animation(source: str | Path | BinaryIO, name: str) -> Iterator[tuple[int, Callable[[int], Image.Image]]]:
    """Open an animated image file; one that is not animated has one frame.

    Args:
        source: its path, or the file itself, opened for reading bytes.
        name: names the file in errors.

    Yields:
        The number of frames, and a function that reads one of them as RGB.

    Raises:
        FileNotFoundError, ValueError: see `open_image`; the message names the frame.
    """
    file = _open(Path(source)) if isinstance(source, str | Path) else source
    with file, _read_header(file, name) as image:

        def frame(index: int) -> Image.Image:
            try:
                image.seek(index)
            except MemoryError:
                raise
            except Exception as e:
                raise _undecodable(f"frame {index} of {name}", e) from e
            return _convert(image, f"frame {index} of {name}")

        # Counting the frames of some formats reads the entire file.
        try:
            n_frames = getattr(image, "n_frames", 1)
        except Exception as e:
            raise _undecodable(name, e) from e
        yield n_frames, frame


def _read_header(file: BinaryIO, name: str) -> Image.Image:
    """Open an image without decoding its pixels."""
    try:
        return Image.open(file, formats=_readable_formats())
    except MemoryError:
        raise
    except Exception as e:
        raise _undecodable(name, e) from e


def is_image(name: str) -> bool:
    """Return whether a file's extension is that of one of `FORMATS`."""
    return os.path.splitext(name)[1].lower() in _endings()


def _convert(image: Image.Image, name: str) -> Image.Image:
    if not image.width * image.height:
        raise ValueError(f"{name} has no pixels: its size is {image.width} x {image.height}")
    # Checked before decoding allocates memory.
    if max(image.size) > MAX_IMAGE_SIDE:
        raise ValueError(
            f"{name} is too large: {image.width} x {image.height} pixels, a side beyond {MAX_IMAGE_SIDE:,}"
        )
    try:
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as e:
        raise _undecodable(name, e) from e


def _undecodable(name: str, error: Exception) -> ValueError:
    """Convert an exception of a decoder, which may be of nearly every kind, to a ValueError."""
    if isinstance(error, UnidentifiedImageError):
        return ValueError(f"{name} is not an image that can be read: its content is none of {', '.join(FORMATS)}")
    if isinstance(error, Image.DecompressionBombError):
        return ValueError(f"{name} is too large: {error}")
    return ValueError(f"{name} is damaged or cut short: {error or type(error).__name__}")


@functools.cache
def _readable_formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this build of Pillow supports."""
    # Loads all plugins.
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def _endings() -> frozenset[str]:
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in FORMATS)


def _with_shorter_side(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return (width, height) with the same aspect ratio; the longer side is rounded down."""
    short, long = min(size), max(size)
    longer = int(side * long / short)
    return (side, longer) if size[0] == short else (longer, side)


def _letterbox_borders(size: tuple[int, int]) -> tuple[int, int]:
    """Return the widths of the borders left and right, and above and below.

    Both sides are equal: where they would differ by a pixel, the result is one pixel short of square.
    """
    across, down = ((max(size) - s) // 2 for s in size)
    return across, down
