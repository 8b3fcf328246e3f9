"""Devices by name."""

from __future__ import annotations

import torch


def device_named(name: str) -> torch.device:
    """Return a device by name; `auto` is a GPU where there is one, otherwise the CPU.

    Raises:
        ValueError: the name is not that of a device that models run on, or there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # rejected below
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device must be auto, cpu, cuda, mps, or one of several such as cuda:1; got {name!r}")
    if device.type == "mps":
        there = int(torch.backends.mps.is_available())
    else:
        there = torch.cuda.device_count() if device.type == "cuda" else 1
    if not there:
        raise ValueError(f"device {name} was asked for, but torch sees no GPU here")
    if (device.index or 0) >= there:
        raise ValueError(f"device {name} was asked for, but torch sees {there} of its kind here")
    return device
