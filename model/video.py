"""Videos as frames: a folder of images, an animated file, or a list of images, of which some are sampled."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .image import ImageLike, as_rgb, is_image, open_animation


@dataclass(frozen=True)
class Video:
    """A video at one mark `<image>` of a conversation.

    Args:
        source: a folder, whose images are frames in the order of the numbers in their names; an animated file (GIF,
            WebP, PNG and others that Pillow reads) as its path or bytes; or the frames themselves.
        max_frames: most frames that are sampled; None is that of the model's config.
    """

    source: str | Path | bytes | Sequence[ImageLike]
    max_frames: int | None = None

    def __post_init__(self) -> None:
        if self.max_frames is not None and self.max_frames < 1:
            raise ValueError(f"max_frames must be at least 1, got {self.max_frames}")

    def frames(self, max_frames: int) -> list[Image.Image]:
        """Read frames at equal distances, the first and the last among them.

        Args:
            max_frames: most frames, if the video has no number of its own. Only these are decoded, as far as the
                format allows it.

        Returns:
            RGB images.

        Raises:
            FileNotFoundError: there is no such folder or file.
            ValueError: there is no frame, or one is damaged; the message names it.
        """
        most = max_frames if self.max_frames is None else self.max_frames
        source = self.source
        if isinstance(source, str | Path):
            # A file is an animation, a folder has a file for each frame.
            if not Path(source).is_dir():
                return _animation_frames(source, most)
            names = sorted((p for p in Path(source).iterdir() if is_image(p.name)), key=_natural_order)
            if not names:
                raise ValueError(f"the folder {source} has no frames: no file in it is an image")
            source = names
        elif isinstance(source, bytes):
            return _animation_frames(source, most)
        if not source:
            raise ValueError("a video needs at least one frame, got none")
        return [as_rgb(source[i]) for i in sample_frames(len(source), most)]


def sample_frames(n_frames: int, max_frames: int) -> list[int]:
    """Choose frames at equal distances, as LLaVA-NeXT does.

    Args:
        n_frames: frames of the video.
        max_frames: most frames to choose; a shorter video has all of them.

    Returns:
        Indices, ascending.
    """
    # A short video is not stretched.
    if n_frames <= max_frames:
        return list(range(n_frames))
    # numpy.linspace(0, n_frames - 1, max_frames, dtype=int); a single frame is the first.
    return [i * (n_frames - 1) // max(max_frames - 1, 1) for i in range(max_frames)]


def _animation_frames(source: str | Path | bytes, max_frames: int) -> list[Image.Image]:
    name = "the video" if isinstance(source, bytes) else str(source)
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with open_animation(file, name) as (n_frames, frame):
        return [frame(i) for i in sample_frames(n_frames, max_frames)]


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """Sort key that has frame 2 before frame 10."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
