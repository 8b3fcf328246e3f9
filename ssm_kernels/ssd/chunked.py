"""SSD in pure PyTorch at speed, on any device.

A chunk of Q steps is a few matrix products (arXiv 2405.21060, section 6): the part of its output that comes from
its own inputs is `(C B^T o M) x`, with M_ij = exp(a_i - a_j) dt_j for i >= j and a the running sum of dt A; the
part that comes from before is `exp(a) C S`. Chunks are walked in order, all sequences and heads at once, carrying
S. The backward keeps S at every few chunks only, computes those between again, and walks the chunks in reverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import define_op
from .._sequences import make_blocks, parse_sequences

# The state is kept once in so many chunks: a state weighs as much as N of the Q steps of a chunk.
CHUNKS_PER_CHECKPOINT = 8


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
    return _Scan.apply(x, dt, A, B, C, initial_states, cu_seqlens, seq_idx, chunk_size)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, initial_states, cu_seqlens, seq_idx, chunk_size):
        y, final_states, kept = _forward_op(x, dt, A, B, C, initial_states, cu_seqlens, seq_idx, chunk_size)
        ctx.save_for_backward(x, dt, A, B, C, kept, cu_seqlens, seq_idx)
        ctx.chunk_size = chunk_size
        ctx.state_dtype = None if initial_states is None else initial_states.dtype
        return y, final_states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dfinal):
        saved = ctx.saved_tensors
        *grads, dinitial = _backward_op(*saved[:6], dy, dfinal, *saved[6:], ctx.chunk_size)
        dinitial = None if ctx.state_dtype is None else dinitial.to(ctx.state_dtype)
        return *grads, dinitial, None, None, None


# --- one chunk --------------------------------------------------------------------------------------------------
# Inside: n sequences, G groups, E = H / G heads a group. The state is (n, G, N, E * P), so that what all heads of a
# group share is one matrix product.


class _Chunk:
    """The inputs of one chunk and what both directions need of them."""

    def __init__(self, a: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor):
        self.x, self.dt, self.a = x, dt, a  # (n, Q, G, E, P), (n, Q, G, E), (G, E)
        self.B, self.C = B.transpose(1, 2), C.transpose(1, 2)  # (n, G, Q, N)
        self.input = x * dt.unsqueeze(-1)
        self.log_decay = torch.cumsum(dt * a, dim=1)  # (n, Q, G, E)
        total = self.log_decay[:, -1:]
        self.from_start = self.log_decay.exp().unsqueeze(-1)
        self.to_end = (total - self.log_decay).exp().unsqueeze(-1)
        self.whole = total.exp().transpose(1, 2).unsqueeze(-1)  # (n, G, 1, E, 1)

    def next_state(self, state: Tensor) -> Tensor:
        return self.decayed(state).add_(self.B.mT @ _by_group(self.input * self.to_end))

    def decayed(self, state: Tensor) -> Tensor:
        return (state.unflatten(3, self.x.shape[3:]) * self.whole).flatten(3)

    def from_state(self, state: Tensor) -> Tensor:
        """The output that comes from before the chunk, but for `from_start`, (n, Q, G, E, P)."""
        return (self.C @ state).unflatten(3, self.x.shape[3:]).transpose(1, 2)

    def decay_between(self) -> Tensor:
        """exp(a_i - a_j) for i >= j, else 0, (n, G, E, Q, Q): masked before the exponential can overflow."""
        log = self.log_decay.permute(0, 2, 3, 1)
        later = torch.ones(log.shape[-1], log.shape[-1], dtype=torch.bool, device=log.device).triu(1)
        return (log.unsqueeze(-1) - log.unsqueeze(-2)).masked_fill_(later, -torch.inf).exp_()

    def forward(self, state: Tensor) -> Tensor:
        """y (n, Q, G, E, P)."""
        mix = self.decay_between().mul_((self.C @ self.B.mT).unsqueeze(2))
        own = (mix @ _by_head(self.input)).permute(0, 3, 1, 2, 4)
        return torch.addcmul(own, self.from_state(state), self.from_start)

    def backward(self, state: Tensor, dy: Tensor, dnext: Tensor) -> tuple[Tensor, ...]:
        """Gradients of x, dt, B, C, a and of `state`, from those of y and of the next state."""
        heads = self.x.shape[3:]
        between = self.decay_between()
        mix = between * (self.C @ self.B.mT).unsqueeze(2)
        dy_heads = _by_head(dy)
        dmix = dy_heads @ _by_head(self.input).mT  # (n, G, E, Q, Q)
        dscores = between.mul_(dmix).sum(2)  # (n, G, Q, Q)

        dy_decayed = _by_group(dy * self.from_start)
        dC = dscores @ self.B + dy_decayed @ state.mT
        dB = dscores.mT @ self.C + _by_group(self.input * self.to_end) @ dnext.mT
        dstate = self.decayed(dnext).add_(self.C.mT @ dy_decayed)
        from_next = (self.B @ dnext).unflatten(3, heads).transpose(1, 2)
        dinput = torch.addcmul((mix.mT @ dy_heads).permute(0, 3, 1, 2, 4), from_next, self.to_end)

        # Step k's dt A decays whatever passes from before k to k or later. Each such passage is added up as it is,
        # not as a difference of running totals, which would cancel.
        inside = dmix.mul_(mix).tril_(-1).cumsum(-1).tril_(-1).sum(-2)  # (n, G, E, Q): i > j at j = k - 1
        inside = inside.roll(1, -1).permute(0, 3, 1, 2)
        out_of_state = (dy * self.from_state(state)).sum(-1) * self.from_start.squeeze(-1)  # (n, Q, G, E)
        into_state = (self.input * from_next).sum(-1) * self.to_end.squeeze(-1)
        through = (state * dnext).unflatten(3, heads).sum((2, 4)).unsqueeze(1) * self.whole.view(
            len(dy), 1, *self.a.shape
        )
        dlog = inside + out_of_state.flip(1).cumsum(1).flip(1) + (into_state.cumsum(1) - into_state) + through

        ddt = (dinput * self.x).sum(-1) + dlog * self.a
        dx, da = dinput.mul_(self.dt.unsqueeze(-1)), (dlog * self.dt).sum((0, 1))
        return dx, ddt, dB.transpose(1, 2), dC.transpose(1, 2), da, dstate


def _by_group(m: Tensor) -> Tensor:
    """(n, Q, G, E, P) -> (n, G, Q, E * P)"""
    return m.transpose(1, 2).flatten(3)


def _by_head(m: Tensor) -> Tensor:
    """(n, Q, G, E, P) -> (n, G, E, Q, P)"""
    return m.permute(0, 2, 3, 1, 4)


# --- all chunks -------------------------------------------------------------------------------------------------


class _Problem:
    """What both directions need of one call besides its tensors: where the chunks lie, and shapes inside."""

    def __init__(self, x, A, B, cu_seqlens, seq_idx, chunk_size):
        batch, length, heads, headdim = x.shape
        groups, n = B.shape[2:]
        sequences = parse_sequences(batch, length, cu_seqlens, seq_idx)
        self.n_sequences = len(sequences.lengths)
        self.blocks = make_blocks(sequences.starts, sequences.lengths, chunk_size, x.device)
        self.heads = (groups, heads // groups)
        self.headdim, self.n = headdim, n
        self.a = A.view(self.heads)
        place = torch.argsort(self.blocks.order)
        first, last = (torch.tensor(s, dtype=torch.int64, device=x.device) for s in sequences[2:])
        self.first, self.last = place[first], place[last]

    def flat(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> list[Tensor]:
        """(B, L, H, P), (B, L, H), (B, L, G, N) twice -> (B * L, G, ...) each."""
        inner = ((*self.heads, self.headdim), self.heads, (self.heads[0], self.n), (self.heads[0], self.n))
        return [m.reshape(m.shape[0] * m.shape[1], *shape) for m, shape in zip((x, dt, B, C), inner, strict=True)]

    def chunk(self, k: int, inputs: list[Tensor]) -> _Chunk:
        return _Chunk(self.a, *(self.blocks.read(k, m, self.a.dtype) for m in inputs))

    def states(self, rows: Tensor | None, where: Tensor) -> Tensor:
        """(rows, H, P, N) put at `where` among zero states of all sequences, (S, G, N, E * P)."""
        groups, per_group = self.heads
        states = self.a.new_zeros(self.n_sequences, groups, self.n, per_group * self.headdim)
        if rows is not None:
            inner = rows.to(self.a.dtype).unflatten(1, self.heads)  # (rows, G, E, P, N)
            states[where] = inner.permute(0, 1, 4, 2, 3).flatten(3)
        return states

    def rows(self, states: Tensor, where: Tensor) -> Tensor:
        """The inverse of `states`."""
        inner = states[where].unflatten(3, (self.heads[1], self.headdim))  # (rows, G, N, E, P)
        return inner.permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()


def _n_checkpoints(x: Tensor, n_sequences: int, chunk_size: int) -> int:
    """No fewer than are kept, told from shapes alone as tracing needs."""
    return x.shape[0] * x.shape[1] // (chunk_size * CHUNKS_PER_CHECKPOINT) + n_sequences


def _forward(x, dt, A, B, C, initial_states, cu_seqlens, seq_idx, chunk_size):
    p = _Problem(x, A, B, cu_seqlens, seq_idx, chunk_size)
    inputs = p.flat(x, dt, B, C)
    y = A.new_empty(x.shape)
    state = p.states(initial_states, p.first)
    kept, n_kept = A.new_empty(_n_checkpoints(x, len(state), chunk_size), *state.shape[1:]), 0
    for k, count in enumerate(p.blocks.counts):
        if k % CHUNKS_PER_CHECKPOINT == 0:
            kept[n_kept : n_kept + count] = state[:count]
            n_kept += count
        chunk = p.chunk(k, inputs)
        p.blocks.write(k, chunk.forward(state[:count]), y.view_as(inputs[0]))
        state[:count] = chunk.next_state(state[:count])
    return y, p.rows(state, p.last), kept


def _backward(x, dt, A, B, C, kept, dy, dfinal, cu_seqlens, seq_idx, chunk_size):
    p = _Problem(x, A, B, cu_seqlens, seq_idx, chunk_size)
    counts = p.blocks.counts
    inputs, dy = p.flat(x, dt, B, C), dy.reshape(-1, *p.heads, p.headdim)
    dstate = p.states(dfinal, p.last)
    grads = [torch.empty_like(m, memory_format=torch.contiguous_format) for m in (x, dt, B, C)]
    grads_flat = p.flat(*grads)
    da = torch.zeros_like(p.a)
    n_kept = sum(counts[::CHUNKS_PER_CHECKPOINT])
    for begin in reversed(range(0, len(counts), CHUNKS_PER_CHECKPOINT)):
        n_kept -= counts[begin]
        states = [kept[n_kept : n_kept + counts[begin]]]
        segment = range(begin, min(begin + CHUNKS_PER_CHECKPOINT, len(counts)))
        chunks = [p.chunk(k, inputs) for k in segment]
        for k, chunk in zip(segment[1:], chunks, strict=False):
            states.append(chunk.next_state(states[-1])[: counts[k]])
        for k, chunk, state in reversed(list(zip(segment, chunks, states, strict=True))):
            here = slice(counts[k])
            dy_k = p.blocks.read(k, dy, A.dtype)
            *grads_k, da_k, dstate[here] = chunk.backward(state, dy_k, dstate[here])
            da += da_k
            for part, out in zip(grads_k, grads_flat, strict=True):
                p.blocks.write(k, part, out)
    dx, ddt, dB, dC = grads
    return dx, ddt, da.view(A.shape), dB, dC, p.rows(dstate, p.first)


# --- ops --------------------------------------------------------------------------------------------------------


def _forward_fake(x, dt, A, B, C, initial_states, cu_seqlens, seq_idx, chunk_size):
    batch, _, heads, headdim = x.shape
    groups, n = B.shape[2:]
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    n_sequences = rows if seq_idx is None else torch.library.get_ctx().new_dynamic_size()
    kept = A.new_empty(_n_checkpoints(x, n_sequences, chunk_size), groups, n, heads // groups * headdim)
    return A.new_empty(x.shape), A.new_empty(rows, heads, headdim, n), kept


def _backward_fake(x, dt, A, B, C, kept, dy, dfinal, cu_seqlens, seq_idx, chunk_size):
    grads = (m.new_empty(m.shape) for m in (x, dt, A, B, C))
    return *grads, A.new_empty(dfinal.shape)


_forward_op = define_op(
    "ssd_chunked(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? initial_states, Tensor? cu_seqlens,"
    " Tensor? seq_idx, int chunk_size) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = define_op(
    "ssd_chunked_backward(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor kept, Tensor dy, Tensor dfinal,"
    " Tensor? cu_seqlens, Tensor? seq_idx, int chunk_size)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
