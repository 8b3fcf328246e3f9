"""RMSNorm with a gate (arXiv 2405.21060, section 7) and RMSNorm fused with the residual add before it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._core.dispatch import Backend, resolve_backend
from .._core.validation import check_divides, check_integer, check_tensor
from . import numba, pytorch, reference, triton


class AddRMSNormOutput(NamedTuple):
    """The result of `add_rms_norm`."""

    y: Tensor
    """(..., D) the normalized sum, in the dtype of `x`."""
    residual: Tensor
    """(..., D) the sum, in `residual_dtype`; `x` itself where nothing is added and it has that dtype. The backward may
    read it, so autograd raises after it was changed in place."""


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    z: Tensor | None = None,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Normalize: `x / sqrt(mean(x^2) + eps) * weight`, with an optional gate `silu(z)`.

    Args:
        x: (..., D).
        weight: (D,).
        z: (..., D) gate. It multiplies `x` before the norm, or the result where `norm_before_gate`.
        eps: added to the mean square.
        group_size: channels that are normalized together, a divisor of D; all D by default.
        norm_before_gate: see `z`.
        backend: see `ssm_kernels.use_backend`.

    Returns:
        (..., D) in the dtype of `x`. It is computed in float32 (float64 where `x` is), under autocast too.

    Raises:
        TypeError: an argument is not a tensor or has a dtype that is not supported.
        ValueError: a shape, device or value does not fit; the message names the argument.
        RuntimeError: `backend` was chosen by name and cannot run here.
    """
    _check(x, weight, eps)
    if z is not None:
        check_tensor("z", z, tuple(x.shape), like=x)
    group_size = x.shape[-1] if group_size is None else check_integer("group_size", group_size, 1)
    check_divides("group_size", group_size, "D", x.shape[-1])
    chosen = resolve_backend(backend, x.device, "rms_norm")
    norm = {
        "triton": triton.rms_norm,
        "numba": numba.rms_norm,
        "torch": pytorch.rms_norm,
        "reference": reference.rms_norm,
    }[chosen]
    return norm(x, weight, z, eps, group_size, norm_before_gate)


def add_rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> AddRMSNormOutput:
    """Add `x` to the residual stream and normalize the sum: the step between two layers.

    Args:
        x: (..., D) output of the layer before.
        weight: (D,).
        residual: (..., D) the residual stream; None before the first layer.
        eps: added to the mean square.
        residual_dtype: dtype of the sum; that of `residual`, or of `x` without one, by default.
        backend: see `ssm_kernels.use_backend`.

    Returns:
        The normalized sum and the sum.

    Raises:
        TypeError, ValueError, RuntimeError: as `rms_norm`.
    """
    _check(x, weight, eps)
    if residual is not None:
        check_tensor("residual", residual, tuple(x.shape), like=x)
    if residual_dtype is None:
        residual_dtype = x.dtype if residual is None else residual.dtype
    chosen = resolve_backend(backend, x.device, "add_rms_norm")
    add_norm = {
        "triton": triton.add_rms_norm,
        "numba": numba.add_rms_norm,
        "torch": pytorch.add_rms_norm,
        "reference": reference.add_rms_norm,
    }[chosen]
    return AddRMSNormOutput(*add_norm(x, residual, weight, eps, residual_dtype))


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    if isinstance(x, Tensor) and x.dim() == 0:
        raise ValueError("x must have shape (..., D), got a scalar")
    check_tensor("x", x, tuple(x.shape) if isinstance(x, Tensor) else ())
    check_tensor("weight", weight, (x.shape[-1],), like=x)
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
