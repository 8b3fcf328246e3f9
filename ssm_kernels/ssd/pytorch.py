"""SSD in pure PyTorch, fast on any device.

Chunks of Q steps are a few matrix products (arXiv 2405.21060, listing 1): the part of a chunk's output that comes from
its own inputs is `(L o C B^T) dt x`, with L_ij = exp(a_i - a_j) for i >= j and a the cumulative sum of dt A; the part
that comes from the state S before it is `exp(a) C S`. A segment is some chunks of several sequences; its chunks and
heads are computed at once, save for S, which passes from chunk to chunk. The backward saves S before each segment only,
recomputes it inside, and walks the segments in reverse.

Letters: B batch, L length, H heads, P head dimension, N state, G groups, E = H / G heads a group, S sequences;
m chunks of Q steps in a segment. Inside a segment the state is (m, G, N, E * P), so that what all heads of a group
share is one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.discretization import skip_and_gate, step_size
from .._core.invariant import matmul
from .._core.library import Gradient, autocast_off, define_op, unknown_size
from .._core.slots import StepPlan, step_all, step_by_slots
from .._core.transforms import Fold, backward_formula, transformable
from .._core.varlen import Blocks, batch_by_length, max_blocks, parse_sequences, without_padding
from . import differentiable

CHUNKS_PER_SEGMENT = 8
"""Chunks of a sequence in a segment: more of them are fewer and larger operations on more scratch memory."""
CHUNK_MULTIPLE = 16
"""Divisor of the steps of every chunk; shorter sequences are padded.

How BLAS rounds depends on the length of a product's sums and on whether an operand starts at a multiple of 64 bytes.
"""
MAX_CHUNK_SIZE = 64
"""Most steps of a chunk. More only make products larger: at 24 heads, P 64, N 128, 2048 steps took 62 ms with chunks of
64 and 136 ms with chunks of 256."""
MAX_STATE_ELEMENTS = 1 << 20
"""Elements of the states of a segment, which bounds how many sequences are scanned together."""
MAX_LOG_DECAY = {torch.float32: 104.0, torch.float64: 746.0}
"""exp of it overflows, exp of its negative is 0."""


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
    input_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan with arguments in the canonical form of `reference.ssd`, and the same results.

    Args:
        chunk_size: most steps of a chunk.
    """
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    x, dt = without_padding(x, cu_seqlens, seq_idx), without_padding(dt, cu_seqlens, seq_idx)
    z = None if z is None else without_padding(z, cu_seqlens, seq_idx)
    dt = step_size(dt, dt_bias, dt_softplus, compute_dtype, dt_limit)
    chunk_size = -(-min(chunk_size, MAX_CHUNK_SIZE) // CHUNK_MULTIPLE) * CHUNK_MULTIPLE
    A = A.to(compute_dtype)
    if input_weights is not None:
        input_weights = without_padding(input_weights, cu_seqlens, seq_idx).to(compute_dtype)
    y, final_states, _ = _scan(x, dt, A, B, C, input_weights, initial_states, cu_seqlens, seq_idx, chunk_size)
    return skip_and_gate(y, x, D, z), final_states


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    plan: StepPlan | None,
    input_weights: Tensor | None = None,
    state_scale: Tensor | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """Advance `state` (B, H, P, N) by T tokens, in place; x (B, T, H, P) -> y like x."""

    def step(
        h: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        tokens, heads = x.shape[1:3]
        dt = step_size(dt, dt_bias, dt_softplus, h.dtype, dt_limit)
        B, C = (t.to(h.dtype).repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))  # (B, T, H, N)
        decay = torch.exp(dt * A.to(h.dtype))  # (B, T, H)
        weighted_x = (dt if weights is None else weights.to(h.dtype)).unsqueeze(-1) * x  # (B, T, H, P)
        y = torch.empty(x.shape, dtype=h.dtype, device=x.device)
        for t in range(tokens):
            # Equation 2: S_t = exp(dt A) S_{t-1} + dt x B^T, y_t = S_t C_t.
            h.mul_(decay[:, t, :, None, None])
            h.addcmul_(weighted_x[:, t].unsqueeze(-1), B[:, t].unsqueeze(2))
            y[:, t] = matmul(h, C[:, t].unsqueeze(-1)).squeeze(-1)
        return skip_and_gate(y, x, D, z)

    inputs = (x, dt, B, C, z, input_weights)
    with autocast_off(x.device):
        if plan is None:
            last = None if seeds is None else seeds.unflatten(0, x.shape[:2])[:, -1]
            return step_all(step, state, inputs, state_scale, last)
        y = torch.zeros_like(x).flatten(0, 1).unsqueeze(1)  # (M, 1, H, P)
        by_token = [None if t is None else t.flatten(0, 1).unsqueeze(1) for t in inputs]  # (M, 1, ...)
        return step_by_slots(step, state, plan, y, by_token, state_scale, seeds).view(x.shape)


# --- one segment ------------------------------------------------------------------------------------------------


class _Segment:
    """Inputs of m chunks, and the intermediate results that the forward and the backward share."""

    def __init__(
        self, active: tuple[int, ...], a: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, weights: Tensor | None
    ):
        self.active = active  # sequences that have a first, second, ... chunk here; their sum is m
        self.x, self.dt, self.a = x, dt, a  # (m, Q, G, E, P), (m, Q, G, E), (G, E)
        self.weights = dt if weights is None else weights  # (m, Q, G, E)
        self.B, self.C = B.transpose(1, 2), C.transpose(1, 2)  # (m, G, Q, N)
        self.cumsum = _exact_cumsum(dt * a)  # (m, Q, G, E) twice
        coarse, fine = self.cumsum
        self.decay_from_start = (coarse + fine).exp().unsqueeze(-1)  # (m, Q, G, E, 1)
        self.decay_to_end = ((coarse[:, -1:] - coarse) + (fine[:, -1:] - fine)).exp().unsqueeze(-1)
        self.chunk_decay = self.decay_from_start[:, -1:].transpose(1, 2)  # (m, G, 1, E, 1)
        self.dt_x = x * self.weights.unsqueeze(-1)  # (m, Q, G, E, P)
        self.dt_x_by_head = _by_head(self.dt_x)  # (m, G, E, Q, P)
        self.decayed_input = _by_group(self.dt_x * self.decay_to_end)  # (m, G, Q, E * P)

    def initial_states(self, state: Tensor) -> Tensor:
        """Return the state before each chunk, (m, G, N, E * P).

        `state` (n, G, N, E * P) is that of each sequence before the segment; it becomes that after it.
        """
        # Listing 1, step 2: the state that each chunk adds.
        chunk_states = matmul(self.B.mT, self.decayed_input)  # (m, G, N, E * P)
        return self._pass_states(state, chunk_states, reverse=False)

    def _pass_states(self, state: Tensor, chunk_states: Tensor, reverse: bool) -> Tensor:
        """Pass `state` over the chunks, in place, and return what each chunk starts from (listing 1, step 3)."""
        heads = self.x.shape[3:]
        before = torch.empty_like(chunk_states)
        chunks = list(zip(*(t.split(self.active) for t in (before, chunk_states, self.chunk_decay)), strict=True))
        for before_chunk, chunk_state, chunk_decay in reversed(chunks) if reverse else chunks:
            active = state[: len(before_chunk)]
            before_chunk.copy_(active)
            active = active.unflatten(3, heads)  # (n, G, N, E, P)
            torch.addcmul(chunk_state.unflatten(3, heads), active, chunk_decay, out=active)
        return before

    def undecayed_state_output(self, states: Tensor) -> Tensor:
        """Return the outputs of the states before the chunks, without `decay_from_start`: (m, Q, G, E, P)."""
        return matmul(self.C, states).unflatten(3, self.x.shape[3:]).transpose(1, 2)

    def decay_matrix(self) -> Tensor:
        """Return L of listing 1, exp(a_i - a_j) for i >= j and 0 above the diagonal, (m, G, E, Q, Q)."""
        coarse, fine = (t.permute(0, 2, 3, 1).contiguous() for t in self.cumsum)  # (m, G, E, Q)
        log_decay = coarse.unsqueeze(-1) - coarse.unsqueeze(-2)  # (m, G, E, Q, Q)
        # Above the diagonal the exponential may overflow; `tril_` overwrites it.
        return log_decay.add_(fine.unsqueeze(-1)).sub_(fine.unsqueeze(-2)).exp_().tril_()

    def forward(self, state: Tensor) -> Tensor:
        """Return y (m, Q, G, E, P). `state`, of each sequence before the segment, becomes that after it."""
        masked_scores = self.decay_matrix().mul_(matmul(self.C, self.B.mT).unsqueeze(2))  # (m, G, E, Q, Q)
        # Listing 1, step 1: the output of the chunk's own inputs.
        y_diag = matmul(masked_scores, self.dt_x_by_head).permute(0, 3, 1, 2, 4)  # (m, Q, G, E, P)
        # Listing 1, step 4: the output of the state before the chunk.
        return torch.addcmul(y_diag, self.undecayed_state_output(self.initial_states(state)), self.decay_from_start)

    def backward(
        self, states: Tensor, dy: Tensor, dstate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of x, dt as the decay, B, C, the weights of the inputs, and a.

        Args:
            states: (m, G, N, E * P) before each chunk.
            dy: (m, Q, G, E, P).
            dstate: (n, G, N, E * P) gradient of each sequence's state after the segment; becomes that before it.
        """
        heads = self.x.shape[3:]
        decay_matrix = self.decay_matrix()
        masked_scores = decay_matrix * matmul(self.C, self.B.mT).unsqueeze(2)  # (m, G, E, Q, Q)
        dy_by_head = _by_head(dy)  # (m, G, E, Q, P)
        dmasked_scores = matmul(dy_by_head, self.dt_x_by_head.mT)  # (m, G, E, Q, Q)
        dscores = decay_matrix.mul_(dmasked_scores).sum(2)  # (m, G, Q, Q)

        decayed_dy = _by_group(dy * self.decay_from_start)  # (m, G, Q, E * P)
        # The gradient of the state after each chunk.
        dstates = self._pass_states(dstate, matmul(self.C.mT, decayed_dy), reverse=True)  # (m, G, N, E * P)
        dC = matmul(dscores, self.B) + matmul(decayed_dy, states.mT)  # (m, G, Q, N)
        dB = matmul(dscores.mT, self.C) + matmul(self.decayed_input, dstates.mT)  # (m, G, Q, N)
        ddt_x_of_state = matmul(self.B, dstates).unflatten(3, heads).transpose(1, 2)  # (m, Q, G, E, P)
        ddt_x_of_outputs = matmul(masked_scores.mT, dy_by_head).permute(0, 3, 1, 2, 4)  # (m, Q, G, E, P)
        ddt_x = torch.addcmul(ddt_x_of_outputs, ddt_x_of_state, self.decay_to_end)

        # The log decay dt A of step k acts on all that passes from before k to k or later. Each such term is added up
        # as it is, not as a difference of running totals, which would cancel.
        # From input j < k to output i >= k: the sum over i > j, at j = k - 1.
        input_to_output = dmasked_scores.mul_(masked_scores).tril_(-1).cumsum(-1).tril_(-1).sum(-2)  # (m, G, E, Q)
        input_to_output = input_to_output.roll(1, -1).permute(0, 3, 1, 2)  # (m, Q, G, E)
        # From the state before the chunk to output i >= k.
        state_to_output = (dy * self.undecayed_state_output(states)).sum(-1) * self.decay_from_start.squeeze(-1)
        # From input j < k to the state after the chunk.
        input_to_state = (self.dt_x * ddt_x_of_state).sum(-1) * self.decay_to_end.squeeze(-1)  # (m, Q, G, E)
        input_to_state = F.pad(input_to_state[:, :-1], (0, 0, 0, 0, 1, 0)).cumsum(1)
        # From the state before the chunk to the state after it.
        chunk_decay = self.chunk_decay.view(len(dy), 1, *self.a.shape)
        state_to_state = (states * dstates).unflatten(3, heads).sum((2, 4)).unsqueeze(1) * chunk_decay  # (m, 1, G, E)
        dlog_decay = input_to_output + state_to_output.flip(1).cumsum(1).flip(1) + input_to_state + state_to_state

        dweights, ddt = (ddt_x * self.x).sum(-1), dlog_decay * self.a  # (m, Q, G, E) twice
        dx, da = ddt_x.mul_(self.weights.unsqueeze(-1)), (dlog_decay * self.dt).sum((0, 1))
        return dx, ddt, dB.transpose(1, 2), dC.transpose(1, 2), dweights, da


def _exact_cumsum(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cumulative sum of (m, Q, ...) over Q as two parts, whose differences are as exact as their terms.

    A running sum is as precise as the largest terms in it, and so is the difference of two of them. Here the coarse
    part sums the terms as multiples of a power of two so large that the sums are exact, and the fine part sums the
    remainders. Terms are clamped to MAX_LOG_DECAY, whose exponential is infinite, or 0, already.
    """
    max_log_decay = MAX_LOG_DECAY[log_decay.dtype]
    log_decay = log_decay.clamp(-max_log_decay, max_log_decay)
    digits = 1 - math.log2(torch.finfo(log_decay.dtype).eps)
    unit = 2.0 ** (math.ceil(math.log2(max_log_decay * log_decay.shape[1])) - digits)
    coarse = (log_decay / unit).floor_().mul_(unit)
    return coarse.cumsum(1), (log_decay - coarse).cumsum(1)


def _by_group(t: Tensor) -> Tensor:
    """(m, Q, G, E, P) -> (m, G, Q, E * P)"""
    return t.transpose(1, 2).flatten(3)


def _by_head(t: Tensor) -> Tensor:
    """(m, Q, G, E, P) -> (m, G, E, Q, P)"""
    return t.permute(0, 2, 3, 1, 4).contiguous()


# --- all segments -----------------------------------------------------------------------------------------------


class _SegmentIndex(NamedTuple):
    """The chunks of a segment in tensors flattened over batch and length."""

    blocks: Blocks
    chunks: range
    chunk_size: int
    """Q, to which shorter blocks are padded."""

    @property
    def active(self) -> tuple[int, ...]:
        """Sequences in each chunk."""
        return self.blocks.active[self.chunks.start : self.chunks.stop]

    def gather(self, flat: Tensor, dtype: torch.dtype) -> Tensor:
        """(B * L, ...) -> (m, Q, ...)"""
        parts = [self.blocks.gather(k, flat, dtype) for k in self.chunks]
        missing = self.chunk_size - parts[-1].shape[1]
        if missing:  # the last chunk of all is shorter
            parts[-1] = F.pad(parts[-1], (0, 0) * (flat.dim() - 1) + (0, missing))
        return torch.cat(parts)

    def scatter(self, part: Tensor, flat: Tensor) -> None:
        """Write (m, Q, ...) to the positions in (B * L, ...) that `gather` reads."""
        for k, block in zip(self.chunks, part.split(self.active), strict=True):
            self.blocks.scatter(k, block[:, : self.blocks.size], flat)


class _Layout:
    """Sequences and sizes of one call: the order of its segments, and the shapes of inputs and states inside them."""

    def __init__(
        self,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        cu_seqlens: Tensor | None,
        seq_idx: Tensor | None,
        chunk_size: int,
    ):
        batch, length, heads, headdim = x.shape
        groups, d_state = B.shape[2:]
        self.sequences = parse_sequences(batch, length, cu_seqlens, seq_idx)
        self.has_padding = self.sequences.has_padding(batch * length)
        self.chunk_size = chunk_size
        self.heads = (groups, heads // groups)  # (G, E)
        self.headdim, self.d_state = headdim, d_state
        self.a = A.view(self.heads)
        self.initial_sequences, self.final_sequences = self.sequences.state_indices(x.device)

    def batches(self) -> Iterator[tuple[Tensor, list[_SegmentIndex]]]:
        """Yield sequences that are scanned together, by number, and their segments in order of time."""
        longest = max(self.sequences.lengths, default=0)
        chunks_each = min(CHUNKS_PER_SEGMENT, -(-longest // self.chunk_size))
        state_size = self.a.numel() * self.headdim * self.d_state
        max_sequences = max(1, MAX_STATE_ELEMENTS // max(1, chunks_each * state_size))
        for members, blocks in batch_by_length(self.sequences, max_sequences, self.chunk_size, self.a.device):
            chunks = range(len(blocks.active))
            starts = chunks[::CHUNKS_PER_SEGMENT]
            yield members, [_SegmentIndex(blocks, chunks[k : k + CHUNKS_PER_SEGMENT], self.chunk_size) for k in starts]

    def segment(self, index: _SegmentIndex, inputs: list[Tensor]) -> _Segment:
        """Gather x, dt, B, C and the weights of a segment from `inputs`, as `flatten` returns them."""
        gathered = [index.gather(t, self.a.dtype) for t in inputs]
        return _Segment(index.active, self.a, *gathered, *[None] * (5 - len(gathered)))

    def flatten(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, weights: Tensor | None) -> list[Tensor]:
        """x (B * L, G, E, P), dt (B * L, G, E), B and C (B * L, G, N), and the weights like dt where there are any."""
        group_shape = (self.heads[0], self.d_state)
        shapes = ((*self.heads, self.headdim), self.heads, group_shape, group_shape, self.heads)
        tensors = (x, dt, B, C) if weights is None else (x, dt, B, C, weights)
        return [t.reshape(t.shape[0] * t.shape[1], *shape) for t, shape in zip(tensors, shapes, strict=False)]

    def states_of_sequences(self, rows: Tensor | None, sequences: Tensor) -> Tensor:
        """Put `rows` (rows, H, P, N) at `sequences` among zero states of all sequences, (S, G, N, E * P)."""
        groups, per_group = self.heads
        states = self.a.new_zeros(len(self.sequences.lengths), groups, self.d_state, per_group * self.headdim)
        if rows is not None:
            by_group = rows.to(self.a.dtype).unflatten(1, self.heads)  # (rows, G, E, P, N)
            states[sequences] = by_group.permute(0, 1, 4, 2, 3).flatten(3)
        return states

    def states_of_rows(self, states: Tensor, sequences: Tensor) -> Tensor:
        """Take the states at `sequences`, as (rows, H, P, N). Inverse of `states_of_sequences`."""
        by_group = states[sequences].unflatten(3, (self.heads[1], self.headdim))  # (rows, G, N, E, P)
        return by_group.permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()


def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    input_weights: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y, the final states, and the state of each sequence before each segment, (checkpoints, G, N, E * P)."""
    layout = _Layout(x, A, B, cu_seqlens, seq_idx, chunk_size)
    inputs = layout.flatten(x, dt, B, C, input_weights)
    y = A.new_zeros(x.shape) if layout.has_padding else A.new_empty(x.shape)
    states = layout.states_of_sequences(initial_states, layout.initial_sequences)  # (S, G, N, E * P)
    checkpoint_states = A.new_empty(max_blocks(x, len(states), chunk_size * CHUNKS_PER_SEGMENT), *states.shape[1:])
    n_checkpoints = 0
    for members, segment_indices in layout.batches():
        state = states[members]
        for index in segment_indices:
            segment = layout.segment(index, inputs)
            n = index.active[0]
            checkpoint_states[n_checkpoints : n_checkpoints + n] = state[:n]
            n_checkpoints += n
            index.scatter(segment.forward(state), y.view_as(inputs[0]))
        states[members] = state
    checkpoint_states[n_checkpoints:] = 0  # unused rows
    return y, layout.states_of_rows(states, layout.final_sequences), checkpoint_states


def _backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    input_weights: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
    checkpoint_states: Tensor,
    dy: Tensor,
    dfinal_states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of x, dt, A, B, C, the weights (empty without them) and the initial states."""
    layout = _Layout(x, A, B, cu_seqlens, seq_idx, chunk_size)
    inputs = layout.flatten(x, dt, B, C, input_weights)
    dy = dy.reshape(-1, *layout.heads, layout.headdim)  # (B * L, G, E, P)
    dstates = layout.states_of_sequences(dfinal_states, layout.final_sequences)  # (S, G, N, E * P)
    new = torch.zeros_like if layout.has_padding else torch.empty_like
    dx, ddt, dB, dC = (new(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C))
    dweights = None if input_weights is None else new(input_weights, memory_format=torch.contiguous_format)
    flat_gradients = layout.flatten(dx, ddt, dB, dC, dweights)
    da = torch.zeros_like(layout.a)  # (G, E)
    n_checkpoints = 0
    for members, segment_indices in layout.batches():
        dstate = dstates[members]
        active = [index.active[0] for index in segment_indices]
        segment_states = checkpoint_states[n_checkpoints : n_checkpoints + sum(active)].split(active)
        n_checkpoints += sum(active)
        for index, segment_state in zip(reversed(segment_indices), reversed(segment_states), strict=True):
            segment = layout.segment(index, inputs)
            chunk_states = segment.initial_states(segment_state.clone())
            *gradients, dinput, segment_da = segment.backward(chunk_states, index.gather(dy, A.dtype), dstate)
            da += segment_da
            if dweights is None:  # dt is the weight too
                gradients[1] += dinput
            else:
                gradients.append(dinput)
            for gradient, flat in zip(gradients, flat_gradients, strict=True):
                index.scatter(gradient, flat)
        dstates[members] = dstate
    dinitial_states = layout.states_of_rows(dstates, layout.initial_sequences)
    if initial_states is not None:
        dinitial_states = dinitial_states.to(initial_states.dtype)
    return dx, ddt, da.view(A.shape), dB, dC, A.new_empty(0) if dweights is None else dweights, dinitial_states


# --- ops --------------------------------------------------------------------------------------------------------


def _forward_fake(x, dt, A, B, C, input_weights, initial_states, cu_seqlens, seq_idx, chunk_size):
    batch, _, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    n_checkpoints = max_blocks(x, rows, chunk_size * CHUNKS_PER_SEGMENT) if seq_idx is None else unknown_size(x)
    checkpoint_states = A.new_empty(n_checkpoints, groups, d_state, heads // groups * headdim)
    return A.new_empty(x.shape), A.new_empty(rows, heads, headdim, d_state), checkpoint_states


def _backward_fake(
    x, dt, A, B, C, input_weights, initial_states, cu_seqlens, seq_idx, chunk_size, checkpoint_states, dy,
    dfinal_states,
):  # fmt: skip
    dx, ddt, dA, dB, dC = (t.new_empty(t.shape) for t in (x, dt, A, B, C))
    dtype = A.dtype if initial_states is None else initial_states.dtype
    dweights = A.new_empty(0 if input_weights is None else input_weights.shape)
    return dx, ddt, dA, dB, dC, dweights, A.new_empty(dfinal_states.shape, dtype=dtype)


def _formula(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    return differentiable.ssd(**{name: arguments[name] for name in _TENSORS})


def _save(ctx, inputs, outputs):
    *tensors, ctx.chunk_size = inputs
    _, _, checkpoint_states = outputs
    ctx.save_for_backward(*tensors, checkpoint_states)


def _gradients(ctx, dy, dfinal_states):
    # Read once: torch.utils.checkpoint does not return them again.
    *tensors, checkpoint_states = ctx.saved_tensors
    results = _backward_scan(*tensors, ctx.chunk_size, checkpoint_states, dy, dfinal_states)
    grads = dict(zip(_GRADIENTS, results, strict=True))
    return {name: grad for (name, grad), x in zip(grads.items(), tensors, strict=False) if x is not None}


def _saved(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad():
        _, _, states = _scan(*(arguments[name] for name in (*_TENSORS, "chunk_size")))
    return {"checkpoint_states": states}


_TENSORS = ("x", "dt", "A", "B", "C", "input_weights", "initial_states", "cu_seqlens", "seq_idx")
_GRADIENTS = _TENSORS[:7]
_SCHEMA = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? input_weights, Tensor? initial_states,"
    " Tensor? cu_seqlens, Tensor? seq_idx, int chunk_size"
)
_FOLDED = {
    "x": -2, "dt": -1, "A": -1, "B": -2, "C": -2, "input_weights": -1, "initial_states": -3, "dy": -2,
    "dfinal_states": -3,
}  # fmt: skip
"""Dimension of heads, or of groups, of each tensor."""

_gradient = Gradient(_save, _gradients, _formula, 2)
_forward_op = define_op(f"ssd_torch({_SCHEMA}) -> (Tensor, Tensor, Tensor)", _forward, _forward_fake, _gradient)
_backward_op = define_op(
    f"ssd_torch_backward({_SCHEMA}, Tensor checkpoint_states, Tensor dy, Tensor dfinal_states)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_scan = transformable(_forward_op, Fold(_FOLDED, ("x", "initial_states", None)), _gradient)
_backward_scan = transformable(
    _backward_op,
    Fold(_FOLDED, _GRADIENTS, saved=_saved),
    backward_formula(_formula, _GRADIENTS, ("dy", "dfinal_states")),
)
