"""Causal depthwise convolution over time, as in the Mamba mixers (arXiv 2312.00752, figure 3)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._core.dispatch import Backend, resolve_backend
from .._core.invariant import silu
from .._core.sharding import shardable
from .._core.validation import check_tensor
from .._core.varlen import check_packing
from . import numba, pytorch, reference, triton


class CausalConv1dOutput(NamedTuple):
    """What `causal_conv1d` gives."""

    y: Tensor
    """(B, L, D) in the dtype of `x`."""
    final_states: Tensor
    """(B, K - 1, D), or (S, K - 1, D) with `cu_seqlens`: the last inputs, in the dtype of `x`."""


@shardable
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Literal["silu"] | None = None,
    initial_states: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: Backend = "auto",
) -> CausalConv1dOutput:
    """Convolve each channel over time: `y_t = act(bias + sum_k weight_k x_{t - K + 1 + k})`.

    Letters: B batch, L length, D channels, K width of the window, S sequences in a pack.

    Args:
        x: (B, L, D) input; before its first step stand the `initial_states`, or zeros.
        weight: (D, K); `weight[:, -1]` meets the present step.
        bias: (D,).
        activation: None or `"silu"`.
        initial_states: (B, K - 1, D) inputs before the first step, in order of time; (S, K - 1, D) with `cu_seqlens`.
        cu_seqlens: (S + 1,) int32 or int64 bounds of packed sequences; needs batch 1. No window crosses a bound.
            Steps after the last bound are padding.
        seq_idx: (B, L) int32 or int64; a new sequence starts where the number changes, and steps with a negative
            number are padding. The initial state is that of each row's first sequence, the final state that of its
            last; a row of padding alone ends as it starts.
        backend: see `ssm_kernels.use_backend`.

    Padding belongs to no sequence: y is zero there, and no state and no gradient depends on what the inputs hold there.

    Inputs may be float64, float32, bfloat16 or float16, and of any strides. Sums are float32 (float64 where `x`
    is), under autocast too. Gradients flow to every floating-point argument.

    Raises:
        TypeError: an argument is not a tensor or has a dtype that is not supported.
        ValueError: a shape, device or value does not fit; the message names the argument.
        RuntimeError: `backend` was chosen by name and cannot run here.
    """
    check_tensor("x", x, ("B", "L", "D"))
    check_packing(*x.shape[:2], cu_seqlens, seq_idx)
    _check_weights(x, weight, bias, activation)
    if initial_states is not None:
        rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        check_tensor("initial_states", initial_states, (rows, weight.shape[1] - 1, x.shape[2]), like=x)
    chosen = resolve_backend(backend, x.device, "causal_conv1d")
    if chosen == "triton":
        y, final_states = triton.conv(
            x.unsqueeze(2), weight, bias, activation == "silu", initial_states, cu_seqlens, seq_idx
        )
        return CausalConv1dOutput(y.squeeze(2), final_states)
    conv = {"numba": numba.conv, "torch": pytorch.conv, "reference": reference.conv}[chosen]
    y, final_states = conv(x, weight, bias, activation == "silu", initial_states, cu_seqlens, seq_idx)
    return CausalConv1dOutput(y.to(x.dtype), final_states.to(x.dtype))


def causal_conv1d_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Literal["silu"] | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Advance the convolution by one step, for decoding. Gives y (B, D) in the dtype of `x`; no gradients.

    Args:
        state: (B, K - 1, D) the last inputs; **updated in place**.
        x: (B, D). The rest as in `causal_conv1d`.
        backend: see `ssm_kernels.use_backend`.

    Raises:
        TypeError, ValueError, RuntimeError: as `causal_conv1d`.
    """
    check_tensor("x", x, ("B", "D"))
    _check_weights(x, weight, bias, activation)
    check_tensor("state", state, (x.shape[0], weight.shape[1] - 1, x.shape[1]), like=x)
    chosen = resolve_backend(backend, x.device, "causal_conv1d")
    if chosen in ("triton", "numba"):
        conv_step = {"triton": triton.conv_step, "numba": numba.conv_step}[chosen]
        with torch.no_grad():
            return conv_step(state, x, weight, bias, activation == "silu")
    compute = torch.promote_types(x.dtype, torch.float32)
    with torch.no_grad():
        window = torch.cat([state, x.unsqueeze(1).to(state.dtype)], dim=1)  # (B, K, D)
        y = (window.to(compute) * weight.to(compute).T).sum(1)
        if bias is not None:
            y = y + bias
        state.copy_(window[:, 1:])
        return (silu(y) if activation == "silu" else y).to(x.dtype)


def _check_weights(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    check_tensor("weight", weight, (x.shape[-1], "K"), like=x)
    if weight.shape[1] < 1:
        raise ValueError(f"weight must have a width K of at least 1, got shape {tuple(weight.shape)}")
    if bias is not None:
        check_tensor("bias", bias, (x.shape[-1],), like=x)
    check_activation(activation)


def check_activation(activation: str | None) -> None:
    """Raise a ValueError unless it is one of the names that `causal_conv1d` takes."""
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")
