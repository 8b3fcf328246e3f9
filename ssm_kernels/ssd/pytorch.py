"""SSD in pure PyTorch at speed, on any device.

Chunks of Q steps are a few matrix products (arXiv 2405.21060, section 6): the part of a chunk's output that comes
from its own inputs is `(C B^T o M) x`, with M_ij = exp(a_i - a_j) dt_j for i >= j and a the running sum of dt A; the
part that comes from before is `exp(a) C S`. A few chunks of several sequences and all heads, a segment, are computed
at once, save for S, which is carried through them in order. The backward keeps S before each segment only, carries
it through the segment again, and walks the segments in reverse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.invariant import matmul
from .._core.library import Gradient, define_op, unknown_size
from .._core.varlen import Blocks, batch_by_length, parse_sequences

# Chunks of a sequence in a segment: more of them are fewer and larger operations on more scratch memory.
SEGMENT = 8
# Every chunk has the same number of steps, a multiple of CHUNK_MULTIPLE, and shorter sequences are padded: the length
# of a product's sums, and whether an operand begins at a multiple of 64 bytes, decide how BLAS rounds. More steps than
# LONGEST_CHUNK only make products larger: at 24 heads, P 64, N 128, 2048 steps took 62 ms at 64 and 136 ms at 256.
CHUNK_MULTIPLE = 16
LONGEST_CHUNK = 64
# Elements of the states of a segment, which bounds how many sequences are scanned together.
SEGMENT_ELEMENTS = 1 << 20
# The exponential of so much overflows, and of its negative is 0.
MAX_LOG_DECAY = {torch.float32: 104.0, torch.float64: 746.0}


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """x (B, L, H, P); dt (B, L, H); A (H,); B, C (B, L, G, N) -> y like x and final states (rows, H, P, N)."""
    steps = -(-min(chunk_size, LONGEST_CHUNK) // CHUNK_MULTIPLE) * CHUNK_MULTIPLE
    y, final_states, _ = _forward_op(x, dt, A, B, C, initial_states, cu_seqlens, seq_idx, steps)
    return y, final_states


# --- one segment ------------------------------------------------------------------------------------------------
# Inside: m chunks of Q steps, first to last of several sequences; G groups, E = H / G heads a group. The state
# is (m, G, N, E * P), so that what all heads of a group share is one matrix product.


class _Segment:
    """The inputs of some chunks and what both directions need of them."""

    def __init__(self, counts: tuple[int, ...], a: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor):
        self.counts = counts  # sequences that have a first, second, ... chunk here
        self.x, self.dt, self.a = x, dt, a  # (m, Q, G, E, P), (m, Q, G, E), (G, E)
        self.B, self.C = B.transpose(1, 2), C.transpose(1, 2)  # (m, G, Q, N)
        self.log_decay = _running_sum(dt * a)  # (m, Q, G, E) twice
        first, second = self.log_decay
        self.from_start = (first + second).exp().unsqueeze(-1)
        self.to_end = ((first[:, -1:] - first) + (second[:, -1:] - second)).exp().unsqueeze(-1)
        self.whole = self.from_start[:, -1:].transpose(1, 2)  # (m, G, 1, E, 1)
        self.input = x * dt.unsqueeze(-1)
        self.input_heads = _by_head(self.input)
        self.leaving = _by_group(self.input * self.to_end)

    def states(self, carry: Tensor) -> Tensor:
        """The state before each chunk, (m, G, N, E * P); `carry`, that of each sequence, moves to the end."""
        return self._carried(carry, matmul(self.B.mT, self.leaving), reverse=False)

    def _carried(self, carry: Tensor, arrivals: Tensor, reverse: bool) -> Tensor:
        """What each chunk finds in `carry`, and leaves there decayed, with its arrivals added."""
        heads = self.x.shape[3:]
        found = torch.empty_like(arrivals)
        runs = list(zip(*(m.split(self.counts) for m in (found, arrivals, self.whole)), strict=True))
        for seen, arrived, whole in reversed(runs) if reverse else runs:
            here = carry[: len(seen)]
            seen.copy_(here)
            here = here.unflatten(3, heads)
            torch.addcmul(arrived.unflatten(3, heads), here, whole, out=here)
        return found

    def from_state(self, states: Tensor) -> Tensor:
        """The output that comes from before the chunk, but for `from_start`, (m, Q, G, E, P)."""
        return matmul(self.C, states).unflatten(3, self.x.shape[3:]).transpose(1, 2)

    def decay_between(self) -> Tensor:
        """exp(a_i - a_j) for i >= j, else 0, (m, G, E, Q, Q). What overflows above the diagonal is overwritten."""
        first, second = (log.permute(0, 2, 3, 1).contiguous() for log in self.log_decay)
        log = first.unsqueeze(-1) - first.unsqueeze(-2)
        return log.add_(second.unsqueeze(-1)).sub_(second.unsqueeze(-2)).exp_().tril_()

    def forward(self, carry: Tensor) -> Tensor:
        """y (m, Q, G, E, P), from the state of each sequence, which moves to the segment's end."""
        mix = self.decay_between().mul_(matmul(self.C, self.B.mT).unsqueeze(2))
        own = matmul(mix, self.input_heads).permute(0, 3, 1, 2, 4)
        return torch.addcmul(own, self.from_state(self.states(carry)), self.from_start)

    def backward(self, states: Tensor, dy: Tensor, dcarry: Tensor) -> tuple[Tensor, ...]:
        """Gradients of x, dt, B, C and a. `dcarry`, of the states after the segment, becomes of those before."""
        heads = self.x.shape[3:]
        between = self.decay_between()
        mix = between * matmul(self.C, self.B.mT).unsqueeze(2)
        dy_heads = _by_head(dy)
        dmix = matmul(dy_heads, self.input_heads.mT)  # (m, G, E, Q, Q)
        dscores = between.mul_(dmix).sum(2)  # (m, G, Q, Q)

        dy_decayed = _by_group(dy * self.from_start)
        dnext = self._carried(dcarry, matmul(self.C.mT, dy_decayed), reverse=True)
        dC = matmul(dscores, self.B) + matmul(dy_decayed, states.mT)
        dB = matmul(dscores.mT, self.C) + matmul(self.leaving, dnext.mT)
        from_next = matmul(self.B, dnext).unflatten(3, heads).transpose(1, 2)
        dinput = torch.addcmul(matmul(mix.mT, dy_heads).permute(0, 3, 1, 2, 4), from_next, self.to_end)

        # Step k's dt A decays whatever passes from before k to k or later. Each such passage is added up as it is,
        # not as a difference of running totals, which would cancel.
        inside = dmix.mul_(mix).tril_(-1).cumsum(-1).tril_(-1).sum(-2)  # (m, G, E, Q): i > j at j = k - 1
        inside = inside.roll(1, -1).permute(0, 3, 1, 2)
        out_of_state = (dy * self.from_state(states)).sum(-1) * self.from_start.squeeze(-1)  # (m, Q, G, E)
        into_state = (self.input * from_next).sum(-1) * self.to_end.squeeze(-1)
        through = (states * dnext).unflatten(3, heads).sum((2, 4)).unsqueeze(1) * self.whole.view(
            len(dy), 1, *self.a.shape
        )
        before = F.pad(into_state[:, :-1], (0, 0, 0, 0, 1, 0)).cumsum(1)
        dlog = inside + out_of_state.flip(1).cumsum(1).flip(1) + before + through

        ddt = (dinput * self.x).sum(-1) + dlog * self.a
        dx, da = dinput.mul_(self.dt.unsqueeze(-1)), (dlog * self.dt).sum((0, 1))
        return dx, ddt, dB.transpose(1, 2), dC.transpose(1, 2), da


def _running_sum(log: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of (m, Q, ...) up to each step, as two parts, of which a difference is as exact as its own terms.

    A running sum has the digits of the largest terms in it, and so has what is left of two of them. Here the first
    part has the terms as multiples of a power of two so large that their sums are exact, and the second what remains
    of them. No term need be larger than what makes 0, or infinity, of the exponential.
    """
    largest = MAX_LOG_DECAY[log.dtype]
    log = log.clamp(-largest, largest)
    digits = 1 - math.log2(torch.finfo(log.dtype).eps)
    unit = 2.0 ** (math.ceil(math.log2(largest * log.shape[1])) - digits)
    coarse = (log / unit).floor_().mul_(unit)
    return coarse.cumsum(1), (log - coarse).cumsum(1)


def _by_group(m: Tensor) -> Tensor:
    """(m, Q, G, E, P) -> (m, G, Q, E * P)"""
    return m.transpose(1, 2).flatten(3)


def _by_head(m: Tensor) -> Tensor:
    """(m, Q, G, E, P) -> (m, G, E, Q, P)"""
    return m.permute(0, 2, 3, 1, 4).contiguous()


# --- all segments -----------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a segment lies."""

    blocks: Blocks
    chunks: range
    steps: int
    """Q, to which shorter blocks are padded."""

    @property
    def counts(self) -> tuple[int, ...]:
        return self.blocks.active[self.chunks.start : self.chunks.stop]

    def read(self, flat: Tensor, dtype: torch.dtype) -> Tensor:
        """(B * L, ...) -> (m, Q, ...)"""
        parts = [self.blocks.gather(k, flat, dtype) for k in self.chunks]
        missing = self.steps - parts[-1].shape[1]
        if missing:  # the last chunk of all is shorter
            parts[-1] = F.pad(parts[-1], (0, 0) * (flat.dim() - 1) + (0, missing))
        return torch.cat(parts)

    def write(self, part: Tensor, flat: Tensor) -> None:
        """(m, Q, ...) -> (B * L, ...)"""
        for k, block in zip(self.chunks, part.split(self.counts), strict=True):
            self.blocks.scatter(k, block[:, : self.blocks.size], flat)


class _Problem:
    """What both directions need of one call besides its tensors: where the segments lie, and shapes inside."""

    def __init__(self, x, A, B, cu_seqlens, seq_idx, chunk_size):
        batch, length, heads, headdim = x.shape
        groups, n = B.shape[2:]
        self.sequences = parse_sequences(batch, length, cu_seqlens, seq_idx)
        self.has_gaps = bool(self.sequences.padding_runs(batch * length))
        self.chunk_size = chunk_size
        self.heads = (groups, heads // groups)
        self.headdim, self.n = headdim, n
        self.a = A.view(self.heads)
        self.first, self.last = self.sequences.state_indices(x.device)

    def tiles(self) -> Iterator[tuple[Tensor, list[_Place]]]:
        """Sequences that are scanned together, by number, and their segments in order of time."""
        chunks_each = min(SEGMENT, -(-max(self.sequences.lengths, default=0) // self.chunk_size))
        state_size = self.a.numel() * self.headdim * self.n
        width = max(1, SEGMENT_ELEMENTS // max(1, chunks_each * state_size))
        for members, blocks in batch_by_length(self.sequences, width, self.chunk_size, self.a.device):
            chunks = range(len(blocks.active))
            yield members, [_Place(blocks, chunks[k : k + SEGMENT], self.chunk_size) for k in chunks[::SEGMENT]]

    def segment(self, place: _Place, inputs: list[Tensor]) -> _Segment:
        return _Segment(place.counts, self.a, *(place.read(m, self.a.dtype) for m in inputs))

    def flat(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> list[Tensor]:
        """(B, L, H, P), (B, L, H), (B, L, G, N) twice -> (B * L, G, ...) each."""
        inner = ((*self.heads, self.headdim), self.heads, (self.heads[0], self.n), (self.heads[0], self.n))
        return [m.reshape(m.shape[0] * m.shape[1], *shape) for m, shape in zip((x, dt, B, C), inner, strict=True)]

    def states(self, rows: Tensor | None, where: Tensor) -> Tensor:
        """(rows, H, P, N) put at `where` among zero states of all sequences, (S, G, N, E * P)."""
        groups, per_group = self.heads
        states = self.a.new_zeros(len(self.sequences.lengths), groups, self.n, per_group * self.headdim)
        if rows is not None:
            inner = rows.to(self.a.dtype).unflatten(1, self.heads)  # (rows, G, E, P, N)
            states[where] = inner.permute(0, 1, 4, 2, 3).flatten(3)
        return states

    def rows(self, states: Tensor, where: Tensor) -> Tensor:
        """The inverse of `states`."""
        inner = states[where].unflatten(3, (self.heads[1], self.headdim))  # (rows, G, N, E, P)
        return inner.permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()


def _n_checkpoints(x: Tensor, n_sequences: int, chunk_size: int) -> int:
    """More than are kept, told from shapes alone as tracing needs.

    One more, so that tracing with a dynamic length need not know whether there is only one.
    """
    return x.shape[0] * x.shape[1] // (chunk_size * SEGMENT) + n_sequences + 1


def _forward(x, dt, A, B, C, initial_states, cu_seqlens, seq_idx, chunk_size):
    p = _Problem(x, A, B, cu_seqlens, seq_idx, chunk_size)
    inputs = p.flat(x, dt, B, C)
    y = A.new_zeros(x.shape) if p.has_gaps else A.new_empty(x.shape)
    state = p.states(initial_states, p.first)
    kept, n_kept = A.new_empty(_n_checkpoints(x, len(state), chunk_size), *state.shape[1:]), 0
    for members, places in p.tiles():
        carry = state[members]
        for place in places:
            segment = p.segment(place, inputs)
            count = place.counts[0]
            kept[n_kept : n_kept + count] = carry[:count]
            n_kept += count
            place.write(segment.forward(carry), y.view_as(inputs[0]))
        state[members] = carry
    kept[n_kept:] = 0  # rows to spare
    return y, p.rows(state, p.last), kept


def _backward(x, dt, A, B, C, kept, dy, dfinal, cu_seqlens, seq_idx, chunk_size):
    p = _Problem(x, A, B, cu_seqlens, seq_idx, chunk_size)
    inputs, dy = p.flat(x, dt, B, C), dy.reshape(-1, *p.heads, p.headdim)
    dstate = p.states(dfinal, p.last)
    new = torch.zeros_like if p.has_gaps else torch.empty_like
    grads = [new(m, memory_format=torch.contiguous_format) for m in (x, dt, B, C)]
    grads_flat = p.flat(*grads)
    da = torch.zeros_like(p.a)
    n_kept = 0
    for members, places in p.tiles():
        dcarry = dstate[members]
        counts = [place.counts[0] for place in places]
        starts = kept[n_kept : n_kept + sum(counts)].split(counts)
        n_kept += sum(counts)
        for place, start in zip(reversed(places), reversed(starts), strict=True):
            segment = p.segment(place, inputs)
            states = segment.states(start.clone())
            *grads_k, da_k = segment.backward(states, place.read(dy, A.dtype), dcarry)
            da += da_k
            for part, out in zip(grads_k, grads_flat, strict=True):
                place.write(part, out)
        dstate[members] = dcarry
    dx, ddt, dB, dC = grads
    return dx, ddt, da.view(A.shape), dB, dC, p.rows(dstate, p.first)


# --- ops --------------------------------------------------------------------------------------------------------


def _forward_fake(x, dt, A, B, C, initial_states, cu_seqlens, seq_idx, chunk_size):
    batch, _, heads, headdim = x.shape
    groups, n = B.shape[2:]
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    n_kept = _n_checkpoints(x, rows, chunk_size) if seq_idx is None else unknown_size(x)
    kept = A.new_empty(n_kept, groups, n, heads // groups * headdim)
    return A.new_empty(x.shape), A.new_empty(rows, heads, headdim, n), kept


def _backward_fake(x, dt, A, B, C, kept, dy, dfinal, cu_seqlens, seq_idx, chunk_size):
    grads = (m.new_empty(m.shape) for m in (x, dt, A, B, C))
    return *grads, A.new_empty(dfinal.shape)


def _save(ctx, inputs, outputs):
    x, dt, A, B, C, initial_states, cu_seqlens, seq_idx, ctx.chunk_size = inputs
    ctx.save_for_backward(x, dt, A, B, C, outputs[2], cu_seqlens, seq_idx)
    ctx.state_dtype = None if initial_states is None else initial_states.dtype


@torch.autograd.function.once_differentiable
def _gradients(ctx, dy, dfinal):
    saved = ctx.saved_tensors
    *grads, dinitial = _backward_op(*saved[:6], dy, dfinal, *saved[6:], ctx.chunk_size)
    dinitial = None if ctx.state_dtype is None else dinitial.to(ctx.state_dtype)
    return *grads, dinitial, None, None, None


_forward_op = define_op(
    "ssd_torch(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? initial_states, Tensor? cu_seqlens,"
    " Tensor? seq_idx, int chunk_size) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    Gradient(_save, _gradients, 2),
)
_backward_op = define_op(
    "ssd_torch_backward(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor kept, Tensor dy, Tensor dfinal,"
    " Tensor? cu_seqlens, Tensor? seq_idx, int chunk_size)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
