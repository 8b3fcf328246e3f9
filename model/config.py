"""Architecture configs as plain values: the contents of `config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from ..connectors import ConnectorConfig
from .fields import Interval, Size, check_fields
from .image import ImageProcessor
from .prompt import get_template

Layer = Literal["mamba", "mamba2", "mamba3"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]


@dataclass(frozen=True)
class LMConfig:
    """A Mamba, Mamba-2 or Mamba-3 language model. The published sizes are in `formats.language.PUBLISHED`."""

    d_model: Size = 768
    n_layer: Annotated[int, Interval("[1, 4096]")] = 24
    vocab_size: Annotated[int, Interval("[1, 16777216]")] = 50277
    layer: Layer = "mamba"
    d_state: Size = 16
    """State size N."""
    d_conv: Size = 4
    """Taps K of the convolution; Mamba-3 has none."""
    expand: Size = 2
    """Inner width divided by `d_model`."""
    dt_rank: Size | None = None
    """R, Mamba-1 only; None is ceil(d_model / 16)."""
    headdim: Size = 64
    """Channels P of a head. Not in Mamba-1, like `ngroups` and `chunk_size`; `dt_limit` is for Mamba-2 only."""
    ngroups: Size = 1
    chunk_size: Size = 64
    dt_limit: tuple[Annotated[float, Interval("[0, inf]")], Annotated[float, Interval("[0, inf]")]] = (0.0, math.inf)
    bias: bool = False
    """Biases in `in_proj` and `out_proj`."""
    conv_bias: bool = True
    norm_eps: Annotated[float, Interval("[0, inf)")] = 1e-5
    dt_bc_norm_eps: Annotated[float, Interval("[0, inf)")] | None = None
    """Epsilon of the RMS norm of dt, B and C before the scan (Falcon-Mamba, Mamba-1 only); None is no norm."""
    rope_fraction: Annotated[float, Interval("[0.5, 1]")] = 0.5
    """Share of a state's entries that rotate, 0.5 or 1. Mamba-3 only, like the next three."""
    A_floor: Annotated[float, Interval("[0, inf)")] = 1e-4
    is_outproj_norm: bool = False
    mimo_rank: Size | None = None
    """R, inputs and outputs of a head; None is SISO."""
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    pad_vocab_size_multiple: Size = 8

    def __post_init__(self) -> None:
        check_fields(self)
        # Relations between fields; the annotations check each by itself.
        low, high = self.dt_limit
        if low > high:
            raise ValueError(f"dt_limit must be a lower and an upper bound, got {self.dt_limit}")
        if self.layer != "mamba" and self.dt_bc_norm_eps is not None:
            raise ValueError(f"dt_bc_norm_eps is for Mamba-1 layers only, got {self.dt_bc_norm_eps} for {self.layer!r}")
        if self.rope_fraction not in (0.5, 1.0):
            raise ValueError(f"rope_fraction must be 0.5 or 1, got {self.rope_fraction}")
        if self.layer == "mamba3" and self.bias:
            raise ValueError("bias must be False for 'mamba3', whose projections have none")
        if self.layer != "mamba3" and self.mimo_rank is not None:
            raise ValueError(f"mimo_rank is for Mamba-3 layers only, got {self.mimo_rank} for {self.layer!r}")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple


@dataclass(frozen=True)
class ViTConfig:
    """A vision transformer. The constants below are the published sizes."""

    image_size: Size = 224
    """Side of the images that the position table is for, in pixels."""
    patch_size: Size = 14
    width: Size = 768
    depth: Annotated[int, Interval("[1, 4096]")] = 12
    heads: Size = 12
    mlp_width: Size = 3072
    activation: Activation = "gelu"
    norm_eps: Annotated[float, Interval("[0, inf)")] = 1e-6
    class_token: bool = False
    register_tokens: Annotated[int, Interval("[0, 1048576]")] = 0
    position_of_class: bool = False
    """Whether the first row of the position table is for the class token."""
    pre_norm: bool = False
    """LayerNorm before the first block (CLIP)."""
    patch_bias: bool = True
    layer_scale: bool = False
    feature_layer: int = -2
    """Block whose output is the feature: -2 is the second to last; -1 the last, with the final norm applied."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.position_of_class and not self.class_token:
            raise ValueError("position_of_class must be False where class_token is")
        if self.width % self.heads:
            raise ValueError(f"heads must divide width = {self.width}, got {self.heads}")
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size must be at least patch_size = {self.patch_size}, got {self.image_size}")
        if not -self.depth <= self.feature_layer <= -1:
            raise ValueError(f"feature_layer must be in [-{self.depth}, -1], got {self.feature_layer}")

    @property
    def grid_size(self) -> int:
        """Patches along a side. Pixels beyond them, at the right and bottom edge, are ignored."""
        return self.image_size // self.patch_size


CLIP_L_336 = ViTConfig(
    336, 14, 1024, 24, 16, 4096, "quick_gelu", 1e-5,
    class_token=True, position_of_class=True, pre_norm=True, patch_bias=False,
)  # fmt: skip
SIGLIP_SO400M_384 = ViTConfig(384, 14, 1152, 27, 16, 4304)
DINOV2_L_REG_384 = ViTConfig(
    384, 14, 1024, 24, 16, 4096, class_token=True, register_tokens=4, layer_scale=True
)  # fmt: skip


@dataclass(frozen=True)
class VisionConfig:
    """A vision encoder and its preprocessing."""

    encoder: ViTConfig = field(default_factory=ViTConfig)
    processor: ImageProcessor = field(default_factory=ImageProcessor)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.processor.size != self.encoder.image_size:
            raise ValueError(
                f"processor.size must be the encoder's image_size {self.encoder.image_size}, got {self.processor.size}"
            )


@dataclass(frozen=True)
class TilesConfig:
    """Tiles of an image at a higher resolution (LLaVA-NeXT): after a view of the whole image, a grid of views."""

    grids: tuple[tuple[Annotated[int, Interval("[1, 64]")], Annotated[int, Interval("[1, 64]")]], ...] = (
        (1, 2), (2, 1), (2, 2), (3, 1), (1, 3),
    )  # fmt: skip
    """Grids to choose from for each image, as rows and columns of tiles: LLaVA-NeXT's `image_grid_pinpoints`, divided
    by the encoder's side. The one is taken that keeps most of the image's pixels, and wastes fewest."""
    merge: Literal["spatial", "spatial_unpad"] = "spatial"
    """`spatial` joins the rows of patches over all tiles. `spatial_unpad` leaves out those of the border, and ends each
    row with a trained vector, `image_newline`; an image without tiles ends with one."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.grids:
            raise ValueError("grids must have at least one grid (rows, columns), got none")

    @property
    def unpads(self) -> bool:
        """Whether border is left out and rows end with `image_newline`."""
        return self.merge == "spatial_unpad"


@dataclass(frozen=True)
class VLMConfig:
    """A vision-language model: encoders whose features are concatenated, a connector, a language model."""

    language: LMConfig = field(default_factory=LMConfig)
    vision: tuple[VisionConfig, ...] = field(default_factory=lambda: (VisionConfig(),))
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    template: str = "vicuna"
    """Name of the prompt template in `model.prompt`."""
    tiles: TilesConfig | None = None
    """Tiles of each image; None is one view of it."""
    max_frames: Size = 8
    """Most frames that are sampled of a video."""

    def __post_init__(self) -> None:
        check_fields(self)
        get_template(self.template)
        # Features of the same patch are concatenated.
        grids = {(v.encoder.grid_size, v.encoder.grid_size) for v in self.vision}
        if len(grids) != 1:
            raise ValueError(f"all vision encoders must give the same grid of patches, got {sorted(grids)}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of an image: (rows, columns)."""
        size = self.vision[0].encoder.grid_size
        return size, size
