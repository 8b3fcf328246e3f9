"""Parameters of the mixers: initial values, marks for training code, and whether an op may read a layer's weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module


def without_weight_decay(value: Tensor) -> nn.Parameter:
    """Make a parameter with the mark that training code written for `mamba_ssm` looks for.

    Args:
        value: initial value.

    Returns:
        a parameter whose `_no_weight_decay` is True.
    """
    parameter = nn.Parameter(value)
    parameter._no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue]
    return parameter


def initial_dt_bias(shape: tuple[int, ...], dt_min: float, dt_max: float, floor: float) -> Tensor:
    """Draw the initial bias of the step sizes (arXiv 2312.00752, section 3.6).

    Args:
        shape: shape of the result, one entry for each channel or head.
        dt_min, dt_max: range from which step sizes are drawn log-uniformly.
        floor: least step size.

    Returns:
        the inverse softplus of the step sizes.
    """
    dt = torch.exp(torch.rand(shape) * math.log(dt_max / dt_min) + math.log(dt_min)).clamp(min=floor)
    # softplus^-1(dt) = log(exp(dt) - 1) = dt + log(1 - exp(-dt)), the form that keeps small steps exact
    return dt + torch.log(-torch.expm1(-dt))


def decay_rate(A_log: Tensor) -> Tensor:
    """Return A = -exp(A_log), in float32, or float64 where the parameter is.

    Args:
        A_log: parameter of any shape.

    Returns:
        the decay rate, negative, of that shape.
    """
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module runs `kind.forward` and nothing else, so that an op may read its weights instead.

    A parametrisation is computed whenever its weight is read, and does no harm.

    Args:
        module: the layer.
        kind: class whose `forward` the op replaces.

    Returns:
        False for an adapter or a quantized layer that replaces the layer, and with hooks.
    """
    return type(module).forward is kind.forward and not call_extras(module) and not torch_module._has_any_global_hook()


def call_extras(module: nn.Module) -> str | None:
    """Name what a call of the module runs besides the `forward` of its class, or return None."""
    if "forward" in module.__dict__:
        return "a forward of its own"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "hooks"
    return None
