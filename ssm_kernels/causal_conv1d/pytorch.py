"""The causal convolution in fast PyTorch, on any device, with its own backward.

All sequences are concatenated, each after its K - 1 earlier inputs; padding is left out. One shifted multiply-add per
tap then serves every sequence. No window of a wanted output leaves its sequence, and the last K - 1 inputs of a
sequence are its final state, however short it is. The backward recomputes the sums.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._core.invariant import silu as invariant_silu
from .._core.invariant import silu_backward
from .._core.library import Gradient, define_op
from .._core.slots import StepPlan, step_by_slots
from .._core.stream_cache import cached_per_stream
from .._core.transforms import Fold, backward_formula, transformable
from .._core.varlen import parse_sequences
from . import differentiable


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Convolve with arguments in the canonical form of `reference.causal_conv1d`, and the same results."""
    y, final_states = _conv(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx)
    return y.to(x.dtype), final_states.to(x.dtype)


def causal_conv1d_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, plan: StepPlan | None
) -> Tensor:
    """Advance by one step: state (B, K - 1, D), updated in place; x (M, D) -> y (M, D)."""
    if plan is not None:

        def step(h: Tensor, x: Tensor) -> Tensor:
            return causal_conv1d_step(h, x, weight, bias, silu, None)

        return step_by_slots(step, state, plan, torch.zeros_like(x), (x,))
    dtype = torch.promote_types(x.dtype, torch.float32)
    window = torch.cat([state, x.unsqueeze(1).to(state.dtype)], dim=1)  # (B, K, D)
    y = (window.to(dtype) * weight.to(dtype).T).sum(1)  # (B, D)
    if bias is not None:
        y = y + bias
    state.copy_(window[:, 1:])
    return (invariant_silu(y) if silu else y).to(x.dtype)


class _Concatenation:
    """The layout of all sequences in one (M, D) tensor, each after its K - 1 earlier inputs. T steps in sequences."""

    def __init__(self, x: Tensor, width: int, cu_seqlens: Tensor | None, seq_idx: Tensor | None):
        sequences = parse_sequences(x.shape[0], x.shape[1], cu_seqlens, seq_idx)
        self.length = sum(sequences.lengths) + len(sequences.lengths) * (width - 1)  # M
        has_padding = sequences.has_padding(x.shape[0] * x.shape[1])
        # (T,) rows of the flattened (B * L) tensor that are no padding.
        self.source_rows = sequences.positions(x.device) if has_padding else None
        self.steps, earlier, last = _positions(sequences.lengths, width, x.device)  # (T,), (S, K - 1), (S, K - 1)
        initial, final = sequences.state_indices(x.device)
        self.initial_states, self.final_states = earlier[initial], last[final]  # (rows, K - 1)

    def gather(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (T, D) without padding."""
        rows = x.flatten(0, 1)
        return rows if self.source_rows is None else rows.index_select(0, self.source_rows)

    def scatter(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """(T, D) -> (B, L, D), zero in padding."""
        if self.source_rows is None:
            return rows.view(shape)
        padded = rows.new_zeros(shape)
        padded.view(-1, shape[2]).index_copy_(0, self.source_rows, rows)
        return padded

    def inputs(self, x: Tensor, initial_states: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Concatenate x (B, L, D) and the initial states (rows, K - 1, D): (M, D), zero where no state is before."""
        inputs = x.new_zeros(self.length, x.shape[2], dtype=dtype)
        inputs.index_copy_(0, self.steps, self.gather(x).to(dtype))
        if initial_states is not None:
            inputs[self.initial_states] = initial_states.to(dtype)
        return inputs


@cached_per_stream(maxsize=64)
def _positions(lengths: tuple[int, ...], width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of all steps (T,), and of the K - 1 inputs before and at the end of each sequence (S, K - 1)."""
    offsets = torch.tensor(list(itertools.accumulate((n + width - 1 for n in lengths), initial=0))[:-1])
    offsets, n_steps = offsets.to(torch.int64), torch.tensor(lengths, dtype=torch.int64)  # (S,)
    window = torch.arange(width - 1)
    earlier, last = offsets[:, None] + window, (offsets + n_steps)[:, None] + window  # (S, K - 1)
    skipped = torch.arange(1, len(lengths) + 1) * (width - 1)
    steps = torch.arange(sum(lengths)) + skipped.repeat_interleave(n_steps)  # (T,)
    return steps.to(device), earlier.to(device), last.to(device)


def _sums(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve the concatenation (M, D): (M - K + 1, D), row i from inputs i to i + K - 1."""
    n = max(len(inputs) - weight.shape[1] + 1, 0)
    taps = weight.T.contiguous()  # (K, D)
    out = inputs[:n] * taps[0] if bias is None else torch.addcmul(bias, inputs[:n], taps[0])
    for k in range(1, len(taps)):
        out.addcmul_(inputs[k : k + n], taps[k])
    return out


def _forward(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx):
    dtype = torch.promote_types(x.dtype, torch.float32)
    width = weight.shape[1]
    layout = _Concatenation(x, width, cu_seqlens, seq_idx)
    inputs = layout.inputs(x, initial_states, dtype)  # (M, D)
    sums = _sums(inputs, weight.to(dtype), None if bias is None else bias.to(dtype))
    y = sums.index_select(0, layout.steps - (width - 1))  # (T, D)
    return layout.scatter(invariant_silu(y) if silu else y, x.shape), inputs[layout.final_states]


def _backward(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx, dy, dfinal_states):
    dtype = torch.promote_types(x.dtype, torch.float32)
    width = weight.shape[1]
    layout = _Concatenation(x, width, cu_seqlens, seq_idx)
    inputs = layout.inputs(x, initial_states, dtype)  # (M, D)
    taps = weight.to(dtype)
    outputs = layout.steps - (width - 1)  # (T,) rows of the sums that are outputs

    dy = layout.gather(dy)  # (T, D)
    if silu:
        sums = _sums(inputs, taps, None if bias is None else bias.to(dtype)).index_select(0, outputs)
        dy = silu_backward(dy, sums)
    dsums = dy.new_zeros(max(layout.length - width + 1, 0), x.shape[2]).index_copy_(0, outputs, dy)
    n = len(dsums)
    dinputs = torch.zeros_like(inputs)  # (M, D)
    for k in range(width):
        dinputs[k : k + n].addcmul_(dsums, taps[:, k])
    dweight = torch.stack([(dsums * inputs[k : k + n]).sum(0) for k in range(width)], dim=1)  # (D, K)
    dinputs.index_put_((layout.final_states,), dfinal_states.to(dtype), accumulate=True)

    dx = layout.scatter(dinputs.index_select(0, layout.steps), x.shape)  # (B, L, D)
    dbias = dy.sum(0) if bias is None else dy.sum(0).to(bias.dtype)
    dinitial_states = dinputs[layout.initial_states]
    if initial_states is not None:
        dinitial_states = dinitial_states.to(initial_states.dtype)
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias, dinitial_states


def _forward_fake(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx):
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(rows, weight.shape[1] - 1, x.shape[2], dtype=dtype)


def _backward_fake(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx, dy, dfinal_states):
    dbias = dy.new_empty(x.shape[2]) if bias is None else torch.empty_like(bias)
    dinitial_states = (
        dfinal_states.new_empty(dfinal_states.shape)
        if initial_states is None
        else initial_states.new_empty(dfinal_states.shape)
    )
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dinitial_states


def _formula(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    names = ("weight", "bias", "silu", "initial_states", "cu_seqlens", "seq_idx")
    y, final_states = differentiable.causal_conv1d(arguments["x"].unsqueeze(2), *(arguments[name] for name in names))
    return y.squeeze(2), final_states


def _save(ctx, inputs, outputs):
    x, weight, bias, ctx.silu, initial_states, cu_seqlens, seq_idx = inputs
    ctx.save_for_backward(x, weight, bias, initial_states, cu_seqlens, seq_idx)


def _gradients(ctx, dy, dfinal_states):
    x, weight, bias, initial_states, cu_seqlens, seq_idx = ctx.saved_tensors
    dx, dweight, dbias, dinitial_states = _backward_conv(
        x, weight, bias, ctx.silu, initial_states, cu_seqlens, seq_idx, dy, dfinal_states
    )
    return {
        "x": dx,
        "weight": dweight,
        "bias": None if bias is None else dbias,
        "initial_states": None if initial_states is None else dinitial_states,
    }


_GRADIENTS = ("x", "weight", "bias", "initial_states")
_FOLDED = {"x": -1, "weight": -2, "bias": -1, "initial_states": -1, "dy": -1, "dfinal_states": -1}
"""Dimension of channels of each tensor."""

_gradient = Gradient(_save, _gradients, _formula, 2)
_forward_op = define_op(
    "causal_conv1d_torch(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_states,"
    " Tensor? cu_seqlens, Tensor? seq_idx) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _gradient,
)
_backward_op = define_op(
    "causal_conv1d_torch_backward(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_states,"
    " Tensor? cu_seqlens, Tensor? seq_idx, Tensor dy, Tensor dfinal_states) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_conv = transformable(_forward_op, Fold(_FOLDED, ("x", "initial_states")), _gradient)
_backward_conv = transformable(
    _backward_op, Fold(_FOLDED, _GRADIENTS), backward_formula(_formula, _GRADIENTS, ("dy", "dfinal_states"))
)
