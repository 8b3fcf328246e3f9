"""The causal convolution in pure PyTorch at speed, on any device.

All sequences are laid one after the other, each with its K - 1 earlier inputs before it; padding is left out.
Then one shifted multiply-add a tap serves every sequence, no window of a wanted output leaves its sequence, and the
last K - 1 inputs of a sequence are its final state, however short it is. The backward computes the sums again.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from .._core.invariant import silu as _silu
from .._core.invariant import silu_backward
from .._core.library import Gradient, define_op
from .._core.varlen import parse_sequences


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x (B, L, D); weight (D, K) -> y (B, L, D) and the last inputs of each sequence (rows, K - 1, D)."""
    return _forward_op(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx)


class _Line:
    """Where everything stands on the line of all sequences with their earlier inputs, M positions long."""

    def __init__(self, x: Tensor, width: int, cu_seqlens: Tensor | None, seq_idx: Tensor | None):
        sequences = parse_sequences(*x.shape[:2], cu_seqlens, seq_idx)
        self.length = sum(sequences.lengths) + len(sequences.lengths) * (width - 1)
        has_gaps = bool(sequences.padding_runs(x.shape[0] * x.shape[1]))
        self.positions = sequences.positions(x.device) if has_gaps else None
        self.inputs, self.before, self.after = _positions(sequences.lengths, width, x.device)
        first, last = sequences.state_indices(x.device)
        self.before, self.after = self.before[first], self.after[last]  # (rows, K - 1)

    def take(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (T, D) without padding."""
        rows = x.flatten(0, 1)
        return rows if self.positions is None else rows.index_select(0, self.positions)

    def put(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """(T, D) -> (B, L, D), zero in padding."""
        if self.positions is None:
            return rows.view(shape)
        padded = rows.new_zeros(shape)
        padded.view(-1, shape[2]).index_copy_(0, self.positions, rows)
        return padded


@functools.lru_cache(maxsize=64)
def _positions(lengths: tuple[int, ...], width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of each input (T,), and of the K - 1 inputs before and at the end of each sequence (S, K - 1)."""
    begins = torch.tensor(list(itertools.accumulate((n + width - 1 for n in lengths), initial=0))[:-1])
    begins, n = begins.to(torch.int64), torch.tensor(lengths, dtype=torch.int64)
    window = torch.arange(width - 1)
    before, after = begins[:, None] + window, (begins + n)[:, None] + window
    total = sum(lengths)
    inputs = torch.arange(total) + (torch.arange(1, len(lengths) + 1) * (width - 1)).repeat_interleave(n)
    return inputs.to(device), before.to(device), after.to(device)


def _lay_out(line: _Line, x: Tensor, initial_states: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The inputs and what stands before them, (M, D)."""
    out = x.new_zeros(line.length, x.shape[2], dtype=dtype)
    out.index_copy_(0, line.inputs, line.take(x).to(dtype))
    if initial_states is not None:
        out[line.before] = initial_states.to(dtype)
    return out


def _sums(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of the whole line, (M - K + 1, D): entry i from inputs i to i + K - 1."""
    n = max(len(inputs) - weight.shape[1] + 1, 0)
    taps = weight.T.contiguous()  # (K, D)
    out = inputs[:n] * taps[0] if bias is None else torch.addcmul(bias, inputs[:n], taps[0])
    for k in range(1, len(taps)):
        out.addcmul_(inputs[k : k + n], taps[k])
    return out


def _forward(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx):
    dtype = torch.promote_types(x.dtype, torch.float32)
    width = weight.shape[1]
    line = _Line(x, width, cu_seqlens, seq_idx)
    inputs = _lay_out(line, x, initial_states, dtype)
    sums = _sums(inputs, weight.to(dtype), None if bias is None else bias.to(dtype))
    y = sums.index_select(0, line.inputs - (width - 1))  # (T, D)
    return line.put(_silu(y) if silu else y, x.shape), inputs[line.after]


def _backward(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx, dy, dfinal):
    dtype = torch.promote_types(x.dtype, torch.float32)
    width = weight.shape[1]
    line = _Line(x, width, cu_seqlens, seq_idx)
    inputs = _lay_out(line, x, initial_states, dtype)
    taps = weight.to(dtype)
    at = line.inputs - (width - 1)

    dy = line.take(dy)
    if silu:
        sums = _sums(inputs, taps, None if bias is None else bias.to(dtype)).index_select(0, at)
        dy = silu_backward(dy, sums)
    dsums = dy.new_zeros(max(line.length - width + 1, 0), x.shape[2]).index_copy_(0, at, dy)
    n = len(dsums)
    dinputs = torch.zeros_like(inputs)
    for k in range(width):
        dinputs[k : k + n].addcmul_(dsums, taps[:, k])
    dweight = torch.stack([(dsums * inputs[k : k + n]).sum(0) for k in range(width)], dim=1)
    dinputs.index_put_((line.after,), dfinal.to(dtype), accumulate=True)

    dx = line.put(dinputs.index_select(0, line.inputs), x.shape)
    dbias = dy.sum(0) if bias is None else dy.sum(0).to(bias.dtype)
    dinitial = dinputs[line.before]
    if initial_states is not None:
        dinitial = dinitial.to(initial_states.dtype)
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias, dinitial


def _forward_fake(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx):
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(rows, weight.shape[1] - 1, x.shape[2], dtype=dtype)


def _backward_fake(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx, dy, dfinal):
    dbias = dy.new_empty(x.shape[2]) if bias is None else torch.empty_like(bias)
    dinitial = dfinal.new_empty(dfinal.shape) if initial_states is None else initial_states.new_empty(dfinal.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dinitial


def _save(ctx, inputs, outputs):
    x, weight, bias, ctx.silu, initial_states, cu_seqlens, seq_idx = inputs
    ctx.save_for_backward(x, weight, bias, initial_states, cu_seqlens, seq_idx)


@torch.autograd.function.once_differentiable
def _gradients(ctx, dy, dfinal):
    x, weight, bias, initial_states, cu_seqlens, seq_idx = ctx.saved_tensors
    dx, dweight, dbias, dinitial = _backward_op(
        x, weight, bias, ctx.silu, initial_states, cu_seqlens, seq_idx, dy, dfinal
    )
    return {
        "x": dx,
        "weight": dweight,
        "bias": None if bias is None else dbias,
        "initial_states": None if initial_states is None else dinitial,
    }


_forward_op = define_op(
    "causal_conv1d_torch(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_states,"
    " Tensor? cu_seqlens, Tensor? seq_idx) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    Gradient(_save, _gradients, 2),
)
_backward_op = define_op(
    "causal_conv1d_torch_backward(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_states,"
    " Tensor? cu_seqlens, Tensor? seq_idx, Tensor dy, Tensor dfinal) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
