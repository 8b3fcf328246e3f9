"""The vision transformer of CLIP (2103.00020), SigLIP (2303.15343) and DINOv2 with registers (2309.16588).

One class covers the three, with the parameter names of `timm`. Letters: B batch, T tokens (prefix and patches),
D width, h and w the grid of patches.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import VisionConfig, ViTConfig
from .config_io import save_config
from .formats.vision import VISION_ENCODERS, open_encoder
from .hub import PROCESSOR, HubModel, fetch_model
from .image import ImageProcessor
from .position_table import resample_positions
from .quantize import Quantization, check_devices, check_quantization
from .weights import DeviceMap, load_into


class ViT(HubModel, library_name="vl-mamba", pipeline_tag="image-feature-extraction"):
    """Vision transformer: images to a grid of patch features, without class and register tokens.

    Args:
        config: architecture.
    """

    config_class = ViTConfig

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.processor: ImageProcessor | None = None
        """Preprocessing that the encoder expects; set by `from_pretrained`."""
        prefix = config.position_of_class + config.grid_size**2
        self.patch_embed = _PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width)) if config.class_token else None
        self.reg_token = (
            nn.Parameter(torch.zeros(1, config.register_tokens, config.width)) if config.register_tokens else None
        )
        self.pos_embed = nn.Parameter(torch.randn(1, prefix, config.width) * 0.02)
        self.norm_pre = nn.LayerNorm(config.width, config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        for p in (self.cls_token, self.reg_token):
            if p is not None:
                nn.init.normal_(p, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode images.

        For another size than `image_size`, the position table is resampled (bicubic, antialiased, as in timm).

        Args:
            pixels: (B, 3, height, width), normalized.

        Returns:
            (B, h, w, D).

        Raises:
            ValueError: not a batch of RGB images, or one smaller than a patch.
        """
        if pixels.dim() != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels must have shape (B, 3, height, width), got {tuple(pixels.shape)}")
        size = self.config.patch_size
        if min(pixels.shape[2:]) < size:
            raise ValueError(f"pixels must be at least {size} high and wide, got {tuple(pixels.shape[2:])}")
        h, w = pixels.shape[2] // size, pixels.shape[3] // size
        x = self.patch_embed(pixels)  # (B, h * w, D)

        class_position, positions = self._positions(h, w, x.dtype)
        x = x + positions  # (B, h * w, D)
        prefix = []  # class and register tokens, (1, n, D) each
        if self.cls_token is not None:
            prefix.append(self.cls_token if class_position is None else self.cls_token + class_position)
        if self.reg_token is not None:
            prefix.append(self.reg_token)
        n_prefix = sum(p.shape[1] for p in prefix)
        x = torch.cat([*(p.expand(len(x), -1, -1) for p in prefix), x], dim=1)  # (B, T, D)

        x = self.norm_pre(x)
        for block in self.blocks[: self.config.depth + 1 + self.config.feature_layer]:
            x = block(x)  # (B, T, D)
        if self.config.feature_layer == -1:
            x = self.norm(x)
        return x[:, n_prefix:].unflatten(1, (h, w))  # (B, h, w, D)

    def _positions(self, h: int, w: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
        """Return the position of the class token (1, 1, D), if the table has one, and those of the patches."""
        table = self.pos_embed
        n = int(self.config.position_of_class)
        class_position, grid = (table[:, :n] if n else None), table[:, n:]
        side = self.config.grid_size
        return class_position, resample_positions(grid, (side, side), (h, w)).to(dtype)  # (1, h * w, D)

    def quantizable(self) -> dict[str, int]:
        return {n: 4 for n, m in self.named_modules() if n.startswith("blocks.") and isinstance(m, nn.Linear)}

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        config: VisionConfig | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        device_map: DeviceMap = "cpu",
        quantize: Quantization | None = None,
    ) -> ViT:
        """Load a published encoder and its `processor`, ready for inference.

        >>> vit = ViT.from_pretrained("vit_so400m_patch14_siglip_384")  # doctest: +SKIP
        >>> vit(vit.processor("picture.png")[None]).shape  # doctest: +SKIP
        torch.Size([1, 27, 27, 1152])

        Args:
            name_or_path: a name in `formats.vision.VISION_ENCODERS`; or a repository or folder with a CLIP, SigLIP or
                DINOv2 encoder by `transformers` or `timm`, or one that `save_pretrained` wrote.
            config: architecture and preprocessing; by default those of `VISION_ENCODERS`, or of the files. For
                another `image_size` than the file's, the position table is resampled.
            revision, cache_dir, token, force_download, local_files_only, dtype, device_map, quantize: as for every
                model; see `HubModel.from_pretrained`.

        Returns:
            The encoder, in evaluation mode.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: it cannot be found, read or reached.
            ValueError: a file is damaged or incomplete, or the encoder is not a known one.
        """
        known = VISION_ENCODERS.get(str(name_or_path))
        if known is not None and not Path(name_or_path).is_dir():
            name_or_path, config = known.repo, config or known.config
        check_quantization(quantize)
        folder = fetch_model(
            name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        config, weights = open_encoder(folder, config)
        with torch.device("meta"):
            vit = cls(config.encoder)
        weights = vit.make_quantized(weights, quantize, str(folder))
        check_devices(vit, device_map)
        load_into(vit, weights, str(folder), dtype, device_map)
        vit.processor = config.processor
        return vit.eval()

    def save_extras(self, folder: Path) -> None:
        if self.processor is not None:
            save_config(self.processor, folder / PROCESSOR)


class _PatchEmbed(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(3, config.width, size, stride=size, bias=config.patch_bias)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).mT  # (B, h * w, D)


class _Block(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.attn = _Attention(config.width, config.heads)
        self.ls1 = _LayerScale(config.width) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = _MLP(config)
        self.ls2 = _LayerScale(config.width) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))  # (B, T, D)
        return x + self.ls2(self.mlp(self.norm2(x)))  # (B, T, D)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, D / heads)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, T, D)
        return self.proj(y)


class _MLP(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)  # (B, T, MLP width)
        if self.activation == "quick_gelu":
            x = x * torch.sigmoid(1.702 * x)
        else:
            x = F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.fc2(x)  # (B, T, D)


class _LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
