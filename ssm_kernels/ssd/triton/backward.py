"""Backward of SSD in Triton.

Sequences are divided into short segments. States pass forward over the segments, their gradients in reverse; then each
segment is scanned both ways once more, to write the state before and the gradient after each of its chunks. With these
the chunks are independent: one kernel computes the gradients of a head's own inputs, one those of B and C, which
several heads share. Sums over programs are partial sums in buffers, added up at the end.
"""

# The stubs know neither launches nor what jit functions return.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import maxnreg_option, num_sms, on_device, with_contiguous_last_dim
from ..._triton.primitives import LN2, load_segment, zero_padding
from ..._triton.segment_table import SegmentTable
from ..._triton.state_passing import state_passing
from .arguments import ScanArguments, ScanGradients
from .chunk import (
    CHUNKS_PER_SEGMENT,
    ScanInputs,
    Tiles,
    choose_tiles,
    chunk_decays,
    chunk_positions,
    decay_matrix,
    dot,
    group_direction,
    load_dt,
    load_head,
    split_program,
)
from .decays import compute_chunk_decays
from .forward import STATE_REGISTERS, compute_segment_initial_states, launch_forward

MAX_CHUNK_STATE_BYTES = 1 << 28
"""Bound of the scratch memory for the states of chunks, if one segment does not need more."""
CHUNK_STATE_DTYPES = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16}
"""dtype of the states of chunks: that to which products round them anyway."""


def backward(dy: Tensor, dfinal_states: Tensor, *args) -> ScanGradients:
    """Compute the gradients. Body of `ssd_triton_backward`; takes the fields of `ScanArguments` after dy, dfinal."""
    arguments = ScanArguments(*args)
    inputs = ScanInputs(arguments)
    dy, dfinal_states = with_contiguous_last_dim(dy), dfinal_states.contiguous()
    tiles = choose_tiles(inputs, backward=True)
    # The kernels that compute states alone take the forward's tiles.
    state_tiles = choose_tiles(inputs, backward=False)._replace(chunk_size=tiles.chunk_size)
    segments = inputs.build_segment_table(tiles.chunk_size * CHUNKS_PER_SEGMENT)
    num_segments = len(segments.entries)

    decays = compute_chunk_decays(inputs, state_tiles, segments)
    # The state before each segment, and the gradient of the state after it.
    final_states = inputs.states_like(inputs.initial_states)
    segment_initial_states, dt_sum = compute_segment_initial_states(inputs, state_tiles, segments, decays, final_states)
    dsegment_states, dinitial_states = inputs.empty_states(num_segments), inputs.states_like(dfinal_states)
    _launch_state_gradient(inputs, state_tiles, segments, dy, dinitial_states=dsegment_states)
    state_passing(segments, dsegment_states, inputs.A, dt_sum, dfinal_states, dinitial_states, reverse=True)

    # Partial gradients, with a leading or a last dimension for the programs that share a sum.
    num_tiles = triton.cdiv(inputs.headdim, tiles.block_p)
    num_chunks = num_segments * CHUNKS_PER_SEGMENT
    dx = inputs.empty(*inputs.x.shape, dtype=inputs.x.dtype)  # (B, L, H, P)
    ddt = inputs.empty(num_tiles, *inputs.dt.shape)  # (tiles, B, L, H)
    # Zeros, for the unused chunks.
    dA = inputs.empty(num_chunks, inputs.heads, num_tiles).zero_()  # (chunks, H, tiles)
    dD = inputs.empty(num_chunks, inputs.heads, 0 if inputs.D is None else inputs.headdim).zero_()  # (chunks, H, P)

    # The states of all chunks would take several times the memory of the inputs: some segments at a time.
    chunk_state_dtype = CHUNK_STATE_DTYPES.get(inputs.dot, inputs.state_dtype)
    chunk_state_bytes = inputs.heads * inputs.headdim * inputs.d_state * torch.finfo(chunk_state_dtype).bits // 8
    at_once = MAX_CHUNK_STATE_BYTES // (2 * CHUNKS_PER_SEGMENT * chunk_state_bytes)
    at_once = max(1, min(num_segments, at_once))
    chunk_states_shape = (at_once * CHUNKS_PER_SEGMENT, inputs.heads, inputs.headdim, inputs.d_state)
    chunk_states = inputs.empty(*chunk_states_shape, dtype=chunk_state_dtype)
    dchunk_states = inputs.empty(*chunk_states_shape, dtype=chunk_state_dtype)
    # Programs of the kernel for B and C: enough to fill the device, and no more, since each has sums of its own.
    programs = at_once * CHUNKS_PER_SEGMENT * inputs.groups
    splits = triton.cdiv(2 * num_sms(inputs.device), programs)
    splits = max(1, min(inputs.heads // inputs.groups, splits))
    dB, dC = (inputs.empty(splits, *t.shape) for t in (inputs.B, inputs.C))  # (splits, B, L, G, N)

    for first in range(0, num_segments, at_once):
        segment_range = range(first, min(first + at_once, num_segments))
        launch_forward(
            inputs, state_tiles, segments, decays, initial_states=segment_initial_states, chunk_states=chunk_states,
            segment_range=segment_range,
        )  # fmt: skip
        _launch_state_gradient(
            inputs, state_tiles, segments, dy, dfinal_states=dsegment_states, dchunk_states=dchunk_states,
            segment_range=segment_range,
        )  # fmt: skip
        _launch_input_gradient(inputs, tiles, segments, segment_range, dy, chunk_states, dchunk_states, dx, ddt, dA, dD)
        _launch_shared_gradient(inputs, tiles, segments, segment_range, dy, chunk_states, dchunk_states, dB, dC, splits)

    ddt, dB, dC = (t.sum(0) for t in (ddt, dB, dC))
    zero_padding(segments, dx, ddt, dB, dC)
    if arguments.D is None or arguments.D.shape[1] == inputs.headdim:
        dD = dD.sum(0)  # (H, P)
    else:
        dD = dD.sum((0, 2)).unsqueeze(1)  # (H, 1)
    return ScanGradients(
        x=dx,
        dt=ddt.to(arguments.dt.dtype),
        A=dA.sum((0, 2)).to(arguments.A.dtype),
        B=dB.to(arguments.B.dtype),
        C=dC.to(arguments.C.dtype),
        D=_gradient_of(arguments.D, dD),
        dt_bias=_gradient_of(arguments.dt_bias, ddt.sum((0, 1))),
        initial_states=_gradient_of(arguments.initial_states, dinitial_states),
    )


def _gradient_of(argument: Tensor | None, gradient: Tensor) -> Tensor:
    """The gradient in the argument's dtype, or an empty tensor where there is no argument."""
    return gradient.new_empty(0) if argument is None else gradient.to(argument.dtype)


def _launch_state_gradient(
    inputs: ScanInputs,
    tiles: Tiles,
    segments: SegmentTable,
    dy: Tensor,
    *,
    dfinal_states: Tensor | None = None,
    dinitial_states: Tensor | None = None,
    dchunk_states: Tensor | None = None,
    segment_range: range | None = None,
) -> None:
    """Run the state gradient kernel over all segments or those of `segment_range`, writing one of the outputs."""
    segment_range = segment_range or range(len(segments.entries))
    num_programs = len(segment_range) * inputs.num_head_tiles(tiles)
    if not num_programs:
        return
    dt, C = inputs.dt, inputs.C
    with on_device(dy):
        _state_gradient_kernel[(num_programs,)](
            dt, inputs.A, C, inputs.dt_bias, dy, dfinal_states, dinitial_states, dchunk_states, segments.entries,
            segment_range.start, inputs.length, inputs.height, inputs.directions,
            dt.stride(), C.stride(), dy.stride(),
            CHUNKS_PER_SEGMENT=CHUNKS_PER_SEGMENT, HAS_DFINAL_STATES=dfinal_states is not None,
            WRITE_DCHUNK_STATES=dchunk_states is not None, num_stages=2, **tiles.options(), **inputs.constants,
            **maxnreg_option(STATE_REGISTERS, inputs.device),
        )  # fmt: skip


@triton.jit
def _state_gradient_kernel(
    dt_ptr,  # (B, L, H)
    A_ptr,  # (H,)
    C_ptr,  # (B, L, G, N)
    dt_bias_ptr,  # (H,)
    dy_ptr,  # (B, L, H, P)
    dfinal_states_ptr,  # (M, H, P, N)
    dinitial_states_ptr,  # (M, H, P, N), written
    dchunk_states_ptr,  # (segments of this launch, CHUNKS_PER_SEGMENT, H, P, N), written
    segments_ptr,  # (M, 4)
    segment_offset, length, height, directions,
    dt_strides, C_strides, dy_strides,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr, NUM_DIRECTIONS: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS_PER_SEGMENT: tl.constexpr,
    HAS_DFINAL_STATES: tl.constexpr, HAS_DT_BIAS: tl.constexpr, HAS_DT_LIMIT: tl.constexpr,
    WRITE_DCHUNK_STATES: tl.constexpr, DT_SOFTPLUS: tl.constexpr, DT_MIN: tl.constexpr, DT_MAX: tl.constexpr,
    DOT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Pass the gradient of the state through one segment in reverse, for BLOCK_P channels of one head.

    Grid: segments x heads x tiles of P. Tiles: dy (Q, BLOCK_P); C (Q, BLOCK_N); dstate (BLOCK_N, BLOCK_P).

    It starts from `dfinal_states`, or zero. With WRITE_DCHUNK_STATES the gradient of the state after each chunk is
    written to `dchunk_states`, otherwise that of the state before the segment to `dinitial_states`.
    """
    segment, head, tile = split_program(tl.program_id(0), H, P, BLOCK_P)
    first_chunk = (segment * CHUNKS_PER_SEGMENT).to(tl.int64) * H + head  # row of dchunk_states
    segment += segment_offset
    batch, start, end, sequence = load_segment(segments_ptr, segment)
    if sequence < 0:
        return
    group = head // (H // G)
    direction = group_direction(directions, group, G, NUM_DIRECTIONS)
    p, n = tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    mask_p, mask_n = p < P, n < N
    mask_state = mask_n[:, None] & mask_p[None, :]
    state_offsets = p[None, :] * N + n[:, None]  # (N, P) in (P, N)
    a, dt_bias = load_head(A_ptr, dt_bias_ptr, head, HAS_DT_BIAS, COMPUTE)
    dt_ptr += batch * dt_strides[0] + head.to(tl.int64) * dt_strides[2]
    C_ptr += batch * C_strides[0] + group.to(tl.int64) * C_strides[2]
    dy_ptr += batch * dy_strides[0] + head.to(tl.int64) * dy_strides[2]

    segment_row = (segment.to(tl.int64) * H + head) * (P * N)  # of the states before and after segments
    dstate = tl.zeros((BLOCK_N, BLOCK_P), COMPUTE)
    if HAS_DFINAL_STATES:
        dstate = tl.load(dfinal_states_ptr + segment_row + state_offsets, mask_state, other=0.0).to(COMPUTE)
    num_chunks = (end - start + Q - 1) // Q
    for chunks_after in range(num_chunks):
        chunk = num_chunks - 1 - chunks_after
        if WRITE_DCHUNK_STATES:
            tl.store(
                dchunk_states_ptr + (first_chunk + chunk * H) * (P * N) + state_offsets,
                dstate.to(dchunk_states_ptr.dtype.element_ty),
                mask_state,
            )

        positions, mask_q = chunk_positions(start + chunk * Q, end, direction, length, height, Q, NUM_DIRECTIONS)
        mask_x, mask_C = mask_q[:, None] & mask_p[None, :], mask_q[:, None] & mask_n[None, :]

        dt_ptrs = dt_ptr + positions * dt_strides[1]
        dt, _ = load_dt(dt_ptrs, mask_q, dt_bias, DT_SOFTPLUS, HAS_DT_LIMIT, DT_MIN, DT_MAX, COMPUTE)
        _, _, decay_from_start, _, chunk_decay = chunk_decays(dt, a, Q, COMPUTE)
        C = tl.load(C_ptr + positions[:, None] * C_strides[1] + n[None, :], mask_C, other=0.0).to(DOT)  # (Q, N)
        dy_ptrs = dy_ptr + positions[:, None] * dy_strides[1] + p[None, :]
        dy = tl.load(dy_ptrs, mask_x, other=0.0).to(COMPUTE)  # (Q, P)

        # Transpose of listing 1, steps 3 and 4: through the decay of the chunk, and through its outputs.
        decayed_dy = (dy * decay_from_start[:, None]).to(DOT)
        dstate_of_outputs = dot(tl.trans(C), decayed_dy, COMPUTE)
        dstate = dstate * chunk_decay + dstate_of_outputs  # (N, P)

    if not WRITE_DCHUNK_STATES:
        tl.store(dinitial_states_ptr + segment_row + state_offsets, dstate, mask_state)


def _chunk_options(inputs: ScanInputs, tiles: Tiles) -> dict[str, Any]:
    """Launch options of the kernels whose programs take one chunk each."""
    return {"CHUNKS_PER_SEGMENT": CHUNKS_PER_SEGMENT, "num_stages": 1, **tiles.options(), **inputs.constants}


def _launch_input_gradient(
    inputs: ScanInputs,
    tiles: Tiles,
    segments: SegmentTable,
    segment_range: range,
    dy: Tensor,
    chunk_states: Tensor,
    dchunk_states: Tensor,
    dx: Tensor,
    ddt: Tensor,
    dA: Tensor,
    dD: Tensor,
) -> None:
    """Write the gradients of x, dt, A and D for the chunks of some segments."""
    x, dt, B, C, D = inputs.x, inputs.dt, inputs.B, inputs.C, inputs.D
    num_programs = len(segment_range) * CHUNKS_PER_SEGMENT * inputs.num_head_tiles(tiles)
    with on_device(x):
        _input_gradient_kernel[(num_programs,)](
            x, dt, inputs.A, B, C, D, inputs.dt_bias, dy, chunk_states, dchunk_states, dx, ddt, dA, dD,
            segments.entries,
            segment_range.start, inputs.length, inputs.height, inputs.directions,
            x.stride(), dt.stride(), B.stride(), C.stride(), dy.stride(), None if D is None else D.stride(),
            inputs.batch * inputs.length,
            HAS_D=D is not None, **_chunk_options(inputs, tiles),
        )  # fmt: skip


@triton.jit
def _input_gradient_kernel(
    x_ptr,  # (B, L, H, P)
    dt_ptr,  # (B, L, H)
    A_ptr,  # (H,)
    B_ptr, C_ptr,  # (B, L, G, N)
    D_ptr,  # (H, P)
    dt_bias_ptr,  # (H,)
    dy_ptr,  # (B, L, H, P)
    chunk_states_ptr, dchunk_states_ptr,  # (segments of this launch, CHUNKS_PER_SEGMENT, H, P, N)
    dx_ptr,  # (B, L, H, P), written
    ddt_ptr,  # (tiles, B, L, H), written
    dA_ptr,  # (M * CHUNKS_PER_SEGMENT, H, tiles), written
    dD_ptr,  # (M * CHUNKS_PER_SEGMENT, H, P), written
    segments_ptr,  # (M, 4)
    segment_offset, length, height, directions,
    x_strides, dt_strides, B_strides, C_strides, dy_strides, D_strides, num_positions,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr, NUM_DIRECTIONS: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS_PER_SEGMENT: tl.constexpr, HAS_D: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr, HAS_DT_LIMIT: tl.constexpr, DT_SOFTPLUS: tl.constexpr, DT_MIN: tl.constexpr,
    DT_MAX: tl.constexpr, DOT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute all gradients but those of B and C, of one chunk and BLOCK_P channels of one head.

    Grid: segments x CHUNKS_PER_SEGMENT x heads x tiles of P. Tiles: x, dy (Q, BLOCK_P); B, C (Q, BLOCK_N); states
    (BLOCK_P, BLOCK_N); scores (Q, Q).

    Reads the state before the chunk and the gradient of the state after it. dx is complete; ddt is one partial sum a
    tile of P; dA and dD are one partial sum a chunk (and tile). `num_positions` is B * L.
    """
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    chunk, head, tile = split_program(tl.program_id(0), H, P, BLOCK_P)
    segment = segment_offset + chunk // CHUNKS_PER_SEGMENT
    batch, start, end, sequence = load_segment(segments_ptr, segment)
    first = start + chunk % CHUNKS_PER_SEGMENT * Q
    if first >= end:
        return
    group = head // (H // G)
    direction = group_direction(directions, group, G, NUM_DIRECTIONS)
    p, n = tile * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    mask_p, mask_n = p < P, n < N
    positions, mask_q = chunk_positions(first, end, direction, length, height, Q, NUM_DIRECTIONS)
    mask_x, mask_B = mask_q[:, None] & mask_p[None, :], mask_q[:, None] & mask_n[None, :]

    a, dt_bias = load_head(A_ptr, dt_bias_ptr, head, HAS_DT_BIAS, COMPUTE)
    dt_ptr += batch * dt_strides[0] + head.to(tl.int64) * dt_strides[2]
    dt_ptrs = dt_ptr + positions * dt_strides[1]
    dt, dt_derivative = load_dt(dt_ptrs, mask_q, dt_bias, DT_SOFTPLUS, HAS_DT_LIMIT, DT_MIN, DT_MAX, COMPUTE)
    coarse, fine, decay_from_start, decay_to_end, chunk_decay = chunk_decays(dt, a, Q, COMPUTE)

    x_ptr += batch * x_strides[0] + head.to(tl.int64) * x_strides[2]
    dy_ptr += batch * dy_strides[0] + head.to(tl.int64) * dy_strides[2]
    B_ptr += batch * B_strides[0] + group.to(tl.int64) * B_strides[2]
    C_ptr += batch * C_strides[0] + group.to(tl.int64) * C_strides[2]
    x = tl.load(x_ptr + positions[:, None] * x_strides[1] + p[None, :], mask_x, other=0.0).to(COMPUTE)  # (Q, P)
    dy = tl.load(dy_ptr + positions[:, None] * dy_strides[1] + p[None, :], mask_x, other=0.0).to(COMPUTE)  # (Q, P)
    B = tl.load(B_ptr + positions[:, None] * B_strides[1] + n[None, :], mask_B, other=0.0).to(DOT)  # (Q, N)
    C = tl.load(C_ptr + positions[:, None] * C_strides[1] + n[None, :], mask_B, other=0.0).to(DOT)  # (Q, N)
    state_offsets = (chunk.to(tl.int64) * H + head) * (P * N) + p[:, None] * N + n[None, :]
    mask_state = mask_p[:, None] & mask_n[None, :]
    state = tl.load(chunk_states_ptr + state_offsets, mask_state, other=0.0)  # (P, N)
    dstate = tl.load(dchunk_states_ptr + state_offsets, mask_state, other=0.0)  # (P, N)
    if HAS_D:
        D = tl.load(D_ptr + head * D_strides[0] + p * D_strides[1], mask_p, other=0.0).to(COMPUTE)  # (P,)

    # The log decay dt A of step k acts on all that passes from before k to k or later: from the state before the chunk
    # to the state after it, from the former to output i >= k, from input j < k to output i >= k, and from input j < k
    # to the state after.
    dlog_decay = tl.sum(tl.sum(state.to(COMPUTE) * dstate.to(COMPUTE), axis=1), axis=0) * chunk_decay
    # Listing 1, step 4, again.
    y_of_state = dot(C, tl.trans(state.to(DOT)), COMPUTE)
    y_of_state *= decay_from_start[:, None]  # (Q, P)
    masked_scores = dot(C, tl.trans(B), COMPUTE)
    masked_scores *= decay_matrix(coarse, fine, Q)  # (Q, Q)
    y_offsets = (((batch * length + positions) * H + head) * P)[:, None] + p[None, :]
    dy_dot = dy.to(DOT)
    dt_x = (x * dt[:, None]).to(DOT)
    dmasked_scores = dot(dy_dot, tl.trans(dt_x), COMPUTE)  # (Q, Q)
    i, j = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    # Entry (k, j): from input j to all outputs i >= k. Sums of the terms themselves, not differences of running
    # totals, which would cancel.
    from_input = tl.cumsum(tl.where(i > j, dmasked_scores * masked_scores, 0.0), axis=0, reverse=True)  # (Q, Q)

    # Gradient of dt x through the state after the chunk: transpose of listing 1, step 2.
    ddt_x_of_state = dot(B, tl.trans(dstate.to(DOT)), COMPUTE)
    ddt_x_of_state *= decay_to_end[:, None]  # (Q, P)
    ddt_input = tl.sum(x * ddt_x_of_state, axis=1)  # (Q,)
    input_to_state = ddt_input * dt
    dlog_decay += tl.cumsum(tl.sum(dy * y_of_state, axis=1), axis=0, reverse=True)
    dlog_decay += tl.sum(tl.where(i > j, from_input + input_to_state[None, :], 0.0), axis=1)  # (Q,)
    # Gradient of dt x through the outputs of the chunk: transpose of listing 1, step 1.
    ddt_x_of_outputs = dot(tl.trans(masked_scores.to(DOT)), dy_dot, COMPUTE)
    ddt_input += tl.sum(x * ddt_x_of_outputs, axis=1)

    ddt = (ddt_input + dlog_decay * (a * tl.full((), LN2, COMPUTE))) * dt_derivative
    ddt_offsets = ((tile.to(tl.int64) * num_positions + batch * length) + positions) * H + head
    tl.store(ddt_ptr + ddt_offsets, ddt, mask_q)
    dx = (ddt_x_of_state + ddt_x_of_outputs) * dt[:, None]  # (Q, P)
    chunk_row = (segment.to(tl.int64) * CHUNKS_PER_SEGMENT + chunk % CHUNKS_PER_SEGMENT) * H + head
    if HAS_D:
        dx += D[None, :] * dy
        tl.store(dD_ptr + chunk_row * P + p, tl.sum(dy * x, axis=0), mask_p)
    tl.store(dx_ptr + y_offsets, dx.to(dx_ptr.dtype.element_ty), mask_x)
    # Summed as a column: of a vector, the compiler of triton 3.7 cannot lay this sum out on Blackwell.
    tl.store(dA_ptr + chunk_row * TILES + tile + tl.arange(0, 1), tl.sum((dlog_decay * dt)[:, None], axis=0))


def _launch_shared_gradient(
    inputs: ScanInputs,
    tiles: Tiles,
    segments: SegmentTable,
    segment_range: range,
    dy: Tensor,
    chunk_states: Tensor,
    dchunk_states: Tensor,
    dB: Tensor,
    dC: Tensor,
    splits: int,
) -> None:
    """Write the gradients of B and C, which the heads of a group share, for the chunks of some segments."""
    x, dt, B, C = inputs.x, inputs.dt, inputs.B, inputs.C
    num_programs = len(segment_range) * CHUNKS_PER_SEGMENT * inputs.groups * splits
    with on_device(x):
        _shared_gradient_kernel[(num_programs,)](
            x, dt, inputs.A, B, C, inputs.dt_bias, dy, chunk_states, dchunk_states, dB, dC, segments.entries,
            segment_range.start, inputs.length, inputs.height, inputs.directions,
            x.stride(), dt.stride(), B.stride(), C.stride(), dy.stride(), inputs.batch * inputs.length,
            SPLITS=splits, **_chunk_options(inputs, tiles),
        )  # fmt: skip


@triton.jit
def _shared_gradient_kernel(
    x_ptr,  # (B, L, H, P)
    dt_ptr,  # (B, L, H)
    A_ptr,  # (H,)
    B_ptr, C_ptr,  # (B, L, G, N)
    dt_bias_ptr,  # (H,)
    dy_ptr,  # (B, L, H, P)
    chunk_states_ptr, dchunk_states_ptr,  # (segments of this launch, CHUNKS_PER_SEGMENT, H, P, N)
    dB_ptr, dC_ptr,  # (SPLITS, B, L, G, N), written
    segments_ptr,  # (M, 4)
    segment_offset, length, height, directions,
    x_strides, dt_strides, B_strides, C_strides, dy_strides, num_positions,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr, NUM_DIRECTIONS: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS_PER_SEGMENT: tl.constexpr, SPLITS: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr, HAS_DT_LIMIT: tl.constexpr, DT_SOFTPLUS: tl.constexpr, DT_MIN: tl.constexpr,
    DT_MAX: tl.constexpr, DOT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of B and C of one chunk, summed over some heads of a group: one partial sum a split.

    Grid: segments x CHUNKS_PER_SEGMENT x groups x SPLITS. Tiles: x, dy (Q, BLOCK_P); B, C, dB, dC (Q, BLOCK_N); states
    (BLOCK_P, BLOCK_N); scores (Q, Q). `num_positions` is B * L.
    """
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    HEADS: tl.constexpr = H // G
    program = tl.program_id(0)
    chunk, group, split = program // (G * SPLITS), program // SPLITS % G, program % SPLITS
    batch, start, end, sequence = load_segment(segments_ptr, segment_offset + chunk // CHUNKS_PER_SEGMENT)
    first = start + chunk % CHUNKS_PER_SEGMENT * Q
    if first >= end:
        return
    direction = group_direction(directions, group, G, NUM_DIRECTIONS)
    n = tl.arange(0, BLOCK_N)
    positions, mask_q = chunk_positions(first, end, direction, length, height, Q, NUM_DIRECTIONS)
    mask_B = mask_q[:, None] & (n < N)[None, :]
    x_ptr += batch * x_strides[0]
    dt_ptr += batch * dt_strides[0]
    dy_ptr += batch * dy_strides[0]

    dB, dC = tl.zeros((Q, BLOCK_N), COMPUTE), tl.zeros((Q, BLOCK_N), COMPUTE)
    dscores = tl.zeros((Q, Q), COMPUTE)
    for head_tile in range(split * HEADS // SPLITS * TILES, (split + 1) * HEADS // SPLITS * TILES):
        head = tl.cast(group * HEADS + head_tile // TILES, tl.int64)
        p = head_tile % TILES * BLOCK_P + tl.arange(0, BLOCK_P)
        mask_x = mask_q[:, None] & (p < P)[None, :]

        a, dt_bias = load_head(A_ptr, dt_bias_ptr, head, HAS_DT_BIAS, COMPUTE)
        dt_ptrs = dt_ptr + (head * dt_strides[2] + positions * dt_strides[1])
        dt, _ = load_dt(dt_ptrs, mask_q, dt_bias, DT_SOFTPLUS, HAS_DT_LIMIT, DT_MIN, DT_MAX, COMPUTE)
        coarse, fine, decay_from_start, decay_to_end, _ = chunk_decays(dt, a, Q, COMPUTE)

        x_ptrs = x_ptr + head * x_strides[2] + positions[:, None] * x_strides[1] + p[None, :]
        dt_x = tl.load(x_ptrs, mask_x, other=0.0).to(COMPUTE)
        dt_x *= dt[:, None]  # (Q, P)
        dy_ptrs = dy_ptr + head * dy_strides[2] + positions[:, None] * dy_strides[1] + p[None, :]
        dy = tl.load(dy_ptrs, mask_x, other=0.0).to(COMPUTE)  # (Q, P)
        state_offsets = (chunk.to(tl.int64) * H + head) * (P * N) + p[:, None] * N + n[None, :]
        mask_state = (p < P)[:, None] & (n < N)[None, :]
        state = tl.load(chunk_states_ptr + state_offsets, mask_state, other=0.0).to(DOT)  # (P, N)
        dstate = tl.load(dchunk_states_ptr + state_offsets, mask_state, other=0.0).to(DOT)  # (P, N)

        # Listing 1, step 1: scores = C B^T, which all heads of the group share.
        dmasked_scores = dot(dy.to(DOT), tl.trans(dt_x.to(DOT)), COMPUTE)
        dscores += dmasked_scores * decay_matrix(coarse, fine, Q)  # (Q, Q)
        # Step 4: C meets the state before the chunk.
        decayed_dy = (dy * decay_from_start[:, None]).to(DOT)
        dC += dot(decayed_dy, state, COMPUTE)  # (Q, N)
        # Step 2: B writes to the state after the chunk.
        decayed_input = (dt_x * decay_to_end[:, None]).to(DOT)
        dB += dot(decayed_input, dstate, COMPUTE)  # (Q, N)

    B_offsets = (
        positions[:, None] * B_strides[1] + n[None, :] + batch * B_strides[0] + group.to(tl.int64) * B_strides[2]
    )
    B = tl.load(B_ptr + B_offsets, mask_B, other=0.0).to(DOT)  # (Q, N)
    dC += dot(dscores.to(DOT), B, COMPUTE)
    C_offsets = (
        positions[:, None] * C_strides[1] + n[None, :] + batch * C_strides[0] + group.to(tl.int64) * C_strides[2]
    )
    C = tl.load(C_ptr + C_offsets, mask_B, other=0.0).to(DOT)  # (Q, N)
    dB += dot(tl.trans(dscores.to(DOT)), C, COMPUTE)
    offsets = ((split.to(tl.int64) * num_positions + batch * length + positions) * G + group)[:, None] * N + n[None, :]
    tl.store(dB_ptr + offsets, dB, mask_B)
    tl.store(dC_ptr + offsets, dC, mask_B)
