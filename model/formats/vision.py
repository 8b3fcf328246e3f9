"""Vision encoders as `transformers` and `timm` publish them: CLIP, SigLIP and DINOv2.

A checkpoint is read in two steps: its small files become a `VisionConfig`, and its weights get the names of `ViT`,
which are those of `timm`. Neither library is needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import CLIP_L_336, DINOV2_L_REG_384, SIGLIP_SO400M_384, Activation, VisionConfig, ViTConfig
from ..config_io import load_config
from ..hub import PROCESSOR
from ..image import ImageProcessor
from ..position_table import resample_positions
from ..weights import LazyTensor, Weights, open_weights
from . import detect_format, parsing, read_json
from .settings import REQUIRED, Settings, Table

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PublishedEncoder:
    """Repository of an encoder on the Hub, and its config."""

    repo: str
    config: VisionConfig


_CLIP = VisionConfig(CLIP_L_336, ImageProcessor(336, "crop", CLIP_MEAN, CLIP_STD))
_SIGLIP = VisionConfig(SIGLIP_SO400M_384, ImageProcessor(384))
_DINOV2 = VisionConfig(DINOV2_L_REG_384, ImageProcessor(384, "naive", IMAGENET_MEAN, IMAGENET_STD))

VISION_ENCODERS = {
    "vit_large_patch14_clip_336.openai": PublishedEncoder("timm/vit_large_patch14_clip_336.openai", _CLIP),
    "vit_so400m_patch14_siglip_384": PublishedEncoder("timm/vit_so400m_patch14_siglip_384.webli", _SIGLIP),
    "vit_large_patch14_reg4_dinov2.lvd142m": PublishedEncoder("timm/vit_large_patch14_reg4_dinov2.lvd142m", _DINOV2),
    "openai/clip-vit-large-patch14-336": PublishedEncoder(
        "openai/clip-vit-large-patch14-336", replace(_CLIP, processor=replace(_CLIP.processor, resize="crop-floor"))
    ),
    "google/siglip-so400m-patch14-384": PublishedEncoder("google/siglip-so400m-patch14-384", _SIGLIP),
    "facebook/dinov2-with-registers-large": PublishedEncoder("facebook/dinov2-with-registers-large", _DINOV2),
}
"""The papers' encoders by their published names, configured as in Cobra and ML-Mamba, whichever file the weights are
from: SigLIP with the exact GELU of `timm` (its `transformers` config has tanh), and DINOv2 at 384 pixels (its files
have 518, and 224 after preprocessing). CLIP is as OpenAI published it, with quick GELU."""


def open_encoder(folder: str | Path, config: VisionConfig | None = None) -> tuple[VisionConfig, Weights]:
    """Open an encoder on disk.

    Args:
        folder: with a config and weights.
        config: architecture and preprocessing; by default those of its files.

    Returns:
        The config, and the weights under the names of `ViT`, unread.

    Raises:
        FileNotFoundError, ValueError: see `read_vision_config`, `open_weights` and `vision_weights`.
    """
    config = config or read_vision_config(folder)
    return config, vision_weights(open_weights(folder), config.encoder)


def read_vision_config(folder: str | Path) -> VisionConfig:
    """Read architecture and preprocessing from the small files of a checkpoint.

    The encoder's `image_size` is that of the preprocessing: DINOv2 of `transformers` has 224 pixels, with a position
    table for 518.

    Args:
        folder: of the checkpoint.

    Returns:
        The config.

    Raises:
        FileNotFoundError: there is no config.
        ValueError: it is not of a CLIP, SigLIP or DINOv2 encoder, or needs what `ViT` or `ImageProcessor` lack.
    """
    folder = Path(folder)
    kind = detect_format(folder)
    if kind in ("transformers", "timm"):
        with parsing(folder):
            return _read_transformers(folder) if kind == "transformers" else _read_timm(folder)
    if kind == "own":
        # Written by ViT.save_pretrained, with or without preprocessing.
        encoder = load_config(ViTConfig, folder / "config.json")
        processor = folder / PROCESSOR
        if processor.exists():
            return VisionConfig(encoder, load_config(ImageProcessor, processor))
        return VisionConfig(encoder, ImageProcessor(encoder.image_size))
    raise ValueError(f"{folder / 'config.json'} is of the format {kind!r}, which has no vision encoder alone")


# -- transformers ------------------------------------------------------------------------------------------------------

MODEL_TYPES = {
    "clip": "clip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2_with_registers",
}
"""Architectures by `model_type`."""

# ours: (theirs, default). Files leave out what equals the defaults of the configuration classes. A side may be a pair.
_TRANSFORMERS: Table = {
    "image_size": ("image_size", (224, 224)),
    "width": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
}
_TRANSFORMERS_DINOV2: Table = {
    **_TRANSFORMERS,
    "patch_size": ("patch_size", (14, 14)),
    "mlp_ratio": ("mlp_ratio", 4.0),
    "activation": ("hidden_act", "gelu"),
    "norm_eps": ("layer_norm_eps", 1e-6),
}
TRANSFORMERS: dict[str, Table] = {
    "clip": {
        **_TRANSFORMERS,
        "patch_size": ("patch_size", (32, 32)),
        "mlp_width": ("intermediate_size", 3072),
        "activation": ("hidden_act", "quick_gelu"),
        "norm_eps": ("layer_norm_eps", 1e-5),
    },
    "siglip": {
        **_TRANSFORMERS,
        "patch_size": ("patch_size", (16, 16)),
        "mlp_width": ("intermediate_size", 3072),
        "activation": ("hidden_act", "gelu_pytorch_tanh"),
        "norm_eps": ("layer_norm_eps", 1e-6),
    },
    "dinov2": _TRANSFORMERS_DINOV2,
    "dinov2_with_registers": {
        **_TRANSFORMERS_DINOV2,
        "patch_size": ("patch_size", (16, 16)),
        "register_tokens": ("num_register_tokens", 4),
    },
}
"""Keys by architecture."""
TRANSFORMERS_ALWAYS: dict[str, dict[str, Any]] = {
    "clip": {"class_token": True, "position_of_class": True, "pre_norm": True, "patch_bias": False},
    "siglip": {},
    "dinov2": {"class_token": True, "position_of_class": True, "layer_scale": True},
    "dinov2_with_registers": {"class_token": True, "layer_scale": True},
}
"""Fields that an architecture determines, so that files have no key for them, where they differ from `ViTConfig`."""
_TRANSFORMERS_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

# ours: (theirs, default). Defaults are those of the processor classes.
_CROPPED: Table = {
    "size": ("size", {"shortest_edge": 224}),
    "crop_size": ("crop_size", {"height": 224, "width": 224}),
    "do_center_crop": ("do_center_crop", True),
    "mean": ("image_mean", CLIP_MEAN),
    "std": ("image_std", CLIP_STD),
}
TRANSFORMERS_PROCESSORS: dict[str, Table] = {
    "clip": _CROPPED,
    "siglip": {
        "size": ("size", {"height": 224, "width": 224}),
        "crop_size": ("crop_size", None),
        "do_center_crop": ("do_center_crop", False),
        "mean": ("image_mean", (0.5,) * 3),
        "std": ("image_std", (0.5,) * 3),
    },
    "dinov2": _CROPPED,
    "dinov2_with_registers": _CROPPED,
}


def _read_transformers(folder: Path) -> VisionConfig:
    path = folder / "config.json"
    data = read_json(path)
    model_type = data["model_type"]
    # A list, since the value in a damaged file may not be hashable.
    if model_type not in list(MODEL_TYPES):
        raise ValueError(
            f"{path} has model_type {model_type!r}; of vision encoders, known are {', '.join(map(repr, MODEL_TYPES))}"
        )
    architecture = MODEL_TYPES[model_type]
    if model_type in ("clip", "siglip"):  # with a text tower; old CLIP files have the settings twice
        data = data.get("vision_config_dict") or data.get("vision_config") or {}
    settings = Settings(data, str(path))
    for key, supported in (("num_channels", 3), ("use_swiglu_ffn", False), ("qkv_bias", True)):
        settings.require(key, supported)
    values = settings.take_table(TRANSFORMERS[architecture])
    values = _decoded(values, TRANSFORMERS[architecture], _TRANSFORMERS_ACTIVATIONS, path)
    encoder = ViTConfig(**values, **TRANSFORMERS_ALWAYS[architecture])
    processor = _read_transformers_processor(folder, architecture, encoder.image_size)
    return VisionConfig(replace(encoder, image_size=processor.size), processor)


def _read_transformers_processor(folder: Path, architecture: str, image_size: int) -> ImageProcessor:
    data = None
    path = folder / "preprocessor_config.json"
    if path.exists():
        data = read_json(path)
    elif (folder / "processor_config.json").exists():
        path = folder / "processor_config.json"
        data = read_json(path).get("image_processor")
    # No preprocessing file: that of the published models.
    if data is None:
        if architecture == "siglip":
            return ImageProcessor(image_size)
        mean, std = (CLIP_MEAN, CLIP_STD) if architecture == "clip" else (IMAGENET_MEAN, IMAGENET_STD)
        return ImageProcessor(image_size, "crop-floor", mean, std)
    # Null is the default, as in the processor classes.
    settings = Settings({key: value for key, value in data.items() if value is not None}, str(path))
    for key, supported in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("do_pad", False)):
        settings.require(key, supported)
    settings.require("resample", 3)  # bicubic
    factor = settings.take("rescale_factor", 1 / 255)
    if not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ValueError(f"{path}: rescale_factor must be 1/255, got {factor}")
    values = settings.take_table(TRANSFORMERS_PROCESSORS[architecture])

    size, mean, std = values["size"], _three(values["mean"]), _three(values["std"])
    # A shortest edge is resized to; with height and width, the aspect ratio is ignored.
    if isinstance(size, Mapping) and size.keys() == {"shortest_edge"}:
        size = size["shortest_edge"]
    if values["do_center_crop"]:
        if not isinstance(size, int):
            raise ValueError(f"{path}: size before a center crop must be the shortest edge's, got {size}")
        side = _square(values["crop_size"], "crop_size", path)
        return ImageProcessor(side, "crop-floor", mean, std, resize_to=None if size == side else size)
    if isinstance(size, int) and architecture != "siglip":
        raise ValueError(f"{path}: size = {values['size']} without a center crop gives images that are not square")
    return ImageProcessor(_square(size, "size", path), "naive", mean, std)


def _decoded(values: dict[str, Any], table: Table, activations: Mapping[str, Activation], path: Path) -> dict[str, Any]:
    """Convert what files write differently: sides of squares, the MLP's width as a ratio, names of activations."""
    values = dict(values)
    for name in {"image_size", "patch_size"} & values.keys():
        values[name] = _square(values[name], table[name][0], path)
    if "mlp_ratio" in values:
        values["mlp_width"] = int(values["width"] * values.pop("mlp_ratio"))
    key, activation = table["activation"][0], values["activation"]
    # A list, as above.
    if activation not in list(activations):
        raise ValueError(f"{path}: {key} must be one of {', '.join(map(repr, activations))}; got {activation!r}")
    values["activation"] = activations[activation]
    return values


def _three(values: Iterable[float]) -> tuple[float, float, float]:
    """Return one number per color channel."""
    channels = tuple(values)
    if len(channels) != 3:
        raise ValueError(f"mean and std must have 3 entries, got {channels}")
    return channels


def _square(size: Any, name: str, path: Path) -> int:
    """Return the side of a square that is given as a number, a pair, or height and width by name."""
    sides = [size]
    if isinstance(size, Mapping):
        sides = [size.get("height"), size.get("width")]
    elif isinstance(size, list | tuple):
        sides = list(size)
    if not sides or len(set(sides)) != 1 or not isinstance(sides[0], int):
        raise ValueError(f"{path}: {name} must be a square's, got {size}")
    return sides[0]


# -- timm --------------------------------------------------------------------------------------------------------------

# ours: (theirs, default). Defaults are those of timm's `VisionTransformer`, `norm_eps` that of its norm layer.
TIMM: Table = {
    "patch_size": ("patch_size", REQUIRED),
    "width": ("embed_dim", REQUIRED),
    "depth": ("depth", REQUIRED),
    "heads": ("num_heads", REQUIRED),
    "mlp_ratio": ("mlp_ratio", 4.0),
    "activation": ("act_layer", "gelu"),
    "norm_eps": ("norm_eps", 1e-6),
    "class_token": ("class_token", True),
    "register_tokens": ("reg_tokens", 0),
    "pre_norm": ("pre_norm", False),
    # None or 0 is no layer scale.
    "layer_scale": ("init_values", None),
    # Whether class and register tokens have no position.
    "no_embed_class": ("no_embed_class", False),
}
TIMM_ALWAYS = {"in_chans": 3, "qkv_bias": True, "proj_bias": True, "final_norm": True, "qk_norm": False}
"""Arguments with only one supported value."""
# Arguments that do not change the features in evaluation mode.
_TIMM_IGNORED = re.compile(
    r"num_classes|global_pool|fc_norm|dynamic_img_size|strict_img_size|weight_init|\w+_drop_rate"
)
_TIMM_CLIP = {"patch_size": 14, "embed_dim": 1024, "depth": 24, "num_heads": 16, "pre_norm": True, "norm_eps": 1e-5}
_TIMM_DINOV2 = {"patch_size": 14, "embed_dim": 1024, "depth": 24, "num_heads": 16, "init_values": 1e-5}
TIMM_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit_large_patch14_clip_336": _TIMM_CLIP,
    "vit_large_patch14_clip_quickgelu_336": {**_TIMM_CLIP, "act_layer": "quick_gelu"},
    "vit_so400m_patch14_siglip_384": {
        **{"patch_size": 14, "embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362},
        "class_token": False,
    },
    "vit_large_patch14_dinov2": _TIMM_DINOV2,
    "vit_large_patch14_reg4_dinov2": {**_TIMM_DINOV2, "reg_tokens": 4, "no_embed_class": True},
}
"""Arguments of each architecture, which a file's `model_args` change."""
_TIMM_ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_tanh"}
# Defaults are those of timm's data configs.
TIMM_PROCESSOR: Table = {
    "input_size": ("input_size", (3, 224, 224)),
    "interpolation": ("interpolation", "bicubic"),
    "crop_mode": ("crop_mode", "center"),
    "crop_pct": ("crop_pct", 0.875),
    "mean": ("mean", IMAGENET_MEAN),
    "std": ("std", IMAGENET_STD),
}


def _read_timm(folder: Path) -> VisionConfig:
    path = folder / "config.json"
    data = read_json(path)
    pretrained = data.get("pretrained_cfg", data)
    architecture = data["architecture"]
    if architecture not in TIMM_ARCHITECTURES:
        raise ValueError(f"{path} has architecture {architecture!r}; known are {', '.join(TIMM_ARCHITECTURES)}")
    args = TIMM_ARCHITECTURES[architecture]
    # OpenAI's weights want quick GELU, which the plain architecture lacks.
    if architecture == "vit_large_patch14_clip_336" and pretrained.get("tag") == "openai":
        args = args | {"act_layer": "quick_gelu"}
    settings = Settings(args | (data.get("model_args") or {}), f"{path}: model_args")
    for key, supported in TIMM_ALWAYS.items():
        settings.require(key, supported)
    settings.ignore(*filter(_TIMM_IGNORED.fullmatch, list(settings.unread)))
    image_size = settings.take("img_size", None)
    values = settings.take_table(TIMM)
    settings.reject_unread()

    values = _decoded(values, TIMM, _TIMM_ACTIVATIONS, path)
    no_embed_class, layer_scale = values.pop("no_embed_class"), values.pop("layer_scale")
    # With no_embed_class = False, timm's table has positions for the registers too.
    if values["register_tokens"] and not no_embed_class:
        raise ValueError(
            f"{path}: reg_tokens = {values['register_tokens']} with no_embed_class = False is not supported"
        )
    # Null is the default.
    settings = Settings({key: value for key, value in pretrained.items() if value is not None}, str(path))
    preprocessing = settings.take_table(TIMM_PROCESSOR)
    channels, *size = preprocessing["input_size"]
    if channels != 3:
        raise ValueError(f"{path}: input_size must have 3 channels, got {channels}")
    image_size = _square(image_size or size, "input_size", path)
    encoder = ViTConfig(
        image_size=image_size,
        position_of_class=values["class_token"] and not no_embed_class,
        patch_bias=not values["pre_norm"],
        layer_scale=bool(layer_scale),
        **values,
    )
    return VisionConfig(encoder, _timm_processor(preprocessing, image_size, path))


def _timm_processor(values: Mapping[str, Any], image_size: int, path: Path) -> ImageProcessor:
    if values["interpolation"] != "bicubic":
        raise ValueError(f"{path}: interpolation must be 'bicubic', got {values['interpolation']!r}")
    if values["crop_mode"] not in ("center", "squash"):
        raise ValueError(f"{path}: crop_mode must be 'center' or 'squash', got {values['crop_mode']!r}")
    # timm resizes to the side divided by the crop ratio, then crops the center.
    resize_to = math.floor(image_size / values["crop_pct"])
    return ImageProcessor(
        image_size,
        "crop" if values["crop_mode"] == "center" else "naive",
        _three(values["mean"]),
        _three(values["std"]),
        resize_to=None if resize_to == image_size else resize_to,
    )


# -- weights -----------------------------------------------------------------------------------------------------------

_TIMM_NAMES = re.compile(
    r"patch_embed\.proj\.(?:weight|bias)|cls_token|reg_token|pos_embed|(?:norm_pre|norm)\.(?:weight|bias)"
    r"|blocks\.\d+\.(?:norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12])\.(?:weight|bias|qdata|scale)|blocks\.\d+\.ls[12]\.gamma"
)
# Names of transformers on disk and, where they differ, of its version 5 in memory: (pattern, ours).
_TRANSFORMERS_NAMES = [
    (r"embeddings\.(?:patch_embedding|patch_embeddings\.projection)\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"embeddings\.(?:class_embedding|cls_token)", "cls_token"),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.(?:position_embedding\.weight|position_embeddings)", "pos_embed"),
    (r"pre_layrnorm\.(weight|bias)", r"norm_pre.\1"),
    (r"(?:post_layernorm|layernorm)\.(weight|bias)", r"norm.\1"),
    (r"encoder\.layers?\.(\d+)\.(?:layer_norm|norm)([12])\.(weight|bias)", r"blocks.\1.norm\2.\3"),
    (
        r"encoder\.layers?\.(\d+)\.(?:self_attn\.|attention\.attention\.|attention\.)([qkv])(?:uery|ey|alue|_proj)"
        r"\.(weight|bias)",
        r"blocks.\1.attn.\2.\3",
    ),
    (
        r"encoder\.layers?\.(\d+)\.(?:self_attn\.out_proj|attention\.output\.dense|attention\.o_proj)\.(weight|bias)",
        r"blocks.\1.attn.proj.\2",
    ),
    (r"encoder\.layers?\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layers?\.(\d+)\.mlp\.fc([12])\.(weight|bias)", r"blocks.\1.mlp.fc\2.\3"),
]
# OpenAI's own names, in a second file for OpenCLIP in `timm`'s repositories of CLIP.
_OPENAI_NAMES = [
    (r"visual\.conv1\.weight", "patch_embed.proj.weight"),
    (r"visual\.class_embedding", "cls_token"),
    (r"visual\.positional_embedding", "pos_embed"),
    (r"visual\.ln_pre\.(weight|bias)", r"norm_pre.\1"),
    (r"visual\.ln_post\.(weight|bias)", r"norm.\1"),
    (r"visual\.transformer\.resblocks\.(\d+)\.ln_([12])\.(weight|bias)", r"blocks.\1.norm\2.\3"),
    (r"visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", r"blocks.\1.attn.qkv.\2"),
    (r"visual\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
]
# Text towers, projections and heads, which features do not need.
_UNUSED = re.compile(
    r"(?:text_model|visual_projection|head|attn_pool|fc_norm)\..*|(?:embeddings\.)?mask_token|embeddings\.position_ids"
    r"|(?:text|transformer|token_embedding|ln_final)\..*|positional_embedding|(?:visual\.proj|text_projection)(?:\..*)?"
    r"|logit_(?:scale|bias)|input_resolution|context_length|vocab_size"
)


def vision_weights(weights: Weights, config: ViTConfig) -> Weights:
    """Convert the weights of a CLIP, SigLIP or DINOv2 encoder to those of `ViT`.

    Args:
        weights: under the names of `transformers` or OpenCLIP (a model with a text tower, or the encoder alone) or
            of `timm`.
        config: of the encoder. Its size may differ from the file's: the position table is resampled in float32, as
            in `timm`. The position of the class token is added to the token if `config` has none for it, as `timm`
            stores DINOv2 with registers.

    Returns:
        Weights under the names of `ViT`, unread.

    Raises:
        ValueError: lists the names that are not known; or the position table does not fit.
    """
    # All unknown names are reported at once.
    unknown: list[str] = []

    def ours(name: str) -> str | None:
        name = name.removeprefix("vision_model.").removeprefix("visual.trunk.")
        if _UNUSED.fullmatch(name):
            return None
        if _TIMM_NAMES.fullmatch(name):
            return name
        for pattern, new in _TRANSFORMERS_NAMES + _OPENAI_NAMES:
            if re.fullmatch(pattern, name):
                return re.sub(pattern, new, name)
        unknown.append(name)
        return None

    renamed = weights.renamed(ours)
    if unknown:
        raise ValueError("names that no known vision encoder has:\n  " + "\n  ".join(unknown))

    out: dict[str, LazyTensor] = {}
    for name in renamed:
        part = re.fullmatch(r"(blocks\.\d+\.attn\.)([qkv])(\.\w+)", name)
        if part is None:
            out[name] = renamed.lazy(name)
        # timm has one projection for q, k and v, transformers three.
        elif part[2] == "q":
            parts = [part[1] + p + part[3] for p in "qkv"]
            absent = [p for p in parts if p not in renamed]
            if absent:
                raise ValueError(f"there is {name}, but not {' and '.join(absent)}")
            out[part[1] + "qkv" + part[3]] = _stacked([renamed.lazy(p) for p in parts])
    if "cls_token" in out:
        out["cls_token"] = _reshaped(out["cls_token"], (1, 1, config.width))
    if "pos_embed" in out:
        _fit_positions(out, config)
    return Weights(out)


def _fit_positions(out: dict[str, LazyTensor], config: ViTConfig) -> None:
    """Bring `pos_embed` to the size of the config, in place. Modifies `cls_token` where it takes a position."""
    table = out["pos_embed"]
    rows, width = table.shape[-2:]
    # A table of n * n + 1 rows has one for the class token, one of n * n rows has none.
    of_class = int(rows > 1 and math.isqrt(rows - 1) ** 2 == rows - 1)
    side = math.isqrt(rows - of_class)
    if side**2 != rows - of_class:
        raise ValueError(f"pos_embed must have a square of positions, and maybe the class token's; it has {rows}")
    if config.position_of_class and not of_class:
        raise ValueError(f"pos_embed must have a position for the class token; it has {rows} = {side} x {side}")
    table = _reshaped(table, (1, rows, width))  # (1, rows, D)
    if of_class and not config.position_of_class:
        if "cls_token" not in out:
            raise ValueError(f"pos_embed has {rows} positions, one for a class token, but there is no class token")
        # Adding the position to the token once is equal to adding it at each forward pass.
        token = out["cls_token"]
        out["cls_token"] = LazyTensor(token.shape, token.dtype, lambda: token.read() + table.read()[:, :1])
    n_class = int(config.position_of_class)
    size = config.grid_size

    def read() -> Tensor:
        stored = table.read()  # (1, rows, D)
        grid = resample_positions(stored[:, of_class:], (side, side), (size, size))  # (1, size * size, D)
        return torch.cat([stored[:, :n_class], grid], dim=1)  # (1, n_class + size * size, D)

    out["pos_embed"] = LazyTensor(torch.Size((1, n_class + size**2, width)), table.dtype, read)


def _stacked(parts: list[LazyTensor]) -> LazyTensor:
    """Concatenate matrices or vectors along the first axis."""
    first = parts[0]
    shape = torch.Size((sum(p.shape[0] for p in parts), *first.shape[1:]))
    return LazyTensor(shape, first.dtype, lambda: torch.cat([p.read() for p in parts]))


def _reshaped(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    return LazyTensor(torch.Size(shape), tensor.dtype, lambda: tensor.read().reshape(shape))
