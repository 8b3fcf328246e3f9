"""Sequences of unequal length in one tensor, and the order in which a scan over time visits them.

Two ways to say where sequences lie are accepted by every op:

- `cu_seqlens` (S + 1,): the batch has one row, sequence s is `[cu_seqlens[s], cu_seqlens[s + 1])`;
- `seq_idx` (B, L): a number for each position; a new sequence starts where the number changes along a row.

Both become a `Sequences`, which lists every sequence as a run of rows of the flattened (B * L) tensor.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

_INTS = (torch.int32, torch.int64)


class Sequences(NamedTuple):
    """Runs of positions in a (B, L) tensor flattened to (B * L)."""

    starts: tuple[int, ...]
    """First position of each sequence."""
    lengths: tuple[int, ...]
    first: tuple[int, ...]
    """For each row of `initial_states`, the sequence that it starts."""
    last: tuple[int, ...]
    """For each row of `final_states`, the sequence that it ends."""


def parse_sequences(
    batch: int, length: int, cu_seqlens: Tensor | None = None, seq_idx: Tensor | None = None
) -> Sequences:
    """Check `cu_seqlens` or `seq_idx` and list the sequences; with neither, each batch row is one.

    With `cu_seqlens` there is a state per sequence. With `seq_idx` there is a state per batch row: the initial
    state belongs to the row's first sequence and the final state to its last, as in `mamba_ssm`.

    Raises:
        TypeError: the tensor is not of an integer type.
        ValueError: both are given, or the shape or the values do not describe sequences of this tensor.
    """
    if cu_seqlens is not None and seq_idx is not None:
        raise ValueError("cu_seqlens and seq_idx exclude each other; got both")
    if cu_seqlens is not None:
        bounds = _checked_cu_seqlens(cu_seqlens, batch, length)
        everyone = tuple(range(len(bounds) - 1))
        return Sequences(tuple(bounds[:-1]), _differences(bounds), everyone, everyone)
    if seq_idx is None or length == 0:
        rows = tuple(range(batch))
        return Sequences(tuple(b * length for b in rows), (length,) * batch, rows, rows)

    if seq_idx.dtype not in _INTS:
        raise TypeError(f"seq_idx must be int32 or int64, got {seq_idx.dtype}")
    if tuple(seq_idx.shape) != (batch, length):
        raise ValueError(f"seq_idx must have shape (B, L) = ({batch}, {length}), got {tuple(seq_idx.shape)}")
    new = torch.ones(batch, length, dtype=torch.bool, device=seq_idx.device)
    new[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts = new.flatten().nonzero().flatten().tolist()
    per_row = new.sum(1).tolist()
    ends = list(itertools.accumulate(per_row))
    return Sequences(
        tuple(starts),
        _differences([*starts, batch * length]),
        tuple(end - n for end, n in zip(ends, per_row, strict=True)),
        tuple(end - 1 for end in ends),
    )


def _differences(bounds: list[int]) -> tuple[int, ...]:
    return tuple(b - a for a, b in itertools.pairwise(bounds))


def _checked_cu_seqlens(cu_seqlens: Tensor, batch: int, length: int) -> list[int]:
    if cu_seqlens.dtype not in _INTS:
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens must have shape (S + 1,), got {tuple(cu_seqlens.shape)}")
    if batch != 1:
        raise ValueError(f"cu_seqlens needs a batch of one packed row, got batch {batch}")
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length:
        raise ValueError(f"cu_seqlens must run from 0 to L = {length}, got {bounds[0]} to {bounds[-1]}")
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        if b < a:
            raise ValueError(f"cu_seqlens must not decrease: entry {i} is {a}, entry {i + 1} is {b}")
    return bounds


class Blocks(NamedTuple):
    """Sequences cut in blocks of `size` steps, ordered so that one pass over the blocks scans them all at once.

    The sequences are sorted by falling length, and block k of every sequence that is that long stands before
    block k + 1 of any. So block k holds the first `counts[k]` sequences of `order`, a carried state is a slice
    that only shrinks, and no sequence sees another one's state. The last block of a sequence is padded.

    Rows, the unit of `gather` and `scatter`, are the `sum(counts) * size` steps of all blocks. Those of one block
    lie together, as (count, size) or, when built with `step_major`, as (size, count).
    """

    size: int
    counts: tuple[int, ...]
    """How many sequences have a k-th block."""
    order: Tensor
    """(S,) the sequences by falling length."""
    index: Tensor
    """(rows,) position of each row in the flattened (B * L) tensor; padding points at position 0."""
    padding: Tensor
    """The rows that are padding."""
    inside: Tensor
    """The rows that are not."""

    def gather(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, L, ...) -> (rows, ...), zero where padded."""
        return x.flatten(0, 1).index_select(0, self.index).to(dtype).index_fill_(0, self.padding, 0)

    def scatter(self, rows: Tensor, out: Tensor) -> None:
        """Write (rows, ...) to the covered positions of a contiguous `out` (B, L, ...)."""
        if len(self.padding):
            rows = rows.index_select(0, self.inside)
        out.flatten(0, 1).index_copy_(0, self.index[self.inside], rows.to(out.dtype))


@functools.lru_cache(maxsize=64)
def make_blocks(
    starts: tuple[int, ...], lengths: tuple[int, ...], size: int, step_major: bool, device: torch.device
) -> Blocks:
    """Lay sequences out in blocks of at most `size` steps (fewer when all sequences are shorter)."""
    start, length = (torch.tensor(t, dtype=torch.int64) for t in (starts, lengths))
    size = max(1, min(size, max(lengths, default=1)))
    order = torch.argsort(length, descending=True, stable=True)
    n_blocks = -(-length[order] // size)
    counts = tuple(int((n_blocks > k).sum()) for k in range(max(n_blocks.tolist(), default=0)))
    index, inside = [start[:0]], [start[:0].bool()]
    for k, count in enumerate(counts):
        members = order[:count, None]
        step = k * size + torch.arange(size)
        grids = start[members] + step, step < length[members]  # (count, size)
        index_k, inside_k = (g.T if step_major else g for g in grids)
        index.append(index_k.flatten())
        inside.append(inside_k.flatten())
    is_inside = torch.cat(inside)
    index = torch.where(is_inside, torch.cat(index), 0).to(device)
    padding, inside = (m.nonzero().flatten().to(device) for m in (~is_inside, is_inside))
    return Blocks(size, counts, order.to(device), index, padding, inside)
