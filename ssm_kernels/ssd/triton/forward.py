"""Forward of SSD in Triton: a program passes the state of one head through the chunks of one segment of a sequence.

A chunk of Q steps is a few matrix products (arXiv 2405.21060, listing 1): its own inputs yield `(L o C B^T) dt x`, and
the state S before it `exp(a) C S`. S, (N, P), stays in registers from chunk to chunk and is never written. Where heads
and sequences are too few to fill the device, sequences are divided into segments: a first pass computes what each
segment adds to the state, `state_passing` turns that into the state before each segment, and a second pass scans them.

Heads whose P channels do not fit in registers are divided into tiles, which are independent but for sums over P.
"""

# The stubs know neither launches nor what jit functions return.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import maxnreg_option, num_sms, on_device
from ..._triton.primitives import and_scalar, load_segment, zero_padding
from ..._triton.segment_table import SegmentTable
from ..._triton.state_passing import state_passing
from .arguments import ScanArguments
from .chunk import (
    CHUNKS_PER_SEGMENT,
    ScanInputs,
    Tiles,
    choose_tiles,
    chunk_decays,
    chunk_positions,
    coarse_decay_matrix,
    dot,
    group_direction,
    load_dt,
    load_head,
    split_program,
)

STATE_REGISTERS = 128
"""Registers of a thread in the kernels that compute states alone, on NVIDIA."""


def forward(*args) -> tuple[Tensor, Tensor]:
    """Compute y and the final states. Body of `ssd_triton`; takes the fields of `ScanArguments`."""
    arguments = ScanArguments(*args)
    inputs = ScanInputs(arguments)
    tiles = choose_tiles(inputs, backward=False)
    segment_size = _segment_size(inputs, tiles)
    segments = inputs.build_segment_table(segment_size)
    y = inputs.empty(*inputs.x.shape, dtype=arguments.out_dtype)  # (B, L, H, P)
    final_states = inputs.states_like(inputs.initial_states)

    if segment_size >= inputs.length:  # a segment is an entire sequence
        launch_forward(
            inputs, tiles, segments, initial_states=inputs.initial_states,
            initial_state_rows=segments.initial_state_rows, y=y, final_states=final_states,
            final_state_rows=segments.final_state_rows,
        )  # fmt: skip
    else:
        segment_initial_states, _ = compute_segment_initial_states(inputs, tiles, segments, final_states)
        launch_forward(inputs, tiles, segments, initial_states=segment_initial_states, y=y)
    zero_padding(segments, y)
    return y, final_states


def _segment_size(inputs: ScanInputs, tiles: Tiles) -> int:
    """Steps of a segment of the forward: entire sequences where these fill the device."""
    sequences = 1 if inputs.is_packed else inputs.batch  # packed sequences may be one long one
    programs = sequences * inputs.num_head_tiles(tiles)
    wanted = 2 * num_sms(inputs.device) // max(1, programs)
    if wanted <= 1 or inputs.length <= tiles.chunk_size * CHUNKS_PER_SEGMENT:
        return max(1, inputs.length)
    chunks = max(CHUNKS_PER_SEGMENT, triton.cdiv(triton.cdiv(inputs.length, tiles.chunk_size), wanted))
    return chunks * tiles.chunk_size


def compute_segment_initial_states(
    inputs: ScanInputs, tiles: Tiles, segments: SegmentTable, final_states: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the state before each segment, (M, H, P, N), and the sum of its dt, (M, H).

    `final_states` receives the state after each sequence.
    """
    segment_states = inputs.empty_states(len(segments.entries))
    dt_sum = inputs.empty(len(segments.entries), inputs.heads)
    # Listing 1, steps 2 and 3, by segments instead of chunks.
    launch_forward(inputs, tiles, segments, final_states=segment_states, dt_sum=dt_sum)
    state_passing(segments, segment_states, inputs.A, dt_sum, inputs.initial_states, final_states, reverse=False)
    return segment_states, dt_sum


def launch_forward(
    inputs: ScanInputs,
    tiles: Tiles,
    segments: SegmentTable,
    *,
    initial_states: Tensor | None = None,
    initial_state_rows: Tensor | None = None,
    y: Tensor | None = None,
    final_states: Tensor | None = None,
    final_state_rows: Tensor | None = None,
    dt_sum: Tensor | None = None,
    chunk_states: Tensor | None = None,
    segment_range: range | None = None,
) -> None:
    """Run the forward kernel over all segments or those of `segment_range`, writing the outputs that are passed."""
    segment_range = segment_range or range(len(segments.entries))
    num_programs = len(segment_range) * inputs.num_head_tiles(tiles)
    if not num_programs:
        return
    x, dt, B, C, D = inputs.x, inputs.dt, inputs.B, inputs.C, inputs.D
    with on_device(x):
        _forward_kernel[(num_programs,)](
            x, dt, inputs.A, B, C, D, inputs.dt_bias, initial_states, y, final_states, dt_sum, chunk_states,
            segments.entries, initial_state_rows, final_state_rows,
            segment_range.start, inputs.length, inputs.height, inputs.directions,
            x.stride(), dt.stride(), B.stride(), C.stride(), None if D is None else D.stride(),
            CHUNKS_PER_SEGMENT=CHUNKS_PER_SEGMENT, HAS_D=D is not None, HAS_INITIAL_STATES=initial_states is not None,
            WRITE_Y=y is not None, WRITE_FINAL_STATES=final_states is not None, WRITE_DT_SUM=dt_sum is not None,
            WRITE_CHUNK_STATES=chunk_states is not None, num_stages=2, **tiles.options(), **inputs.constants,
            **(maxnreg_option(STATE_REGISTERS, inputs.device) if y is None else {}),
        )  # fmt: skip


@triton.jit
def _forward_kernel(
    x_ptr,  # (B, L, H, P)
    dt_ptr,  # (B, L, H)
    A_ptr,  # (H,)
    B_ptr, C_ptr,  # (B, L, G, N)
    D_ptr,  # (H, P)
    dt_bias_ptr,  # (H,)
    initial_states_ptr,  # (rows, H, P, N)
    y_ptr,  # (B, L, H, P), written
    final_states_ptr,  # (rows, H, P, N), written
    dt_sum_ptr,  # (M, H), written
    chunk_states_ptr,  # (segments of this launch, CHUNKS_PER_SEGMENT, H, P, N), written
    segments_ptr,  # (M, 4)
    initial_state_rows_ptr, final_state_rows_ptr,  # (S,)
    segment_offset, length, height, directions,
    x_strides, dt_strides, B_strides, C_strides, D_strides,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr, NUM_DIRECTIONS: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS_PER_SEGMENT: tl.constexpr,
    HAS_INITIAL_STATES: tl.constexpr, HAS_D: tl.constexpr, HAS_DT_BIAS: tl.constexpr, HAS_DT_LIMIT: tl.constexpr,
    WRITE_Y: tl.constexpr, WRITE_FINAL_STATES: tl.constexpr, WRITE_DT_SUM: tl.constexpr,
    WRITE_CHUNK_STATES: tl.constexpr, DT_SOFTPLUS: tl.constexpr, DT_MIN: tl.constexpr, DT_MAX: tl.constexpr,
    DOT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Scan one segment for BLOCK_P channels of one head; write y, the final state, the state before each chunk.

    Grid: segments x heads x tiles of P. Tiles: x (Q, BLOCK_P); B, C (Q, BLOCK_N); state (BLOCK_N, BLOCK_P).

    The rows of `initial_states` and `final_states` belong to sequences, by the tables of rows; where these are None,
    they belong to segments. `segment_offset` is the first segment of this launch.
    """
    segment, head, tile = split_program(tl.program_id(0), H, P, BLOCK_P)
    first_chunk = (segment * CHUNKS_PER_SEGMENT).to(tl.int64) * H + head  # row of chunk_states
    segment += segment_offset
    batch, start, end, sequence = load_segment(segments_ptr, segment)
    if sequence < 0:
        return
    group = head // (H // G)
    direction = group_direction(directions, group, G, NUM_DIRECTIONS)
    p, n = tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    mask_p, mask_n = p < P, n < N
    a, dt_bias = load_head(A_ptr, dt_bias_ptr, head, HAS_DT_BIAS, COMPUTE)
    state_offsets = p[None, :] * N + n[:, None]  # (N, P) in (P, N)
    mask_state = mask_n[:, None] & mask_p[None, :]

    state = tl.zeros((BLOCK_N, BLOCK_P), COMPUTE)
    if HAS_INITIAL_STATES:
        row = segment if initial_state_rows_ptr is None else tl.load(initial_state_rows_ptr + sequence)
        row = row.to(tl.int64)
        initial_state_ptrs = initial_states_ptr + (row * H + head) * (P * N) + state_offsets
        state = tl.load(initial_state_ptrs, and_scalar(mask_state, row >= 0), other=0.0).to(COMPUTE)
    if HAS_D:
        D = tl.load(D_ptr + head * D_strides[0] + p * D_strides[1], mask_p, other=0.0).to(COMPUTE)  # (P,)
    dt_sum = tl.zeros((), COMPUTE)
    x_ptr += batch * x_strides[0] + head.to(tl.int64) * x_strides[2]
    dt_ptr += batch * dt_strides[0] + head.to(tl.int64) * dt_strides[2]
    B_ptr += batch * B_strides[0] + group.to(tl.int64) * B_strides[2]
    C_ptr += batch * C_strides[0] + group.to(tl.int64) * C_strides[2]

    for first in range(start, end, Q):
        positions, mask_q = chunk_positions(first, end, direction, length, height, Q, NUM_DIRECTIONS)
        mask_x, mask_B = mask_q[:, None] & mask_p[None, :], mask_q[:, None] & mask_n[None, :]
        dt_ptrs = dt_ptr + positions * dt_strides[1]
        dt, _ = load_dt(dt_ptrs, mask_q, dt_bias, DT_SOFTPLUS, HAS_DT_LIMIT, DT_MIN, DT_MAX, COMPUTE)
        coarse, fine, decay_from_start, decay_to_end, chunk_decay = chunk_decays(dt, a, Q, COMPUTE)

        if WRITE_CHUNK_STATES:
            chunk = first_chunk + (first - start) // Q * H
            tl.store(
                chunk_states_ptr + chunk * (P * N) + state_offsets,
                state.to(chunk_states_ptr.dtype.element_ty),
                mask_state,
            )

        x = tl.load(x_ptr + positions[:, None] * x_strides[1] + p[None, :], mask_x, other=0.0)  # (Q, P)
        B = tl.load(B_ptr + positions[:, None] * B_strides[1] + n[None, :], mask_B, other=0.0).to(DOT)  # (Q, N)

        if WRITE_Y:
            C = tl.load(C_ptr + positions[:, None] * C_strides[1] + n[None, :], mask_B, other=0.0).to(DOT)  # (Q, N)
            scores = dot(C, tl.trans(B), COMPUTE)  # (Q, Q)
            # L o C B^T dt, with L as `decay_matrix`; in this order it takes the fewest registers.
            masked_scores = scores * coarse_decay_matrix(coarse, Q) * tl.exp2(fine)[:, None]
            masked_scores *= (dt * tl.exp2(-fine))[None, :]
            # Listing 1, step 4: the output from the state before the chunk.
            y = dot(C, state.to(DOT), COMPUTE) * decay_from_start[:, None]
            # Listing 1, step 1: the output from the chunk's own inputs.
            y += dot(masked_scores.to(DOT), x.to(DOT), COMPUTE)  # (Q, P)
            if HAS_D:
                y += D[None, :] * x.to(COMPUTE)
            y_offsets = ((batch * length + positions) * H + head) * P
            tl.store(y_ptr + y_offsets[:, None] + p[None, :], y.to(y_ptr.dtype.element_ty), mask_x)

        # Listing 1, steps 2 and 3: the state after the chunk.
        decayed_input = x.to(COMPUTE) * (dt * decay_to_end)[:, None]
        chunk_state = dot(tl.trans(B), decayed_input.to(DOT), COMPUTE)
        state = state * chunk_decay + chunk_state  # (N, P)
        dt_sum += tl.sum(dt, axis=0)

    if WRITE_FINAL_STATES:
        row = (segment if final_state_rows_ptr is None else tl.load(final_state_rows_ptr + sequence)).to(tl.int64)
        final_state_ptrs = final_states_ptr + (row * H + head) * (P * N) + state_offsets
        tl.store(final_state_ptrs, state.to(final_states_ptr.dtype.element_ty), and_scalar(mask_state, row >= 0))
    if WRITE_DT_SUM:
        if tile == 0:
            tl.store(dt_sum_ptr + segment.to(tl.int64) * H + head, dt_sum)
