"""`SequenceSharding`: which steps each rank holds, and the context manager that puts one in force."""

from __future__ import annotations

import contextlib
import functools
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .._core import sharding as _core_sharding
from .._core.validation import check_tensor
from .._core.varlen import parse_sequences


@dataclass(frozen=True)
class SequenceSharding:
    """Contiguous shards of a sequence, one for each rank of a group.

    >>> sharding = SequenceSharding.even(length=8192)  # doctest: +SKIP
    >>> with context_parallel(sharding):  # doctest: +SKIP
    ...     logits = lm(sharding.shard(input_ids)).logits  # of this rank's shard
    >>> # shifted before sharding: the last target of a shard is on the next rank
    >>> targets = sharding.shard(next_tokens)  # doctest: +SKIP

    Raises:
        RuntimeError: `torch.distributed` has not been initialized.
        ValueError: not one length, of at least 0, for each rank.
    """

    lengths: tuple[int, ...]
    """Steps on each rank, in order of rank; a rank may have none."""
    group: dist.ProcessGroup | None = None
    """Process group; None is the group of all ranks."""

    def __post_init__(self) -> None:
        world = _world_size(self.group)
        is_valid = all(isinstance(n, int) and n >= 0 for n in self.lengths)
        if not is_valid or len(self.lengths) != world:
            raise ValueError(f"lengths must be {world} integers from 0 up, one a rank; got {self.lengths!r}")

    @classmethod
    def even(cls, length: int, group: dist.ProcessGroup | None = None) -> SequenceSharding:
        """Shard a sequence so that no two shards differ by more than one step.

        Args:
            length: steps of the complete sequence.
            group: process group; None is the group of all ranks.

        Returns:
            the sharding, whose longer shards are on the first ranks.

        Raises:
            RuntimeError: `torch.distributed` has not been initialized.
        """
        # ceil((length - r) / world) steps on rank r
        world = _world_size(group)
        return cls(tuple((length + world - 1 - r) // world for r in range(world)), group)

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return dist.get_rank(self.group)

    @property
    def offsets(self) -> tuple[int, ...]:
        """(W + 1,) first step of each rank, and the length of the complete sequence."""
        return tuple(itertools.accumulate(self.lengths, initial=0))

    @property
    def span(self) -> tuple[int, int]:
        """This rank's first step, and the one after its last."""
        return self.offsets[self.rank], self.offsets[self.rank + 1]

    def shard(self, full: Tensor, dim: int = 1) -> Tensor:
        """Take this rank's shard of a tensor.

        Args:
            full: tensor that holds the complete sequence along `dim`.
            dim: dimension of time.

        Returns:
            a view of this rank's steps.

        Raises:
            ValueError: its length is not that of the sequence.
        """
        total = sum(self.lengths)
        if full.shape[dim] != total:
            raise ValueError(f"full must have length {total} along dim {dim}, got shape {tuple(full.shape)}")
        return full.narrow(dim, self.span[0], self.lengths[self.rank])


def _world_size(group: dist.ProcessGroup | None) -> int:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("a sharded sequence needs ranks: call torch.distributed.init_process_group first")
    return dist.get_world_size(group)


@contextlib.contextmanager
def context_parallel(sharding: SequenceSharding) -> Iterator[None]:
    """Make the ops, and mixers and models on them, work on this rank's shard of each sequence.

    Inside, `causal_conv1d`, `selective_scan` and `ssd` are called as on one rank, with these meanings:

    - every tensor with a length holds this rank's steps;
    - `cu_seqlens` are the bounds of the complete sequence, best on the CPU: on a GPU they cost a host-device
      synchronization once for each tensor. `seq_idx` is refused;
    - `initial_states` are those before the complete sequence, the same on every rank;
    - `final_states` are those after this rank's shard: a sequence's own on the rank that has its last step. For
      sequences without a step here they are the initial states.

    A mixer's `state` is the one before the complete sequence and becomes the one after it, equal on every rank. The
    scans over grids (`cross_scan` and so on) and the decoding steps are never sharded. Text is generated outside, where
    every rank has each token.

    Args:
        sharding: steps of each rank.

    Returns:
        a context manager; the sharding before it is in force again after the `with` block.

    Raises:
        TypeError: not a `SequenceSharding`.
    """
    if not isinstance(sharding, SequenceSharding):
        raise TypeError(f"sharding must be a SequenceSharding, got {type(sharding).__name__}")
    with _core_sharding.use_sharding(sharding):
        yield


def current_sharding() -> SequenceSharding | None:
    """Return the sharding of the innermost `context_parallel`, or None outside of any."""
    return _core_sharding.current()


class RankShard(NamedTuple):
    """The part of the sequences that this rank holds.

    Without `cu_seqlens` each row of the batch is a sequence; all are sharded alike, and here they count as one.
    """

    sharding: SequenceSharding
    rank: int
    bounds: tuple[int, ...]
    """(S + 1,) bounds of the sequences in the complete sequence."""
    batch: int
    """Rows of states for each sequence."""
    cu_seqlens: Tensor | None
    """(S + 1,) bounds within this shard; sequences without a step here are empty."""
    incoming: int | None
    """Sequence that starts on an earlier rank and continues here."""
    outgoing: int | None
    """Sequence that starts here or earlier and continues on a later rank."""
    started: tuple[int, int]
    """Sequences that start here: the first, and the one after the last."""
    incoming_length: int
    """Steps of the incoming sequence on this rank."""

    @classmethod
    def of(cls, sharding: SequenceSharding, name: str, x: Tensor, cu_seqlens: Tensor | None) -> RankShard:
        """Return this rank's shard, whose steps are those of `x`.

        Args:
            sharding: steps of each rank.
            name: argument that `x` is, for the message of an error.
            x: (B, L, ...).
            cu_seqlens: (S + 1,) bounds of the complete sequence, or None.

        Raises:
            ValueError: `x` does not have this rank's length, or `cu_seqlens` not the length of the complete sequence.
        """
        rank, lengths = sharding.rank, sharding.lengths
        if x.shape[1] != lengths[rank]:
            raise ValueError(
                f"{name} must have this rank's {lengths[rank]} steps (rank {rank} of lengths {lengths}),"
                f" got shape {tuple(x.shape)}"
            )
        if cu_seqlens is None:
            return _layout(sharding, rank, (0, sum(lengths)), x.shape[0], False)
        return _layout(sharding, rank, _read_bounds(cu_seqlens, x.shape[0], sum(lengths)), 1, True)

    @property
    def n_sequences(self) -> int:
        return len(self.bounds) - 1

    def rows(self, start: int, end: int) -> slice:
        """Return the rows of states of sequences `start` to `end`."""
        return slice(start * self.batch, end * self.batch)

    def owner(self, step: int) -> int:
        """Return the rank that holds a step."""
        offsets = self.sharding.offsets
        return min(bisect_right(offsets, step), len(offsets) - 1) - 1

    def check_states(self, initial_states: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> None:
        """Raise unless `initial_states` is None or has a row of the given shape for each sequence."""
        if initial_states is not None:
            rows = self.rows(0, self.n_sequences).stop
            check_tensor("initial_states", initial_states, (rows, *shape), like=x)


# All layers of a model share one `cu_seqlens`: its values are read once, and again where it has been changed.
_known_bounds = WeakIdKeyDictionary()


def _read_bounds(cu_seqlens: Tensor, batch: int, length: int) -> tuple[int, ...]:
    """Return bounds (S + 1,) that cover the complete sequence."""
    key = (cu_seqlens._version, batch, length)
    known = _known_bounds.get(cu_seqlens)
    if known is not None and known[0] == key:
        return known[1]
    sequences = parse_sequences(batch, length, cu_seqlens)
    if gaps := sequences.padding_runs(batch * length):
        end = length - sum(stop - start for start, stop in gaps)
        raise ValueError(f"cu_seqlens must run from 0 to L = {length} over all ranks, got 0 to {end}")
    bounds = (*sequences.starts, length)
    _known_bounds[cu_seqlens] = (key, bounds)
    return bounds


@functools.lru_cache(maxsize=64)
def _layout(sharding: SequenceSharding, rank: int, bounds: tuple[int, ...], batch: int, is_packed: bool) -> RankShard:
    start, stop = sharding.offsets[rank], sharding.offsets[rank + 1]
    # At most one sequence crosses each edge of the shard: sequences are contiguous, and in order.
    incoming, outgoing = _sequence_across(bounds, start), _sequence_across(bounds, stop)
    incoming_length = 0 if incoming is None else min(bounds[incoming + 1], stop) - start
    first = bisect_left(bounds, start) if incoming is None else incoming + 1
    started = (first, max(first, bisect_left(bounds, stop)))
    # Bounds before or after the shard move to its edges, so that sequences without a step here are empty.
    cu_seqlens = torch.tensor([min(max(b, start), stop) - start for b in bounds]) if is_packed else None  # (S + 1,)
    return RankShard(sharding, rank, bounds, batch, cu_seqlens, incoming, outgoing, started, incoming_length)


def _sequence_across(bounds: tuple[int, ...], step: int) -> int | None:
    """Return the sequence that has steps both before `step` and from it on."""
    i = bisect_left(bounds, step)
    return i - 1 if 0 < i < len(bounds) and bounds[i] != step else None
