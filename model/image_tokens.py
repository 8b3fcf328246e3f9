"""Images as a model reads them: preprocessed for each vision encoder, with the number of tokens that they take."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .config import VLMConfig
from .image import ImageLike, as_rgb
from .tiles import TileGrid, choose_grid, count_tokens, cut_tiles, patch_bounds
from .video import Video


@dataclass(frozen=True)
class ProcessedImage:
    """An image preprocessed for each vision encoder: one view, or with tiles a view of the whole and each tile; or the
    frames of a video."""

    pixels: tuple[Tensor, ...]
    """For each encoder, (views, 3, height, width)."""
    n_tokens: int
    """Number of tokens of the language model that the image takes."""
    grid: TileGrid | None = None
    """Grid of the tiles, if any."""
    salt: bytes = field(default=b"", repr=False)
    """Secret that the digest depends on, at most 64 bytes: images of two users have different digests."""

    @property
    def n_views(self) -> int:
        """Number of images that each encoder sees: 1, those of the tiles, or the frames of a video."""
        return len(self.pixels[0])

    @functools.cached_property
    def digest(self) -> bytes:
        """Hash of the content as the model sees it: pixels after preprocessing, and the grid; keyed by the salt."""
        hashed = hashlib.blake2b(repr(self.grid).encode(), digest_size=32, key=self.salt)
        # Shape and dtype too, so that no two contents have the same bytes.
        for pixels in self.pixels:
            hashed.update(f"{pixels.dtype} {tuple(pixels.shape)}".encode())
            hashed.update(pixels.contiguous().flatten().view(torch.uint8).numpy().data)
        return hashed.digest()

    def to(self, dtype: torch.dtype) -> ProcessedImage:
        """Convert the pixels to a dtype."""
        return replace(self, pixels=tuple(p.to(dtype) for p in self.pixels))


class ImagePreprocessor:
    """Preprocessing of a model's images. It has no weights, so that workers can have a copy.

    Args:
        config: of the model; its `vision` lists encoders and processors, its `tiles` the grids.
    """

    def __init__(self, config: VLMConfig):
        self.tiles = config.tiles
        self.processors = [v.processor for v in config.vision]
        # Tiles have the encoder's size, and the view of the whole beside them is never cropped.
        self.tile_processors = [replace(p, resize="naive", resize_to=None) for p in self.processors]
        self.patches, self.max_frames = config.grid[0], config.max_frames

    def __call__(self, image: ImageLike | Video) -> ProcessedImage:
        """Preprocess an image, or the sampled frames of a video.

        Args:
            image: in any form that `as_rgb` takes; or a video.

        Returns:
            The image for each encoder. A video's views are its frames, without tiles.

        Raises:
            FileNotFoundError, TypeError, ValueError: see `as_rgb` and `Video.frames`.
        """
        if isinstance(image, Video):
            frames = image.frames(self.max_frames)
            # (frames, 3, height, width) for each encoder
            pixels = tuple(torch.stack([processor(f) for f in frames]) for processor in self.processors)
            return ProcessedImage(pixels, self._count(len(frames)))
        rgb = as_rgb(image)
        if self.tiles is None:
            pixels = tuple(processor(rgb)[None] for processor in self.processors)  # (1, 3, height, width) each
            return ProcessedImage(pixels, self._count(1))
        chosen = choose_grid(rgb.size, self.tiles.grids, self.processors[0].size)
        grid = patch_bounds(rgb.size, chosen, self.patches, self.tiles.unpads)
        # Encoders of other sizes see the same grid in tiles of their own.
        pixels = tuple(
            torch.stack([processor(view) for view in [rgb, *cut_tiles(rgb, chosen, processor.size)]])
            for processor in self.tile_processors
        )  # (1 + tiles, 3, height, width) each
        return ProcessedImage(pixels, self._count(len(pixels[0]), grid), grid)

    @property
    def most_tokens(self) -> int:
        """Most tokens that an image takes."""
        if self.tiles is None:
            return self._count(1)
        # Border that is left out makes an image shorter.
        n = self.patches
        return max(self._count(1 + r * c, TileGrid(r, c, 0, r * n, 0, c * n)) for r, c in self.tiles.grids)

    def _count(self, n_views: int, grid: TileGrid | None = None) -> int:
        return count_tokens(n_views, grid, self.patches, self.tiles is not None and self.tiles.unpads)
