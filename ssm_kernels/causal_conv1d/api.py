"""Causal depthwise convolution over time, as in the Mamba mixers (arXiv 2312.00752, figure 3)."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from .._core.dispatch import Backend, resolve_backend
from .._core.library import grad_off
from .._core.sharding import shardable
from .._core.slots import StateSlots, plan_step
from .._core.validation import check_tensor
from .._core.varlen import check_packing
from . import numba, pytorch, reference, triton


class CausalConv1dOutput(NamedTuple):
    """The result of `causal_conv1d`."""

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

    Letters: B batch, L length, D channels, K taps, S sequences in a pack.

    Args:
        x: (B, L, D) input, preceded by `initial_states`, or by zeros.
        weight: (D, K) taps; `weight[:, -1]` multiplies the current step.
        bias: (D,).
        activation: None or `"silu"`.
        initial_states: (B, K - 1, D) inputs before the first step, in order of time; (S, K - 1, D) with `cu_seqlens`.
        cu_seqlens: (S + 1,) int32 or int64 boundaries of packed sequences; needs batch 1. No window crosses a
            boundary. Steps after the last boundary are padding.
        seq_idx: (B, L) int32 or int64; a new sequence starts where the number changes, and steps with a negative
            number are padding. The initial state is that of each row's first sequence, the final state that of its
            last; the final state of a row of padding alone is its initial state.
        backend: see `ssm_kernels.use_backend`.

    Returns:
        y (B, L, D) and the final states, both in the dtype of `x`. y is zero in padding, and no state and no gradient
        depends on what the inputs hold there.

    Inputs may be float64, float32, bfloat16 or float16, and of any strides. Sums are float32 (float64 where `x` is),
    under autocast too. Gradients flow to every floating-point argument.

    Raises:
        TypeError: an argument is not a tensor or has a dtype that is not supported.
        ValueError: a shape, device or value does not fit; the message names the argument.
        RuntimeError: `backend` was chosen by name and cannot run here.
    """
    check_tensor("x", x, ("B", "L", "D"))
    check_packing(x.shape[0], x.shape[1], cu_seqlens, seq_idx)
    _check_weights(x, weight, bias, activation)
    if initial_states is not None:
        rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        check_tensor("initial_states", initial_states, (rows, weight.shape[1] - 1, x.shape[2]), like=x)
    chosen = resolve_backend(backend, x.device, "causal_conv1d")
    conv = {
        "triton": triton.causal_conv1d,
        "numba": numba.causal_conv1d,
        "torch": pytorch.causal_conv1d,
        "reference": reference.causal_conv1d,
    }[chosen]
    y, final_states = conv(x, weight, bias, activation == "silu", initial_states, cu_seqlens, seq_idx)
    return CausalConv1dOutput(y, final_states)


def causal_conv1d_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Literal["silu"] | None = None,
    *,
    slots: StateSlots | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Advance the convolution by one token, or by a few, for decoding. No gradients.

    Args:
        state: (B, K - 1, D) the last inputs, of any floating-point dtype; with `slots` a pool with the slots first.
            **Updated in place**.
        x: (B, D), or (B, T, D) for T tokens.
        weight, bias, activation: as in `causal_conv1d`.
        slots: slots of `state` that each sequence reads and writes; row b reads and writes state b by default.
        backend: see `ssm_kernels.use_backend`.

    Returns:
        y of the shape and dtype of `x`.

    Raises:
        TypeError, ValueError, RuntimeError: as `causal_conv1d`.
    """
    is_single = isinstance(x, Tensor) and x.dim() == 2
    check_tensor("x", x, ("B", "D") if is_single else ("B", "T", "D"))
    _check_weights(x, weight, bias, activation)
    batch, tokens = (x.shape[0], 1) if is_single else x.shape[:2]
    rows = batch if slots is None else "slots"
    check_tensor("state", state, (rows, weight.shape[1] - 1, x.shape[-1]), like=x)
    plan = plan_step(slots, state, batch, tokens)
    chosen = resolve_backend(backend, x.device, "causal_conv1d")
    step = {
        "triton": triton.causal_conv1d_step,
        "numba": numba.causal_conv1d_step,
        "torch": pytorch.causal_conv1d_step,
        "reference": reference.causal_conv1d_step,
    }[chosen]
    with grad_off():
        y = step(state, x if is_single else x.flatten(0, 1), weight, bias, activation == "silu", plan)  # (M, D)
    return y if is_single else y.unflatten(0, (batch, tokens))


def _check_weights(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    check_tensor("weight", weight, (x.shape[-1], "K"), like=x)
    if weight.shape[1] < 1:
        raise ValueError(f"weight must have a width K of at least 1, got shape {tuple(weight.shape)}")
    if bias is not None:
        check_tensor("bias", bias, (x.shape[-1],), like=x)
    check_activation(activation)


def check_activation(activation: str | None) -> None:
    """Check the name of an activation.

    Raises:
        ValueError: it is neither None nor `"silu"`.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")
