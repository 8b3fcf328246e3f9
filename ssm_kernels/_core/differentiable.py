"""Parts of the formulas of the scans and the convolution: PyTorch operations alone, which any transform takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .varlen import parse_sequences


def linear_recurrence(decay: Tensor, inputs: Tensor, initial: Tensor) -> Tensor:
    """Compute `h_t = decay_t h_{t-1} + inputs_t` in O(T) work and O(log T) operations.

    Args:
        decay: (S, T, ...), broadcast over `inputs`.
        inputs: (S, T, ...).
        initial: (S, ...) state before the first step.

    Returns:
        (S, T, ...) the state after each step.
    """
    if inputs.shape[1] == 0:
        return inputs
    first = torch.addcmul(inputs[:, :1], decay[:, :1], initial.unsqueeze(1))
    return _scan(decay, torch.cat([first, inputs[:, 1:]], 1))


def _scan(decay: Tensor, inputs: Tensor) -> Tensor:
    """Scan from a state of zero: the states after steps 1, 3, ... are a scan over pairs of steps."""
    steps = inputs.shape[1]
    if steps == 1:
        return inputs
    end = steps // 2 * 2
    pair_decay = decay[:, 0:end:2] * decay[:, 1:end:2]  # (S, T / 2, ...)
    pair_inputs = decay[:, 1:end:2] * inputs[:, 0:end:2] + inputs[:, 1:end:2]
    odd = _scan(pair_decay, pair_inputs)
    before = odd[:, : (steps - 1) // 2]  # the states before steps 2, 4, ...
    even = torch.cat([inputs[:, :1], decay[:, 2::2] * before + inputs[:, 2::2]], 1)
    states = torch.stack([even[:, : end // 2], odd], 2).flatten(1, 2)  # (S, end, ...)
    return states if end == steps else torch.cat([states, even[:, -1:]], 1)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), accurate for x of any size, and so are its derivatives."""
    return -F.logsigmoid(-x)


class PaddedSequences:
    """Sequences side by side, (S, T, ...): each is padded to the longest.

    Args:
        x: (B, L, ...) input.
        cu_seqlens, seq_idx: as in the ops.

    Raises:
        RuntimeError: `cu_seqlens` or `seq_idx` is vmapped.
    """

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None, seq_idx: Tensor | None):
        self.batch, self.length = x.shape[:2]
        self.is_packed = cu_seqlens is not None or seq_idx is not None
        if not self.is_packed:
            self.lengths = torch.full((self.batch,), self.length, device=x.device)
            return
        sequences = parse_sequences(
            self.batch, self.length, _values("cu_seqlens", cu_seqlens), _values("seq_idx", seq_idx)
        )
        starts, self.lengths = (torch.tensor(t, dtype=torch.int64) for t in (sequences.starts, sequences.lengths))
        step = torch.arange(max(sequences.lengths, default=0))
        is_step = step < self.lengths[:, None]  # (S, T)
        positions = starts[:, None] + step  # (S, T)
        n_positions = self.batch * self.length
        # One past the end is a row of zeros.
        self.positions = torch.where(is_step, positions, n_positions).to(x.device)
        entries = torch.full((n_positions,), is_step.numel())
        entries[positions[is_step]] = torch.arange(is_step.numel()).view_as(is_step)[is_step]
        self.entries = entries.to(x.device)  # (B * L,)
        initial_rows = torch.full((len(starts),), len(sequences.initial_sequences))
        initial_rows[list(sequences.initial_sequences)] = torch.arange(len(sequences.initial_sequences))
        self.initial_rows = initial_rows.to(x.device)  # (S,)
        self.final_sequences = torch.tensor(sequences.final_sequences, dtype=torch.int64, device=x.device)
        self.lengths = self.lengths.to(x.device)

    def gather(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (S, T, ...), zero where a sequence has no step."""
        return _with_zeros(x.flatten(0, 1))[self.positions] if self.is_packed else x

    def scatter(self, y: Tensor) -> Tensor:
        """(S, T, ...) -> (B, L, ...), zero in padding."""
        if not self.is_packed:
            return y
        return _with_zeros(y.flatten(0, 1))[self.entries].unflatten(0, (self.batch, self.length))

    def has_step(self, like: Tensor) -> Tensor:
        """Return a mask (S, T, 1, ...) of as many dimensions as `like`."""
        steps = torch.arange(like.shape[1], device=like.device)
        return (steps < self.lengths[:, None]).view(*like.shape[:2], *[1] * (like.dim() - 2))

    def initial(self, rows: Tensor) -> Tensor:
        """(rows, ...) of initial states -> (S, ...) of all sequences, zero for one without."""
        return _with_zeros(rows)[self.initial_rows] if self.is_packed else rows

    def final(self, states: Tensor) -> Tensor:
        """(S, ...) -> (rows, ...) of final states."""
        return states[self.final_sequences] if self.is_packed else states


def _values(name: str, x: Tensor | None) -> Tensor | None:
    """Return the plain tensor inside one that transforms have wrapped."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    while x is not None and functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            raise RuntimeError(
                f"{name} is vmapped in forward-mode AD or a second derivative, where all samples must be packed alike:"
                f" got a {name} for each of them; call the op for each sample"
            )
        x = functorch.get_unwrapped(x)
    return x


def _with_zeros(x: Tensor) -> Tensor:
    """Append a row of zeros."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])


def steps_along(directions: Sequence[int], height: int, length: int, device: torch.device) -> Tensor:
    """Return the position of each step along each direction, (L, K); the codes are indices in `cross_scan.CROSS`."""
    rows = torch.arange(length, device=device)
    columns = rows.view(height, -1).T.flatten() if length else rows
    orders = (rows, columns, rows.flip(0), columns.flip(0))
    return torch.stack([orders[code] for code in directions], 1)


def take_steps(x: Tensor, positions: Tensor) -> Tensor:
    """x (B, L, K, ...), positions (L, K) -> the steps of each of the K slices at its own positions, (B, L, K, ...)."""
    return x[:, positions, torch.arange(x.shape[2], device=x.device)]
