"""What a model is, as plain values. Everything here is saved as `config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ..connectors import ConnectorConfig
from .image import ImageProcessor
from .vit import ViTConfig


@dataclass(frozen=True)
class LMConfig:
    """A Mamba or Mamba-2 language model. `mamba_130m` and its siblings below are the published sizes."""

    d_model: int = 768
    n_layer: int = 24
    vocab_size: int = 50277
    layer: Literal["mamba", "mamba2"] = "mamba"
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None
    """Mamba-1; None is ceil(d_model / 16)."""
    headdim: int = 64
    """Mamba-2, as `ngroups`, `chunk_size` and `dt_limit`."""
    ngroups: int = 1
    chunk_size: int = 64
    dt_limit: tuple[float, float] = (0.0, math.inf)
    bias: bool = False
    """Of the in and out projections."""
    conv_bias: bool = True
    norm_eps: float = 1e-5
    dt_bc_norm_eps: float | None = None
    """Mamba-1: divide dt, B and C by their root mean square, as Falcon-Mamba does; None does not."""
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 8

    def __post_init__(self) -> None:
        if self.layer not in ("mamba", "mamba2"):
            raise ValueError(f"layer must be 'mamba' or 'mamba2', got {self.layer!r}")
        sizes = ("d_model", "n_layer", "vocab_size", "d_state", "d_conv", "expand", "headdim", "ngroups", "chunk_size")
        for name in (*sizes, "pad_vocab_size_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.layer == "mamba2" and self.dt_bc_norm_eps is not None:
            raise ValueError(f"dt_bc_norm_eps is of Mamba-1 layers alone, got {self.dt_bc_norm_eps} for 'mamba2'")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple


@dataclass(frozen=True)
class VisionConfig:
    """An image encoder and the preprocessing that it expects."""

    encoder: ViTConfig = field(default_factory=ViTConfig)
    processor: ImageProcessor = field(default_factory=ImageProcessor)

    def __post_init__(self) -> None:
        if self.processor.size != self.encoder.image_size:
            raise ValueError(
                f"processor.size must be the encoder's image_size {self.encoder.image_size}, got {self.processor.size}"
            )


@dataclass(frozen=True)
class VLMConfig:
    """A vision-language model: encoders whose features are concatenated, a connector, a language model."""

    language: LMConfig = field(default_factory=LMConfig)
    vision: tuple[VisionConfig, ...] = field(default_factory=lambda: (VisionConfig(),))
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    template: str = "vicuna"
    """Name of the prompt template in `model.prompt`."""

    def __post_init__(self) -> None:
        grids = {(v.encoder.grid_size, v.encoder.grid_size) for v in self.vision}
        if len(grids) != 1:
            raise ValueError(f"all vision encoders must give the same grid of patches, got {sorted(grids)}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of an image, vertically and horizontally."""
        size = self.vision[0].encoder.grid_size
        return size, size
