"""Devices by name: what is none, or is not here, is refused before anything is loaded."""

from __future__ import annotations

import pytest
import torch

from vlmamba import cli
from vlmamba.benchmarks import cli as bench
from vlmamba.model.device import device_named


def test_devices_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_named("auto") == torch.device("cuda")
    assert device_named("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device cuda:2 was asked for, but torch sees 2 of its kind here"):
        device_named("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert device_named("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="torch sees no GPU here"):
        device_named("cuda")


@pytest.mark.parametrize("name", ["nope", "meta", "cuda:x", "", "cpu:9"])
@pytest.mark.parametrize(
    ("main", "command"),
    [
        (cli.main, ["generate", "nowhere", "a"]),
        (cli.main, ["chat", "nowhere"]),
        (cli.main, ["train", "small", "--output", "x"]),
        (cli.main, ["demo", "--output", "x"]),
        (cli.main, ["reproduce", "vl-mamba", "--miniature", "--output", "x"]),
        (bench.main, ["run", "ssd"]),
        (bench.main, ["fuzz"]),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else None,
)
def test_every_command_refuses_what_is_no_device(name, main, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="device .*must be|device cpu:9 was asked for"):
        main([*command, "--device", name])
    assert not list(tmp_path.iterdir())
