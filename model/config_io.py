"""Conversion between frozen dataclasses and JSON. Unknown keys are errors that suggest the closest known one."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

from .fields import check_value
from .files import write_atomic
from .text_files import read_json

T = TypeVar("T")

MODEL_TYPES = ("vlmamba", "vlmamba_lm")
"""`model_type` of this library's vision-language and language models in `config.json`, for `transformers`."""
TRANSFORMERS_KEYS = (
    "model_type", "architectures", "auto_map", "dtype", "transformers_version", "quantization_config",
)  # fmt: skip
"""Keys of such a `config.json` that are not of the model's config."""


def to_json_dict(config: Any) -> Any:
    """Convert nested dataclasses to plain values. Infinities become strings, since standard JSON has none."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_json_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, list | tuple):
        return [to_json_dict(v) for v in config]
    if isinstance(config, float) and math.isinf(config):
        return "inf" if config > 0 else "-inf"
    return config


def from_json_dict(cls: type[T], data: Any, where: str = "") -> T:
    """Build `cls` from the result of `to_json_dict`.

    Args:
        cls: a dataclass whose fields are plain values, tuples, optional values or nested dataclasses.
        data: the decoded JSON; fields that are absent take their defaults.
        where: prefix of the names in error messages.

    Raises:
        ValueError: a key that `cls` does not know, or a value that does not fit its field.
    """
    where = where or cls.__name__
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be an object with named values, got {data!r}")
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        # Dropping an unknown key would load another model than the file describes.
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(fields))}"
            raise ValueError(f"{where} has no setting {key!r}{hint}")
    return cls(**{key: _decode(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def save_config(config: Any, path: str | Path) -> None:
    """Write a config as indented JSON."""
    write_atomic(path, json.dumps(to_json_dict(config), indent=2, allow_nan=False) + "\n")


def load_config(cls: type[T], path: str | Path) -> T:
    """Read a config that `save_config` wrote, or a `config.json` of `MODEL_TYPES`.

    Raises:
        ValueError: the file is not UTF-8 or not JSON, or does not describe a `cls`; the message names the file.
    """
    data = read_json(path)
    if isinstance(data, dict) and data.get("model_type") in MODEL_TYPES:
        data = {key: value for key, value in data.items() if key not in TRANSFORMERS_KEYS}
    try:
        return from_json_dict(cls, data)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def _decode(hint: Any, value: Any, where: str) -> Any:
    """Convert a JSON value to the type of an annotation."""
    plain = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    origin, args = typing.get_origin(plain), typing.get_args(plain)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _decode(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list, got {value!r}")
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(inner) != len(value):
            raise ValueError(f"{where} must have {len(inner)} entries, got {len(value)}")
        return tuple(_decode(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(inner, value, strict=True)))
    if dataclasses.is_dataclass(plain):
        return from_json_dict(plain, value, where)  # type: ignore[arg-type]
    # Infinities are written as strings, see `to_json_dict`.
    if plain is float and isinstance(value, str) and value in ("inf", "-inf"):
        value = float(value)
    check_value(hint, value, where)
    return float(value) if plain is float else value
