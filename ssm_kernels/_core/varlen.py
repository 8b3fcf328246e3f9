"""Sequences of unequal length in one tensor, and the order in which a scan over time visits them.

Two ways to say where sequences lie are accepted by every op:

- `cu_seqlens` (S + 1,): the batch has one row, sequence s is `[cu_seqlens[s], cu_seqlens[s + 1])`;
- `seq_idx` (B, L): a number for each position; a new sequence starts where the number changes along a row.

Positions after the last of `cu_seqlens`, and those whose `seq_idx` is negative, are padding. They belong to no
sequence: outputs are zero there, and neither states nor gradients depend on what the inputs hold there.

Both become a `Sequences`, which lists every sequence as a run of rows of the flattened (B * L) tensor.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_INTS = (torch.int32, torch.int64)


class Sequences(NamedTuple):
    """Runs of positions in a (B, L) tensor flattened to (B * L), in order; what is between them is padding."""

    starts: tuple[int, ...]
    """First position of each sequence."""
    lengths: tuple[int, ...]
    first: tuple[int, ...]
    """For each row of `initial_states`, the sequence that it starts."""
    last: tuple[int, ...]
    """For each row of `final_states`, the sequence that it ends."""

    def gaps(self, total: int) -> list[tuple[int, int]]:
        """Runs of padding among `total` positions: the first position, and the one after the last."""
        ends = [0, *(start + n for start, n in zip(self.starts, self.lengths, strict=True))]
        return [(end, start) for end, start in zip(ends, [*self.starts, total], strict=True) if end < start]

    def positions(self, device: torch.device) -> Tensor:
        """(T,) int64: every position of every sequence, in order."""
        runs = [torch.arange(start, start + n) for start, n in zip(self.starts, self.lengths, strict=True)]
        return torch.cat(runs or [torch.arange(0)]).to(device)


def parse_sequences(
    batch: int, length: int, cu_seqlens: Tensor | None = None, seq_idx: Tensor | None = None
) -> Sequences:
    """Check `cu_seqlens` or `seq_idx` and list the sequences; with neither, each batch row is one.

    With `cu_seqlens` there is a state per sequence. With `seq_idx` there is a state per batch row: the initial
    state belongs to the row's first sequence and the final state to its last, as in `mamba_ssm`. A row of nothing
    but padding has one sequence without steps, whose final state is its initial state.

    Raises:
        TypeError: the tensor is not of an integer type.
        ValueError: both are given, or the shape or the values do not describe sequences of this tensor.
    """
    check_packing(batch, length, cu_seqlens, seq_idx)
    if cu_seqlens is not None:
        bounds = _read_cu_seqlens(cu_seqlens, length)
        everyone = tuple(range(len(bounds) - 1))
        return Sequences(tuple(bounds[:-1]), _differences(bounds), everyone, everyone)
    if seq_idx is None or length == 0:
        rows = tuple(range(batch))
        return Sequences(tuple(b * length for b in rows), (length,) * batch, rows, rows)

    new = torch.ones(batch, length, dtype=torch.bool, device=seq_idx.device)
    new[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    runs = new.flatten().nonzero().flatten()
    is_padding = (seq_idx.flatten()[runs] < 0).tolist()
    runs = [*runs.tolist(), batch * length]

    starts, lengths, first, last = [], [], [], []
    for (start, end), padding in zip(itertools.pairwise(runs), is_padding, strict=True):
        if start % length == 0:  # a new row
            first.append(len(starts))
        if not padding:
            starts.append(start)
            lengths.append(end - start)
        if end % length == 0:
            if len(starts) == first[-1]:
                starts.append(start // length * length)
                lengths.append(0)
            last.append(len(starts) - 1)
    return Sequences(tuple(starts), tuple(lengths), tuple(first), tuple(last))


def _differences(bounds: list[int]) -> tuple[int, ...]:
    return tuple(b - a for a, b in itertools.pairwise(bounds))


def without_padding(x: Tensor, cu_seqlens: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """x (B, L, ...) with zeros where it belongs to no sequence. Nothing is read from the device."""
    if seq_idx is not None:
        is_padding = seq_idx < 0
    elif cu_seqlens is not None:
        is_padding = (torch.arange(x.shape[1], device=cu_seqlens.device) >= cu_seqlens[-1]).unsqueeze(0)
    else:
        return x
    return x.masked_fill(is_padding.to(x.device).reshape(*is_padding.shape, *[1] * (x.dim() - 2)), 0)


def check_packing(batch: int, length: int, cu_seqlens: Tensor | None, seq_idx: Tensor | None) -> None:
    """Check what can be told of `cu_seqlens` and `seq_idx` without their values.

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
    """Sequences cut in blocks of `size` steps, ordered so that one pass over the blocks scans all of them.

    The sequences are sorted by falling length, and block k holds the first `counts[k]` of them: those that have a
    k-th block. So a carried state is a slice that only shrinks, and no sequence sees another one's state. Where
    lengths differ, the last block of a sequence is padded; where all are equal, the last block is shorter.
    """

    size: int
    counts: tuple[int, ...]
    order: Tensor
    """(S,) the sequences by falling length."""
    run: tuple[int, int, int] | None
    """Where all sequences are equally long and lie one after the other: the first position, S and the length."""
    index: tuple[Tensor, ...]
    """Otherwise, per block, (counts[k] * size,) positions; padding points at position 0 ..."""
    padding: tuple[Tensor, ...]
    """... with the entries of `index` that are padding ..."""
    inside: tuple[Tensor, ...]
    """... and those that are not."""

    def read(self, k: int, flat: Tensor, dtype: torch.dtype) -> Tensor:
        """Block k of a (B * L, ...) tensor as (counts[k], steps, ...), zero where padded."""
        if self.run:
            return self._view(k, flat).to(dtype)
        rows = flat.index_select(0, self.index[k]).to(dtype).index_fill_(0, self.padding[k], 0)
        return rows.unflatten(0, (self.counts[k], self.size))

    def write(self, k: int, block: Tensor, flat: Tensor) -> None:
        """Put (counts[k], steps or more, ...) where `read` takes it from, leaving out the padding."""
        if self.run:
            rows = self._view(k, flat)
            rows.copy_(block[:, : rows.shape[1]])
        else:
            kept = self.inside[k]
            rows = block.flatten(0, 1).index_select(0, kept).to(flat.dtype)
            flat.index_copy_(0, self.index[k].index_select(0, kept), rows)

    def _view(self, k: int, flat: Tensor) -> Tensor:
        start, n, length = self.run
        rows = flat[start : start + n * length].unflatten(0, (n, length))
        return rows[:, k * self.size : (k + 1) * self.size]


def make_tiles(sequences: Sequences, width: int, size: int, device: torch.device) -> Iterator[tuple[Tensor, Blocks]]:
    """Groups of at most `width` sequences of like length, the longest first: their numbers, and their blocks."""
    by_length = sorted(range(len(sequences.lengths)), key=lambda s: -sequences.lengths[s])
    for i in range(0, len(by_length), width):
        members = by_length[i : i + width]
        if sequences.lengths[members[0]] == 0:
            return
        starts, lengths = ([part[s] for s in members] for part in sequences[:2])
        blocks = make_blocks(tuple(starts), tuple(lengths), size, device)
        yield torch.tensor(members, device=device)[blocks.order], blocks


@functools.lru_cache(maxsize=256)
def make_blocks(starts: tuple[int, ...], lengths: tuple[int, ...], size: int, device: torch.device) -> Blocks:
    """Lay sequences out in blocks of at most `size` steps (fewer when all sequences are shorter)."""
    longest = max(lengths, default=0)
    size = max(1, min(size, longest))
    start, length = (torch.tensor(t, dtype=torch.int64) for t in (starts, lengths))
    order = torch.argsort(length, descending=True, stable=True)
    n_blocks = -(-length // size)
    counts = tuple(int((n_blocks > k).sum()) for k in range(-(-longest // size)))
    if starts and starts == tuple(starts[0] + i * longest for i in range(len(starts))) and min(lengths) == longest:
        return Blocks(size, counts, order.to(device), (starts[0], len(starts), longest), (), (), ())

    index, padding, inside = [], [], []
    for k, count in enumerate(counts):
        members = order[:count, None]
        step = k * size + torch.arange(size)
        is_inside = (step < length[members]).flatten()
        index.append(torch.where(is_inside, (start[members] + step).flatten(), 0).to(device))
        padding.append((~is_inside).nonzero().flatten().to(device))
        inside.append(is_inside.nonzero().flatten().to(device))
    return Blocks(size, counts, order.to(device), None, tuple(index), tuple(padding), tuple(inside))
