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

    def __init__(self, x: Tensor, dt: Tensor, a: Tensor, B: Tensor, C: Tensor):
        self.x, self.dt, self.a = x, dt, a  # (n, Q, G, E, P), (n, Q, G, E), (G, E)
        self.B, self.C = B.transpose(1, 2), C.transpose(1, 2)  # (n, G, Q, N)
        self.input = x * dt.unsqueeze(-1)
        self.log_decay = torch.cumsum(dt * a, dim=1)  # (n, Q, G, E)
        total = self.log_decay[:, -1:]
        self.from_start = self.log_decay.exp().unsqueeze(-1)
        self.to_end = (total - self.log_decay).exp().unsqueeze(-1)
        self.whole = total.exp().transpose(1, 2).unsqueeze(-1)  # (n, G, 1, E, 1)

    def next_state(self, state: Tensor) -> Tensor:
        return self.decayed(state) + self.B.mT @ _by_group(self.input * self.to_end)

    def decayed(self, state: Tensor) -> Tensor:
        return (state.unflatten(3, self.x.shape[3:]) * self.whole).flatten(3)

    def from_state(self, state: Tensor) -> Tensor:
        """The output that comes from before the chunk, (n, Q, G, E, P)."""
        return (self.C @ state).unflatten(3, self.x.shape[3:]).transpose(1, 2) * self.from_start

    def decay_between(self) -> Tensor:
        """exp(a_i - a_j) for i >= j, else 0, (n, G, E, Q, Q): masked before the exponential can overflow."""
        log = self.log_decay.permute(0, 2, 3, 1)
        later = torch.ones(log.shape[-1], log.shape[-1], dtype=torch.bool, device=log.device).triu(1)
        return (log.unsqueeze(-1) - log.unsqueeze(-2)).masked_fill_(later, -torch.inf).exp_()

    def forward(self, state: Tensor) -> Tensor:
        """y (n, Q, G, E, P)."""
        mix = self.decay_between().mul_((self.C @ self.B.mT).unsqueeze(2))
        return (mix @ _by_head(self.input)).permute(0, 3, 1, 2, 4) + self.from_state(state)

    def backward(self, state: Tensor, dy: Tensor, dnext: Tensor) -> tuple[Tensor, ...]:
        """Gradients of x, dt, a, B, C and of `state`, from those of y and of the next state."""
        heads = self.x.shape[3:]
        between = self.decay_between()
        mix = between * (self.C @ self.B.mT).unsqueeze(2)
        dy_heads = _by_head(dy)
        dmix = dy_heads @ _by_head(self.input).mT  # (n, G, E, Q, Q)
        dscores = (dmix * between).sum(2)  # (n, G, Q, Q)

        dy_decayed = _by_group(dy * self.from_start)
        dC = dscores @ self.B + dy_decayed @ state.mT
        dB = dscores.mT @ self.C + _by_group(self.input * self.to_end) @ dnext.mT
        dstate = self.C.mT @ dy_decayed + self.decayed(dnext)
        dinput_state = (self.B @ dnext).unflatten(3, heads).transpose(1, 2) * self.to_end
        dinput = (mix.mT @ dy_heads).permute(0, 3, 1, 2, 4) + dinput_state

        # Step k's dt A decays whatever passes from before k to k or later. Each such passage is added up as it is,
        # not as a difference of running totals, which would cancel.
        inside = dmix.mul_(mix).tril_(-1).cumsum(-1).tril_(-1).sum(-2)  # (n, G, E, Q): i > j at j = k - 1
        inside = inside.roll(1, -1).permute(0, 3, 1, 2)
        out_of_state = (dy * self.from_state(state)).sum(-1)  # (n, Q, G, E)
        into_state = (self.input * dinput_state).sum(-1)
        through = (self.decayed(state) * dnext).unflatten(3, heads).sum((2, 4)).unsqueeze(1)
        dlog = inside + out_of_state.flip(1).cumsum(1).flip(1) + (into_state.cumsum(1) - into_state) + through

        ddt = (dinput * self.x).sum(-1) + dlog * self.a
        return (
            dinput * self.dt.unsqueeze(-1),
            ddt,
            (dlog * self.dt).sum((0, 1)),
            dB.transpose(1, 2),
            dC.transpose(1, 2),
            dstate,
        )


def _by_group(m: Tensor) -> Tensor:
    """(n, Q, G, E, P) -> (n, G, Q, E * P)"""
    return m.transpose(1, 2).flatten(3)


def _by_head(m: Tensor) -> Tensor:
    """(n, Q, G, E, P) -> (n, G, E, Q, P)"""
    return m.permute(0, 2, 3, 1, 4)


# --- all chunks -------------------------------------------------------------------------------------------------


class _Problem:
    """The tensors of one call cut in chunks, and the states at the ends of its sequences."""

    def __init__(self, x, dt, A, B, C, cu_seqlens, seq_idx, chunk_size):
        batch, length, heads, headdim = x.shape
        groups, n = B.shape[2:]
        self.sequences = parse_sequences(batch, length, cu_seqlens, seq_idx)
        self.blocks = make_blocks(self.sequences.starts, self.sequences.lengths, chunk_size, False, x.device)
        self.head_shape = (groups, heads // groups, headdim)
        self.a = A.view(self.head_shape[:2])
        self.state_shape = (groups, n, heads // groups * headdim)
        self.n_checkpoints = _n_checkpoints(x, len(self.sequences.lengths), chunk_size)
        first, last = (torch.tensor(s, dtype=torch.int64, device=x.device) for s in self.sequences[2:])
        place = torch.argsort(self.blocks.order)
        self.first, self.last = place[first], place[last]

    def states(self, rows: Tensor | None, where: Tensor) -> Tensor:
        """(rows, H, P, N) put at `where` among zero states of all sequences, (S, G, N, E * P)."""
        states = self.a.new_zeros(len(self.sequences.lengths), *self.state_shape)
        if rows is not None:
            inner = rows.to(self.a.dtype).unflatten(1, self.head_shape[:2])  # (rows, G, E, P, N)
            states[where] = inner.permute(0, 1, 4, 2, 3).flatten(3)
        return states

    def rows(self, states: Tensor, where: Tensor) -> Tensor:
        """The inverse of `states`."""
        inner = states[where].unflatten(3, self.head_shape[1:])  # (rows, G, N, E, P)
        return inner.permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()

    def cut(self, m: Tensor, *shape: int) -> list[Tensor]:
        """(B, L, ...) -> a tensor (n, Q, *shape) a chunk."""
        rows = self.blocks.gather(m, self.a.dtype).view(-1, *shape)
        return [r.unflatten(0, (-1, self.blocks.size)) for r in rows.split(self._rows_per_chunk())]

    def join(self, parts: list[Tensor], out: Tensor) -> None:
        """The inverse of `cut`."""
        self.blocks.scatter(torch.cat([p.flatten(0, 1) for p in parts]).view(-1, *out.shape[2:]), out)

    def _rows_per_chunk(self) -> list[int]:
        return [self.blocks.size * n for n in self.blocks.counts]

    def chunks(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> list[tuple[Tensor, ...]]:
        groups, per_group, _ = self.head_shape
        cuts = (
            self.cut(x, *self.head_shape),
            self.cut(dt, groups, per_group),
            [self.a] * len(self.blocks.counts),
            self.cut(B, *self.state_shape[:2]),
            self.cut(C, *self.state_shape[:2]),
        )
        return list(zip(*cuts, strict=True))


def _n_checkpoints(x: Tensor, n_sequences: int, chunk_size: int) -> int:
    """No fewer than are kept, told from shapes alone as tracing needs."""
    return x.shape[0] * x.shape[1] // (chunk_size * CHUNKS_PER_CHECKPOINT) + n_sequences


def _forward(x, dt, A, B, C, initial_states, cu_seqlens, seq_idx, chunk_size):
    p = _Problem(x, dt, A, B, C, cu_seqlens, seq_idx, chunk_size)
    state = p.states(initial_states, p.first)
    kept, n_kept = A.new_empty(p.n_checkpoints, *p.state_shape), 0
    ys = []
    for k, inputs in enumerate(p.chunks(x, dt, B, C)):
        count = p.blocks.counts[k]
        if k % CHUNKS_PER_CHECKPOINT == 0:
            kept[n_kept : n_kept + count] = state[:count]
            n_kept += count
        chunk = _Chunk(*inputs)
        ys.append(chunk.forward(state[:count]))
        state[:count] = chunk.next_state(state[:count])
    y = A.new_empty(x.shape)
    if ys:
        p.join(ys, y)
    return y, p.rows(state, p.last), kept


def _backward(x, dt, A, B, C, kept, dy, dfinal, cu_seqlens, seq_idx, chunk_size):
    p = _Problem(x, dt, A, B, C, cu_seqlens, seq_idx, chunk_size)
    dstate = p.states(dfinal, p.last)
    inputs, dys, counts = p.chunks(x, dt, B, C), p.cut(dy, *p.head_shape), p.blocks.counts
    grads: list[tuple[Tensor, ...]] = []
    da = torch.zeros_like(p.a)

    n_kept = sum(counts[::CHUNKS_PER_CHECKPOINT])
    for begin in reversed(range(0, len(counts), CHUNKS_PER_CHECKPOINT)):
        n_kept -= counts[begin]
        states = [kept[n_kept : n_kept + counts[begin]]]
        segment = [_Chunk(*i) for i in inputs[begin : begin + CHUNKS_PER_CHECKPOINT]]
        for chunk, count in zip(segment[:-1], counts[begin + 1 :], strict=False):
            states.append(chunk.next_state(states[-1])[:count])
        for i in reversed(range(len(segment))):
            count = counts[begin + i]
            dx_k, ddt_k, da_k, dB_k, dC_k, dstate[:count] = segment[i].backward(
                states[i], dys[begin + i], dstate[:count].clone()
            )
            grads.append((dx_k, ddt_k, dB_k, dC_k))
            da += da_k
    out = [torch.empty_like(m, memory_format=torch.contiguous_format) for m in (x, dt, B, C)]
    for m, parts in zip(out, zip(*reversed(grads), strict=True), strict=False):
        p.join(parts, m)
    dx, ddt, dB, dC = out
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
