"""Configs and names of published language models, both ways.

`state-spaces` is what `mamba_ssm` reads and writes; `transformers` has the model types `mamba`, `mamba2` and
`falcon_mamba`; `mistral` is the layout of Codestral Mamba (`params.json`, `consolidated.safetensors`). Sources: the
repositories' own files as the tests repeat them, `mamba_ssm` 2.3, `transformers` 5.23, `mistral-inference`.

A setting that changes the numbers is honoured, or refused by name. One that only says how the work is cut or how
weights were first drawn (`chunk_size`, `fused_add_norm`, `time_step_min`, ...) is not carried over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ..config import LMConfig
from ..config_io import load_config
from ..fields import Interval, check_value
from ..weights import Weights, open_weights
from . import detect_format, read_json

_ANY_LAYER = "vlmamba.model.mamba_ssm.MambaLMHeadModel"
"""Class for models of `mamba_ssm` with layers that `MambaLM` does not have."""
LM_HEAD = "lm_head.weight"
EMBEDDING = "backbone.embedding.weight"
NEOX_VOCABULARY = 50277
"""Tokens of GPT-NeoX, which the models of `state-spaces` and those made of them have."""


def read(folder: Path) -> tuple[LMConfig, Weights]:
    """The config and the weights of a language model in any known format, the weights by our names and unread.

    Raises:
        FileNotFoundError: the folder has no config or no weights.
        ValueError: it is no language model, or one that is not supported; or a file is damaged.
    """
    layout = detect_format(folder)
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
    """A published parameter's name in `MambaLM`: nearly all are the same."""
    if name.startswith(("model.backbone.", "model.lm_head.")):  # Mistral's
        name = name.removeprefix("model.")
    return name.replace("backbone.embeddings.", "backbone.embedding.", 1)


def transformers_name(name: str) -> str:
    """The name in `transformers` of a parameter of `MambaLM`."""
    return name.replace("backbone.embedding.", "backbone.embeddings.", 1)


def from_state_spaces(data: Mapping[str, Any]) -> LMConfig:
    """`config.json` of `state-spaces/*`.

    Raises:
        ValueError: a setting that is not supported or not known, by name.
    """
    given = _Settings(data, "config.json")
    for name, supported in (("rms_norm", True), ("d_intermediate", 0), ("attn_layer_idx", [])):
        given.only(name, supported, _ANY_LAYER)
    given.skip("attn_cfg", "fused_add_norm", *GENERIC)
    ssm = _Settings(given.take("ssm_cfg", {}), "ssm_cfg")
    layer = ssm.take("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        raise ValueError(f"ssm_cfg.layer must be 'Mamba1' or 'Mamba2', got {layer!r}")
    ssm.skip("dt_min", "dt_max", "dt_init_floor", "conv_init", "device", "dtype")
    d_model = given.take("d_model", 2560)
    if layer == "Mamba1":
        ssm.skip("dt_init", "dt_scale", "use_fast_path")
        of_layer = {"d_state": ssm.take("d_state", 16), "dt_rank": _rank(ssm.take("dt_rank", "auto"), d_model)}
    else:
        ssm.skip("chunk_size", "A_init_range", "use_mem_eff_path", "process_group", "sequence_parallel")
        ssm.only("rmsnorm", True, _ANY_LAYER)
        ssm.only("norm_before_gate", False, _ANY_LAYER)
        ssm.only("D_has_hdim", False, _ANY_LAYER)
        ssm.only("d_ssm", None, _ANY_LAYER)
        of_layer = {
            "d_state": ssm.take("d_state", 128),
            "headdim": ssm.take("headdim", 64),
            "ngroups": ssm.take("ngroups", 1),
            "dt_limit": _limit(ssm.take("dt_limit", (0.0, math.inf))),
        }
    config = LMConfig(
        d_model=d_model,
        n_layer=given.take("n_layer", 64),
        vocab_size=given.take("vocab_size", NEOX_VOCABULARY),
        layer="mamba" if layer == "Mamba1" else "mamba2",
        d_conv=ssm.take("d_conv", 4),
        expand=ssm.take("expand", 2),
        bias=ssm.take("bias", False),
        conv_bias=ssm.take("conv_bias", True),
        residual_in_fp32=given.take("residual_in_fp32", True),
        tie_embeddings=given.take("tie_embeddings", True),
        pad_vocab_size_multiple=given.take("pad_vocab_size_multiple", 8),
        **of_layer,
    )
    ssm.done()
    given.done()
    return config


def to_state_spaces(config: LMConfig) -> dict[str, Any]:
    """A `config.json` that `mamba_ssm` reads, with the keys of the published ones.

    Raises:
        ValueError: a setting that the format has no place for, by name.
    """
    _refuse(config, "state-spaces", norm_eps=1e-5, dt_bc_norm_eps=None)
    mamba2 = config.layer == "mamba2"
    ssm: dict[str, Any] = {"layer": "Mamba2"} if mamba2 else {}
    defaults = {"d_state": 128 if mamba2 else 16, "d_conv": 4, "expand": 2, "bias": False, "conv_bias": True}
    defaults |= {"headdim": 64, "ngroups": 1, "dt_limit": (0.0, math.inf)} if mamba2 else {"dt_rank": None}
    ssm |= {name: getattr(config, name) for name, value in defaults.items() if getattr(config, name) != value}
    data: dict[str, Any] = {"d_model": config.d_model}
    if mamba2:
        data["d_intermediate"] = 0
    data |= {"n_layer": config.n_layer, "vocab_size": config.vocab_size, "ssm_cfg": ssm}
    if mamba2:
        data |= {"attn_layer_idx": [], "attn_cfg": {}}
    data |= {"rms_norm": True, "residual_in_fp32": config.residual_in_fp32, "fused_add_norm": True}
    data["pad_vocab_size_multiple"] = config.pad_vocab_size_multiple
    if mamba2 or not config.tie_embeddings:
        data["tie_embeddings"] = config.tie_embeddings
    return data


def from_transformers(data: Mapping[str, Any]) -> LMConfig:
    """`config.json` of `transformers`. Keys that its models do not read are left out of account, as there.

    `norm_before_gate` is one: Codestral's file says true, but the model multiplies the gate in before the norm.

    Raises:
        ValueError: a model type or setting that is not supported, by name.
    """
    kind = data["model_type"]
    if kind not in ("mamba", "mamba2", "falcon_mamba"):
        raise ValueError(f"model_type must be 'mamba', 'mamba2' or 'falcon_mamba', got {kind!r}")
    given = _Settings(data, "config.json")
    act = given.take("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise ValueError(f"hidden_act must be 'silu', got {act!r}")
    given.only("rms_norm", True)
    given.only("quantization_config", None)
    d_model, expand = given.take("hidden_size", 4096 if kind == "mamba2" else 768), given.take("expand", 2)
    inner = int(expand * d_model)
    if kind != "mamba2":
        inner = given.take("intermediate_size", inner)  # Falcon-Mamba's expand is 16, and not heeded
    if inner % d_model:
        raise ValueError(f"intermediate_size must be a multiple of hidden_size {d_model}, got {inner}")
    if kind == "mamba2":
        heads, headdim = given.take("num_heads", 128), given.take("head_dim", 64)
        if heads * headdim != inner:
            raise ValueError(f"num_heads * head_dim must be expand * hidden_size {inner}, got {heads} * {headdim}")
        of_layer = {
            "layer": "mamba2",
            "d_state": given.take("state_size", 128),
            "headdim": headdim,
            "ngroups": given.take("n_groups", 8),
            "dt_limit": _limit(given.take("time_step_limit", (0.0, math.inf))),
        }
    else:
        of_layer = {
            "layer": "mamba",
            "d_state": given.take("state_size", 16),
            "dt_rank": _rank(given.take("time_step_rank", "auto"), d_model),
            "dt_bc_norm_eps": given.take("mixer_rms_eps", 1e-6) if kind == "falcon_mamba" else None,
        }
    rows = given.take("vocab_size", 32768 if kind == "mamba2" else 50280)
    # How many of the rows are tokens is ours to say: see to_transformers.
    vocab_size, multiple = given.take("unpadded_vocab_size", rows), given.take("pad_vocab_size_multiple", 1)
    if -(-vocab_size // multiple) * multiple != rows:
        vocab_size, multiple = rows, 1
    return LMConfig(
        d_model=d_model,
        n_layer=given.take("num_hidden_layers", 64 if kind == "mamba2" else 32),
        vocab_size=vocab_size,
        d_conv=given.take("conv_kernel", 4),
        expand=inner // d_model,
        bias=given.take("use_bias", False),
        conv_bias=given.take("use_conv_bias", True),
        norm_eps=given.take("layer_norm_epsilon", 1e-5),
        residual_in_fp32=given.take("residual_in_fp32", True),
        tie_embeddings=given.take("tie_word_embeddings", kind != "mamba2"),
        pad_vocab_size_multiple=multiple,
        **of_layer,
    )


def to_transformers(config: LMConfig, special: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A `config.json` that `transformers` reads.

    Args:
        config: of the model.
        special: `bos_token_id`, `eos_token_id` and `pad_token_id`; 0 where absent, as in GPT-NeoX.

    `vocab_size` there counts the padding. `unpadded_vocab_size` keeps what it was; `transformers` does not read it.
    """
    falcon = config.dt_bc_norm_eps is not None
    kind = "mamba2" if config.layer == "mamba2" else "falcon_mamba" if falcon else "mamba"
    architecture = {"mamba": "Mamba", "mamba2": "Mamba2", "falcon_mamba": "FalconMamba"}[kind]
    inner = config.expand * config.d_model
    data: dict[str, Any] = {
        "architectures": [architecture + "ForCausalLM"],
        "model_type": kind,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "vocab_size": config.padded_vocab_size,
        "unpadded_vocab_size": config.vocab_size,
        "pad_vocab_size_multiple": config.pad_vocab_size_multiple,
        "state_size": config.d_state,
        "conv_kernel": config.d_conv,
        "expand": config.expand,
        "use_bias": config.bias,
        "use_conv_bias": config.conv_bias,
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": config.residual_in_fp32,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if kind == "mamba2":
        data |= {
            "num_heads": inner // config.headdim,
            "head_dim": config.headdim,
            "n_groups": config.ngroups,
            "chunk_size": 256,
        }
        if config.dt_limit != (0.0, math.inf):
            # Standard JSON has no infinity; this is how `transformers` writes one.
            data["time_step_limit"] = [{"__float__": "Infinity"} if math.isinf(v) else v for v in config.dt_limit]
    else:
        data |= {"intermediate_size": inner, "time_step_rank": config.dt_rank or math.ceil(config.d_model / 16)}
        if falcon:
            data["mixer_rms_eps"] = config.dt_bc_norm_eps
    return data | {name: (special or {}).get(name, 0) for name in SPECIAL_TOKENS}


SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def from_mistral(data: Mapping[str, Any]) -> LMConfig:
    """`params.json` of Codestral Mamba: a Mamba-2 of `mamba_ssm` with some settings by other names.

    Raises:
        ValueError: a setting that is not supported or not known, by name.
    """
    given = _Settings(data, "params.json")
    given.only("model_type", "mamba")
    given.only("rms_norm", True)
    given.skip("fused_add_norm")
    config = LMConfig(
        d_model=given.take("dim"),
        n_layer=given.take("n_layers"),
        vocab_size=given.take("vocab_size"),
        layer="mamba2",
        d_state=128,
        ngroups=given.take("n_groups"),
        residual_in_fp32=given.take("residual_in_fp32"),
        tie_embeddings=given.take("tie_embeddings"),
        pad_vocab_size_multiple=given.take("pad_vocab_size_multiple"),
    )
    given.done()
    return config


_READERS: dict[str, tuple[str, Callable[[Mapping[str, Any]], LMConfig]]] = {
    "state-spaces": ("config.json", from_state_spaces),
    "transformers": ("config.json", from_transformers),
    "mistral": ("params.json", from_mistral),
}
# What tools put beside the model's own settings.
GENERIC = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")
_REQUIRED = object()


class _Settings:
    """The settings of a file, each to be taken once; what is left over is not known."""

    def __init__(self, data: Mapping[str, Any], where: str):
        if not isinstance(data, Mapping):
            raise ValueError(f"{where} must be an object with named values, got {data!r}")
        self.left, self.where = dict(data), where

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self.left.pop(name, default)
        if value is _REQUIRED:
            raise ValueError(f"{self.where} has no {name}")
        kind = type(default)
        if kind in (int, bool) and type(value) is not kind:
            raise ValueError(f"{self.where}: {name} must be {kind.__name__}, got {value!r}")
        if kind is int:  # all of them are sizes; LMConfig has limits of its own for each
            check_value(Annotated[int, Interval("[1, 16777216]")], value, f"{self.where}: {name}")
        if kind is float and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise ValueError(f"{self.where}: {name} must be a number, got {value!r}")
        return value

    def only(self, name: str, supported: Any, elsewhere: str | None = None) -> None:
        """Refuse any other value; `elsewhere` is a class that takes it."""
        value = self.left.pop(name, supported)
        if value != supported:
            hint = f" here; load it with {elsewhere}" if elsewhere else ""
            raise ValueError(f"{self.where}: {name} is {value!r}, but only {supported!r} is supported{hint}")

    def skip(self, *names: str) -> None:
        for name in names:
            self.left.pop(name, None)

    def done(self) -> None:
        if self.left:
            raise ValueError(f"{self.where} has settings that are not known: {', '.join(map(repr, self.left))}")


def _rank(value: Any, d_model: int) -> int | None:
    auto = math.ceil(d_model / 16)
    if value in ("auto", auto):
        return None
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"the rank of dt must be 'auto' or a positive whole number, got {value!r}")
    return value


def _limit(value: Any) -> tuple[float, float]:
    try:
        low, high = (float(v["__float__"] if isinstance(v, Mapping) else v) for v in value)
    except (TypeError, ValueError, KeyError) as e:
        raise ValueError(f"the bounds of dt must be two numbers, got {value!r}") from e
    return low, high


def _refuse(config: LMConfig, layout: str, **supported: Any) -> None:
    for name, value in supported.items():
        if getattr(config, name) != value:
            raise ValueError(f"{layout!r} has no place for {name} {getattr(config, name)!r}; it is always {value!r}")


def special_tokens(folder: Path) -> dict[str, int]:
    """The ids that begin, end and fill up a text, where `config.json` or `generation_config.json` tells them."""
    found = {}
    for file in ("config.json", "generation_config.json"):
        data = read_json(folder / file) if (folder / file).exists() else {}
        found |= {name: data[name] for name in SPECIAL_TOKENS if data.get(name) is not None}
    return found


def dump(data: Mapping[str, Any]) -> str:
    """A config as the text of a file."""
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Published:
    """A checkpoint on the Hub."""

    format: str
    """As `formats.detect_format` names it."""
    parameters: int
    config: LMConfig


def _mamba(d_model: int, n_layer: int, vocab_size: int = NEOX_VOCABULARY, multiple: int = 8) -> LMConfig:
    return LMConfig(d_model, n_layer, vocab_size, pad_vocab_size_multiple=multiple)


def _mamba2(d_model: int, n_layer: int, vocab_size: int = NEOX_VOCABULARY, multiple: int = 16) -> LMConfig:
    return LMConfig(d_model, n_layer, vocab_size, "mamba2", d_state=128, pad_vocab_size_multiple=multiple)


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
"""The language models that are known to load, for tests and docs. Loading itself reads `config.json`."""
