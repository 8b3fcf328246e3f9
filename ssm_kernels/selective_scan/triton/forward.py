"""The forward kernel and its launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._triton.device import maxnreg_option, num_sms, on_device, pack_directions, with_contiguous_last_dim
from ..._triton.primitives import and_scalar, load_segment, sigmoid, zero_padding
from ..._triton.segment_table import build_segment_table
from ..._triton.state_passing import state_passing
from . import CHECKPOINT_INTERVAL, empty_like
from .tile import (
    LOG2E,
    REGISTERS,
    advance,
    compile_options,
    contiguous,
    dot,
    forward_tile,
    jit_unspecialized,
    load,
    load_delta,
    load_matrix,
    load_states,
    near_offset,
    place_program,
    store_states,
    strides_of,
    sum_over_lanes,
    unroll,
    with_near_steps,
    zero_states,
)


@jit_unspecialized
def _forward_kernel(
    u, dt, A, B, C, D, z, dt_bias, starts, initial_states, y, final_states, kept, times,
    table, first, kept_first, begin, initial_row, final_row, length, height, codes, G, E,
    u_0, u_1, u_2, u_3, dt_0, dt_1, dt_2, dt_3, z_0, z_1, z_2, z_3, y_0, y_1, y_2, y_3, B_0, B_1, B_2, C_0, C_1, C_2,
    N: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, BLOCK_E: tl.constexpr, B_WORD: tl.constexpr,
    C_WORD: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, ROUTED: tl.constexpr, HAS_STARTS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, KEEP: tl.constexpr, ENDS_ONLY: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Walk BLOCK_E channels through one segment. Grid: segments * G * tiles of the channels of a group.

    Writes y, the final state where the segment is the last of its sequence, and with KEEP the state at the start of each
    chunk. With ENDS_ONLY instead what the segment adds to a state, into `starts`, and the sum of its steps, into `times`;
    of the last segment of a sequence nobody asks for them, and zeros stand for them.
    """
    segment, group, e, lane = place_program(G, E, BLOCK_E, LANES)
    lanes = tl.arange(0, LANES)[None, :]
    mask = e < E
    channel = group * E + e
    row, start, end, sequence = load_segment(table, segment)
    is_last = (sequence >= 0) & (segment + 1 == tl.load(first + tl.maximum(sequence, 0) + 1))
    if ENDS_ONLY:
        end = tl.where(is_last, start, end)
    way = (codes >> (2 * group) & 3, length, height) if ROUTED else None

    a = load_states(A + channel * N, mask, lane, N, K, LOG2E, COMPUTE)
    if CONSTANT_B:
        b = load_states(B + channel * N, mask, lane, N, K, 1.0, COMPUTE)
    if CONSTANT_C:
        c = load_states(C + channel * N, mask, lane, N, K, 1.0, COMPUTE)
    bias = tl.load(dt_bias + channel, mask, other=0.0).to(COMPUTE) if HAS_BIAS else 0.0
    if HAS_D:
        skip = tl.load(D + channel, mask, other=0.0).to(COMPUTE)
    state = channel * N  # in one row of states
    size = tl.cast(G, tl.int64) * E * N
    if HAS_STARTS:
        h = load_states(starts + segment * size + state, mask, lane, N, K, 1.0, COMPUTE)
    elif HAS_INITIAL:
        initial = tl.where(sequence >= 0, tl.load(initial_row + tl.maximum(sequence, 0)), -1).to(tl.int64)
        h = load_states(
            initial_states + initial * size + state, and_scalar(mask, initial >= 0), lane, N, K, 1.0, COMPUTE
        )
    else:
        h = zero_states(BLOCK_E, LANES, K, COMPUTE)
    if KEEP:
        chunk = tl.where(sequence >= 0, tl.load(kept_first + tl.maximum(sequence, 0)), 0).to(tl.int64)
        chunk += (start - tl.where(sequence >= 0, tl.load(begin + tl.maximum(sequence, 0)), 0)) // CHUNK
        kept += chunk * size + state

    u += row * u_0 + group * u_2 + e * u_3
    dt += row * dt_0 + group * dt_2 + e * dt_3
    if not CONSTANT_B:
        B += row * B_0 + group * B_2 + lanes * K
    if not ENDS_ONLY:
        y += row * y_0 + group * y_2 + e * y_3
        if HAS_Z:
            z += row * z_0 + group * z_2 + e * z_3
        if not CONSTANT_C:
            C += row * C_0 + group * C_2 + lanes * K
    total = tl.zeros((BLOCK_E, LANES), COMPUTE)

    for t0 in range(start, end, UNROLL):
        if KEEP:
            if (t0 - start) % CHUNK == 0:
                store_states(kept, h, mask, lane, N, K)
                kept += size
        ys = ()
        far = tl.cast(t0, tl.int64) if way is None else 0
        for i in tl.static_range(UNROLL):
            inside = and_scalar(mask, t0 + i < end)
            near = near_offset(t0, i, end, way)
            delta = load_delta(dt + far * dt_1 + near * dt_1, inside, bias, SOFTPLUS, COMPUTE)
            x = load(u + far * u_1 + near * u_1, inside, COMPUTE)
            if not CONSTANT_B:
                b_row = B + far * B_1 + near * B_1
                b = load_matrix(b_row, lanes, t0 + i < end, N, K, B_WORD, COMPUTE)
            h = advance(h, a, b, delta, delta * x, K)
            if ENDS_ONLY:
                total += delta
            else:
                if not CONSTANT_C:
                    c_row = C + far * C_1 + near * C_1
                    c = load_matrix(c_row, lanes, t0 + i < end, N, K, C_WORD, COMPUTE)
                out = sum_over_lanes(dot(c, h, K), LANES)
                if HAS_D:
                    out += skip * x
                if HAS_Z:
                    gate = load(z + far * z_1 + near * z_1, inside, COMPUTE)
                    out *= gate * sigmoid(gate)
                ys = ys + (out,)
        if not ENDS_ONLY:
            for i in tl.static_range(UNROLL):
                y_at = y + far * y_1 + near_offset(t0, i, end, way) * y_1
                tl.store(y_at, ys[i].to(y.dtype.element_ty), and_scalar(mask, t0 + i < end))

    if ENDS_ONLY:
        store_states(starts + segment * size + state, h, mask, lane, N, K)
        tl.store(times + segment * (G * E) + channel, total, mask)
    else:
        final = tl.where(is_last, tl.load(final_row + tl.maximum(sequence, 0)), -1).to(tl.int64)
        store_states(final_states + final * size + state, h, and_scalar(mask, final >= 0), lane, N, K)


def forward(
    u, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, seq_idx, dt_softplus, directions, height, keep
):  # fmt: skip
    """As `selective_scan_triton`: y, the final states, and the state at the start of each chunk, if kept."""
    batch, length, groups, _ = u.shape
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    compute = torch.promote_types(u.dtype, torch.float32)
    packed = cu_seqlens is not None or seq_idx is not None
    A, D, dt_bias, initial_states = (contiguous(x) for x in (A, D, dt_bias, initial_states))
    B, C = (contiguous(m) if m.dim() == 2 else with_contiguous_last_dim(m) for m in (B, C))
    u, dt, z, B, C = (with_near_steps(x) for x in (u, dt, z, B, C))
    options = compile_options(forward_tile(A.shape[1], u.device), u, dt_softplus, A, B, C, D, z, dt_bias, directions)
    tiles = groups * triton.cdiv(u.shape[3], options["BLOCK_E"])

    y = empty_like(u)
    final_states = torch.empty((rows, *A.shape), dtype=compute, device=u.device)
    segments = build_segment_table(
        batch, length, _segment_size(batch, length, tiles, u.device), cu_seqlens, seq_idx, u.device
    )
    chunks = (
        build_segment_table(batch, length, CHECKPOINT_INTERVAL, cu_seqlens, seq_idx, u.device) if keep else segments
    )
    kept = torch.empty((len(chunks.entries) + 1 if keep else 0, *A.shape), dtype=compute, device=u.device)
    if packed and keep:
        kept.zero_()  # rows to spare
    else:
        kept[-1:].zero_()
    n_segments = len(segments.entries)
    is_cut = segments.size < length
    if not is_cut and (packed or not length):  # sequences without a segment end as they start
        final_states.copy_(initial_states) if initial_states is not None else final_states.zero_()
    if not (n_segments and A.numel()):
        zero_padding(segments, y)
        return y, final_states, kept

    def launch(starts, times, keep, ends_only):
        _forward_kernel[(n_segments * tiles,)](
            u, dt, A, B, C, D, z, dt_bias, starts, initial_states, y, final_states, kept, times,
            segments.entries, segments.first_segment, chunks.first_segment, segments.sequence_starts, segments.initial_state_rows, segments.final_state_rows,
            length, height, pack_directions(directions), groups, u.shape[3],
            *u.stride(), *dt.stride(), *strides_of(z, 4), *y.stride(), *strides_of(B, 3), *strides_of(C, 3),
            HAS_STARTS=starts is not None and not ends_only, HAS_INITIAL=initial_states is not None and not ends_only,
            KEEP=keep, ENDS_ONLY=ends_only, CHUNK=CHECKPOINT_INTERVAL, UNROLL=unroll(directions, u.device), **options,
            **maxnreg_option(REGISTERS, u.device),
        )  # fmt: skip

    with on_device(u):
        starts = None
        if is_cut:
            starts = torch.empty((n_segments, *A.shape), dtype=compute, device=u.device)
            times = torch.empty((n_segments, len(A)), dtype=compute, device=u.device)
            launch(starts, times, False, True)
            state_passing(segments, starts, A.flatten(), times, initial_states, final_states, reverse=False)
        launch(starts, None, keep, False)
    zero_padding(segments, y)
    return y, final_states, kept


def _segment_size(batch: int, length: int, tiles: int, device: torch.device) -> int:
    """Whole sequences where they give every processor two programs; else for four, at up to twice the work."""
    whole = triton.cdiv(max(length, 1), CHECKPOINT_INTERVAL) * CHECKPOINT_INTERVAL
    programs = batch * tiles
    if programs == 0 or programs >= 2 * num_sms(device):
        return whole
    parts = triton.cdiv(4 * num_sms(device), programs)
    return triton.cdiv(triton.cdiv(whole, parts), CHECKPOINT_INTERVAL) * CHECKPOINT_INTERVAL
