"""Released checkpoints of Cobra and ML-Mamba, reading and writing.

A checkpoint is a pickle `{"model": {"llm_backbone": ..., "projector": ..., ...}}` beside a `config.json`. It holds the
language model and the connector. The encoders stayed frozen: `config.json` names them, and their weights are `timm`'s.

    key in the pickle                                    here
    llm_backbone.* (ML-Mamba), llm_backbone.llm.* (Cobra)  language_model.*
    mlp.*, bidirectional_mamba.* (ML-Mamba)                connector.mlp.*, connector.bidirectional_mamba.*
    projector.projector.* (ML-Mamba)                       connector.projector.projector.*
    projector.projector.* (Cobra)                          connector.projector.*, or linear1 and linear2 of two layers

Sources: WenjunHuang94/ML-Mamba at 5fdff98, h-zhao1997/cobra at 4b81082. The published files themselves were not
opened: names and shapes are those that the code saves, and add up to the sizes of the files.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...connectors import ConnectorConfig, Kind
from ..config import LMConfig, VisionConfig, VLMConfig
from ..hub import fetch_model
from ..image import Resize
from ..weights import Weights, open_weights
from . import RELEASED, checkpoint_folder, detect_format, read_json
from .language import EMBEDDING, LM_HEAD, NEOX_VOCABULARY, PUBLISHED, dump
from .vision import VISION_ENCODERS, open_encoder

PADDING = {50280: 8, 50288: 16}
"""Padded vocabulary sizes of Mamba-1 and Mamba-2 models, and the multiples that they are padded to."""
ENCODERS = {
    "dinosiglip-vit-so-384px": ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_384"),
    "siglip-vit-so400m-384px": ("vit_so400m_patch14_siglip_384",),
    "clip-vit-l-336px": ("vit_large_patch14_clip_336.openai",),
}
"""`vision_backbone_id` to names in `VISION_ENCODERS`, in the order of their features."""
RESIZE: dict[str, Resize] = {"resize-naive": "naive", "resize-crop": "crop", "letterbox": "letterbox"}

_TWO_LAYERS = {"0": "linear1", "2": "linear2"}


def open_released(folder: Path, **hub: Any) -> tuple[VLMConfig, Weights]:
    """Open a released model and its encoders.

    Args:
        folder: of the checkpoint.
        hub: as for `hub.fetch`; the encoders are fetched from the main branch.

    Returns:
        The config, and the weights under the names of `VLM`, unread.

    Raises:
        FileNotFoundError: no checkpoint; or see `fetch`, for an encoder.
        ValueError: the config has an unknown name, or the weights are of no known layout.
    """
    folder = checkpoint_folder(folder)
    is_ml_mamba = detect_format(folder) == "ml-mamba"
    settings = _settings(folder)
    # The pickle has the parts of the model under the key `model`.
    weights = open_weights(_checkpoint(folder)).renamed(lambda name: name.removeprefix("model."))
    language = weights.renamed(_language_name)
    if EMBEDDING not in language:
        raise ValueError(f"{_checkpoint(folder)} has no llm_backbone with {EMBEDDING}, so it is no released model")
    language_config = _language_config(language, settings)
    connector = weights.renamed(lambda name: None if name.startswith("llm_backbone.") else name)
    kind = _connector_kind(connector, settings, folder)
    # Everything but the language model is the connector: encoders stayed frozen and were not saved.
    names = {name: _own_connector_name(name, kind) for name in connector}

    # ML-Mamba's code has these values built in.
    vision_id = _known(settings, "vision_backbone_id", ENCODERS, "dinosiglip-vit-so-384px", folder)
    resize = _known(settings, "image_resize_strategy", RESIZE, "resize-naive", folder)
    vision, encoders = open_encoders(ENCODERS[vision_id], RESIZE[resize], **hub)
    llm = str(settings.get("llm_backbone_id", "mamba2-2.7b"))
    config = VLMConfig(
        language_config, vision, _connector_config(kind, connector),
        template="zephyr" if is_ml_mamba or llm.endswith("zephyr") else "in-out",
    )  # fmt: skip
    return config, merged({"language_model.": language, "connector.": connector.renamed(names), "": encoders})


def write_released(config: VLMConfig, weights: Weights, folder: Path, model_id: str) -> None:
    """Write a model for its authors' code. Weights of the encoders are left out.

    Args:
        config: of the model.
        weights: under the names of `VLM`.
        folder: to write to.
        model_id: name of the model in its `config.json`.

    Raises:
        ValueError: the layout cannot hold a part of the model.
    """
    # Encoders and resizing must be combinations that the authors' code has names for.
    kind, names = config.connector.kind, tuple(_encoder_name(v) for v in config.vision)
    vision_id = next((key for key, known in ENCODERS.items() if known == names), None)
    resize = {key for key, ours in RESIZE.items() if all(v.processor.resize == ours for v in config.vision)}
    if config.tiles is not None:
        raise ValueError("the released layouts have no tiles, but the model's config has")
    if kind not in ("mlp", "mamba2-mlp", "mamba2-advanced"):
        raise ValueError(f"the released layouts have no connector {kind!r}, only mlp, mamba2-mlp and mamba2-advanced")
    # Their code loads encoders by name from timm, so other encoders cannot be stored.
    if vision_id is None or not resize:
        raise ValueError(
            "the released layouts know these encoders, as `VISION_ENCODERS` has them: "
            + "; ".join(" and ".join(known) for known in ENCODERS.values())
        )
    is_ml_mamba = kind == "mamba2-advanced"
    model: dict[str, OrderedDict[str, Tensor]] = {}
    for name, tensor in weights.items():
        if name.startswith("language_model."):
            part, key = "llm_backbone", ("" if is_ml_mamba else "llm.") + name.removeprefix("language_model.")
        elif name.startswith("connector."):
            part, key = _released_connector_name(name.removeprefix("connector."), kind).split(".", 1)
        else:
            continue
        model.setdefault(part, OrderedDict())[key] = tensor
    llm = model["llm_backbone"]
    prefix = "" if is_ml_mamba else "llm."
    # Their loader is strict, and expects the head even if it is tied.
    llm.setdefault(prefix + LM_HEAD, llm[prefix + EMBEDDING])
    settings = {
        "model_id": model_id,
        "arch_specifier": "no-align+gelu-mlp" if kind == "mlp" else "no-align+fused-gelu-mlp",
        "vision_backbone_id": vision_id,
        "llm_backbone_id": _language_id(config),
        "image_resize_strategy": min(resize),
        "llm_max_length": 2048,
    }
    (folder / "checkpoints").mkdir()
    torch.save({"model": model}, folder / "checkpoints" / RELEASED)
    (folder / "config.json").write_text(dump({"model": settings}), encoding="utf-8")


def open_encoders(
    names: Sequence[str], resize: Resize | None = None, **hub: Any
) -> tuple[tuple[VisionConfig, ...], Weights]:
    """Open encoders by their names in `VISION_ENCODERS`.

    Args:
        names: of the encoders.
        resize: `ImageProcessor.resize` in place of that of each encoder.
        hub: as for `hub.fetch`.

    Returns:
        The configs, and the weights as `vision.encoders.*`, unread.
    """
    # Weights stay unread: only names, shapes and dtypes are needed until loading.
    configs, parts = [], {}
    for i, name in enumerate(names):
        known = VISION_ENCODERS[name]
        config = known.config
        if resize is not None:
            config = replace(config, processor=replace(config.processor, resize=resize))
        folder = fetch_model(known.repo, **{**hub, "revision": None})
        config, parts[f"vision.encoders.{i}."] = open_encoder(folder, config)
        configs.append(config)
    return tuple(configs), merged(parts)


def merged(parts: Mapping[str, Weights]) -> Weights:
    """Merge weights; each key is prefixed to the names of its part."""
    return Weights({prefix + name: part.lazy(name) for prefix, part in parts.items() for name in part})


def _settings(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").exists():  # huangwenjun1994/ML-Mamba may lack one; its code has the values built in
        return {}
    data = read_json(folder / "config.json")
    return data["model"] if isinstance(data.get("model"), dict) else data


def _checkpoint(folder: Path) -> Path:
    for path in (folder / RELEASED, folder / "checkpoints" / RELEASED):
        if path.exists():
            return path
    raise FileNotFoundError(f"{folder} has no {RELEASED}, nor a folder checkpoints with one")


def _known(settings: Mapping[str, Any], name: str, known: Mapping[str, Any], default: str, folder: Path) -> str:
    value = settings.get(name, default)
    if value not in known:
        raise ValueError(f"{folder / 'config.json'}: {name} must be one of {', '.join(known)}; got {value!r}")
    return value


def _language_name(name: str) -> str | None:
    if not name.startswith("llm_backbone."):
        return None
    return name.removeprefix("llm_backbone.").removeprefix("llm.")


def _language_config(weights: Weights, settings: Mapping[str, Any]) -> LMConfig:
    """Derive the config from names and shapes: `config.json` only names the model."""
    shapes = weights.shapes
    # Every size follows from a shape.
    rows, d_model = shapes[EMBEDDING]
    n_layer = 1 + max(int(m[1]) for name in shapes if (m := re.match(r"backbone\.layers\.(\d+)\.", name)))
    mixer = {name.split(".mixer.")[1]: size for name, size in shapes.items() if ".layers.0.mixer." in name}
    # out_proj is (D, E).
    inner = mixer["out_proj.weight"][1]
    tied = LM_HEAD not in shapes or torch.equal(weights[LM_HEAD], weights[EMBEDDING])
    common: dict[str, Any] = {
        "d_model": d_model, "n_layer": n_layer, "d_conv": mixer["conv1d.weight"][2], "expand": inner // d_model,
        "vocab_size": NEOX_VOCABULARY if rows in PADDING else rows, "tie_embeddings": tied,
        "pad_vocab_size_multiple": PADDING.get(rows, 1),
    }  # fmt: skip
    # Only Mamba-1 projects dt, B and C from x.
    if "x_proj.weight" in mixer:
        return LMConfig(layer="mamba", d_state=mixer["A_log"][1], dt_rank=mixer["dt_proj.weight"][1], **common)
    heads = mixer["D"][0]
    # The convolution has E + 2GN channels, with G = 1.
    d_state = (mixer["conv1d.weight"][0] - inner) // 2
    return LMConfig(layer="mamba2", d_state=d_state, headdim=inner // heads, chunk_size=256, **common)


def _connector_kind(weights: Weights, settings: Mapping[str, Any], folder: Path) -> Kind:
    # Kinds differ in their parts and numbers of layers.
    parts = {name.split(".")[0] for name in weights}
    layers = sorted({name.split(".")[2] for name in weights if name.startswith("projector.projector.")})
    if parts == {"mlp", "bidirectional_mamba", "projector"} and layers == ["0", "2", "4"]:
        return "mamba2-advanced"
    plain = all(re.fullmatch(r"projector\.projector\.\d\.(weight|bias)", name) for name in weights)
    if plain and layers in (["0", "2", "4"], ["0", "2"]):
        return "mamba2-mlp" if len(layers) == 3 else "mlp"
    raise ValueError(
        f"{folder}: arch_specifier {settings.get('arch_specifier')!r} with the parts {sorted(parts)} is not supported, "
        "only projectors of two or three layers, alone or behind ML-Mamba's scan"
    )


def _connector_config(kind: Kind, weights: Weights) -> ConnectorConfig:
    if kind != "mamba2-advanced":
        return ConnectorConfig(kind)
    shapes = weights.shapes
    mixer = "bidirectional_mamba.layers.0.mixer."
    width, inner = shapes[mixer + "out_proj.weight"]
    channels, _, d_conv = shapes[mixer + "conv1d.weight"]
    n_layer = len({name.split(".")[2] for name in shapes if name.startswith("bidirectional_mamba.layers.")})
    return ConnectorConfig(
        kind, "bidirectional", d_state=(channels - inner) // 2, expand=inner // width, d_conv=d_conv,
        headdim=inner // shapes[mixer + "D"][0], n_layer=n_layer, chunk_size=256,
    )  # fmt: skip


def _own_connector_name(name: str, kind: str) -> str:
    if kind == "mamba2-advanced":
        return name
    layer, _, rest = name.removeprefix("projector.projector.").partition(".")
    if kind == "mamba2-mlp":
        return f"projector.{layer}.{rest}"
    return f"{_TWO_LAYERS[layer]}.{rest}"


def _released_connector_name(name: str, kind: str) -> str:
    if kind == "mamba2-advanced":
        return name
    if kind == "mamba2-mlp":
        return f"projector.{name}"
    layer, _, rest = name.partition(".")
    return f"projector.projector.{ {v: k for k, v in _TWO_LAYERS.items()}[layer] }.{rest}"


def _language_id(config: VLMConfig) -> str:
    """Return the name of a language model in the authors' code: that of its repository."""
    # The chunk size changes no result, and is not part of a published name.
    own = replace(config.language, chunk_size=LMConfig.chunk_size)
    names = [repo.split("/")[1] for repo, known in PUBLISHED.items() if known.config == own]
    is_chat = config.template == "zephyr" and own.layer == "mamba"
    name = next((n for n in names if n.endswith("zephyr") == is_chat), own.layer)
    return name if not is_chat or name.endswith("zephyr") else f"{name}-zephyr"


def _encoder_name(vision: VisionConfig) -> str | None:
    """Return the `timm` name of an encoder in `VISION_ENCODERS`, whatever its `resize`; None if there is none."""
    timm = {name for names in ENCODERS.values() for name in names}
    for name in timm:
        known = VISION_ENCODERS[name].config
        if vision == replace(known, processor=replace(known.processor, resize=vision.processor.resize)):
            return name
    return None
