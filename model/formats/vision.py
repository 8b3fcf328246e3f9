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

_FAMILIES = {
    "clip": "clip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
}
# Defaults of transformers, whose files leave out settings that are equal to them.
_SIZES = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "num_channels": 3}
_MODEL_DEFAULTS = {
    "clip": {"intermediate_size": 3072, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip": {"intermediate_size": 3072, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    "dinov2": {"mlp_ratio": 4, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6},
    "dinov2_with_registers": {
        **{"mlp_ratio": 4, "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-6},
        "num_register_tokens": 4,
    },
}
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def _read_transformers(folder: Path) -> VisionConfig:
    path = folder / "config.json"
    data = read_json(path)
    model_type = data["model_type"]
    family = _FAMILIES.get(model_type)
    if family is None:
        raise ValueError(
            f"{path} has model_type {model_type!r}; of vision encoders, known are {', '.join(map(repr, _FAMILIES))}"
        )
    if model_type in ("clip", "siglip"):  # with a text tower; old CLIP files have the settings twice
        data = data.get("vision_config_dict") or data.get("vision_config") or {}
    defaults: dict[str, Any] = _SIZES | _MODEL_DEFAULTS[model_type if family == "dinov2" else family]
    settings = defaults | data
    if settings["num_channels"] != 3:
        raise ValueError(f"{path}: num_channels must be 3, got {settings['num_channels']}")
    if settings["hidden_act"] not in _ACTIVATIONS:
        known = ", ".join(map(repr, _ACTIVATIONS))
        raise ValueError(f"{path}: hidden_act must be one of {known}; got {settings['hidden_act']!r}")
    for name, wanted in (("use_swiglu_ffn", False), ("qkv_bias", True)):
        if settings.get(name, wanted) is not wanted:
            raise ValueError(f"{path}: {name} = {settings[name]} is not supported, only {wanted}")
    # DINOv2 gives the MLP's width as a ratio. SigLIP has no class token, CLIP no patch bias.
    width = settings["hidden_size"]
    encoder = ViTConfig(
        image_size=_square(settings["image_size"], "image_size", path),
        patch_size=_square(settings["patch_size"], "patch_size", path),
        width=width,
        depth=settings["num_hidden_layers"],
        heads=settings["num_attention_heads"],
        mlp_width=int(width * settings["mlp_ratio"]) if family == "dinov2" else settings["intermediate_size"],
        activation=_ACTIVATIONS[settings["hidden_act"]],
        norm_eps=settings["layer_norm_eps"],
        class_token=family != "siglip",
        register_tokens=settings.get("num_register_tokens", 0) if family == "dinov2" else 0,
        position_of_class=family == "clip" or model_type == "dinov2",
        pre_norm=family == "clip",
        patch_bias=family != "clip",
        layer_scale=family == "dinov2",
    )
    processor = _read_transformers_processor(folder, family, encoder.image_size)
    return VisionConfig(replace(encoder, image_size=processor.size), processor)


def _read_transformers_processor(folder: Path, family: str, image_size: int) -> ImageProcessor:
    data = None
    path = folder / "preprocessor_config.json"
    if path.exists():
        data = read_json(path)
    elif (folder / "processor_config.json").exists():
        path = folder / "processor_config.json"
        data = read_json(path).get("image_processor")
    # No preprocessing file: the defaults of each family.
    if data is None:
        return {
            "clip": ImageProcessor(image_size, "crop-floor", CLIP_MEAN, CLIP_STD),
            "siglip": ImageProcessor(image_size),
            "dinov2": ImageProcessor(image_size, "crop-floor", IMAGENET_MEAN, IMAGENET_STD),
        }[family]
    # Defaults of the processor classes.
    if family == "siglip":
        defaults = {"size": {"height": 224, "width": 224}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    else:
        defaults = {"size": 224, "crop_size": 224, "do_center_crop": True, "image_mean": CLIP_MEAN,
                    "image_std": CLIP_STD}  # fmt: skip
    data = defaults | data
    for name, wanted in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("do_pad", False)):
        if data.get(name) not in (wanted, None):
            raise ValueError(f"{path}: {name} = {data[name]} is not supported, only {wanted}")
    if data.get("resample", 3) != 3:
        raise ValueError(f"{path}: resample must be 3, which is bicubic; got {data['resample']}")
    if not math.isclose(data.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise ValueError(f"{path}: rescale_factor must be 1/255, got {data['rescale_factor']}")

    size, mean, std = data["size"], _three(data["image_mean"]), _three(data["image_std"])
    # A shortest edge is resized to; with height and width, the aspect ratio is ignored.
    if isinstance(size, Mapping) and size.keys() == {"shortest_edge"}:
        size = size["shortest_edge"]
    if data.get("do_center_crop"):
        if not isinstance(size, int):
            raise ValueError(f"{path}: size before a centre crop must be the shortest edge's, got {size}")
        side = _square(data["crop_size"], "crop_size", path)
        return ImageProcessor(side, "crop-floor", mean, std, resize_to=None if size == side else size)
    if isinstance(size, int) and family != "siglip":
        raise ValueError(f"{path}: size = {data['size']} without a centre crop gives images that are not square")
    return ImageProcessor(_square(size, "size", path), "naive", mean, std)


def _three(values: Iterable[float]) -> tuple[float, float, float]:
    """Return one number per colour channel."""
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

# Arguments of each architecture in timm; `norm_eps` is that of its norm layer.
_CLIP_ARGS = {"patch_size": 14, "embed_dim": 1024, "depth": 24, "num_heads": 16, "pre_norm": True, "norm_eps": 1e-5}
_DINOV2_ARGS = {"patch_size": 14, "embed_dim": 1024, "depth": 24, "num_heads": 16, "init_values": 1e-5}
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit_large_patch14_clip_336": _CLIP_ARGS,
    "vit_large_patch14_clip_quickgelu_336": {**_CLIP_ARGS, "act_layer": "quick_gelu"},
    "vit_so400m_patch14_siglip_384": {
        **{"patch_size": 14, "embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362},
        "class_token": False,
    },
    "vit_large_patch14_dinov2": _DINOV2_ARGS,
    "vit_large_patch14_reg4_dinov2": {**_DINOV2_ARGS, "reg_tokens": 4, "no_embed_class": True},
}
_TIMM_DEFAULTS = {
    **{"mlp_ratio": 4.0, "init_values": None, "class_token": True, "no_embed_class": False, "reg_tokens": 0},
    **{"pre_norm": False, "act_layer": "gelu", "norm_eps": 1e-6},
}
# Arguments that do not change the features in evaluation mode.
_TIMM_IGNORED = re.compile(
    r"num_classes|global_pool|fc_norm|dynamic_img_size|strict_img_size|weight_init|\w+_drop_rate"
)
_TIMM_ONLY = {"in_chans": 3, "qkv_bias": True, "proj_bias": True, "final_norm": True, "qk_norm": False}


def _read_timm(folder: Path) -> VisionConfig:
    path = folder / "config.json"
    data = read_json(path)
    pretrained = data.get("pretrained_cfg", data)
    architecture = data["architecture"]
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"{path} has architecture {architecture!r}; known are {', '.join(_ARCHITECTURES)}")
    # Architecture, then the changes that the file makes to it.
    args = _TIMM_DEFAULTS | _ARCHITECTURES[architecture]
    # OpenAI's weights want quick GELU, which the plain architecture lacks.
    if architecture == "vit_large_patch14_clip_336" and pretrained.get("tag") == "openai":
        args["act_layer"] = "quick_gelu"
    changes = data.get("model_args") or {}
    for name, value in changes.items():
        if name in _TIMM_ONLY:
            if value != _TIMM_ONLY[name]:
                raise ValueError(f"{path}: {name} = {value} is not supported, only {_TIMM_ONLY[name]}")
        elif name not in (*args, "img_size") and not _TIMM_IGNORED.fullmatch(name):
            raise ValueError(f"{path}: model_args has {name!r}, which is not supported")
    args |= changes
    if args["act_layer"] not in ("gelu", "quick_gelu", "gelu_tanh"):
        raise ValueError(f"{path}: act_layer must be 'gelu', 'quick_gelu' or 'gelu_tanh', got {args['act_layer']!r}")
    # With no_embed_class = False, timm's table has positions for the registers too.
    if args["reg_tokens"] and not args["no_embed_class"]:
        raise ValueError(f"{path}: reg_tokens = {args['reg_tokens']} with no_embed_class = False is not supported")
    channels, *size = pretrained.get("input_size", (3, 224, 224))
    if channels != 3:
        raise ValueError(f"{path}: input_size must have 3 channels, got {channels}")
    image_size = _square(args.get("img_size") or size, "input_size", path)
    encoder = ViTConfig(
        image_size=image_size,
        patch_size=_square(args["patch_size"], "patch_size", path),
        width=args["embed_dim"],
        depth=args["depth"],
        heads=args["num_heads"],
        mlp_width=int(args["embed_dim"] * args["mlp_ratio"]),
        activation=args["act_layer"],
        norm_eps=args["norm_eps"],
        class_token=args["class_token"],
        register_tokens=args["reg_tokens"],
        position_of_class=args["class_token"] and not args["no_embed_class"],
        pre_norm=args["pre_norm"],
        patch_bias=not args["pre_norm"],
        layer_scale=bool(args["init_values"]),
    )
    return VisionConfig(encoder, _read_timm_processor(pretrained, image_size, path))


def _read_timm_processor(pretrained: Mapping[str, Any], image_size: int, path: Path) -> ImageProcessor:
    if pretrained.get("interpolation", "bicubic") != "bicubic":
        raise ValueError(f"{path}: interpolation must be 'bicubic', got {pretrained['interpolation']!r}")
    crop_mode = pretrained.get("crop_mode") or "center"
    if crop_mode not in ("center", "squash"):
        raise ValueError(f"{path}: crop_mode must be 'center' or 'squash', got {crop_mode!r}")
    # timm resizes to the side divided by the crop ratio, then crops the center.
    resize_to = math.floor(image_size / (pretrained.get("crop_pct") or 0.875))
    return ImageProcessor(
        image_size,
        "crop" if crop_mode == "center" else "naive",
        _three(pretrained.get("mean") or IMAGENET_MEAN),
        _three(pretrained.get("std") or IMAGENET_STD),
        resize_to=None if resize_to == image_size else resize_to,
    )


# -- weights -----------------------------------------------------------------------------------------------------------

_TIMM_NAMES = re.compile(
    r"patch_embed\.proj\.(?:weight|bias)|cls_token|reg_token|pos_embed|(?:norm_pre|norm)\.(?:weight|bias)"
    r"|blocks\.\d+\.(?:norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12])\.(?:weight|bias)|blocks\.\d+\.ls[12]\.gamma"
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
