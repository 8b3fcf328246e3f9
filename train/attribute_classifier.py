"""Attribute classification, which trains a tiny image encoder from scratch: none of this size is published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.config import ViTConfig
from ..model.image import ImageProcessor
from ..model.vit import ViT


@dataclass(frozen=True)
class LabelledImages:
    """A batch of images with a class for each of several attributes."""

    pixels: Tensor
    """(B, 3, height, width)"""
    labels: Tensor
    """(B, attributes)"""

    def to(self, device: str | torch.device) -> LabelledImages:
        return LabelledImages(self.pixels.to(device), self.labels.to(device))

    @property
    def n_targets(self) -> int:
        return self.labels.numel()

    @property
    def n_tokens(self) -> int:
        return len(self.pixels)


class AttributeImages:
    """Training set of images with named attributes, processed once and held in memory.

    Args:
        attributes: image file -> its value of each attribute.
        classes: possible values of each attribute.
        processor: image processor of the encoder.
    """

    def __init__(
        self,
        attributes: dict[Path, tuple[str, ...]],
        classes: Sequence[Sequence[str]],
        processor: ImageProcessor,
    ):
        self.pixels = torch.stack([processor(path) for path in attributes])  # (N, 3, height, width)
        # A value's index among the classes of its attribute.
        rows = [[names.index(v) for names, v in zip(classes, a, strict=True)] for a in attributes.values()]
        self.labels = torch.tensor(rows)  # (N, attributes)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pixels[index], self.labels[index]


def collate_augmented(samples: Sequence[tuple[Tensor, Tensor]], max_shift: int = 4) -> LabelledImages:
    """Stack images, flip each with probability 1/2, and shift the batch by up to `max_shift` pixels along each axis."""
    pixels = torch.stack([p for p, _ in samples])  # (B, 3, height, width)
    mirrored = torch.rand(len(pixels)) < 0.5
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
    # One shift for the batch: padding and cropping are two operations for all of its images.
    top, left = torch.randint(0, 2 * max_shift + 1, (2,)).tolist()
    height, width = pixels.shape[2:]
    pixels = F.pad(pixels, (max_shift,) * 4, mode="replicate")[:, :, top : top + height, left : left + width]
    return LabelledImages(pixels, torch.stack([labels for _, labels in samples]))


class ClassifierOutput(NamedTuple):
    loss: Tensor
    n_targets: int


class AttributeClassifier(nn.Module):
    """An encoder with a linear classifier of several attributes on the feature of each patch.

    Each patch has to tell the attributes of the entire image: a language model reads the patches one after the other.
    """

    def __init__(self, config: ViTConfig, n_classes: Sequence[int]):
        super().__init__()
        self.encoder = ViT(config)
        self.head = nn.Linear(config.width, sum(n_classes))
        self.n_classes = list(n_classes)

    def forward(self, batch: LabelledImages) -> ClassifierOutput:
        losses = []
        for i, logits in enumerate(self.classify(batch.pixels)):
            labels = batch.labels[:, i, None].expand(-1, logits.shape[1])  # (B, patches)
            losses.append(F.cross_entropy(logits.mT, labels))
        # Equal weight for each attribute, whatever its number of classes.
        return ClassifierOutput(torch.stack(losses).mean(), batch.n_targets)

    def classify(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Logits of each attribute at each patch, (B, patches, classes) each."""
        features = self.encoder(pixels).flatten(1, 2)  # (B, patches, width)
        return self.head(features).split(self.n_classes, dim=-1)

    @torch.no_grad()
    def accuracy(self, images: AttributeImages) -> float:
        """Fraction of images with every attribute correct, by the mean of the patches' logits."""
        self.eval()
        correct = [a.mean(1).argmax(-1) == images.labels[:, i] for i, a in enumerate(self.classify(images.pixels))]
        return torch.stack(correct).all(0).float().mean().item()
