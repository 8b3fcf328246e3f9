"""Configs and parameter names of published language models, in both directions.

`state-spaces` is what `mamba_ssm` reads and writes; `transformers` has the model types `mamba`, `mamba2` and
`falcon_mamba`; `mistral` is the layout of Codestral Mamba (`params.json`, `consolidated.safetensors`). Sources: the
repositories' own files as the tests repeat them, `mamba_ssm` 2.3, `transformers` 5.23, `mistral-inference`.

A setting that changes the results is honored, or rejected by name. A setting that only affects how the work is
split or how weights are initialized (`chunk_size`, `fused_add_norm`, `time_step_min`, ...) is dropped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Layer, LMConfig
from ..config_io import load_config
from ..weights import Weights, open_weights
from . import detect_format, read_json
from .settings import REQUIRED, Settings, Table

_ANY_LAYER = "vlmamba.model.mamba_ssm.MambaLMHeadModel"
"""Class for `mamba_ssm` models with layers that `MambaLM` does not have."""
LM_HEAD = "lm_head.weight"
EMBEDDING = "backbone.embedding.weight"
NEOX_VOCABULARY = 50277
"""Vocabulary size of GPT-NeoX's tokenizer, which the `state-spaces` models and their descendants use."""
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
GENERIC = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")
"""Keys that tools add to a config and that say nothing about the architecture."""
# ours: (theirs, default). Defaults are those of `mamba_ssm`'s MambaConfig.
STATE_SPACES: Table = {
    "d_model": ("d_model", 2560),
    "n_layer": ("n_layer", 64),
    "vocab_size": ("vocab_size", NEOX_VOCABULARY),
    "residual_in_fp32": ("residual_in_fp32", True),
    "tie_embeddings": ("tie_embeddings", True),
    "pad_vocab_size_multiple": ("pad_vocab_size_multiple", 8),
}
# Arguments of both mixers of `mamba_ssm`.
_SSM_CFG: Table = {
    "d_conv": ("d_conv", 4),
    "expand": ("expand", 2),
    "bias": ("bias", False),
    "conv_bias": ("conv_bias", True),
}
STATE_SPACES_SSM_CFG: dict[str, Table] = {
    "mamba": {
        "d_state": ("d_state", 16),
        **_SSM_CFG,
        # ceil(d_model / 16)
        "dt_rank": ("dt_rank", "auto"),
    },
    "mamba2": {
        "d_state": ("d_state", 128),
        **_SSM_CFG,
        "headdim": ("headdim", 64),
        "ngroups": ("ngroups", 1),
        "dt_limit": ("dt_limit", (0.0, math.inf)),
    },
    "mamba3": {
        "d_state": ("d_state", 128),
        "expand": ("expand", 2),
        "headdim": ("headdim", 64),
        "ngroups": ("ngroups", 1),
        "rope_fraction": ("rope_fraction", 0.5),
        "A_floor": ("A_floor", 1e-4),
        "is_outproj_norm": ("is_outproj_norm", False),
        # Of no meaning without `is_mimo`
        "mimo_rank": ("mimo_rank", 4),
    },
}
"""Keys inside `ssm_cfg`, by `LMConfig.layer`."""

# Defaults are those of the configuration classes of `transformers`.
_TRANSFORMERS: Table = {
    "d_conv": ("conv_kernel", 4),
    "bias": ("use_bias", False),
    "conv_bias": ("use_conv_bias", True),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "residual_in_fp32": ("residual_in_fp32", True),
}
_TRANSFORMERS_MAMBA: Table = {
    "d_model": ("hidden_size", 768),
    "n_layer": ("num_hidden_layers", 32),
    "d_state": ("state_size", 16),
    "dt_rank": ("time_step_rank", "auto"),
    "tie_embeddings": ("tie_word_embeddings", True),
    **_TRANSFORMERS,
}
TRANSFORMERS: dict[str, Table] = {
    "mamba": _TRANSFORMERS_MAMBA,
    "falcon_mamba": {**_TRANSFORMERS_MAMBA, "dt_bc_norm_eps": ("mixer_rms_eps", 1e-6)},
    "mamba2": {
        "d_model": ("hidden_size", 4096),
        "n_layer": ("num_hidden_layers", 64),
        "d_state": ("state_size", 128),
        "headdim": ("head_dim", 64),
        "ngroups": ("n_groups", 8),
        "dt_limit": ("time_step_limit", (0.0, math.inf)),
        "tie_embeddings": ("tie_word_embeddings", False),
        **_TRANSFORMERS,
    },
}
"""Keys by `model_type`. Of `vocab_size`, `expand` and `num_heads` the meaning differs: see `from_transformers`."""

# The file has all of its settings.
MISTRAL: Table = {
    "d_model": ("dim", REQUIRED),
    "n_layer": ("n_layers", REQUIRED),
    "vocab_size": ("vocab_size", REQUIRED),
    "ngroups": ("n_groups", REQUIRED),
    "residual_in_fp32": ("residual_in_fp32", REQUIRED),
    "tie_embeddings": ("tie_embeddings", REQUIRED),
    "pad_vocab_size_multiple": ("pad_vocab_size_multiple", REQUIRED),
}


def open_language_model(folder: Path) -> tuple[LMConfig, Weights]:
    """Open a language model in any known format.

    Args:
        folder: holds the config and the weights.

    Returns:
        The config, and the weights under the names of `MambaLM`, unread.

    Raises:
        FileNotFoundError: the folder has no config or no weights.
        ValueError: it is no language model, or one that is not supported; or a file is damaged.
    """
    layout = detect_format(folder)
    # This library's own config needs no conversion.
    if layout == "own":
        if "d_model" not in read_json(folder / "config.json"):
            raise ValueError(f"{folder} holds another model of this library, not a language model")
        return load_config(LMConfig, folder / "config.json"), open_weights(folder)
    if layout not in _READERS:
        raise ValueError(f"{folder} is no language model: its format is {layout!r}, known are {sorted(_READERS)}")
    file, reader = _READERS[layout]
    data = read_json(folder / file)
    try:
        config = reader(data)
    except ValueError as e:
        raise ValueError(f"{folder / file}: {e}") from e
    return config, open_weights(folder).renamed(own_name)


def own_name(name: str) -> str:
    """Convert a published parameter name to that of `MambaLM`. Nearly all are the same."""
    if name.startswith(("model.backbone.", "model.lm_head.")):  # Mistral
        name = name.removeprefix("model.")
    return name.replace("backbone.embeddings.", "backbone.embedding.", 1)


def transformers_name(name: str) -> str:
    """Convert a parameter name of `MambaLM` to that of `transformers`."""
    return name.replace("backbone.embedding.", "backbone.embeddings.", 1)


def from_state_spaces(data: Mapping[str, Any]) -> LMConfig:
    """Convert the `config.json` of `state-spaces/*`.

    Args:
        data: the decoded file.

    Raises:
        ValueError: a setting that is not supported or not known, by name.
    """
    settings = Settings(data, "config.json")
    # Architectures that only the drop-in class has: layer norm, MLPs, attention.
    for key, supported in (("rms_norm", True), ("d_intermediate", 0), ("attn_layer_idx", [])):
        settings.require(key, supported, _ANY_LAYER)
    settings.ignore("attn_cfg", "fused_add_norm", *GENERIC)
    ssm = Settings(settings.take("ssm_cfg", {}), "ssm_cfg")
    kind = ssm.take("layer", "Mamba1")
    layers: dict[Any, Layer] = {"Mamba1": "mamba", "Mamba2": "mamba2", "Mamba3": "mamba3"}
    if kind not in list(layers):
        raise ValueError(f"ssm_cfg.layer must be 'Mamba1', 'Mamba2' or 'Mamba3', got {kind!r}")
    # Initialization and placement.
    ssm.ignore("dt_min", "dt_max", "dt_init_floor", "conv_init", "device", "dtype")
    if kind == "Mamba1":
        # Initialization, and a switch between equal implementations.
        ssm.ignore("dt_init", "dt_scale", "use_fast_path")
    elif kind == "Mamba3":
        ssm.ignore("chunk_size", "dropout")
    else:
        # Results do not depend on chunking or parallelism.
        ssm.ignore("chunk_size", "A_init_range", "use_mem_eff_path", "process_group", "sequence_parallel")
        for key, supported in (("rmsnorm", True), ("norm_before_gate", False), ("D_has_hdim", False), ("d_ssm", None)):
            ssm.require(key, supported, _ANY_LAYER)
    layer = layers[kind]
    # The rest is one to one.
    values = settings.take_table(STATE_SPACES) | ssm.take_table(STATE_SPACES_SSM_CFG[layer])
    if layer == "mamba3" and not ssm.take("is_mimo", False):
        values["mimo_rank"] = None
    config = LMConfig(layer=layer, **_decoded(values))
    ssm.reject_unread()
    settings.reject_unread()
    return config


def to_state_spaces(config: LMConfig) -> dict[str, Any]:
    """Convert to a `config.json` that `mamba_ssm` reads, with the keys of the published files.

    Args:
        config: of the model.

    Raises:
        ValueError: a setting that the format cannot hold, by name.
    """
    # mamba_ssm has no keys for these.
    for name, supported in (("norm_eps", 1e-5), ("dt_bc_norm_eps", None)):
        value = getattr(config, name)
        if value != supported:
            raise ValueError(f"'state-spaces' has no place for {name} {value!r}; it is always {supported!r}")
    ssm: dict[str, Any] = {} if config.layer == "mamba" else {"layer": config.layer.capitalize()}
    if config.mimo_rank is not None:
        ssm["is_mimo"] = True
    for ours, (theirs, default) in STATE_SPACES_SSM_CFG[config.layer].items():
        value = "auto" if ours == "dt_rank" and config.dt_rank is None else getattr(config, ours)
        # Published files hold only what differs from the defaults.
        if value != default and value is not None:
            ssm[theirs] = value
    data = {theirs: getattr(config, ours) for ours, (theirs, _) in STATE_SPACES.items()}
    data |= {"ssm_cfg": ssm, "rms_norm": True, "fused_add_norm": True}
    if config.layer != "mamba":
        data |= {"d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}}
    elif config.tie_embeddings:
        del data["tie_embeddings"]  # the published files of Mamba-1 lack the key
    return data


def from_transformers(data: Mapping[str, Any]) -> LMConfig:
    """Convert the `config.json` of `transformers`. Keys that its models do not read are ignored, as there.

    `norm_before_gate` is one: Codestral's file says true, but the model multiplies by the gate before the norm.

    Args:
        data: the decoded file.

    Raises:
        ValueError: a model type or setting that is not supported, by name.
    """
    model_type = data["model_type"]
    # A list, since the value in a damaged file may not be hashable.
    if model_type not in list(TRANSFORMERS):
        raise ValueError(f"model_type must be 'mamba', 'mamba2' or 'falcon_mamba', got {model_type!r}")
    mamba2 = model_type == "mamba2"
    settings = Settings(data, "config.json")
    act = settings.take("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise ValueError(f"hidden_act must be 'silu', got {act!r}")
    settings.require("rms_norm", True)
    # Quantized weights have other names and shapes.
    settings.require("quantization_config", None)
    values = settings.take_table(TRANSFORMERS[model_type])
    # The inner width has its own key for Mamba-1, and follows from expand for Mamba-2.
    d_model = values["d_model"]
    inner = int(settings.take("expand", 2) * d_model)
    if not mamba2:
        inner = settings.take("intermediate_size", inner)  # Falcon-Mamba's file has an expand of 16 that is not used
    if inner % d_model:
        raise ValueError(f"intermediate_size must be a multiple of hidden_size {d_model}, got {inner}")
    if mamba2 and (heads := settings.take("num_heads", 128)) * values["headdim"] != inner:
        raise ValueError(
            f"num_heads * head_dim must be expand * hidden_size {inner}, got {heads} * {values['headdim']}"
        )
    # `vocab_size` counts padding rows here. The key for the unpadded size is ours, see `to_transformers`.
    rows = settings.take("vocab_size", 32768 if mamba2 else 50280)
    vocab_size, multiple = settings.take("unpadded_vocab_size", rows), settings.take("pad_vocab_size_multiple", 1)
    if -(-vocab_size // multiple) * multiple != rows:
        vocab_size, multiple = rows, 1
    return LMConfig(
        layer="mamba2" if mamba2 else "mamba",
        expand=inner // d_model,
        vocab_size=vocab_size,
        pad_vocab_size_multiple=multiple,
        **_decoded(values),
    )


def to_transformers(config: LMConfig, special: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Convert to a `config.json` that `transformers` reads.

    There `vocab_size` counts padding rows. `unpadded_vocab_size` holds ours; `transformers` does not read it.

    Args:
        config: of the model.
        special: `bos_token_id`, `eos_token_id` and `pad_token_id`; 0 where absent, as in GPT-NeoX.
    """
    if config.layer == "mamba3":
        raise ValueError("'transformers' has no model type for Mamba-3 layers; save as 'state-spaces'")
    # Falcon-Mamba is a Mamba-1 with norms of dt, B and C.
    model_type = config.layer if config.dt_bc_norm_eps is None else "falcon_mamba"
    architecture = {"mamba": "Mamba", "mamba2": "Mamba2", "falcon_mamba": "FalconMamba"}[model_type]
    inner = config.expand * config.d_model
    data: dict[str, Any] = {"architectures": [architecture + "ForCausalLM"], "model_type": model_type}
    data |= {theirs: getattr(config, ours) for ours, (theirs, _) in TRANSFORMERS[model_type].items()}
    data |= {
        "vocab_size": config.padded_vocab_size,
        "unpadded_vocab_size": config.vocab_size,
        "pad_vocab_size_multiple": config.pad_vocab_size_multiple,
        "expand": config.expand,
        "hidden_act": "silu",
    }
    if model_type == "mamba2":
        data |= {"num_heads": inner // config.headdim, "chunk_size": 256}
        # Written only if it differs from the default.
        low_high = data.pop("time_step_limit")
        if low_high != (0.0, math.inf):
            # Standard JSON has no infinity; this is how `transformers` writes one.
            data["time_step_limit"] = [{"__float__": "Infinity"} if math.isinf(v) else v for v in low_high]
    else:
        data |= {"intermediate_size": inner, "time_step_rank": config.dt_rank or math.ceil(config.d_model / 16)}
    return data | {name: (special or {}).get(name, 0) for name in SPECIAL_TOKENS}


def from_mistral(data: Mapping[str, Any]) -> LMConfig:
    """Convert the `params.json` of Codestral Mamba: a Mamba-2 of `mamba_ssm` under other keys.

    Args:
        data: the decoded file.

    Raises:
        ValueError: a setting that is not supported or not known, by name.
    """
    settings = Settings(data, "params.json")
    settings.require("model_type", "mamba")
    settings.require("rms_norm", True)
    settings.ignore("fused_add_norm")
    # The state size is not in the file: it is the default of mamba_ssm's Mamba2.
    config = LMConfig(layer="mamba2", d_state=128, **settings.take_table(MISTRAL))
    settings.reject_unread()
    return config


_READERS: dict[str, tuple[str, Callable[[Mapping[str, Any]], LMConfig]]] = {
    "state-spaces": ("config.json", from_state_spaces),
    "transformers": ("config.json", from_transformers),
    "mistral": ("params.json", from_mistral),
}


def _decoded(values: dict[str, Any]) -> dict[str, Any]:
    """Convert what files write differently: the rank of dt, "auto" or a number, and the limits of dt."""
    if "dt_rank" in values:
        values = values | {"dt_rank": _dt_rank(values["dt_rank"], values["d_model"])}
    if "dt_limit" in values:
        values = values | {"dt_limit": _dt_limit(values["dt_limit"])}
    return values


def _dt_rank(value: Any, d_model: int) -> int | None:
    # None is stored for the automatic value, so that equal models have equal configs.
    auto = math.ceil(d_model / 16)
    if value in ("auto", auto):
        return None
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"the rank of dt must be 'auto' or a positive whole number, got {value!r}")
    return value


def _dt_limit(value: Any) -> tuple[float, float]:
    try:
        low, high = (float(v["__float__"] if isinstance(v, Mapping) else v) for v in value)
    except (TypeError, ValueError, KeyError) as e:
        raise ValueError(f"the bounds of dt must be two numbers, got {value!r}") from e
    return low, high


def special_tokens(folder: Path) -> dict[str, int]:
    """Read the ids of the start, end and padding tokens from `config.json` and `generation_config.json`.

    Args:
        folder: of a checkpoint.

    Returns:
        Those of `SPECIAL_TOKENS` that the files have.
    """
    found = {}
    # The later file takes precedence.
    for file in ("config.json", "generation_config.json"):
        data = read_json(folder / file) if (folder / file).exists() else {}
        found |= {name: data[name] for name in SPECIAL_TOKENS if data.get(name) is not None}
    return found


def dump(data: Mapping[str, Any]) -> str:
    """Format a config as the text of a JSON file."""
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Published:
    """A checkpoint on the Hub."""

    format: str
    """Name in `formats.FORMATS`."""
    parameters: int
    config: LMConfig


def _mamba(d_model: int, n_layer: int, vocab_size: int = NEOX_VOCABULARY, multiple: int = 8) -> LMConfig:
    return LMConfig(d_model, n_layer, vocab_size, pad_vocab_size_multiple=multiple)


def _mamba2(d_model: int, n_layer: int, vocab_size: int = NEOX_VOCABULARY, multiple: int = 16) -> LMConfig:
    return LMConfig(d_model, n_layer, vocab_size, "mamba2", d_state=128, pad_vocab_size_multiple=multiple)


# size: (d_model, n_layer, parameters)
_MAMBA = {
    "130m": (768, 24, 129_135_360),
    "370m": (1024, 48, 371_516_416),
    "790m": (1536, 48, 793_204_224),
    "1.4b": (2048, 48, 1_372_178_432),
    "2.8b": (2560, 64, 2_768_345_600),
}
_MAMBA2 = {
    "130m": (768, 24, 128_989_632),
    "370m": (1024, 48, 368_346_624),
    "780m": (1536, 48, 780_161_280),
    "1.3b": (2048, 48, 1_343_757_312),
    "2.7b": (2560, 64, 2_702_599_680),
}
# 7B models with vocabularies of their own.
_FALCON = LMConfig(4096, 64, 65024, dt_bc_norm_eps=1e-6, tie_embeddings=False, pad_vocab_size_multiple=1)
_CODESTRAL = LMConfig(
    4096, 64, 32768, "mamba2", d_state=128, ngroups=8, tie_embeddings=False, pad_vocab_size_multiple=1
)

PUBLISHED: dict[str, Published] = {
    **{f"state-spaces/mamba-{s}": Published("state-spaces", n, _mamba(d, k)) for s, (d, k, n) in _MAMBA.items()},
    "state-spaces/mamba-2.8b-slimpj": Published("state-spaces", 2_768_345_600, _mamba(2560, 64)),
    "xiuyul/mamba-2.8b-zephyr": Published("state-spaces", 2_768_345_600, _mamba(2560, 64)),
    **{f"state-spaces/mamba2-{s}": Published("state-spaces", n, _mamba2(d, k)) for s, (d, k, n) in _MAMBA2.items()},
    **{
        f"state-spaces/mamba-{s}-hf": Published("transformers", n, _mamba(d, k, 50280, 1))
        for s, (d, k, n) in _MAMBA.items()
    },
    **{
        f"AntonV/mamba2-{s}-hf": Published("transformers", n, _mamba2(d, k, 50288, 1))
        for s, (d, k, n) in _MAMBA2.items()
    },
    "tiiuae/falcon-mamba-7b": Published("transformers", 7_272_665_088, _FALCON),
    "tiiuae/falcon-mamba-7b-instruct": Published("transformers", 7_272_665_088, _FALCON),
    "mistralai/Mamba-Codestral-7B-v0.1": Published("mistral", 7_285_403_648, _CODESTRAL),
}
"""Published language models that are known to load, for presets, tests and docs. Loading reads `config.json`."""
