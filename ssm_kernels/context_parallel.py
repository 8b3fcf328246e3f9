"""A sequence split over the ranks of a process group: rank r holds the r-th run of its steps.

A scan is linear in its state: what a rank's steps make of a state h that comes from before is `exp(A sum dt) h + e`,
with e their end from a zero state. Every rank makes (e, sum dt) known to all in one all-gather of W messages, W being
the number of ranks, puts together the state before its first step from those of the ranks before it, and scans its
steps from there. It scans twice where a sequence both comes from before and goes on after, and once elsewhere. A ring,
in which each rank waits for the state of the one before, sends less, one state a rank, and scans once, but the scans
come one after the other: it takes the time of all of them, this that of two, however many the ranks. (So on two ranks
it is the memory, the projections and the rest that are halved, not the time of the scan.) The backward is autograd's:
that of the all-gather is one all-to-all, whose parts are summed in order of rank.

The convolution needs the K - 1 inputs before a rank's first step. They come by the same all-gather, from several ranks
where parts are shorter than that.

What a rank sends, and as much it receives, in a forward, and once more in the backward, in bytes:

- selective scan: (W - 1) * B * D * (N + 1) * size, with size 4, or 8 where the input is float64;
- SSD: (W - 1) * B * H * (P * N + 1) * size, likewise;
- convolution: (W - 1) * B * (K - 1) * D * size of an element of its input.

None depends on the length, nor on how many sequences are packed: at most one of them runs on from a rank to the next.
A `state` that is given to a mixer costs an all-reduce of it besides.

All ranks must run the same ops in the same order, forward and backward: each calls `backward` on a loss that depends
on its own outputs, with weight zero if need be; what is learned from is the sum of the losses. Within that, no rank
can wait for one that has gone another way: every exchange stands in the graph of every rank between the inputs of its
op and the outputs, whatever requires gradients. Under `torch.utils.checkpoint` the exchanges of the forward run again
in the backward, which then belongs inside `context_parallel` too; what the mixers compute again by themselves
(`use_mem_eff_path`) needs no exchange. Tensors that all ranks hold alike (A, D, biases, weights, initial states) get
the part of their gradient that comes from the rank's own steps; the sum over the ranks is the gradient.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ._core.dispatch import Backend
from ._core.invariant import softplus
from ._core.validation import check_tensor
from ._core.varlen import parse_sequences
from .causal_conv1d import CausalConv1dOutput, causal_conv1d
from .selective_scan import SelectiveScanOutput, selective_scan
from .ssd import SSDOutput, ssd


@dataclass(frozen=True)
class SequenceSplit:
    """How a sequence is split over the ranks of a group.

    >>> split = SequenceSplit.even(length=8192)  # doctest: +SKIP
    >>> with context_parallel(split):  # doctest: +SKIP
    ...     logits = lm(split.take(input_ids)).logits  # of this rank's part
    >>> # shifted before they are split: a part's last target is on the next rank
    >>> targets = split.take(next_tokens)  # doctest: +SKIP

    Raises:
        RuntimeError: `torch.distributed` has not been initialised.
        ValueError: not one length, of at least 0, for each rank.
    """

    lengths: tuple[int, ...]
    """Steps on each rank, in order; a rank may have none."""
    group: dist.ProcessGroup | None = None
    """None is the group of all ranks."""

    def __post_init__(self) -> None:
        world = _world_size(self.group)
        is_right = all(isinstance(n, int) and n >= 0 for n in self.lengths)
        if not is_right or len(self.lengths) != world:
            raise ValueError(f"lengths must be {world} integers from 0 up, one a rank; got {self.lengths!r}")

    @classmethod
    def even(cls, length: int, group: dist.ProcessGroup | None = None) -> SequenceSplit:
        """Parts that differ by one step at most."""
        world = _world_size(group)
        return cls(tuple((length + world - 1 - r) // world for r in range(world)), group)

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return dist.get_rank(self.group)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first step of each rank, and the length of the whole."""
        return tuple(itertools.accumulate(self.lengths, initial=0))

    @property
    def span(self) -> tuple[int, int]:
        """This rank's first step, and the one after its last."""
        return self.starts[self.rank], self.starts[self.rank + 1]

    def take(self, whole: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a tensor that holds the whole sequence along `dim`.

        Raises:
            ValueError: its length is not that of the sequence.
        """
        total = sum(self.lengths)
        if whole.shape[dim] != total:
            raise ValueError(f"whole must have length {total} along dim {dim}, got shape {tuple(whole.shape)}")
        return whole.narrow(dim, self.span[0], self.lengths[self.rank])


def _world_size(group: dist.ProcessGroup | None) -> int:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("a split sequence needs ranks: call torch.distributed.init_process_group first")
    return dist.get_world_size(group)


# A plain global, not one a thread: the backward on a GPU runs in a thread of its own.
_current: SequenceSplit | None = None


@contextlib.contextmanager
def context_parallel(split: SequenceSplit) -> Iterator[None]:
    """Inside, the mixers of `ssm_kernels.modules`, and models on them, work on this rank's part of each sequence.

    They are called as on one rank, but with the rank's part of every tensor that has a length: `cu_seqlens` are the
    bounds of the whole, best on the CPU, and a `state` that is given is that before the whole, becoming that after it,
    equal on every rank. Text is generated outside, where every rank has each token.

    Raises:
        TypeError: not a `SequenceSplit`.
    """
    global _current
    if not isinstance(split, SequenceSplit):
        raise TypeError(f"split must be a SequenceSplit, got {type(split).__name__}")
    before, _current = _current, split
    try:
        yield
    finally:
        _current = before


def current_split() -> SequenceSplit | None:
    """The split of the innermost `context_parallel`, or None outside of any."""
    return _current


# --- ops --------------------------------------------------------------------------------------------------------


def split_selective_scan(
    split: SequenceSplit | None,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_states: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> SelectiveScanOutput:
    """`selective_scan` of this rank's part of a split sequence; with None for the split, of a whole one.

    Args:
        u, dt, B, C, z: as in `selective_scan`, this rank's steps.
        initial_states: the states before the whole, the same on every rank.
        cu_seqlens: bounds of the whole. On a GPU they make the host wait, once for each tensor.

    The final states are those after this rank's part: a sequence's own on the rank that has its last step. Of sequences
    that have no step here, they are the initial states.

    Raises:
        TypeError, ValueError, RuntimeError: as `selective_scan`; or the length is not that of this rank.
    """

    def scan(at: slice, before: Tensor | None, bounds: Tensor | None, for_end: bool = False) -> tuple[Tensor, Tensor]:
        u_, dt_, B_, C_, z_ = (m if m is None or m.dim() == 2 else m[:, at] for m in (u, dt, B, C, z))
        if for_end:
            return selective_scan(u_, dt_, A, B_, C_.detach(), None, None, dt_bias, dt_softplus, backend=backend)
        return selective_scan(
            u_, dt_, A, B_, C_, D, z_, dt_bias, dt_softplus, before, cu_seqlens=bounds, backend=backend
        )

    if split is None:
        return scan(slice(None), initial_states, cu_seqlens)
    check_tensor("u", u, ("B", "L", "D"))
    check_tensor("A", A, (u.shape[2], "N"), like=u)
    compute = torch.promote_types(u.dtype, torch.float32)
    part = _Part.of(split, "u", u, cu_seqlens)
    before = part.check_states(initial_states, u, tuple(A.shape))

    def decay(total: Tensor) -> Tensor:  # (B, D) -> (B, D, N)
        return torch.exp(total.unsqueeze(-1) * A.to(compute))

    def total() -> Tensor:
        return _TotalStep.apply(dt, dt_bias, dt_softplus, (-torch.inf, torch.inf), compute)

    return SelectiveScanOutput(*_scan(part, u, scan, total, decay, before, tuple(A.shape), u.shape[2]))


def split_ssd(
    split: SequenceSplit | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_states: Tensor | None = None,
    *,
    chunk_size: int = 64,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> SSDOutput:
    """`ssd` of this rank's part of a split sequence; with None for the split, of a whole one.

    Args:
        x, dt, B, C, z: as in `ssd`, this rank's steps.
        initial_states, cu_seqlens, and the final states: as in `split_selective_scan`.

    Raises:
        TypeError, ValueError, RuntimeError: as `ssd`; or the length is not that of this rank.
    """

    def scan(at: slice, before: Tensor | None, bounds: Tensor | None, for_end: bool = False) -> tuple[Tensor, Tensor]:
        x_, dt_, B_, C_, z_ = (m if m is None else m[:, at] for m in (x, dt, B, C, z))
        if for_end:
            return ssd(
                x_, dt_, A, B_, C_.detach(), None, None, dt_bias, dt_softplus, dt_limit, chunk_size=chunk_size,
                backend=backend,
            )  # fmt: skip
        return ssd(
            x_, dt_, A, B_, C_, D, z_, dt_bias, dt_softplus, dt_limit, before, chunk_size=chunk_size,
            cu_seqlens=bounds, backend=backend,
        )  # fmt: skip

    if split is None:
        return scan(slice(None), initial_states, cu_seqlens)
    check_tensor("x", x, ("B", "L", "H", "P"))
    check_tensor("A", A, (x.shape[2],), like=x)
    check_tensor("B", B, (*x.shape[:2], "G", "N"), like=x)
    compute = torch.promote_types(x.dtype, torch.float32)
    shape = (*x.shape[2:], B.shape[3])
    part = _Part.of(split, "x", x, cu_seqlens)
    before = part.check_states(initial_states, x, shape)

    def decay(total: Tensor) -> Tensor:  # (B, H) -> (B, H, 1, 1)
        return torch.exp(total * A.to(compute))[..., None, None]

    def total() -> Tensor:
        return _TotalStep.apply(dt, dt_bias, dt_softplus, dt_limit, compute)

    return SSDOutput(*_scan(part, x, scan, total, decay, before, shape, x.shape[2]))


def split_causal_conv1d(
    split: SequenceSplit | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Literal["silu"] | None = None,
    initial_states: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> CausalConv1dOutput:
    """`causal_conv1d` of this rank's part of a split sequence; with None for the split, of a whole one.

    Args:
        x: (B, L, D) this rank's steps.
        initial_states, cu_seqlens, and the final states: as in `split_selective_scan`.

    Raises:
        TypeError, ValueError, RuntimeError: as `causal_conv1d`; or the length is not that of this rank.
    """
    check_tensor("weight", weight, ("D", "K"))
    x, initial_states, cu_seqlens = conv_halo(split, x, weight.shape[1], initial_states, cu_seqlens)
    return causal_conv1d(x, weight, bias, activation, initial_states, cu_seqlens=cu_seqlens, backend=backend)


def conv_halo(
    split: SequenceSplit | None, x: Tensor, width: int, initial_states: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`x`, initial states and bounds with which `causal_conv1d` convolves this rank's part without the others.

    So a backward that convolves again need not communicate.
    """
    if split is None:
        return x, initial_states, cu_seqlens
    check_tensor("x", x, ("B", "L", "D"))
    part = _Part.of(split, "x", x, cu_seqlens)
    window = width - 1
    initial_states = part.check_states(initial_states, x, (window, x.shape[2]))
    mine = x[:, max(0, x.shape[1] - window) :]
    mine = F.pad(mine, (0, 0, window - mine.shape[1], 0))
    ends = _exchange(part, mine, x)  # (W, B, K - 1, D)
    x = _Tied.apply(x, ends)
    if part.head is not None:
        row = part.rows(part.head, part.head + 1)
        first = None if initial_states is None else initial_states[row]
        found = _window(part, ends, first)
        if part.cu_seqlens is None:
            initial_states = found
        else:
            if initial_states is None:
                initial_states = x.new_zeros(part.n_sequences, window, x.shape[2])
            parts = (initial_states[: row.start], found.to(initial_states.dtype), initial_states[row.stop :])
            initial_states = torch.cat(parts)
    return x, initial_states, part.cu_seqlens


def gather_final_states(
    split: SequenceSplit | None, final_states: Tensor, length: int, cu_seqlens: Tensor | None
) -> Tensor:
    """The final states of the whole, equal on every rank, from those after each rank's part. Without gradients.

    Args:
        length: steps on this rank.
    """
    if split is None:
        return final_states
    like = final_states.new_empty(1 if cu_seqlens is not None else final_states.shape[0], length)
    part = _Part.of(split, "x", like, cu_seqlens)
    owners = [part.owner(max(0, end - 1)) for end in part.bounds[1:]]
    is_mine = torch.tensor([o == part.rank for o in owners], device=final_states.device)
    is_mine = is_mine.view(-1, *[1] * (final_states.dim() - 1))
    with torch.no_grad():
        shared = torch.where(is_mine, final_states, 0)
        dist.all_reduce(shared, group=split.group)
    return shared


# --- where a rank's part lies -----------------------------------------------------------------------------------


class _Part(NamedTuple):
    """What a rank has of the sequences.

    Without `cu_seqlens` each row of the batch is a sequence, all are split alike, and here they count as one.
    """

    split: SequenceSplit
    rank: int
    starts: tuple[int, ...]
    bounds: tuple[int, ...]
    """Where the sequences begin, and the length of the whole."""
    batch: int
    cu_seqlens: Tensor | None
    """The bounds within this part; sequences that have no step here are empty."""
    head: int | None
    """The sequence that began on a rank before and goes on here."""
    tail: int | None
    """The sequence that goes on on a rank after, having begun."""
    inside: tuple[int, int]
    """Sequences that begin here: the first, and the one after the last."""
    head_length: int

    @classmethod
    def of(cls, split: SequenceSplit, name: str, x: Tensor, cu_seqlens: Tensor | None) -> _Part:
        """The part of this rank, whose steps are those of `x`.

        Raises:
            ValueError: `x` has another length than this rank's part, or `cu_seqlens` another than the whole.
        """
        rank, lengths = split.rank, split.lengths
        if x.shape[1] != lengths[rank]:
            raise ValueError(
                f"{name} must have this rank's {lengths[rank]} steps (rank {rank} of lengths {lengths}),"
                f" got shape {tuple(x.shape)}"
            )
        if cu_seqlens is None:
            return _lay_out(split, rank, (0, sum(lengths)), x.shape[0], False)
        return _lay_out(split, rank, _read_bounds(cu_seqlens, x.shape[0], sum(lengths)), 1, True)

    @property
    def n_sequences(self) -> int:
        return len(self.bounds) - 1

    def rows(self, begin: int, end: int) -> slice:
        """Where the states of some sequences are."""
        return slice(begin * self.batch, end * self.batch)

    def owner(self, step: int) -> int:
        """The rank that has a step."""
        return min(bisect_right(self.starts, step), len(self.starts) - 1) - 1

    def check_states(self, initial_states: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        if initial_states is not None:
            rows = self.rows(0, self.n_sequences).stop
            check_tensor("initial_states", initial_states, (rows, *shape), like=x)
        return initial_states


# Every layer of a model reads the same bounds.
_known_bounds: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _read_bounds(cu_seqlens: Tensor, batch: int, length: int) -> tuple[int, ...]:
    known = _known_bounds.setdefault(cu_seqlens, {})
    key = (cu_seqlens._version, batch, length)
    if key not in known:
        sequences = parse_sequences(batch, length, cu_seqlens)
        if sequences.gaps(batch * length):
            end = length - sum(stop - start for start, stop in sequences.gaps(batch * length))
            raise ValueError(f"cu_seqlens must run from 0 to L = {length} over all ranks, got 0 to {end}")
        known[key] = (*sequences.starts, length)
    return known[key]


@functools.lru_cache(maxsize=64)
def _lay_out(split: SequenceSplit, rank: int, bounds: tuple[int, ...], batch: int, packed: bool) -> _Part:
    starts = split.starts
    start, stop = starts[rank], starts[rank + 1]
    head, tail = _running_over(bounds, start), _running_over(bounds, stop)
    head_length = 0 if head is None else min(bounds[head + 1], stop) - start
    first = bisect_left(bounds, start) if head is None else head + 1
    inside = (first, max(first, bisect_left(bounds, stop)))
    local = torch.tensor([min(max(b, start), stop) - start for b in bounds]) if packed else None
    return _Part(split, rank, starts, bounds, batch, local, head, tail, inside, head_length)


def _running_over(bounds: tuple[int, ...], step: int) -> int | None:
    """The sequence that has steps on both sides of the place before `step`."""
    i = bisect_left(bounds, step)
    return i - 1 if 0 < i < len(bounds) and bounds[i] != step else None


# --- exchange ---------------------------------------------------------------------------------------------------


def _exchange(part: _Part, message: Tensor, x: Tensor) -> Tensor:
    """What every rank says, (W, ...), in order of rank. `x`: the input of the op, which the graph leads back to."""
    # A rank may have nothing to learn in its own part, and yet others wait for it in the backward.
    always = torch.empty(0, requires_grad=True)
    return _Exchange.apply(message, x, always, part.split.group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, message, x, always, group):
        ctx.group = group
        received = message.new_empty(dist.get_world_size(group), *message.shape)
        dist.all_gather(list(received), message.contiguous(), group=group)
        return received

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dreceived):
        dmessages = torch.empty_like(dreceived, memory_format=torch.contiguous_format)
        dist.all_to_all_single(dmessages, dreceived.contiguous(), group=ctx.group)
        return dmessages.sum(0), None, None, None


class _Tied(torch.autograd.Function):
    """A result, made to depend on what was received, so that the backward of the exchange runs on every rank."""

    @staticmethod
    def forward(ctx, y, received):
        # Something to compute again: `torch.utils.checkpoint` stops early, but not before this exchange.
        ctx.save_for_backward(received.new_empty(0))
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        _ = ctx.saved_tensors
        return dy, None


class _TotalStep(torch.autograd.Function):
    """The sum over time of what becomes of `dt`, (B, L, ...) -> (B, ...); keeps `dt` alone."""

    @staticmethod
    def forward(ctx, dt, bias, softplus, limit, compute):
        ctx.save_for_backward(dt, bias)
        ctx.options = softplus, limit, compute
        return _total_step(dt, bias, softplus, limit, compute)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dtotal):
        given = ctx.saved_tensors
        inputs = [t if t is None else t.detach().requires_grad_() for t in given]
        with torch.enable_grad():
            total = _total_step(*inputs, *ctx.options)
        wanted = [t for t in inputs if t is not None]
        ddt, *dbias = torch.autograd.grad(total, wanted, dtotal)
        return ddt, dbias[0] if dbias else None, None, None, None


def _total_step(dt, bias, positive, limit, compute) -> Tensor:
    dt = dt.to(compute)
    if bias is not None:
        dt = dt + bias.to(compute)
    if positive:
        dt = softplus(dt)
    return dt.clamp(*limit).sum(1)


# --- what comes from before -------------------------------------------------------------------------------------


def _scan(
    part: _Part,
    x: Tensor,
    scan: Callable[..., tuple[Tensor, Tensor]],
    total: Callable[[], Tensor],
    decay: Callable[[Tensor], Tensor],
    initial_states: Tensor | None,
    state: tuple[int, ...],
    n_steps: int,
) -> tuple[Tensor, Tensor]:
    """y and the states after this part, (rows, *state). A message is an end and the total steps, (B, M).

    Args:
        scan: called with a slice of the steps, states before them or None, and bounds of packed sequences or None; or
            with `for_end=True`, for the end from a zero state.
        total: gives the sum of all steps here, (B, n_steps).
        decay: makes of that the factor of a state.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    first, last = part.inside
    ys, ends = [], []

    def untouched(begin: int, end: int) -> Tensor:
        rows = part.rows(begin, end)
        if initial_states is not None:
            return initial_states[rows].to(compute)
        return x.new_zeros(rows.stop - rows.start, *state, dtype=compute)

    ends_inside = None
    if last > first:
        at = slice(part.head_length, None)
        bounds = None if last - first == 1 else part.cu_seqlens[first : last + 1] - part.head_length
        before = None if initial_states is None else initial_states[part.rows(first, last)]
        y, ends_inside = scan(at, before, bounds)
        ys, ends = [y], [ends_inside]

    if part.tail is None or x.shape[1] == 0:
        message = x.new_zeros(part.batch, math.prod(state) + n_steps, dtype=compute)
    elif part.tail == part.head:
        end = scan(slice(None), None, None, for_end=True)[1]
        message = torch.cat([end.flatten(1), total().flatten(1)], 1)
    else:
        end = ends_inside[-part.batch :]
        message = F.pad(end.flatten(1), (0, n_steps))
    messages = _exchange(part, message, x)  # (W, B, M)

    if part.head is not None:
        here = _state_before(part, messages, decay, state)
        y, end = scan(slice(0, part.head_length), here, None)
        ys, ends = [y, *ys], [end, *ends]

    y = torch.cat(ys, 1) if len(ys) > 1 else ys[0] if ys else torch.zeros_like(x)
    begin = first if part.head is None else part.head
    ends = [untouched(0, begin), *ends, untouched(last, part.n_sequences)]
    ends = [e for e in ends if len(e)]  # most often one, which need not be copied
    final_states = ends[0] if len(ends) == 1 else torch.cat(ends or [untouched(0, 0)])
    return _Tied.apply(y, messages), _Tied.apply(final_states, messages)


def _state_before(part: _Part, messages: Tensor, decay: Callable[[Tensor], Tensor], state: tuple[int, ...]) -> Tensor:
    """The state of the sequence that comes from before, (B, *state), from all that is between its begin and here."""
    size = math.prod(state)
    begin = part.owner(part.bounds[part.head])
    here = messages[begin, :, :size].unflatten(1, state)
    for rank in range(begin + 1, part.rank):
        if part.split.lengths[rank]:
            end, total = messages[rank].split([size, messages.shape[2] - size], 1)
            here = torch.addcmul(end.unflatten(1, state), decay(total), here)
    return here


def _window(part: _Part, ends: Tensor, first: Tensor | None) -> Tensor:
    """The K - 1 inputs before this part, (B, K - 1, D): those of ranks before, and before the sequence `first`'s."""
    window, begin, start = ends.shape[2], part.bounds[part.head], part.starts[part.rank]
    found = []
    if start - window < begin:
        missing = window - (start - begin)
        found = [ends.new_zeros(ends.shape[1], missing, ends.shape[3]) if first is None else first[:, -missing:]]
    step = max(begin, start - window)
    while step < start:
        rank = part.owner(step)
        stop = part.starts[rank + 1]
        found.append(ends[rank, :, window - (stop - step) :])
        step = stop
    return torch.cat([f.to(ends.dtype) for f in found], 1) if found else ends[0]
