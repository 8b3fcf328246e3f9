"""Parameters of the mixers: initial values, marks for training code, and whether an op may read a layer's weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module


def without_weight_decay(value: Tensor) -> nn.Parameter:
    """Return a parameter with the mark that training code written for `mamba_ssm` looks for."""
    parameter = nn.Parameter(value)
    parameter._no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue]
    return parameter


def initial_dt_bias(shape: tuple[int, ...], dt_min: float, dt_max: float, floor: float) -> Tensor:
    """Return the inverse softplus of step sizes drawn log-uniformly from [dt_min, dt_max], at least `floor`."""
    dt = torch.exp(torch.rand(shape) * math.log(dt_max / dt_min) + math.log(dt_min)).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module runs `kind.forward` and nothing else, so that an op may read its weights instead.

    False for an adapter or a quantised layer that replaces it, and with hooks. A parametrisation is computed whenever
    its weight is read, and does no harm.
    """
    return type(module).forward is kind.forward and not call_extras(module) and not torch_module._has_any_global_hook()


def call_extras(module: nn.Module) -> str | None:
    """Name what a call of the module runs besides the `forward` of its class, or return None."""
    if "forward" in module.__dict__:
        return "a forward of its own"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "hooks"
    return None
