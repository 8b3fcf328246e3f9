"""What a model is, as plain values. Everything here is saved as `config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from ..connectors import ConnectorConfig
from .fields import Interval, Size, check_fields
from .image import ImageProcessor
from .prompt import get_template
from .vit import ViTConfig


@dataclass(frozen=True)
class LMConfig:
    """A Mamba or Mamba-2 language model. `mamba_130m` and its siblings below are the published sizes."""

    d_model: Size = 768
    n_layer: Annotated[int, Interval("[1, 4096]")] = 24
    vocab_size: Annotated[int, Interval("[1, 16777216]")] = 50277
    layer: Literal["mamba", "mamba2"] = "mamba"
    d_state: Size = 16
    d_conv: Size = 4
    expand: Size = 2
    dt_rank: Size | None = None
    """Mamba-1; None is ceil(d_model / 16)."""
    headdim: Size = 64
    """Mamba-2, as `ngroups`, `chunk_size` and `dt_limit`."""
    ngroups: Size = 1
    chunk_size: Size = 64
    dt_limit: tuple[Annotated[float, Interval("[0, inf]")], Annotated[float, Interval("[0, inf]")]] = (0.0, math.inf)
    bias: bool = False
    """Of the in and out projections."""
    conv_bias: bool = True
    norm_eps: Annotated[float, Interval("[0, inf)")] = 1e-5
    dt_bc_norm_eps: Annotated[float, Interval("[0, inf)")] | None = None
    """Mamba-1: divide dt, B and C by their root mean square, as Falcon-Mamba does; None does not."""
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    pad_vocab_size_multiple: Size = 8

    def __post_init__(self) -> None:
        check_fields(self)
        low, high = self.dt_limit
        if low > high:
            raise ValueError(f"dt_limit must be a lower and an upper bound, got {self.dt_limit}")
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
        check_fields(self)
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
        check_fields(self)
        get_template(self.template)
        grids = {(v.encoder.grid_size, v.encoder.grid_size) for v in self.vision}
        if len(grids) != 1:
            raise ValueError(f"all vision encoders must give the same grid of patches, got {sorted(grids)}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of an image, vertically and horizontally."""
        size = self.vision[0].encoder.grid_size
        return size, size
