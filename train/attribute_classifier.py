"""Training a tiny image encoder from nothing, since none of this size is published."""

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
    """Images with attributes by name, prepared once and kept."""

    def __init__(
        self,
        attributes: dict[Path, tuple[str, ...]],
        classes: Sequence[Sequence[str]],
        processor: ImageProcessor,
    ):
        self.pixels = torch.stack([processor(path) for path in attributes])
        rows = [[names.index(v) for names, v in zip(classes, a, strict=True)] for a in attributes.values()]
        self.labels = torch.tensor(rows)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pixels[index], self.labels[index]


def collate_moved(samples: Sequence[tuple[Tensor, Tensor]], by: int = 4) -> LabelledImages:
    """Stack images, half of them mirrored, and the whole batch moved by up to `by` pixels either way."""
    pixels = torch.stack([p for p, _ in samples])
    mirrored = torch.rand(len(pixels)) < 0.5
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
    top, left = torch.randint(0, 2 * by + 1, (2,)).tolist()
    height, width = pixels.shape[2:]
    pixels = F.pad(pixels, (by,) * 4, mode="replicate")[:, :, top : top + height, left : left + width]
    return LabelledImages(pixels, torch.stack([labels for _, labels in samples]))


class ClassifierOutput(NamedTuple):
    loss: Tensor
    n_targets: int


class AttributeClassifier(nn.Module):
    """An encoder under a linear classifier of several attributes."""

    def __init__(self, config: ViTConfig, n_classes: Sequence[int]):
        super().__init__()
        self.encoder = ViT(config)
        self.head = nn.Linear(config.width, sum(n_classes))
        self.n_classes = list(n_classes)

    def forward(self, batch: LabelledImages) -> ClassifierOutput:
        logits = self.classify(batch.pixels)
        losses = [F.cross_entropy(a, batch.labels[:, i]) for i, a in enumerate(logits)]
        return ClassifierOutput(torch.stack(losses).mean(), batch.n_targets)

    def classify(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Logits of each attribute."""
        return self.head(self.encoder(pixels).flatten(1, 2).mean(1)).split(self.n_classes, dim=-1)

    @torch.no_grad()
    def accuracy(self, images: AttributeImages) -> float:
        """Share of images of which every attribute is right."""
        self.eval()
        right = [a.argmax(-1) == images.labels[:, i] for i, a in enumerate(self.classify(images.pixels))]
        return torch.stack(right).all(0).float().mean().item()
