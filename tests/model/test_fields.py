"""Configs: every field refuses a value of another type or beyond its interval, by its name."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import pytest

from tests.makers import VISION
from vlmamba.connectors import ConnectorConfig
from vlmamba.model import VLM, GenerationConfig, LMConfig, MambaLM, ViTConfig, VLMConfig
from vlmamba.model.config_io import from_json_dict, to_json_dict
from vlmamba.model.convert import convert
from vlmamba.model.fields import Count, Interval, check_fields
from vlmamba.model.inspect import inspect
from vlmamba.train.config import LoraConfig, StageConfig

CONFIGS = [
    GenerationConfig(),
    LMConfig(32, 1, 300),
    LMConfig(32, 1, 300, "mamba2", headdim=16),
    ViTConfig(32, 8, 32, 2, 2, 64),
    ConnectorConfig(),
    StageConfig("s", ("connector",), lr=1e-3),
    LoraConfig(),
]
WRONG = [math.nan, "x", [], {}, b"", 1j, True, (1, 2, 3), object(), None, -1, -(10**400), -0.5, -math.inf]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{type(c).__name__} {getattr(c, 'layer', '')}")
def test_every_number_refuses_what_is_none(config):
    """And where a value is taken, it is one that the field's annotation allows."""
    for field in dataclasses.fields(config):
        old = getattr(config, field.name)
        is_number = isinstance(old, int | float) and not isinstance(old, bool)
        for value in WRONG:
            try:
                new = replace(config, **{field.name: value})
            except ValueError as e:
                assert field.name in str(e), (field.name, value, e)
                continue
            assert not is_number or value == -1 and field.name == "feature_layer", (field.name, value)
            if value is not None:
                assert type(value) is type(old) or (field.name, value) == ("norm_eps", 0), (field.name, value)
            assert getattr(new, field.name) is value


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (GenerationConfig(), {"temperature": math.nan}, "temperature must be a finite number, got nan"),
        (GenerationConfig(), {"temperature": math.inf}, "temperature must be a finite number, got inf"),
        (GenerationConfig(), {"temperature": 10**400}, "temperature must be a finite number, got an integer beyond"),
        (GenerationConfig(), {"top_p": math.nan}, r"top_p must be in \(0, 1\], got nan"),
        (GenerationConfig(), {"seed": 2**64}, "seed must be in"),
        (GenerationConfig(), {"stop": "end"}, "stop must be a tuple, got 'end'"),
        (GenerationConfig(), {"stop": (b"end",)}, r"stop\[0\] must be str"),
        (LMConfig(), {"dt_rank": 0}, r"dt_rank must be in \[1, 1048576\], got 0"),
        (LMConfig(), {"d_model": 10**9}, r"d_model must be in \[1, 1048576\], got 1000000000"),
        (LMConfig(), {"n_layer": 10**6}, "n_layer must be in"),
        (LMConfig(), {"dt_limit": (0.5, 0.1)}, "dt_limit must be a lower and an upper bound"),
        (LMConfig(), {"dt_limit": (0.0, math.nan)}, r"dt_limit\[1\] must "),
        (ConnectorConfig(), {"n_layer": 10**6}, "n_layer must be at most 64"),
        (StageConfig("s", ("",), lr=1.0), {"epochs": math.inf}, "epochs of stage 's' must be in .* got inf"),
        (StageConfig("s", ("",), lr=1.0), {"lr": math.inf}, "lr of stage 's' must be in .* got inf"),
    ],
)
def test_bad_arguments_are_named(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


def test_numbers_of_numpy_and_infinite_limits_are_taken():
    assert GenerationConfig(top_k=np.int64(3), temperature=np.float32(0.5)).top_k == 3
    assert LMConfig(dt_limit=(0.0, math.inf)).dt_limit[1] == math.inf
    assert StageConfig("s", ("",), lr=1.0, grad_clip=math.inf).grad_clip == math.inf


def test_a_damaged_config_of_a_model_is_a_value_error_before_memory_is_allocated(tmp_path):
    """Every key with every wrong value: a ValueError that names the file, and the key where the value cannot be one."""
    language = LMConfig(32, 1, 300, "mamba2", d_state=8, headdim=16)
    MambaLM(language).save_pretrained(tmp_path / "own")
    MambaLM(LMConfig(32, 1, 300, d_state=8)).save_pretrained(tmp_path / "own-mamba")
    VLM(VLMConfig(language, (VISION,), ConnectorConfig("mlp"))).save_pretrained(tmp_path / "vlm")
    for name in ("state-spaces", "transformers"):
        convert(tmp_path / "own", tmp_path / name, to=name)
        convert(tmp_path / "own-mamba", tmp_path / f"{name}-mamba", to=name)
    for folder in sorted(tmp_path.iterdir()):
        whole = json.loads((folder / "config.json").read_text())
        for path in paths(whole):
            for value in (math.nan, "x", [], {}, None, True, -1, 0, 10**9, 10**400, 1e300, "inf", [[[]]]):
                (folder / "config.json").write_text(json.dumps(changed(whole, path, value)))
                try:
                    inspect(folder)  # opens the checkpoint and builds the model without memory for its weights
                except ValueError as e:
                    assert str(folder) in str(e) or not folder.name.startswith(("own", "vlm")), (path, value, e)


def paths(data, before=()):
    """The place of each value in nested JSON."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*before, key)
        yield from paths(value, (*before, key))


def changed(data, path, value):
    copy = json.loads(json.dumps(data))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copy


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_a_saved_config_is_read_again(config):
    assert from_json_dict(type(config), to_json_dict(config)) == config


def test_intervals():
    inside = {
        "[0, 1)": [0, 0.5], "(0, 1]": [0.5, 1], "[1, inf)": [1, 10**400], "(0, inf]": [1e-300, math.inf],
    }  # fmt: skip
    outside = {
        "[0, 1)": [-1, 1, math.nan], "(0, 1]": [0, 1.1], "[1, inf)": [0, math.inf, math.nan], "(0, inf]": [0, math.nan],
    }  # fmt: skip
    assert all(value in Interval(text) for text, values in inside.items() for value in values)
    assert not any(value in Interval(text) for text, values in outside.items() for value in values)


def test_nested_annotations_are_followed():
    @dataclass(frozen=True)
    class Inner:
        n: Count = 1

    @dataclass(frozen=True)
    class Outer:
        pairs: tuple[Annotated[float, Interval("[0, 1]")], ...] = ()
        mode: Literal["a", "b"] = "a"
        inner: Inner | None = None

    hints = {"Count": Count, "Annotated": Annotated, "Interval": Interval, "Literal": Literal, "Inner": Inner}
    globals().update(hints)
    check_fields(Outer((0, 1.0), "b", Inner()))
    for wrong, message in (
        (Outer((0.5, 2.0)), r"pairs\[1\] must be in \[0, 1\], got 2.0"),
        (Outer((), "c"), "mode must be one of 'a', 'b'; got 'c'"),
        (Outer((), "a", 3), "inner must be Inner, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            check_fields(wrong)
