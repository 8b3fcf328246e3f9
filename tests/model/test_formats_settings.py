"""Settings of published configs: read by tables, checked by the type of the default, each read once."""

from __future__ import annotations

import pytest

from vlmamba.model.formats.settings import REQUIRED, Settings

TABLE = {"width": ("hidden_size", 768), "eps": ("layer_norm_eps", 1e-6), "bias": ("use_bias", False)}


def test_a_table_is_read_by_our_names_with_the_defaults_of_the_layout():
    settings = Settings({"hidden_size": 32, "layer_norm_eps": 1}, "config.json")
    assert settings.take_table(TABLE) == {"width": 32, "eps": 1, "bias": False}
    settings.reject_unread()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"hidden_size": "32"}, "config.json: hidden_size must be int, got '32'"),
        ({"hidden_size": True}, "hidden_size must be int, got True"),
        ({"hidden_size": 0}, r"config.json: hidden_size must be in \[1, 16777216\], got 0"),
        ({"layer_norm_eps": False}, "layer_norm_eps must be a number, got False"),
        ({"use_bias": 1}, "use_bias must be bool, got 1"),
    ],
)
def test_a_value_of_another_type_than_the_default_is_named(data, message):
    with pytest.raises(ValueError, match=message):
        Settings(data, "config.json").take_table(TABLE)


def test_required_unsupported_and_unknown_settings_are_named():
    settings = Settings({"rms_norm": False, "rope": True, "dtype": "float32"}, "config.json")
    with pytest.raises(ValueError, match="config.json has no hidden_size"):
        settings.take("hidden_size", REQUIRED)
    with pytest.raises(ValueError, match="rms_norm is False, but only True is supported here; load it with Other"):
        settings.require("rms_norm", True, "Other")
    settings.ignore("dtype", "absent")
    with pytest.raises(ValueError, match="config.json has settings that are not known: 'rope'"):
        settings.reject_unread()
    with pytest.raises(ValueError, match="config.json must be an object with named values, got 'text'"):
        Settings("text", "config.json")  # type: ignore[arg-type]


def test_a_count_may_be_zero_where_that_is_the_default():
    assert Settings({"reg_tokens": 4}, "config.json").take("reg_tokens", 0) == 4
    assert Settings({}, "config.json").take("reg_tokens", 0) == 0
