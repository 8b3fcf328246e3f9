"""SSD in Triton: a program carries the state of one head through the chunks of one segment of a sequence.

A chunk of Q steps is a few matrix products, as in `pytorch.py`: its own inputs give `(C B^T o M) x`, the state S before
it gives `exp(a) C S`. S, (N, P), stays in registers from chunk to chunk and is never written. Where heads and
sequences are too few to fill the device, sequences are cut in segments: a first pass gives what each segment adds to the
state, `state_passing` turns that into the state before each segment, and the segments are scanned from there.

The backward cuts sequences in short segments always. A program takes a segment and some heads of a group, one after the
other: it carries S through the segment and keeps it before each chunk, then walks the chunks in reverse, the gradient
of S in its registers. The gradients of B and C, sums over heads, are added up in a buffer of the program's own.

Heads whose P channels do not fit are cut in tiles, which are heads of their own but for sums over P. Inside, time
scales are in units of log2: `exp(dt A) = exp2(dt a)` with a = A log2(e).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import capability, maxnreg_option, num_sms, on_device, pack_directions, with_contiguous_last_dim
from ..._triton.primitives import (
    and_scalar,
    compute_type,
    dot_type,
    grid_offset,
    load_segment,
    sigmoid,
    softplus,
    zero_padding,
)
from ..._triton.segment_table import SegmentTable, build_segment_table
from ..._triton.state_passing import state_passing

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)  # both by way of `tl.full`: a float alone is taken as float32


# --- what both directions need of a chunk -----------------------------------------------------------------------


@triton.jit
def _step_sizes(
    dt, at, valid, bias, LOW, HIGH, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """dt of a chunk, (Q,), 0 beyond the segment, and its slope against what was loaded."""
    raw = tl.load(dt + at, valid, other=0.0).to(COMPUTE) + bias
    step, slope = raw, tl.full(raw.shape, 1.0, COMPUTE)
    if SOFTPLUS:
        step, slope = softplus(raw), sigmoid(raw)
    if LIMITED:
        low, high = tl.full((), LOW, COMPUTE), tl.full((), HIGH, COMPUTE)
        slope = tl.where((step >= low) & (step <= high), slope, 0.0)
        step = tl.minimum(tl.maximum(step, low), high)
    return tl.where(valid, step, 0.0), tl.where(valid, slope, 0.0)


@triton.jit
def _decays(dt, a, Q: tl.constexpr, COMPUTE: tl.constexpr):
    """Running sums of dt a in two parts (Q,), and what decays remain from the start, to the end, and over the chunk.

    The first part has the terms as multiples of UNIT, whose sums are exact, and the second what remains of them, so
    that a difference is as exact as its own terms; see `pytorch.py`.
    """
    MAX_LOG_DECAY: tl.constexpr = (
        1100.0 if COMPUTE == tl.float64 else 150.0
    )  # exp2 of it overflows, of its negative is 0
    UNIT: tl.constexpr = Q * (
        2.0**-42 if COMPUTE == tl.float64 else 2.0**-16
    )  # so that Q MAX_LOG_DECAY fits in the digits
    most = tl.full((), MAX_LOG_DECAY, COMPUTE)
    log = tl.minimum(tl.maximum(dt * a, -most), most)
    multiples = tl.floor(log * (1 / UNIT)) * UNIT
    coarse, rest = tl.cumsum(multiples, axis=0), tl.cumsum(log - multiples, axis=0)
    last = tl.arange(0, Q) == Q - 1
    all_coarse, all_rest = tl.sum(tl.where(last, coarse, 0.0), axis=0), tl.sum(tl.where(last, rest, 0.0), axis=0)
    to_end = tl.exp2((all_coarse - coarse) + (all_rest - rest))
    return coarse, rest, tl.exp2(coarse + rest), to_end, tl.exp2(all_coarse + all_rest)


@triton.jit
def _coarse_decay_between(coarse, Q: tl.constexpr):
    """The decay from after step j to step i, (Q, Q), by the first part of the sums alone; zero for j > i."""
    i, j = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    return tl.exp2(tl.where(i >= j, coarse[:, None] - coarse[None, :], float("-inf")))


@triton.jit
def _decay_between(coarse, rest, Q: tl.constexpr):
    """The decay from after step j to step i, (Q, Q), zero for j > i."""
    return _coarse_decay_between(coarse, Q) * tl.exp2(rest)[:, None] * tl.exp2(-rest)[None, :]


@triton.jit
def _rows(first, end, direction, length, height, Q: tl.constexpr, HAS_ROUTES: tl.constexpr):
    """Where the chunk's steps lie in their batch row, (Q,) int64, and which of them are the segment's."""
    t = first + tl.arange(0, Q)
    rows = grid_offset(t, direction, length, height) if HAS_ROUTES else t
    return rows.to(tl.int64), t < end


# --- forward ----------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    x, dt, A, B, C, D, dt_bias, starts, y, ends, time, states, table, start_row, end_row,
    first_segment, length, height, directions,
    x_batch, x_step, x_head, dt_batch, dt_step, dt_head, B_batch, B_step, B_group, C_batch, C_step, C_group,
    D_head, D_channel,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr, DIRECTIONS: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, WRITE_Y: tl.constexpr,
    WRITE_END: tl.constexpr, WRITE_TIME: tl.constexpr, KEEP: tl.constexpr, HAS_START: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """One segment and BLOCK_P channels of one head: y, the state at the end, that before each chunk, or what is wanted.

    Grid: segments x heads x tiles of P. `start_row` and `end_row` (S,) give the row of `starts` and `ends` that
    belongs to a sequence; where they are None, rows are numbered as segments. `states` has CHUNKS rows a segment.
    """
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    segment, head, tile = program // (H * TILES), program // TILES % H, program % TILES
    kept = (segment * CHUNKS).to(tl.int64) * H + head  # of the segment's first chunk, among those kept
    segment += first_segment
    batch, begin, end, sequence = load_segment(table, segment)
    if sequence < 0:
        return
    group = head // (H // G)
    direction = (directions >> 2 * (group // (G // DIRECTIONS))) & 3 if DIRECTIONS else 0
    p, n = tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    in_p, in_n = p < P, n < N
    a = tl.load(A + head).to(COMPUTE) * tl.full((), LOG2E, COMPUTE)
    bias = tl.load(dt_bias + head).to(COMPUTE) if HAS_BIAS else 0.0
    at_state = p[None, :] * N + n[:, None]  # (N, P) in (P, N)
    in_state = in_n[:, None] & in_p[None, :]

    state = tl.zeros((BLOCK_N, BLOCK_P), COMPUTE)
    if HAS_START:
        row = (segment if start_row is None else tl.load(start_row + sequence)).to(tl.int64)
        state = tl.load(starts + (row * H + head) * (P * N) + at_state, and_scalar(in_state, row >= 0), other=0.0).to(
            COMPUTE
        )
    if HAS_D:
        skip = tl.load(D + head * D_head + p * D_channel, in_p, other=0.0).to(COMPUTE)
    total = tl.zeros((), COMPUTE)
    x += batch * x_batch + head.to(tl.int64) * x_head
    dt += batch * dt_batch + head.to(tl.int64) * dt_head
    B += batch * B_batch + group.to(tl.int64) * B_group
    C += batch * C_batch + group.to(tl.int64) * C_group

    for first in range(begin, end, Q):
        rows, valid = _rows(first, end, direction, length, height, Q, DIRECTIONS > 0)
        in_x, in_B = valid[:, None] & in_p[None, :], valid[:, None] & in_n[None, :]
        step, _ = _step_sizes(dt, rows * dt_step, valid, bias, LOW, HIGH, SOFTPLUS, LIMITED, COMPUTE)
        coarse, rest, from_start, to_end, whole = _decays(step, a, Q, COMPUTE)
        if KEEP:
            at_kept = (kept + (first - begin) // Q * H) * (P * N)
            tl.store(states + at_kept + at_state, state.to(states.dtype.element_ty), in_state)
        x_q = tl.load(x + rows[:, None] * x_step + p[None, :], in_x, other=0.0)  # (Q, P)
        B_q = tl.load(B + rows[:, None] * B_step + n[None, :], in_B, other=0.0).to(DOT)  # (Q, N)
        if WRITE_Y:
            C_q = tl.load(C + rows[:, None] * C_step + n[None, :], in_B, other=0.0).to(DOT)
            scores = tl.dot(C_q, tl.trans(B_q), input_precision=PRECISION, out_dtype=COMPUTE)
            # As `_decay_between`; in this order it takes the fewest registers.
            mix = scores * _coarse_decay_between(coarse, Q) * tl.exp2(rest)[:, None] * (step * tl.exp2(-rest))[None, :]
            out = tl.dot(C_q, state.to(DOT), input_precision=PRECISION, out_dtype=COMPUTE) * from_start[:, None]
            out += tl.dot(mix.to(DOT), x_q.to(DOT), input_precision=PRECISION, out_dtype=COMPUTE)
            if HAS_D:
                out += skip[None, :] * x_q.to(COMPUTE)
            at_y = ((batch * length + rows) * H + head) * P
            tl.store(y + at_y[:, None] + p[None, :], out.to(y.dtype.element_ty), in_x)
        arriving = x_q.to(COMPUTE) * (step * to_end)[:, None]
        arrived = tl.dot(tl.trans(B_q), arriving.to(DOT), input_precision=PRECISION, out_dtype=COMPUTE)
        state = state * whole + arrived
        total += tl.sum(step, axis=0)

    if WRITE_END:
        row = (segment if end_row is None else tl.load(end_row + sequence)).to(tl.int64)
        tl.store(
            ends + (row * H + head) * (P * N) + at_state,
            state.to(ends.dtype.element_ty),
            and_scalar(in_state, row >= 0),
        )
    if WRITE_TIME:
        if tile == 0:
            tl.store(time + segment.to(tl.int64) * H + head, total)


# --- backward ---------------------------------------------------------------------------------------------------


@triton.jit
def _state_gradient_kernel(
    dt, A, C, dt_bias, dy, dends, dstarts, dstates, table,
    first_segment, length, height, directions,
    dt_batch, dt_step, dt_head, C_batch, C_step, C_group, dy_batch, dy_step, dy_head,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr, DIRECTIONS: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, HAS_END: tl.constexpr, KEEP: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The gradient of the state of one segment, in reverse, and BLOCK_P channels of one head. Grid: as forward.

    From `dends`, or zero, to `dstarts`, the gradient of the state before the segment; or with KEEP to `dstates`, that
    of the state after each chunk, CHUNKS rows a segment.
    """
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    segment, head, tile = program // (H * TILES), program // TILES % H, program % TILES
    kept = (segment * CHUNKS).to(tl.int64) * H + head  # of the segment's first chunk, among those kept
    segment += first_segment
    batch, begin, end, sequence = load_segment(table, segment)
    if sequence < 0:
        return
    group = head // (H // G)
    direction = (directions >> 2 * (group // (G // DIRECTIONS))) & 3 if DIRECTIONS else 0
    p, n = tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    in_p, in_n = p < P, n < N
    in_state = in_n[:, None] & in_p[None, :]
    at_state = p[None, :] * N + n[:, None]  # (N, P) in (P, N)
    a = tl.load(A + head).to(COMPUTE) * tl.full((), LOG2E, COMPUTE)
    bias = tl.load(dt_bias + head).to(COMPUTE) if HAS_BIAS else 0.0
    dt += batch * dt_batch + head.to(tl.int64) * dt_head
    C += batch * C_batch + group.to(tl.int64) * C_group
    dy += batch * dy_batch + head.to(tl.int64) * dy_head

    at_segment = (segment.to(tl.int64) * H + head) * (P * N)
    dstate = tl.zeros((BLOCK_N, BLOCK_P), COMPUTE)
    if HAS_END:
        dstate = tl.load(dends + at_segment + at_state, in_state, other=0.0).to(COMPUTE)
    n_chunks = (end - begin + Q - 1) // Q
    for back in range(n_chunks):
        chunk = n_chunks - 1 - back
        if KEEP:
            at_kept = (kept + chunk * H) * (P * N)
            tl.store(dstates + at_kept + at_state, dstate.to(dstates.dtype.element_ty), in_state)
        rows, valid = _rows(begin + chunk * Q, end, direction, length, height, Q, DIRECTIONS > 0)
        in_x = valid[:, None] & in_p[None, :]
        step, _ = _step_sizes(dt, rows * dt_step, valid, bias, LOW, HIGH, SOFTPLUS, LIMITED, COMPUTE)
        _, _, from_start, _, whole = _decays(step, a, Q, COMPUTE)
        at_C = C + rows[:, None] * C_step + n[None, :]
        C_q = tl.load(at_C, valid[:, None] & in_n[None, :], other=0.0).to(DOT)
        dy_q = tl.load(dy + rows[:, None] * dy_step + p[None, :], in_x, other=0.0).to(COMPUTE)
        decayed = (dy_q * from_start[:, None]).to(DOT)
        arrived = tl.dot(tl.trans(C_q), decayed, input_precision=PRECISION, out_dtype=COMPUTE)
        dstate = dstate * whole + arrived
    if not KEEP:
        tl.store(dstarts + at_segment + at_state, dstate, in_state)


@triton.jit
def _input_gradient_kernel(
    x, dt, A, B, C, D, dt_bias, dy, states, dstates, dx, ddt, dA, dD, table,
    first_segment, length, height, directions,
    x_batch, x_step, x_head, dt_batch, dt_step, dt_head, B_batch, B_step, B_group, C_batch, C_step, C_group,
    dy_batch, dy_step, dy_head, D_head, D_channel, n_rows,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr, DIRECTIONS: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """All gradients but those of B and C, of one chunk and BLOCK_P channels of one head.

    Reads the state before the chunk and the gradient of the one after it. dx is whole; ddt is one partial a tile
    of P; dA and dD are one partial a chunk (and tile). Grid: segments x CHUNKS x heads x tiles of P.
    """
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    kept, head, tile = program // (H * TILES), program // TILES % H, program % TILES
    segment = first_segment + kept // CHUNKS
    batch, begin, end, sequence = load_segment(table, segment)
    first = begin + kept % CHUNKS * Q
    if first >= end:
        return
    group = head // (H // G)
    direction = (directions >> 2 * (group // (G // DIRECTIONS))) & 3 if DIRECTIONS else 0
    p, n = tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    in_p, in_n = p < P, n < N
    rows, valid = _rows(first, end, direction, length, height, Q, DIRECTIONS > 0)
    in_x, in_B = valid[:, None] & in_p[None, :], valid[:, None] & in_n[None, :]
    a = tl.load(A + head).to(COMPUTE) * tl.full((), LOG2E, COMPUTE)
    bias = tl.load(dt_bias + head).to(COMPUTE) if HAS_BIAS else 0.0
    dt += batch * dt_batch + head.to(tl.int64) * dt_head
    step, slope = _step_sizes(dt, rows * dt_step, valid, bias, LOW, HIGH, SOFTPLUS, LIMITED, COMPUTE)
    coarse, rest, from_start, to_end, whole = _decays(step, a, Q, COMPUTE)
    x += batch * x_batch + head.to(tl.int64) * x_head
    dy += batch * dy_batch + head.to(tl.int64) * dy_head
    B += batch * B_batch + group.to(tl.int64) * B_group
    C += batch * C_batch + group.to(tl.int64) * C_group
    x_q = tl.load(x + rows[:, None] * x_step + p[None, :], in_x, other=0.0).to(COMPUTE)  # (Q, P)
    dy_q = tl.load(dy + rows[:, None] * dy_step + p[None, :], in_x, other=0.0).to(COMPUTE)
    B_q = tl.load(B + rows[:, None] * B_step + n[None, :], in_B, other=0.0).to(DOT)  # (Q, N)
    C_q = tl.load(C + rows[:, None] * C_step + n[None, :], in_B, other=0.0).to(DOT)
    at_state = (kept.to(tl.int64) * H + head) * (P * N) + p[:, None] * N + n[None, :]  # (P, N)
    in_state = in_p[:, None] & in_n[None, :]
    state = tl.load(states + at_state, in_state, other=0.0)
    dstate = tl.load(dstates + at_state, in_state, other=0.0)
    if HAS_D:
        skip = tl.load(D + head * D_head + p * D_channel, in_p, other=0.0).to(COMPUTE)

    # Step k's decay acts on whatever passes from before k to k or later: from the state before the chunk to the one
    # after, from the former to step i >= k, from step j < k to i, and from j to the state after.
    dlog = tl.sum(tl.sum(state.to(COMPUTE) * dstate.to(COMPUTE), axis=1), axis=0) * whole
    from_state = tl.dot(C_q, tl.trans(state.to(DOT)), input_precision=PRECISION, out_dtype=COMPUTE)
    from_state *= from_start[:, None]
    mix = tl.dot(C_q, tl.trans(B_q), input_precision=PRECISION, out_dtype=COMPUTE)
    mix *= _decay_between(coarse, rest, Q)
    at_y = (((batch * length + rows) * H + head) * P)[:, None] + p[None, :]
    dy_dot = dy_q.to(DOT)
    input_dot = (x_q * step[:, None]).to(DOT)
    dmix = tl.dot(dy_dot, tl.trans(input_dot), input_precision=PRECISION, out_dtype=COMPUTE)
    i, j = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    # Each passage is added up as it is, not as a difference of running totals, which would cancel.
    passing = tl.cumsum(tl.where(i > j, dmix * mix, 0.0), axis=0, reverse=True)

    from_next = tl.dot(B_q, tl.trans(dstate.to(DOT)), input_precision=PRECISION, out_dtype=COMPUTE)
    from_next *= to_end[:, None]
    slant = tl.sum(x_q * from_next, axis=1)
    leaving = slant * step
    dlog += tl.cumsum(tl.sum(dy_q * from_state, axis=1), axis=0, reverse=True)
    dlog += tl.sum(tl.where(i > j, passing + leaving[None, :], 0.0), axis=1)
    own = tl.dot(tl.trans(mix.to(DOT)), dy_dot, input_precision=PRECISION, out_dtype=COMPUTE)
    slant += tl.sum(x_q * own, axis=1)
    dstep = (slant + dlog * (a * tl.full((), LN2, COMPUTE))) * slope
    at_dt = ((tile.to(tl.int64) * n_rows + batch * length) + rows) * H + head
    tl.store(ddt + at_dt, dstep, valid)
    dx_q = (from_next + own) * step[:, None]
    at_head = (segment.to(tl.int64) * CHUNKS + kept % CHUNKS) * H + head
    if HAS_D:
        dx_q += skip[None, :] * dy_q
        tl.store(dD + at_head * P + p, tl.sum(dy_q * x_q, axis=0), in_p)
    tl.store(dx + at_y, dx_q.to(dx.dtype.element_ty), in_x)
    # Summed as a column: of a vector, the compiler of triton 3.7 cannot lay this sum out on Blackwell.
    tl.store(dA + at_head * TILES + tile + tl.arange(0, 1), tl.sum((dlog * step)[:, None], axis=0))


@triton.jit
def _shared_gradient_kernel(
    x, dt, A, B, C, dt_bias, dy, states, dstates, dB, dC, table,
    first_segment, length, height, directions,
    x_batch, x_step, x_head, dt_batch, dt_step, dt_head, B_batch, B_step, B_group, C_batch, C_step, C_group,
    dy_batch, dy_step, dy_head, n_rows,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr, DIRECTIONS: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Gradients of B and C of one chunk, (Q, N) each, summed over some heads of a group: one partial a split.

    Grid: segments x CHUNKS x groups x SPLITS.
    """
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    HEADS: tl.constexpr = H // G
    program = tl.program_id(0)
    kept, group, split = program // (G * SPLITS), program // SPLITS % G, program % SPLITS
    batch, begin, end, sequence = load_segment(table, first_segment + kept // CHUNKS)
    first = begin + kept % CHUNKS * Q
    if first >= end:
        return
    direction = (directions >> 2 * (group // (G // DIRECTIONS))) & 3 if DIRECTIONS else 0
    n = tl.arange(0, BLOCK_N)
    rows, valid = _rows(first, end, direction, length, height, Q, DIRECTIONS > 0)
    in_B = valid[:, None] & (n < N)[None, :]
    x += batch * x_batch
    dt += batch * dt_batch
    dy += batch * dy_batch
    dB_q, dC_q = tl.zeros((Q, BLOCK_N), COMPUTE), tl.zeros((Q, BLOCK_N), COMPUTE)
    dscores = tl.zeros((Q, Q), COMPUTE)
    for one in range(split * HEADS // SPLITS * TILES, (split + 1) * HEADS // SPLITS * TILES):
        head = tl.cast(group * HEADS + one // TILES, tl.int64)
        p = one % TILES * BLOCK_P + tl.arange(0, BLOCK_P)
        in_x = valid[:, None] & (p < P)[None, :]
        a = tl.load(A + head).to(COMPUTE) * tl.full((), LOG2E, COMPUTE)
        bias = tl.load(dt_bias + head).to(COMPUTE) if HAS_BIAS else 0.0
        at_dt = head * dt_head + rows * dt_step
        step, _ = _step_sizes(dt, at_dt, valid, bias, LOW, HIGH, SOFTPLUS, LIMITED, COMPUTE)
        coarse, rest, from_start, to_end, _ = _decays(step, a, Q, COMPUTE)
        input_q = tl.load(x + head * x_head + rows[:, None] * x_step + p[None, :], in_x, other=0.0).to(COMPUTE)
        input_q *= step[:, None]
        dy_q = tl.load(dy + head * dy_head + rows[:, None] * dy_step + p[None, :], in_x, other=0.0).to(COMPUTE)
        at_state = (kept.to(tl.int64) * H + head) * (P * N) + p[:, None] * N + n[None, :]  # (P, N)
        in_state = (p < P)[:, None] & (n < N)[None, :]
        state = tl.load(states + at_state, in_state, other=0.0).to(DOT)
        dstate = tl.load(dstates + at_state, in_state, other=0.0).to(DOT)
        dmix = tl.dot(dy_q.to(DOT), tl.trans(input_q.to(DOT)), input_precision=PRECISION, out_dtype=COMPUTE)
        dscores += dmix * _decay_between(coarse, rest, Q)
        decayed = (dy_q * from_start[:, None]).to(DOT)
        dC_q += tl.dot(decayed, state, input_precision=PRECISION, out_dtype=COMPUTE)
        arriving = (input_q * to_end[:, None]).to(DOT)
        dB_q += tl.dot(arriving, dstate, input_precision=PRECISION, out_dtype=COMPUTE)
    at_n = rows[:, None] * B_step + n[None, :] + batch * B_batch + group.to(tl.int64) * B_group
    B_q = tl.load(B + at_n, in_B, other=0.0).to(DOT)
    dC_q += tl.dot(dscores.to(DOT), B_q, input_precision=PRECISION, out_dtype=COMPUTE)
    at_n = rows[:, None] * C_step + n[None, :] + batch * C_batch + group.to(tl.int64) * C_group
    C_q = tl.load(C + at_n, in_B, other=0.0).to(DOT)
    dB_q += tl.dot(tl.trans(dscores.to(DOT)), C_q, input_precision=PRECISION, out_dtype=COMPUTE)
    at_n = ((split.to(tl.int64) * n_rows + batch * length + rows) * G + group)[:, None] * N + n[None, :]
    tl.store(dB + at_n, dB_q, in_B)
    tl.store(dC + at_n, dC_q, in_B)


# --- decoding ---------------------------------------------------------------------------------------------------


@triton.jit
def _step_kernel(
    state, x, dt, A, B, C, D, z, dt_bias, y,
    tokens, state_batch, state_head, state_channel, state_n, x_batch, x_step, x_head, dt_batch, dt_step, dt_head,
    B_batch, B_step, B_group, C_batch, C_step, C_group, z_batch, z_step, z_head, D_head, D_channel,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The next few tokens of one sequence, for BLOCK_P channels of one head, whose state is updated in place.

    Grid: batch x heads x tiles of P.
    """
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    batch, head = (program // (H * TILES)).to(tl.int64), (program // TILES % H).to(tl.int64)
    p, n = program % TILES * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    in_p, in_n = p < P, n < N
    in_state = in_p[:, None] & in_n[None, :]
    state += batch * state_batch + head * state_head
    at_state = p[:, None].to(tl.int64) * state_channel + n[None, :] * state_n
    h = tl.load(state + at_state, in_state, other=0.0).to(COMPUTE)
    a = tl.load(A + head).to(COMPUTE)
    bias = tl.load(dt_bias + head).to(COMPUTE) if HAS_BIAS else 0.0
    if HAS_D:
        skip = tl.load(D + head * D_head + p * D_channel, in_p, other=0.0).to(COMPUTE)
    x += batch * x_batch + head * x_head
    dt += batch * dt_batch + head * dt_head
    B += batch * B_batch + head // (H // G) * B_group
    C += batch * C_batch + head // (H // G) * C_group
    for token in range(tokens):
        at = tl.cast(token, tl.int64)
        always = tl.full((1,), True, tl.int1)
        step, _ = _step_sizes(
            dt + at * dt_step, tl.arange(0, 1), always, bias, LOW, HIGH, SOFTPLUS, LIMITED, COMPUTE
        )  # (1,)
        x_t = tl.load(x + at * x_step + p, in_p, other=0.0).to(COMPUTE)
        B_t = tl.load(B + at * B_step + n, in_n, other=0.0).to(COMPUTE)
        C_t = tl.load(C + at * C_step + n, in_n, other=0.0).to(COMPUTE)
        h = h * tl.exp(step * a)[:, None] + (step * x_t)[:, None] * B_t[None, :]
        out = tl.sum(h * C_t[None, :], axis=1)
        if HAS_D:
            out += skip * x_t
        if HAS_Z:
            gate = tl.load(z + batch * z_batch + at * z_step + head * z_head + p, in_p, other=0.0).to(COMPUTE)
            out *= gate * sigmoid(gate)
        tl.store(y + ((batch * tokens + at) * H + head) * P + p, out.to(y.dtype.element_ty), in_p)
    tl.store(state + at_state, h.to(state.dtype.element_ty), in_state)


def step(state, x, dt, A, B, C, D, z, dt_bias, softplus, low, high):
    """As `ssd_triton_step`: y (B, T, H, P), and the state moved on."""
    batch, tokens, heads, headdim = x.shape
    groups, n = B.shape[2:]
    x, B, C, z = (m if m is None else with_contiguous_last_dim(m) for m in (x, B, C, z))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_n = triton.next_power_of_2(n)
    block_p = max(1, min(triton.next_power_of_2(headdim), 2048 // block_n))
    programs = batch * heads * triton.cdiv(headdim, block_p)
    if programs and tokens:
        with on_device(x):
            _step_kernel[(programs,)](
                state, x, dt, A.contiguous(), B, C, D, z, None if dt_bias is None else dt_bias.contiguous(), y,
                tokens, *state.stride(), *x.stride()[:3], *dt.stride(), *B.stride()[:3], *C.stride()[:3],
                *((0, 0, 0) if z is None else z.stride()[:3]), *_skip_strides(D),
                H=heads, P=headdim, N=n, G=groups, BLOCK_P=block_p, BLOCK_N=block_n, HAS_D=D is not None,
                HAS_Z=z is not None, HAS_BIAS=dt_bias is not None, SOFTPLUS=softplus,
                LIMITED=_is_limited(softplus, low, high), LOW=low, HIGH=high,
                COMPUTE=compute_type(state.dtype), num_warps=4,
            )  # fmt: skip
    return y


# --- launches ---------------------------------------------------------------------------------------------------


class _Tiles(NamedTuple):
    """How a problem is cut. Chosen from the compiler's register counts; not measured on a GPU."""

    chunk: int
    p: int
    n: int
    warps: int

    def options(self) -> dict[str, int]:
        return {"Q": self.chunk, "BLOCK_P": self.p, "BLOCK_N": self.n, "num_warps": self.warps}


class _Call:
    """One call's tensors and sizes, as the kernels want them."""

    def __init__(
        self, x, dt, A, B, C, D, dt_bias, softplus, low, high, initial_states, chunk_size, cu_seqlens, seq_idx, directions,
        height, out_dtype,
    ):  # fmt: skip
        self.x, self.B, self.C = (with_contiguous_last_dim(m) for m in (x, B, C))
        self.A, self.dt_bias, self.initial = (m if m is None else m.contiguous() for m in (A, dt_bias, initial_states))
        self.dt, self.D = dt, D
        self.batch, self.length, self.heads, self.headdim = x.shape
        self.groups, self.n = B.shape[2:]
        self.packing = (cu_seqlens, seq_idx)
        self.state_rows = self.batch if cu_seqlens is None else len(cu_seqlens) - 1
        self.chunk_size, self.out_dtype = chunk_size, out_dtype
        self.capability = capability(x.device)
        self.runtime = (self.length, height, pack_directions(directions))
        self.compute = torch.promote_types(x.dtype, torch.float32)
        dot = dot_type(x.dtype, B.dtype, C.dtype)
        self.constants = {
            "H": self.heads, "P": self.headdim, "N": self.n, "G": self.groups, "DIRECTIONS": len(directions),
            "HAS_BIAS": dt_bias is not None, "SOFTPLUS": softplus, "LOW": low, "HIGH": high,
            "LIMITED": _is_limited(softplus, low, high), "DOT": dot,
            "PRECISION": "ieee",  # of float32; three rounds of tf32 would not fit in registers
            "COMPUTE": compute_type(x.dtype),
        }  # fmt: skip

    def build_segment_table(self, size: int) -> SegmentTable:
        return build_segment_table(self.batch, self.length, size, *self.packing, self.x.device)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.compute, device=self.x.device)

    def states(self, rows: int) -> Tensor:
        return self.empty(rows, self.heads, self.headdim, self.n)

    def end_states(self, starts: Tensor | None) -> Tensor:
        """Where states at the far end of sequences are written; a sequence without steps ends as it starts."""
        if self.packing == (None, None) and self.length:
            return self.states(self.state_rows)
        if starts is None:
            return self.states(self.state_rows).zero_()
        return starts.to(self.compute, copy=True)

    def scan(
        self, tiles: _Tiles, segments: SegmentTable, *, starts=None, start_row=None, y=None, ends=None, end_row=None, time=None,
        states=None, part: range | None = None,
    ) -> None:  # fmt: skip
        """The forward kernel over all segments, or a part of them, writing what is given."""
        x, dt, B, C, D = self.x, self.dt, self.B, self.C, self.D
        part = part or range(len(segments.entries))
        programs = len(part) * self.heads * triton.cdiv(self.headdim, tiles.p)
        if programs:
            with on_device(x):
                _forward_kernel[(programs,)](
                    x, dt, self.A, B, C, D, self.dt_bias, starts, y, ends, time, states, segments.entries,
                    start_row, end_row, part.start, *self.runtime,
                    *x.stride()[:3], *dt.stride(), *B.stride()[:3], *C.stride()[:3], *_skip_strides(D),
                    CHUNKS=SEGMENT_CHUNKS, WRITE_Y=y is not None, WRITE_END=ends is not None,
                    WRITE_TIME=time is not None, KEEP=states is not None, HAS_START=starts is not None,
                    HAS_D=D is not None, num_stages=2, **tiles.options(), **self.constants,
                    **(maxnreg_option(STATE_REGISTERS, x.device) if y is None else {}),
                )  # fmt: skip

    def scan_back(
        self, tiles: _Tiles, segments: SegmentTable, dy: Tensor, *, dends=None, dstarts=None, dstates=None,
        part: range | None = None,
    ) -> None:  # fmt: skip
        """The gradient of the state over all segments, or a part of them: before each segment, or after each chunk."""
        dt, C = self.dt, self.C
        part = part or range(len(segments.entries))
        programs = len(part) * self.heads * triton.cdiv(self.headdim, tiles.p)
        if programs:
            with on_device(dy):
                _state_gradient_kernel[(programs,)](
                    dt, self.A, C, self.dt_bias, dy, dends, dstarts, dstates, segments.entries, part.start,
                    *self.runtime, *dt.stride(), *C.stride()[:3], *dy.stride()[:3],
                    CHUNKS=SEGMENT_CHUNKS, HAS_END=dends is not None, KEEP=dstates is not None, num_stages=2,
                    **tiles.options(), **self.constants,
                    **maxnreg_option(STATE_REGISTERS, dy.device),
                )  # fmt: skip

    def starts(self, tiles: _Tiles, segments: SegmentTable, final: Tensor) -> tuple[Tensor, Tensor]:
        """The state before each segment, each segment's time, and into `final` the state after each sequence."""
        states = self.states(len(segments.entries))
        time = self.empty(len(segments.entries), self.heads)
        self.scan(tiles, segments, ends=states, time=time)
        state_passing(segments, states, self.A, time, self.initial, final, reverse=False)
        return states, time


def forward(*args):
    """As `ssd_triton`: y and the final states."""
    call = _Call(*args)
    tiles = _tiles(call, backward=False)
    y = call.empty(*call.x.shape, dtype=call.out_dtype)
    final = call.end_states(call.initial)
    size = _segment_size(call, tiles)
    segments = call.build_segment_table(size)
    if size >= call.length:
        call.scan(
            tiles,
            segments,
            starts=call.initial,
            start_row=segments.initial_state_rows,
            y=y,
            ends=final,
            end_row=segments.final_state_rows,
        )
    else:
        starts, _ = call.starts(tiles, segments, final)
        call.scan(tiles, segments, starts=starts, y=y)
    zero_padding(segments, y)
    return y, final


def backward(dy, dfinal, *args):
    """As `ssd_triton_backward`: gradients of x, dt, A, B, C, D, dt_bias, initial_states; empty where not given."""
    call = _Call(*args)
    x, dt, A, B, C, D, dt_bias = args[:7]
    dy, dfinal = with_contiguous_last_dim(dy), dfinal.contiguous()
    forward_tiles, tiles = _tiles(call, backward=False), _tiles(call, backward=True)
    segments = call.build_segment_table(tiles.chunk * SEGMENT_CHUNKS)
    n_segments, n_tiles, rows = len(segments.entries), triton.cdiv(call.headdim, tiles.p), call.batch * call.length

    # The states before each segment, and the gradients of those after it.
    starts, time = call.starts(forward_tiles, segments, call.end_states(call.initial))
    dends, dinitial = call.states(n_segments), call.end_states(dfinal)
    strides = (
        *call.x.stride()[:3], *dt.stride(), *call.B.stride()[:3], *call.C.stride()[:3],
        *dy.stride()[:3],
    )  # fmt: skip
    call.scan_back(forward_tiles, segments, dy, dstarts=dends)
    state_passing(segments, dends, call.A, time, dfinal, dinitial, reverse=True)

    dx, ddt = call.empty(*x.shape, dtype=x.dtype), call.empty(n_tiles, *dt.shape)
    n_chunks = n_segments * SEGMENT_CHUNKS
    # Zero, for the chunks to spare.
    dA = x.new_zeros(n_chunks, call.heads, n_tiles, dtype=call.compute)
    dD = x.new_zeros(n_chunks, call.heads, 0 if D is None else call.headdim, dtype=call.compute)
    # What is kept of each chunk is as large as the inputs several times over: not of all segments at once.
    kept_type = KEPT.get(call.constants["DOT"], call.compute)
    chunk_bytes = call.heads * call.headdim * call.n * torch.finfo(kept_type).bits // 8
    at_once = max(1, min(n_segments, KEPT_BYTES // (2 * SEGMENT_CHUNKS * chunk_bytes)))
    states, dstates = (call.empty(at_once * SEGMENT_CHUNKS, *starts.shape[1:], dtype=kept_type) for _ in range(2))
    # Programs enough to fill the device, and no more: each has sums of its own.
    programs = at_once * SEGMENT_CHUNKS * call.groups
    splits = max(1, min(call.heads // call.groups, triton.cdiv(2 * num_sms(x.device), programs)))
    dB, dC = (call.empty(splits, *m.shape) for m in (B, C))
    shared = {"CHUNKS": SEGMENT_CHUNKS, "num_stages": 1, **tiles.options(), **call.constants}
    for first in range(0, n_segments, at_once):
        part = range(first, min(first + at_once, n_segments))
        call.scan(forward_tiles, segments, starts=starts, states=states, part=part)
        call.scan_back(forward_tiles, segments, dy, dends=dends, dstates=dstates, part=part)
        with on_device(x):
            _input_gradient_kernel[(len(part) * SEGMENT_CHUNKS * call.heads * n_tiles,)](
                call.x, dt, call.A, call.B, call.C, D, call.dt_bias, dy, states, dstates,
                dx, ddt, dA, dD, segments.entries, first, *call.runtime, *strides, *_skip_strides(D), rows,
                HAS_D=D is not None, **shared,
            )  # fmt: skip
            _shared_gradient_kernel[(len(part) * SEGMENT_CHUNKS * call.groups * splits,)](
                call.x, dt, call.A, call.B, call.C, call.dt_bias, dy, states, dstates, dB, dC, segments.entries,
                first, *call.runtime, *strides, rows, SPLITS=splits, **shared,
            )  # fmt: skip

    def optional(given: Tensor | None, gradient: Tensor) -> Tensor:
        return x.new_empty(0) if given is None else gradient.to(given.dtype)

    dD = dD.sum(0) if D is None or D.dim() == 2 else dD.sum((0, 2))
    ddt, dB, dC = (m.sum(0) for m in (ddt, dB, dC))
    zero_padding(segments, dx, ddt, dB, dC)
    return (
        dx, ddt.to(dt.dtype), dA.sum((0, 2)).to(A.dtype), dB.to(B.dtype), dC.to(C.dtype),
        optional(D, dD), optional(dt_bias, ddt.sum((0, 1))), optional(call.initial, dinitial),
    )  # fmt: skip


SEGMENT_CHUNKS = 4
"""Chunks of a segment of the backward: more are fewer states in memory, and fewer programs."""
KEPT_BYTES = 1 << 28
"""At most so much scratch memory in the backward, if one segment does not need more."""
STATE_REGISTERS = 128
"""A thread of the kernels that only carry states, on NVIDIA."""
KEPT = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16}
"""What states are kept in within a segment of the backward: what they are rounded to in products anyway."""


def _tiles(call: _Call, backward: bool) -> _Tiles:
    """What the compiler fits in registers for each architecture, and no larger than the problem."""
    n = max(16, triton.next_power_of_2(call.n))
    vendor, version = call.capability
    if call.constants["DOT"] in (tl.float32, tl.float64):
        chunk, elements, warps = 16, 16 * n, 8  # products without tensor cores
    elif vendor == "hip":
        chunk, elements, warps = 32, 8192, 4
    elif n > 128 and version not in (100, 103):
        chunk, elements, warps = 16, 32 * n, 8
    elif version in (90, 100, 103):
        chunk, elements, warps = 64, 8192 if backward else 4096, 8
    else:
        chunk, elements, warps = 32, 8192 if backward else 32 * min(n, 128), 8
    p = max(16, min(64, triton.next_power_of_2(call.headdim), elements // n))
    return _Tiles(max(16, min(chunk, triton.next_power_of_2(call.chunk_size))), p, n, warps)


def _segment_size(call: _Call, tiles: _Tiles) -> int:
    """Steps of a segment of the forward: whole sequences where these fill the device."""
    sequences = call.batch if call.packing == (None, None) else 1  # packed sequences may be one long one
    programs = sequences * call.heads * triton.cdiv(call.headdim, tiles.p)
    wanted = 2 * num_sms(call.x.device) // max(1, programs)
    if wanted <= 1 or call.length <= tiles.chunk * SEGMENT_CHUNKS:
        return max(1, call.length)
    per_segment = max(SEGMENT_CHUNKS, triton.cdiv(triton.cdiv(call.length, tiles.chunk), wanted))
    return per_segment * tiles.chunk


def _is_limited(softplus: bool, low: float, high: float) -> bool:
    return not (softplus and (low, high) == (0.0, float("inf")))


def _skip_strides(D: Tensor | None) -> tuple[int, int]:
    """Of D by head and channel."""
    return (0, 0) if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0)
