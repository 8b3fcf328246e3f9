"""Sequences of unequal length in one tensor, and the order in which a scan over time visits them.

Every op takes the bounds of sequences in one of two forms:

- `cu_seqlens` (S + 1,): the batch has one row, sequence s is `[cu_seqlens[s], cu_seqlens[s + 1])`;
- `seq_idx` (B, L): a number for each position; a new sequence starts where the number changes along a row.

Positions after the last of `cu_seqlens`, and those whose `seq_idx` is negative, are padding. They belong to no
sequence: outputs are zero there, and neither states nor gradients depend on what the inputs hold there.

Both become `Sequences`, which lists every sequence as a run of rows of the flattened (B * L) tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .stream_cache import cached_per_stream

_INTS = (torch.int32, torch.int64)


class Sequences(NamedTuple):
    """Sequences as runs of positions of a (B, L) tensor flattened to (B * L), in order; what is between is padding."""

    starts: tuple[int, ...]
    """(S,) first position of each sequence."""
    lengths: tuple[int, ...]
    """(S,) steps of each sequence."""
    initial_sequences: tuple[int, ...]
    """For each row of `initial_states`, the sequence that starts from it."""
    final_sequences: tuple[int, ...]
    """For each row of `final_states`, the sequence that ends in it."""

    def padding_runs(self, total: int) -> list[tuple[int, int]]:
        """Return the runs of padding among `total` positions: the first position, and the one after the last."""
        ends = [0, *(start + n for start, n in zip(self.starts, self.lengths, strict=True))]
        return [(end, start) for end, start in zip(ends, [*self.starts, total], strict=True) if end < start]

    def has_padding(self, total: int) -> bool:
        """Whether some of `total` positions belong to no sequence."""
        return sum(self.lengths) < total

    def positions(self, device: torch.device) -> Tensor:
        """Return every position of every sequence, in order, (T,) int64."""
        runs = [torch.arange(start, start + n) for start, n in zip(self.starts, self.lengths, strict=True)]
        return torch.cat(runs or [torch.arange(0)]).to(device)

    def state_indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return `initial_sequences` and `final_sequences` as int64 tensors."""
        initial, final = (
            torch.tensor(s, dtype=torch.int64, device=device) for s in (self.initial_sequences, self.final_sequences)
        )
        return initial, final


def parse_sequences(
    batch: int, length: int, cu_seqlens: Tensor | None = None, seq_idx: Tensor | None = None
) -> Sequences:
    """Check `cu_seqlens` or `seq_idx` and list the sequences; with neither, each batch row is one.

    With `cu_seqlens` there is a state per sequence. With `seq_idx` there is a state per batch row: the initial
    state belongs to the row's first sequence and the final state to its last, as in `mamba_ssm`. A row of nothing
    but padding has one sequence without steps, whose final state is its initial state.

    Args:
        batch, length: B and L.
        cu_seqlens: (S + 1,) int32 or int64, or None.
        seq_idx: (B, L) int32 or int64, or None.

    Raises:
        TypeError: the tensor is not of an integer type.
        ValueError: both are given, or the shape or the values do not describe sequences of this tensor.
    """
    check_packing(batch, length, cu_seqlens, seq_idx)
    if cu_seqlens is not None:
        bounds = _read_cu_seqlens(cu_seqlens, length)
        all_sequences = tuple(range(len(bounds) - 1))
        return Sequences(tuple(bounds[:-1]), _differences(bounds), all_sequences, all_sequences)
    if seq_idx is None or length == 0:
        rows = tuple(range(batch))
        return Sequences(tuple([b * length for b in rows]), (length,) * batch, rows, rows)

    # A sequence starts with each row, and where the number changes along it.
    is_start = torch.ones(batch, length, dtype=torch.bool, device=seq_idx.device)
    is_start[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    run_starts = is_start.flatten().nonzero().flatten()  # (runs,)
    is_padding = (seq_idx.flatten()[run_starts] < 0).tolist()
    bounds = [*run_starts.tolist(), batch * length]

    starts, lengths, initial_sequences, final_sequences = [], [], [], []
    for (start, end), padding in zip(itertools.pairwise(bounds), is_padding, strict=True):
        if start % length == 0:  # a new row
            initial_sequences.append(len(starts))
        if not padding:
            starts.append(start)
            lengths.append(end - start)
        if end % length == 0:  # the end of a row
            if len(starts) == initial_sequences[-1]:  # of padding alone
                starts.append(start // length * length)
                lengths.append(0)
            final_sequences.append(len(starts) - 1)
    return Sequences(tuple(starts), tuple(lengths), tuple(initial_sequences), tuple(final_sequences))


def _differences(bounds: list[int]) -> tuple[int, ...]:
    return tuple(b - a for a, b in itertools.pairwise(bounds))


def without_padding(x: Tensor, cu_seqlens: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """Return x (B, L, ...) with zeros where it is padding, without a host-device synchronization."""
    if seq_idx is not None:
        is_padding = seq_idx < 0  # (B, L)
    elif cu_seqlens is not None:
        # On the device of `cu_seqlens`: its last value is compared, and never read by the host.
        is_padding = (torch.arange(x.shape[1], device=cu_seqlens.device) >= cu_seqlens[-1]).unsqueeze(0)  # (1, L)
    else:
        return x
    return x.masked_fill(is_padding.to(x.device).reshape(*is_padding.shape, *[1] * (x.dim() - 2)), 0)


def check_packing(batch: int, length: int, cu_seqlens: Tensor | None, seq_idx: Tensor | None) -> None:
    """Check types and shapes of `cu_seqlens` and `seq_idx`, without reading their values.

    Raises:
        TypeError, ValueError: as `parse_sequences`.
    """
    if cu_seqlens is not None and seq_idx is not None:
        raise ValueError("cu_seqlens and seq_idx exclude each other; got both")
    for name, value in (("cu_seqlens", cu_seqlens), ("seq_idx", seq_idx)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value is not None and value.dtype not in _INTS:
            raise TypeError(f"{name} must be int32 or int64, got {value.dtype}")
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
            raise ValueError(f"cu_seqlens must have shape (S + 1,), got {tuple(cu_seqlens.shape)}")
        if batch != 1:
            raise ValueError(f"cu_seqlens needs a batch of one packed row, got batch {batch}")
    if seq_idx is not None and tuple(seq_idx.shape) != (batch, length):
        raise ValueError(f"seq_idx must have shape (B, L) = ({batch}, {length}), got {tuple(seq_idx.shape)}")


def _read_cu_seqlens(cu_seqlens: Tensor, length: int) -> list[int]:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] > length:
        raise ValueError(f"cu_seqlens must run from 0 to L = {length} at most, got {bounds[0]} to {bounds[-1]}")
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        if b < a:
            raise ValueError(f"cu_seqlens must not decrease: entry {i} is {a}, entry {i + 1} is {b}")
    return bounds


class Blocks(NamedTuple):
    """Sequences divided into blocks of `size` steps, ordered so that one pass over the blocks scans all of them.

    The sequences are sorted by decreasing length, and block k holds the first `active[k]` of them: those that have a
    k-th block. So the state passed from block to block is a slice that only shrinks, and no sequence sees another's.
    Where lengths differ, the last block of a sequence is padded; where all are equal, the last block is shorter.
    """

    size: int
    active: tuple[int, ...]
    """Sequences in each block."""
    order: Tensor
    """(S,) sequences by decreasing length."""
    uniform: tuple[int, int, int] | None
    """First position, S and length of sequences that are equally long and contiguous; blocks are then views."""
    positions: tuple[Tensor, ...]
    """Otherwise, per block, (active[k] * size,) positions to gather; position 0 where it is padded."""
    padding: tuple[Tensor, ...]
    """Per block, the entries of `positions` that are padding."""
    valid: tuple[Tensor, ...]
    """Per block, the entries of `positions` that are not."""

    def gather(self, k: int, flat: Tensor, dtype: torch.dtype) -> Tensor:
        """Gather block k from a tensor (B * L, ...): (active[k], steps, ...), zero where padded."""
        if self.uniform:
            return self._view(k, flat, *self.uniform).to(dtype)
        # Padding is read from position 0, and cleared: NaN there must not reach the states.
        rows = flat.index_select(0, self.positions[k]).to(dtype).index_fill_(0, self.padding[k], 0)
        return rows.unflatten(0, (self.active[k], self.size))

    def scatter(self, k: int, block: Tensor, flat: Tensor) -> None:
        """Write block k, (active[k], steps or more, ...), to where `gather` reads it, without the padding."""
        if self.uniform:
            rows = self._view(k, flat, *self.uniform)
            rows.copy_(block[:, : rows.shape[1]])
        else:
            valid = self.valid[k]
            rows = block.flatten(0, 1).index_select(0, valid).to(flat.dtype)  # (valid steps, ...)
            flat.index_copy_(0, self.positions[k].index_select(0, valid), rows)

    def _view(self, k: int, flat: Tensor, start: int, n: int, length: int) -> Tensor:
        rows = flat[start : start + n * length].unflatten(0, (n, length))  # (S, L, ...)
        return rows[:, k * self.size : (k + 1) * self.size]


def batch_by_length(
    sequences: Sequences, max_sequences: int, size: int, device: torch.device
) -> Iterator[tuple[Tensor, Blocks]]:
    """Batch sequences of similar length, the longest first, leaving out those without steps.

    Args:
        sequences: the sequences.
        max_sequences: most sequences in a batch.
        size: most steps in a block.
        device: device of the results.

    Yields:
        the sequences of a batch, (n,) int64, in the order of their blocks; and their blocks.
    """
    by_length = sorted(range(len(sequences.lengths)), key=lambda s: -sequences.lengths[s])
    for i in range(0, len(by_length), max_sequences):
        members = by_length[i : i + max_sequences]
        if sequences.lengths[members[0]] == 0:
            return
        starts = tuple(sequences.starts[s] for s in members)
        lengths = tuple(sequences.lengths[s] for s in members)
        blocks = make_blocks(starts, lengths, size, device)
        yield torch.tensor(members, device=device)[blocks.order], blocks


def max_blocks(x: Tensor, n_sequences: int, size: int) -> int:
    """A bound of the blocks of `size` steps of all sequences of x (B, L, ...), from shapes alone as tracing needs.

    One more than needed, so that tracing with a dynamic length need not know whether there is only one.
    """
    return x.shape[0] * x.shape[1] // size + n_sequences + 1


@cached_per_stream(maxsize=256)
def make_blocks(starts: tuple[int, ...], lengths: tuple[int, ...], size: int, device: torch.device) -> Blocks:
    """Divide sequences into blocks of at most `size` steps (fewer when all sequences are shorter).

    Args:
        starts, lengths: first position and steps of each sequence.
        size: most steps in a block.
        device: device of the results.
    """
    longest = max(lengths, default=0)
    size = max(1, min(size, longest))
    start, length = (torch.tensor(t, dtype=torch.int64) for t in (starts, lengths))
    # Stable: sequences of one length stay in the order in which they are in memory.
    order = torch.argsort(length, descending=True, stable=True)  # (S,)
    n_blocks = -(-length // size)  # (S,)
    active = tuple(int((n_blocks > k).sum()) for k in range(-(-longest // size)))
    if starts and starts == tuple(starts[0] + i * longest for i in range(len(starts))) and min(lengths) == longest:
        return Blocks(size, active, order.to(device), (starts[0], len(starts), longest), (), (), ())

    positions, padding, valid = [], [], []
    for k, n in enumerate(active):
        members = order[:n, None]  # (n, 1)
        step = k * size + torch.arange(size)  # (size,)
        is_valid = (step < length[members]).flatten()  # (n * size,)
        positions.append(torch.where(is_valid, (start[members] + step).flatten(), 0).to(device))
        padding.append((~is_valid).nonzero().flatten().to(device))
        valid.append(is_valid.nonzero().flatten().to(device))
    return Blocks(size, active, order.to(device), None, tuple(positions), tuple(padding), tuple(valid))
