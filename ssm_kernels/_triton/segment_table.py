"""Sequences cut in segments for the Triton kernels: tables on the device, built without host-device synchronization.

A program of a kernel works on one segment, a run of steps of one sequence. So no kernel depends on batches,
`cu_seqlens` or `seq_idx`, which all become the same table. The number of entries must be known without the values, so
with `cu_seqlens` the table has as many as there could be segments, and unused entries belong to no sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .._core.stream_cache import cached_per_stream, current_stream, is_captured
from .._core.varlen import Sequences, check_packing, parse_sequences


class SegmentTable(NamedTuple):
    """Segments of at most `size` steps, in order of sequence and time. M segments, S sequences, G gaps.

    All tensors but `gaps` are int32.
    """

    size: int
    """Steps of a segment; the last of a sequence may have fewer."""
    gaps: Tensor
    """(G, 2) int64 runs of padding, which no segment holds: first position in the flattened (B * L) tensor, and the
    position after the last. A run may be empty."""
    entries: Tensor
    """(M, 4) batch row, first step, step after the last, and sequence, or -1 for an unused entry."""
    first_segment: Tensor
    """(S + 1,) first segment of each sequence; the last element is the number of segments."""
    sequence_starts: Tensor
    """(S,) first step of each sequence in its batch row."""
    initial_state_rows: Tensor
    """(S,) row of `initial_states` that a sequence starts from, or -1."""
    final_state_rows: Tensor
    """(S,) row of `final_states` that a sequence ends in, or -1."""

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The tensors from `entries` on, in the order in which kernels take them."""
        return (
            self.entries,
            self.first_segment,
            self.sequence_starts,
            self.initial_state_rows,
            self.final_state_rows,
        )


def max_segments(
    batch: int, length: int, n_sequences: int | torch.SymInt, size: int, packed: bool
) -> int | torch.SymInt:
    """Number of entries of the table that `build_segment_table` returns, from shapes alone, as tracing needs."""
    return batch * length // size + n_sequences if packed else batch * -(-length // size)


def build_segment_table(
    batch: int, length: int, size: int, cu_seqlens: Tensor | None, seq_idx: Tensor | None, device
) -> SegmentTable:
    """Cut the sequences of a (B, L) tensor in segments of `size` steps, the last of each being shorter.

    Boundaries on the CPU are read. On a GPU they are not, to avoid a host-device synchronization; `seq_idx` costs one,
    since the number of sequences is in its values.

    Raises:
        TypeError, ValueError: as `parse_sequences`; where `cu_seqlens` is on a GPU, values that are wrong are found
            by the device, which then raises at the next synchronisation.
    """
    if cu_seqlens is None and seq_idx is None:
        return _table_of_rows(batch, length, size, device)
    if cu_seqlens is not None and seq_idx is None and cu_seqlens.device.type != "cpu":
        return _build_on_device(batch, length, size, cu_seqlens)
    return _table_of_sequences(parse_sequences(batch, length, cu_seqlens, seq_idx), batch, length, size, device)


@cached_per_stream(maxsize=64)
def _table_of_rows(batch: int, length: int, size: int, device: torch.device) -> SegmentTable:
    rows = torch.arange(batch, device=device)
    lengths = torch.full_like(rows, length)
    count = int(max_segments(batch, length, batch, size, False))
    no_gaps = rows.new_empty(0, 2)
    return _build(rows, torch.zeros_like(rows), lengths, [rows.int(), rows.int()], count, size, no_gaps)


@cached_per_stream(maxsize=64)
def _table_of_sequences(sequences: Sequences, batch: int, length: int, size: int, device: torch.device) -> SegmentTable:
    starts, lengths = (torch.tensor(t, dtype=torch.int64, device=device) for t in sequences[:2])
    # A sequence without steps may start where the last row ends.
    row = (starts // max(length, 1)).clamp(max=max(batch - 1, 0))
    rows = [_row_of(r, len(starts), device) for r in (sequences.initial_sequences, sequences.final_sequences)]
    count = int(max_segments(batch, length, len(starts), size, True))
    gaps = torch.tensor(sequences.padding_runs(batch * length), dtype=torch.int64, device=device).view(-1, 2)
    return _build(row, starts - row * length, lengths, rows, count, size, gaps)


# Every layer of a model cuts the same sequences.
_tables_by_bounds: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _build_on_device(batch: int, length: int, size: int, cu_seqlens: Tensor) -> SegmentTable:
    # A captured graph must compute its own table: the boundaries may change before it is replayed.
    known: Any = {} if is_captured(cu_seqlens.device) else _tables_by_bounds.setdefault(cu_seqlens, {})
    key = (current_stream(cu_seqlens.device), cu_seqlens._version, batch, length, size)
    if key not in known:
        check_packing(batch, length, cu_seqlens, None)
        bounds = cu_seqlens.long()
        begin, lengths = bounds[:-1], bounds.diff()
        is_right = (bounds[0] == 0) & (bounds[-1] <= length) & (lengths >= 0).all()
        message = f"cu_seqlens must run from 0 to L = {length} at most and never decrease"
        torch._assert_async(is_right, message)  # pyright: ignore[reportPrivateImportUsage]
        everyone = torch.arange(len(begin), dtype=torch.int32, device=bounds.device)
        count = int(max_segments(batch, length, len(begin), size, True))
        gaps = torch.nn.functional.pad(bounds[-1:], (0, 1), value=length).unsqueeze(0)  # (1, 2)
        known[key] = _build(torch.zeros_like(begin), begin, lengths, [everyone, everyone], count, size, gaps)
    return known[key]


def _row_of(sequences: tuple[int, ...], n_sequences: int, device: torch.device) -> Tensor:
    """For each sequence its place among `sequences`, or -1."""
    rows = torch.full((n_sequences,), -1, dtype=torch.int32, device=device)
    at = torch.tensor(sequences, dtype=torch.int64, device=device)
    rows[at] = torch.arange(len(sequences), dtype=torch.int32, device=device)
    return rows


def _build(
    row: Tensor, begin: Tensor, lengths: Tensor, rows: list[Tensor], count: int, size: int, gaps: Tensor
) -> SegmentTable:
    """row, begin, lengths (S,) of each sequence -> `count` segments."""
    per_sequence = (lengths + (size - 1)) // size
    first = torch.nn.functional.pad(per_sequence.cumsum(0), (1, 0))
    segment = torch.arange(count, device=row.device)
    sequence = torch.searchsorted(first[1:], segment, right=True)
    is_spare = segment >= first[-1]  # its sequence is S, which gets an entry here
    n_sequences = len(begin)
    row, begin, lengths = (torch.nn.functional.pad(x, (0, 1)) for x in (row, begin, lengths))
    at = (segment - first[sequence]) * size
    end = begin[sequence] + torch.minimum(at + size, lengths[sequence])
    columns = (row[sequence], begin[sequence] + at, end, sequence)
    table = torch.stack([torch.where(is_spare, -1 if i == 3 else 0, c) for i, c in enumerate(columns)], 1)
    return SegmentTable(size, gaps, table.int(), first.int(), begin[:n_sequences].int(), *rows)
