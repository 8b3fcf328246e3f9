"""Forward of SSD in Triton: a program passes the state of one head through the chunks of one segment of a sequence.

A first kernel computes the decays of all chunks, see `decays`. A chunk of Q steps is then a few matrix products (arXiv
2405.21060, listing 1): its own inputs yield `(L o C B^T) dt x`, and the state S before it `exp(a) C S`. S, (N, P),
stays in registers from chunk to chunk and is never written. Where heads and sequences are too few to fill the device,
sequences are divided into segments: a first pass computes what each segment adds to the state, `state_passing` turns
that into the state before each segment, and a second pass scans them.

Heads whose P channels do not fit in registers are divided into tiles, which are independent but for sums over P.
"""

# The stubs know neither launches nor what jit functions return.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import FUSED_MULTIPLY_ADD, maxnreg_option, num_sms, on_device
from ..._triton.primitives import and_scalar, load_segment, zero_padding
from ..._triton.segment_table import SegmentTable
from ..._triton.state_passing import state_passing
from ..arguments import ScanArguments
from .chunk import (
    CHUNKS_PER_SEGMENT,
    ScanInputs,
    Tiles,
    choose_tiles,
    coarse_decay_matrix,
    dot,
    group_direction,
    scaled_operand,
    split_program,
    step_positions,
    weighted_operand,
)
from .decays import ChunkDecays, chunk_row, compute_chunk_decays

STATE_REGISTERS = 128
"""Registers of a thread in the kernels that compute states alone, on NVIDIA."""


def forward(*args) -> tuple[Tensor, Tensor]:
    """Compute y and the final states. Body of `ssd_triton`; takes the fields of `ScanArguments`."""
    arguments = ScanArguments(*args)
    inputs = ScanInputs(arguments)
    tiles = choose_tiles(inputs, backward=False)
    segment_size = _segment_size(inputs, tiles)
    segments = inputs.build_segment_table(segment_size)
    decays = compute_chunk_decays(inputs, tiles, segments)
    y = inputs.empty(*inputs.x.shape, dtype=arguments.out_dtype)  # (B, L, H, P)
    final_states = inputs.states_like(inputs.initial_states)

    if segment_size >= inputs.length:  # a segment is an entire sequence
        launch_forward(
            inputs, tiles, segments, decays, initial_states=inputs.initial_states,
            initial_state_rows=segments.initial_state_rows, y=y, final_states=final_states,
            final_state_rows=segments.final_state_rows,
        )  # fmt: skip
    else:
        segment_initial_states, _ = compute_segment_initial_states(inputs, tiles, segments, decays, final_states)
        launch_forward(inputs, tiles, segments, decays, initial_states=segment_initial_states, y=y)
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
    inputs: ScanInputs, tiles: Tiles, segments: SegmentTable, decays: ChunkDecays, final_states: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the state before each segment, (M, H, P, N), and the sum of its dt, (M, H).

    `final_states` receives the state after each sequence.
    """
    segment_states = inputs.empty_states(len(segments.entries))
    dt_sum = inputs.empty(len(segments.entries), inputs.heads)
    # Listing 1, steps 2 and 3, by segments instead of chunks.
    launch_forward(inputs, tiles, segments, decays, final_states=segment_states, dt_sum=dt_sum)
    state_passing(segments, segment_states, inputs.A, dt_sum, inputs.initial_states, final_states, reverse=False)
    return segment_states, dt_sum


def launch_forward(
    inputs: ScanInputs,
    tiles: Tiles,
    segments: SegmentTable,
    decays: ChunkDecays,
    *,
    initial_states: Tensor | None = None,
    initial_state_rows: Tensor | None = None,
    y: Tensor | None = None,
    final_states: Tensor | None = None,
    final_state_rows: Tensor | None = None,
    dt_sum: Tensor | None = None,
) -> None:
    """Run the forward kernel over all segments, writing the outputs that are passed."""
    num_programs = len(segments.entries) * inputs.num_head_tiles(tiles)
    if not num_programs:
        return
    x, B, C, D = inputs.x, inputs.B, inputs.C, inputs.D
    names = ("H", "P", "N", "G", "NUM_DIRECTIONS", "DOT", "COMPUTE")
    with on_device(x):
        _forward_kernel[(num_programs,)](
            x, B, C, D, decays.steps, decays.totals, initial_states, y, final_states, dt_sum,
            segments.entries, initial_state_rows, final_state_rows,
            inputs.length, decays.segment_rows, inputs.height, inputs.directions,
            x.stride(), B.stride(), C.stride(), None if D is None else D.stride(0),
            X_STEP=x.stride(1), B_STEP=B.stride(1), C_STEP=C.stride(1),
            HAS_D=D is not None, WIDE_D=D is not None and D.stride(1) != 0,
            IS_PACKED=inputs.is_packed, HAS_INITIAL_STATES=initial_states is not None,
            WRITE_Y=y is not None, WRITE_FINAL_STATES=final_states is not None, WRITE_DT_SUM=dt_sum is not None,
            num_stages=_num_stages(inputs), **tiles.options(),
            **{name: inputs.constants[name] for name in names},
            **(maxnreg_option(STATE_REGISTERS, inputs.device) if y is None else {}),
            **FUSED_MULTIPLY_ADD,
        )  # fmt: skip


def _num_stages(inputs: ScanInputs) -> int:
    """Stages of the loop over chunks: one where its products are on tensor cores of the fifth generation.

    There Triton (3.7 and 3.9) gives x one buffer, and loads the next chunk's into it before the last product has read
    this chunk's: y is wrong.
    """
    return 1 if inputs.on_tensor_cores and inputs.has_tensor_memory else 2


@triton.jit
def _forward_kernel(
    x_ptr,  # (B, L, H, P)
    B_ptr, C_ptr,  # (B, L, G, N)
    D_ptr,  # (H, P)
    step_decays_ptr, chunk_totals_ptr,  # (rows, H, 4, Q), (rows, H, 2): `ChunkDecays`
    initial_states_ptr,  # (rows, H, P, N)
    y_ptr,  # (B, L, H, P), written
    final_states_ptr,  # (rows, H, P, N), written
    dt_sum_ptr,  # (M, H), written
    segments_ptr,  # (M, 4)
    initial_state_rows_ptr, final_state_rows_ptr,  # (S,)
    length, segment_rows, height, directions,
    x_strides, B_strides, C_strides, D_stride_head,
    X_STEP: tl.constexpr, B_STEP: tl.constexpr, C_STEP: tl.constexpr,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr, NUM_DIRECTIONS: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_PACKED: tl.constexpr, HAS_INITIAL_STATES: tl.constexpr, HAS_D: tl.constexpr, WIDE_D: tl.constexpr,
    WRITE_Y: tl.constexpr, WRITE_FINAL_STATES: tl.constexpr, WRITE_DT_SUM: tl.constexpr,
    DOT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Scan one segment for BLOCK_P channels of one head; write y and the final state.

    Grid: segments x heads x tiles of P. Tiles: x (Q, BLOCK_P); B, C (Q, BLOCK_N); state (BLOCK_N, BLOCK_P).

    The rows of `initial_states` and `final_states` belong to sequences, by the tables of rows; where these are None,
    they belong to segments.
    """
    segment, head, tile = split_program(tl.program_id(0), H, P, BLOCK_P)
    batch, start, end, sequence = load_segment(segments_ptr, segment)
    if sequence < 0:
        return
    group = head // (H // G)
    direction = group_direction(directions, group, G, NUM_DIRECTIONS)
    p, n, q = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, Q)
    first_p = tile * BLOCK_P
    mask_p, mask_n = first_p + p < P, n < N

    state = tl.zeros((BLOCK_N, BLOCK_P), COMPUTE)
    if HAS_INITIAL_STATES:
        row = segment if initial_state_rows_ptr is None else tl.load(initial_state_rows_ptr + sequence)
        row = row.to(tl.int64)
        initial_state_ptrs = initial_states_ptr + ((row * H + head) * P + first_p) * N + p[None, :] * N + n[:, None]
        mask_state = and_scalar(mask_n[:, None] & mask_p[None, :], row >= 0)
        state = tl.load(initial_state_ptrs, mask_state, other=0.0).to(COMPUTE)
    if HAS_D:
        D_ptr += head * D_stride_head
        D = tl.load(D_ptr).to(COMPUTE)  # that of all channels, unless WIDE_D
    dt_sum = tl.zeros((), COMPUTE)
    first_row = chunk_row(batch, start, segment, length, segment_rows, IS_PACKED, Q) * H + head
    step_decays_ptr += first_row * (4 * Q)
    chunk_totals_ptr += first_row * 2
    x_ptr += batch * x_strides[0] + head.to(tl.int64) * x_strides[2] + first_p
    B_ptr += batch * B_strides[0] + group.to(tl.int64) * B_strides[2]
    C_ptr += batch * C_strides[0] + group.to(tl.int64) * C_strides[2]
    if WRITE_Y:
        y_ptr += (batch * length * H + head) * P + first_p

    for first in range(start, end, Q):
        # Along a scan direction positions are computed. In time they are constants from the first on, and with it and
        # strides that are constants too, a tile has one address a thread instead of one a row.
        if NUM_DIRECTIONS:
            base = 0
            positions = step_positions(first + q, direction, length, height, NUM_DIRECTIONS)
        else:
            base = tl.cast(first, tl.int64)
            positions = q.to(tl.int64)
        mask_q = first + q < end
        mask_x, mask_B = mask_q[:, None] & mask_p[None, :], mask_q[:, None] & mask_n[None, :]
        x_ptrs = x_ptr + base * X_STEP + positions[:, None] * X_STEP + p[None, :]
        B_ptrs = B_ptr + base * B_STEP + positions[:, None] * B_STEP + n[None, :]
        C_ptrs = C_ptr + base * C_STEP + positions[:, None] * C_STEP + n[None, :]
        chunk = tl.cast((first - start) // Q, tl.int64) * H
        step_decay_ptrs = step_decays_ptr + chunk * (4 * Q) + q

        chunk_decay = tl.load(chunk_totals_ptr + chunk * 2)
        state_weight = tl.load(step_decay_ptrs + 3 * Q)  # (Q,)
        x = tl.load(x_ptrs, mask_x, other=0.0)  # (Q, P)
        B = tl.load(B_ptrs, mask_B, other=0.0).to(DOT)  # (Q, N)

        # In this order of products the values that are live at once fit in registers.
        if WRITE_Y:
            C = tl.load(C_ptrs, mask_B, other=0.0).to(DOT)  # (Q, N)
            coarse, fine = tl.load(step_decay_ptrs), tl.load(step_decay_ptrs + Q)  # (Q,)
            # Listing 1, step 4: the output from the state before the chunk.
            operand, scale = scaled_operand(state, DOT)
            y = dot(C, operand, COMPUTE) * (tl.exp2(coarse + fine) * scale)[:, None]  # (Q, P)
            if HAS_D and WIDE_D:  # loaded in each chunk: D of all channels would take registers through the loop
                y += tl.load(D_ptr + first_p + p, mask_p, other=0.0).to(COMPUTE)[None, :] * x.to(COMPUTE)
            elif HAS_D:
                y += D * x.to(COMPUTE)

        # Listing 1, steps 2 and 3: the state after the chunk.
        decayed_input, scale = weighted_operand(x, state_weight, DOT, COMPUTE)
        chunk_state = dot(tl.trans(B), decayed_input, COMPUTE) * scale
        state = state * chunk_decay + chunk_state  # (N, P)

        if WRITE_Y:
            # Listing 1, step 1: the output from the chunk's own inputs. L o C B^T dt, with L as `decay_matrix`.
            scores = dot(C, tl.trans(B), COMPUTE)  # (Q, Q)
            masked_scores = scores * coarse_decay_matrix(coarse, Q) * tl.exp2(fine)[:, None]
            masked_scores *= tl.load(step_decay_ptrs + 2 * Q)[None, :]
            masked_scores, scale = scaled_operand(masked_scores, DOT)
            y += dot(masked_scores, x.to(DOT), COMPUTE) * scale
            y_ptrs = y_ptr + base * (H * P) + positions[:, None] * (H * P) + p[None, :]
            tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask_x)
        if WRITE_DT_SUM:
            dt_sum += tl.load(chunk_totals_ptr + chunk * 2 + 1)

    if WRITE_FINAL_STATES:
        sequence = load_segment(segments_ptr, segment)[3]  # read again: kept, it takes a register through the loop
        row = (segment if final_state_rows_ptr is None else tl.load(final_state_rows_ptr + sequence)).to(tl.int64)
        final_state_ptrs = final_states_ptr + ((row * H + head) * P + first_p) * N + p[:, None] * N + n[None, :]
        mask_state = and_scalar(mask_p[:, None] & mask_n[None, :], row >= 0)
        tl.store(final_state_ptrs, tl.trans(state).to(final_states_ptr.dtype.element_ty), mask_state)
    if WRITE_DT_SUM:
        if tile == 0:
            tl.store(dt_sum_ptr + segment.to(tl.int64) * H + head, dt_sum)
