"""What a vision-language model is trained on in one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .prompt import IGNORE, IMAGE_TOKEN


@dataclass(frozen=True)
class Sample:
    """One conversation as tokens, with its images already prepared for each encoder."""

    input_ids: list[int]
    labels: list[int]
    images: tuple[Tensor, ...] = ()
    """One (3, height, width) for each vision encoder; none where the conversation is about no image."""


@dataclass(frozen=True)
class Batch:
    """Samples packed one after the other, without padding."""

    input_ids: Tensor
    """(T,) int64; `IMAGE_TOKEN` where a feature of an image stands."""
    labels: Tensor
    """(T,) int64; the token at that place where it is learned, else `IGNORE`."""
    cu_seqlens: Tensor
    """(S + 1,) int32 bounds of the samples."""
    images: tuple[Tensor, ...] = ()
    """For each vision encoder, (images, 3, height, width)."""

    def __post_init__(self) -> None:
        if self.input_ids.shape != self.labels.shape or self.input_ids.dim() != 1:
            shapes = tuple(self.input_ids.shape), tuple(self.labels.shape)
            raise ValueError(
                f"input_ids and labels must be equally long vectors, got shapes {shapes[0]} and {shapes[1]}"
            )

    def to(self, device: str | torch.device) -> Batch:
        """The batch on another device. The bounds stay on the CPU, where they are read."""
        moved = (t.to(device, non_blocking=True) for t in (self.input_ids, self.labels))
        return Batch(*moved, self.cu_seqlens, tuple(i.to(device, non_blocking=True) for i in self.images))

    @property
    def n_targets(self) -> int:
        """Tokens that are learned: those labelled, but for the first of a sample, which nothing predicts."""
        return int((self.next_tokens() != IGNORE).sum())

    @property
    def n_tokens(self) -> int:
        return len(self.input_ids)

    def next_tokens(self) -> Tensor:
        """(T,) what each place must predict: the label of the next place in its sample."""
        targets = torch.full_like(self.labels, IGNORE)
        targets[:-1] = self.labels[1:]
        ends = self.cu_seqlens[1:][self.cu_seqlens[1:] > self.cu_seqlens[:-1]] - 1
        targets[ends.to(targets.device).long()] = IGNORE
        return targets


def collate(samples: Sequence[Sample]) -> Batch:
    """Pack samples in their order."""
    lengths = torch.tensor([0, *(len(s.input_ids) for s in samples)])
    with_image = [s.images for s in samples if s.images]
    return Batch(
        torch.tensor([t for s in samples for t in s.input_ids], dtype=torch.int64),
        torch.tensor([t for s in samples for t in s.labels], dtype=torch.int64),
        lengths.cumsum(0).to(torch.int32),
        tuple(torch.stack(images) for images in zip(*with_image, strict=True)),
    )


def image_places(input_ids: Tensor) -> Tensor:
    """(T,) True where a feature of an image stands."""
    return input_ids == IMAGE_TOKEN
