"""Connector configs: what is out of range is named."""

from __future__ import annotations

import pytest

from vlmamba.connectors import ConnectorConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "ldp"}, "connector kind must be one of mlp, vss-mlp, .*; got 'ldp'"),
        ({"scan": "spiral"}, "scan must be 'bidirectional' or 'cross', got 'spiral'"),
        ({"vss": "mamba2"}, "vss must be 'ss2d' or 'mamba', got 'mamba2'"),
        ({"d_state": 0}, "d_state must be at least 1, got 0"),
        ({"expand": 0}, "expand must be at least 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ConnectorConfig(**settings)
