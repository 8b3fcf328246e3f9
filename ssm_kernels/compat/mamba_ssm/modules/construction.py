"""Device and dtype of a module under construction."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

# A recurrence is sensitive to the rounding of A; the original holds these two in float32.
_AT_LEAST_FLOAT32 = ("A_log", "D")


def on_device(device: torch.device | str | None) -> contextlib.AbstractContextManager:
    """Return a context in which new tensors are on `device`, or on PyTorch's default where it is None."""
    return contextlib.nullcontext() if device is None else torch.device(device)


def cast_parameters(
    module: nn.Module, dtype: torch.dtype | None, at_least_float32: tuple[str, ...] = _AT_LEAST_FLOAT32
) -> None:
    """Cast parameters to `dtype`, those of `at_least_float32` no lower; None casts nothing."""
    if dtype is not None:
        for name, parameter in module.named_parameters():
            wide = torch.promote_types(dtype, torch.float32)
            parameter.data = parameter.data.to(wide if name in at_least_float32 else dtype)
