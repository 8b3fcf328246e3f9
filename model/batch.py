"""Packed batches for one training step or one prefill.

Letters: T tokens of a batch, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .image_tokens import ProcessedImage
from .prompt import IGNORE, IMAGE_TOKEN
from .tiles import TileGrid


@dataclass(frozen=True)
class Sample:
    """One conversation as tokens, with its images preprocessed for each encoder."""

    input_ids: list[int]
    labels: list[int]
    images: tuple[ProcessedImage, ...] = ()
    """In the order of their places in `input_ids`."""

    def image_spans(self) -> list[tuple[int, int]]:
        """Return the range of positions of each image in `input_ids`."""
        spans, end = [], 0
        for image in self.images:
            start = self.input_ids.index(IMAGE_TOKEN, end)
            end = start + image.n_tokens
            spans.append((start, end))
        return spans

    def after(self, position: int) -> Sample:
        """Cut off the start of a sample, with the images in it.

        Args:
            position: first token of the rest; not within an image.

        Returns:
            The rest.
        """
        n_before = sum(end <= position for _, end in self.image_spans())
        return Sample(self.input_ids[position:], self.labels[position:], self.images[n_before:])


@dataclass(frozen=True)
class Batch:
    """Samples packed one after the other, without padding."""

    input_ids: Tensor
    """(T,) int64; `IMAGE_TOKEN` at the positions of image features."""
    labels: Tensor
    """(T,) int64; the token itself where it is a target, else `IGNORE`."""
    cu_seqlens: Tensor
    """(S + 1,) int32 bounds of the samples."""
    images: tuple[Tensor, ...] = ()
    """For each vision encoder, the views of all images, (views, 3, height, width)."""
    layouts: tuple[tuple[int, TileGrid | None], ...] = ()
    """For each image the number of its views, and the grid of its tiles if it has some. Without layouts each view is an
    image."""

    def __post_init__(self) -> None:
        if self.input_ids.shape != self.labels.shape or self.input_ids.dim() != 1:
            shapes = tuple(self.input_ids.shape), tuple(self.labels.shape)
            raise ValueError(
                f"input_ids and labels must be equally long vectors, got shapes {shapes[0]} and {shapes[1]}"
            )

    def to(self, device: str | torch.device) -> Batch:
        """Move the batch to a device. The bounds stay on the CPU, where they are read.

        Args:
            device: target device.

        Returns:
            A new batch.
        """
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.cu_seqlens,
            tuple(i.to(device, non_blocking=True) for i in self.images),
            self.layouts,
        )

    @property
    def n_targets(self) -> int:
        """Number of targets: labelled tokens, except the first of each sample, which nothing predicts."""
        return int((self.next_tokens() != IGNORE).sum())

    @property
    def n_tokens(self) -> int:
        """Number of tokens, image features included."""
        return len(self.input_ids)

    def next_tokens(self) -> Tensor:
        """Return the target of each position, (T,): the label of the next position in the same sample."""
        targets = torch.full_like(self.labels, IGNORE)  # (T,)
        targets[:-1] = self.labels[1:]
        # The last position of a sample predicts nothing. Empty samples have none.
        ends = self.cu_seqlens[1:][self.cu_seqlens[1:] > self.cu_seqlens[:-1]] - 1  # (non-empty samples,)
        targets[ends.to(targets.device).long()] = IGNORE
        return targets


def collate(samples: Sequence[Sample]) -> Batch:
    """Pack samples in their order.

    Args:
        samples: conversations, with any number of images each.

    Returns:
        The batch, on the CPU.
    """
    lengths = torch.tensor([0, *(len(s.input_ids) for s in samples)])
    images = [image for s in samples for image in s.images]
    return Batch(
        torch.tensor([t for s in samples for t in s.input_ids], dtype=torch.int64),
        torch.tensor([t for s in samples for t in s.labels], dtype=torch.int64),
        lengths.cumsum(0).to(torch.int32),
        tuple(torch.cat(views) for views in zip(*(i.pixels for i in images), strict=True)),
        tuple((i.n_views, i.grid) for i in images),
    )


def image_positions(input_ids: Tensor) -> Tensor:
    """Return a mask (T,), True at the positions of image features."""
    return input_ids == IMAGE_TOKEN
