"""Forward of the selective scan in Triton: a program scans BLOCK_E channels through one segment of a sequence.

Where channels and sequences are too few to fill the device, sequences are cut in segments: a first pass computes what
each segment adds to the state, `state_passing` turns that into the state before each segment, and a second pass scans
them. The first also copies B and C to float32, in which the second need not unpack them. For the backward, the state is
saved every CHECKPOINT_INTERVAL steps.
"""

# The stubs know neither launches nor what jit functions return.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportIndexIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._core.memory_layout import empty_like
from ..._triton.device import FUSED_MULTIPLY_ADD, maxnreg_option, num_sms, on_device
from ..._triton.primitives import LOG2E, and_scalar, load_segment, silu, unpack_direction, zero_padding
from ..._triton.segment_table import SegmentTable, build_segment_table
from ..._triton.state_passing import state_passing
from ..arguments import ScanArguments
from . import CHECKPOINT_INTERVAL
from .tile import (
    CUT_REGISTERS,
    REGISTERS,
    ScanInputs,
    advance_states,
    channel_stride,
    dot_states,
    fill_tile,
    forward_tile,
    jit_with_opaque_strides,
    load_row,
    load_states,
    load_steps,
    load_vector,
    split_program,
    step_ptr,
    step_size,
    store_states,
    strides,
    unroll,
    zero_states,
)

COPIED_ROWS: tl.constexpr = tl.constexpr(16)
"""Rows of B or C that a program copies at a time."""


def forward(*args) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y, the final states and the checkpoint states. Body of `selective_scan_triton`.

    Args:
        args: the fields of `ScanArguments`, and whether to save checkpoint states.
    """
    *arguments, save_states = args
    inputs = ScanInputs(ScanArguments(*arguments))
    tile = _choose_tile(inputs)
    num_tiles = _num_tiles(inputs, tile)
    segments = _build_table(inputs, _segment_size(inputs, num_tiles))
    checkpoints = _build_table(inputs, CHECKPOINT_INTERVAL) if save_states else segments

    y = empty_like(inputs.u)  # (B, L, G, E)
    final_states = _empty_states(inputs, inputs.num_state_rows)
    # One row more than needed: see the fake.
    checkpoint_states = _empty_states(inputs, len(checkpoints.entries) + 1 if save_states else 0)
    if inputs.is_packed and save_states:
        checkpoint_states.zero_()  # unused rows too
    else:
        checkpoint_states[-1:].zero_()
    is_cut = segments.size < inputs.length
    if not is_cut and (inputs.is_packed or not inputs.length):  # sequences without a segment end as they start
        if inputs.initial_states is None:
            final_states.zero_()
        else:
            final_states.copy_(inputs.initial_states)

    if len(segments.entries) and inputs.A.numel():
        launch = _Launch(inputs, tile, num_tiles, segments, checkpoints)
        segment_states = None
        if is_cut:
            B_copy, C_copy = _empty_copy(inputs.B), _empty_copy(inputs.C)
            segment_states = _compute_segment_initial_states(launch, final_states, B_copy, C_copy)
            launch = launch._replace(inputs=inputs.with_rows(B_copy, C_copy))
        launch(segment_states, y=y, final_states=final_states, checkpoint_states=checkpoint_states)
    zero_padding(segments, y)
    return y, final_states, checkpoint_states


def _choose_tile(inputs: ScanInputs) -> dict[str, int]:
    """Choose the tile: with half the states a thread where that alone spares cutting sequences.

    Twice as many threads then repeat what is done once a channel (softplus, gate, loads): for 16 states, 1.3 times the
    instructions of a scan. Cutting sequences takes 1.6 times as many, and two launches more.
    """
    tile = forward_tile(inputs.d_state, inputs.device)
    narrow = tile | fill_tile(inputs.d_state, 8)
    can_fill = _fills_device(inputs, _num_tiles(inputs, narrow)) and not _fills_device(inputs, _num_tiles(inputs, tile))
    return narrow if can_fill and tile["K"] > 8 else tile


def _num_tiles(inputs: ScanInputs, tile: dict[str, int]) -> int:
    return inputs.groups * triton.cdiv(inputs.group_channels, tile["BLOCK_E"])


def _fills_device(inputs: ScanInputs, num_tiles: int) -> bool:
    """Whether each SM gets two programs when each program scans an entire sequence."""
    return inputs.batch * num_tiles >= 2 * num_sms(inputs.device)


def _segment_size(inputs: ScanInputs, num_tiles: int) -> int:
    """Steps of a segment: entire sequences where these fill the device, else for four programs on an SM.

    Segments double the work on states, but for the last one of a sequence.
    """
    longest = triton.cdiv(max(inputs.length, 1), CHECKPOINT_INTERVAL) * CHECKPOINT_INTERVAL
    num_programs = inputs.batch * num_tiles
    if num_programs == 0 or _fills_device(inputs, num_tiles):
        return longest
    parts = triton.cdiv(4 * num_sms(inputs.device), num_programs)
    return triton.cdiv(triton.cdiv(longest, parts), CHECKPOINT_INTERVAL) * CHECKPOINT_INTERVAL


def _build_table(inputs: ScanInputs, size: int) -> SegmentTable:
    return build_segment_table(inputs.batch, inputs.length, size, inputs.cu_seqlens, inputs.seq_idx, inputs.device)


def _empty_states(inputs: ScanInputs, count: int) -> Tensor:
    """(count, G * E, N)"""
    return torch.empty((count, *inputs.A.shape), dtype=inputs.state_dtype, device=inputs.device)


def _empty_copy(m: Tensor) -> Tensor | None:
    """Make room for a copy of B or C in float32; None where it is that wide, or constant in time."""
    return torch.empty(m.shape, dtype=torch.float32, device=m.device) if m.dim() == 4 and m.itemsize < 4 else None


class _Launch(NamedTuple):
    """The forward kernel with what both of its passes have in common."""

    inputs: ScanInputs
    tile: dict[str, int]
    num_tiles: int
    segments: SegmentTable
    checkpoints: SegmentTable

    def __call__(
        self,
        segment_states: Tensor | None,
        *,
        y: Tensor | None = None,
        final_states: Tensor | None = None,
        checkpoint_states: Tensor | None = None,
        dt_sum: Tensor | None = None,
        B_copy: Tensor | None = None,
        C_copy: Tensor | None = None,
    ) -> None:
        """Scan each segment from its row of `segment_states`; or with `dt_sum` write there what the segment adds."""
        inputs, segments = self.inputs, self.segments
        u, dt, B, C, z = inputs.u, inputs.dt, inputs.B, inputs.C, inputs.z
        states_only = dt_sum is not None
        continues = segment_states is not None and not states_only
        with on_device(u):
            _forward_kernel[(len(segments.entries) * self.num_tiles,)](
                u, dt, inputs.A, B, C, inputs.D, z, inputs.dt_bias, inputs.initial_states, segment_states, y,
                final_states, checkpoint_states, dt_sum, B_copy, C_copy,
                segments.entries, segments.first_segment, segments.sequence_starts, segments.initial_state_rows,
                segments.final_state_rows, self.checkpoints.first_segment, *inputs.sizes,
                strides(u), strides(dt), strides(B), strides(C), strides(z), strides(y),
                channel_stride(u), channel_stride(dt), channel_stride(z), channel_stride(y),
                HAS_SEGMENT_STATES=continues,
                HAS_INITIAL_STATES=inputs.initial_states is not None and not states_only,
                WRITE_CHECKPOINTS=checkpoint_states is not None and len(checkpoint_states) > 0,
                STATES_ONLY=states_only, CHECKPOINT_INTERVAL=CHECKPOINT_INTERVAL, UNROLL=unroll(inputs),
                PADDED_N=triton.next_power_of_2(inputs.d_state),
                **inputs.options(self.tile),
                **maxnreg_option(CUT_REGISTERS if continues else REGISTERS, inputs.device),
                **FUSED_MULTIPLY_ADD,
            )  # fmt: skip


def _compute_segment_initial_states(
    launch: _Launch, final_states: Tensor, B_copy: Tensor | None, C_copy: Tensor | None
) -> Tensor:
    """Compute the state before each segment, (M, G * E, N).

    Args:
        launch: the first pass.
        final_states: receives the state after each sequence.
        B_copy, C_copy: (B, L, G, N) receive B and C, where there are such.
    """
    inputs, num_segments = launch.inputs, len(launch.segments.entries)
    segment_states = _empty_states(inputs, num_segments)
    dt_sum = segment_states.new_empty(num_segments, inputs.dim)
    launch(segment_states, dt_sum=dt_sum, B_copy=B_copy, C_copy=C_copy)
    state_passing(
        launch.segments, segment_states, inputs.A.flatten(), dt_sum, inputs.initial_states, final_states, reverse=False
    )
    return segment_states


@jit_with_opaque_strides
def _forward_kernel(
    u_ptr, dt_ptr,  # (B, L, G, E)
    A_ptr,  # (G * E, N)
    B_ptr, C_ptr,  # (B, L, G, N), or (G * E, N) where constant in time
    D_ptr,  # (G * E,)
    z_ptr,  # (B, L, G, E)
    dt_bias_ptr,  # (G * E,)
    initial_states_ptr,  # (rows, G * E, N)
    segment_states_ptr,  # (M, G * E, N), written with STATES_ONLY
    y_ptr,  # (B, L, G, E), written
    final_states_ptr,  # (rows, G * E, N), written
    checkpoint_states_ptr,  # (checkpoints, G * E, N), written
    dt_sum_ptr,  # (M, G * E), written
    B_copy_ptr, C_copy_ptr,  # (B, L, G, N), written
    segments_ptr,  # (M, 4)
    first_segment_ptr,  # (S + 1,)
    sequence_starts_ptr, initial_state_rows_ptr, final_state_rows_ptr,  # (S,)
    first_checkpoint_ptr,  # (S + 1,)
    length, height, directions, num_groups, group_channels,
    u_strides, dt_strides, B_strides, C_strides, z_strides, y_strides,  # of batch, time and group
    stride_u_channel, stride_dt_channel, stride_z_channel, stride_y_channel,
    N: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, BLOCK_E: tl.constexpr, B_WORD: tl.constexpr,
    C_WORD: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr, HAS_SEGMENT_STATES: tl.constexpr, HAS_INITIAL_STATES: tl.constexpr,
    WRITE_CHECKPOINTS: tl.constexpr, STATES_ONLY: tl.constexpr, DT_SOFTPLUS: tl.constexpr,
    NUM_DIRECTIONS: tl.constexpr, CHECKPOINT_INTERVAL: tl.constexpr, UNROLL: tl.constexpr, PADDED_N: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Scan BLOCK_E channels through one segment; write y, checkpoint states, and at the end of a sequence its state.

    Grid: segments x groups x tiles of E. Tiles: inputs (BLOCK_E, LANES), each lane alike; B, C K x (1, LANES); state
    K x (BLOCK_E, LANES).

    With STATES_ONLY, write instead what the segment adds to a state and the sum of its dt. Those of the last segment of
    a sequence are never read, and zeros stand for them. The programs of a segment also share copying its B and C.
    """
    segment, group, e, lane = split_program(num_groups, group_channels, BLOCK_E, LANES)
    lanes = tl.arange(0, LANES)[None, :]
    mask = e < group_channels
    e_loaded = tl.minimum(e, group_channels - 1)  # loads in the loop need no mask
    channel = group * group_channels + e
    batch, start, end, sequence = load_segment(segments_ptr, segment)
    is_used, known_sequence = sequence >= 0, tl.maximum(sequence, 0)
    is_last = is_used & (segment + 1 == tl.load(first_segment_ptr + known_sequence + 1))
    if STATES_ONLY:
        if B_copy_ptr is not None:
            _copy_rows(
                B_ptr, B_copy_ptr, B_strides, batch, group, start, end, length, num_groups, group_channels, N, PADDED_N,
                BLOCK_E,
            )  # fmt: skip
        if C_copy_ptr is not None:
            _copy_rows(
                C_ptr, C_copy_ptr, C_strides, batch, group, start, end, length, num_groups, group_channels, N, PADDED_N,
                BLOCK_E,
            )  # fmt: skip
        end = tl.where(is_last, start, end)
    grid = (unpack_direction(directions, group), length, height) if NUM_DIRECTIONS else None

    # Parameters of the channels.
    a = load_states(A_ptr + channel * N, mask, lane, N, K, LOG2E, COMPUTE)
    b, c = (), ()
    if CONSTANT_B:
        b = load_states(B_ptr + channel * N, mask, lane, N, K, 1.0, COMPUTE)
    if CONSTANT_C:
        c = load_states(C_ptr + channel * N, mask, lane, N, K, 1.0, COMPUTE)
    dt_bias = load_vector(dt_bias_ptr + channel, mask, COMPUTE) if HAS_DT_BIAS else 0.0
    D = load_vector(D_ptr + channel, mask, COMPUTE) if HAS_D else 0.0

    # The state before the segment.
    state_offsets = channel * N  # in a row of states
    row_size = tl.cast(num_groups, tl.int64) * group_channels * N
    if HAS_SEGMENT_STATES:
        segment_state_ptr = segment_states_ptr + segment * row_size + state_offsets
        h = load_states(segment_state_ptr, mask, lane, N, K, 1.0, COMPUTE)
    elif HAS_INITIAL_STATES:
        row = tl.where(is_used, tl.load(initial_state_rows_ptr + known_sequence), -1).to(tl.int64)
        initial_state_ptr = initial_states_ptr + row * row_size + state_offsets
        h = load_states(initial_state_ptr, and_scalar(mask, row >= 0), lane, N, K, 1.0, COMPUTE)
    else:
        h = zero_states(BLOCK_E, LANES, K, COMPUTE)
    if WRITE_CHECKPOINTS:
        checkpoint = tl.where(is_used, tl.load(first_checkpoint_ptr + known_sequence), 0).to(tl.int64)
        sequence_start = tl.where(is_used, tl.load(sequence_starts_ptr + known_sequence), 0)
        checkpoint += (start - sequence_start) // CHECKPOINT_INTERVAL
        checkpoint_states_ptr += checkpoint * row_size + state_offsets

    u_ptr += batch * u_strides[0] + group * u_strides[2] + e_loaded * stride_u_channel
    dt_ptr += batch * dt_strides[0] + group * dt_strides[2] + e_loaded * stride_dt_channel
    if not CONSTANT_B:
        B_ptr += batch * B_strides[0] + group * B_strides[2] + lanes * K
    if not STATES_ONLY:
        y_ptr += batch * y_strides[0] + group * y_strides[2] + e * stride_y_channel
        if HAS_Z:
            z_ptr += batch * z_strides[0] + group * z_strides[2] + e_loaded * stride_z_channel
        if not CONSTANT_C:
            C_ptr += batch * C_strides[0] + group * C_strides[2] + lanes * K
    dt_sum = tl.zeros((BLOCK_E, LANES), COMPUTE)
    LOAD_Z: tl.constexpr = HAS_Z and not STATES_ONLY

    # Blocks of UNROLL steps. Their dt, u and z are loaded a block ahead; the last block loads its own again.
    blocks = (end - start) // UNROLL
    is_any = and_scalar(mask, blocks > 0)
    next_dts = load_steps(dt_ptr, start, dt_strides[1], grid, is_any, UNROLL)
    next_us = load_steps(u_ptr, start, u_strides[1], grid, is_any, UNROLL)
    next_zs = load_steps(z_ptr, start, z_strides[1], grid, is_any, UNROLL) if LOAD_Z else ()
    for block in range(blocks):
        t0 = start + block * UNROLL
        if WRITE_CHECKPOINTS:
            if (t0 - start) % CHECKPOINT_INTERVAL == 0:
                store_states(checkpoint_states_ptr, h, mask, lane, N, K)
                checkpoint_states_ptr += row_size
        dts, us, zs = next_dts, next_us, next_zs
        t_next = tl.minimum(t0 + UNROLL, start + (blocks - 1) * UNROLL)
        next_dts = load_steps(dt_ptr, t_next, dt_strides[1], grid, None, UNROLL)
        next_us = load_steps(u_ptr, t_next, u_strides[1], grid, None, UNROLL)
        next_zs = load_steps(z_ptr, t_next, z_strides[1], grid, None, UNROLL) if LOAD_Z else ()
        h, dt_sum = _scan_block(
            t0, h, dt_sum, dts, us, zs, a, b, c, D, dt_bias, B_ptr, C_ptr, y_ptr, B_strides, C_strides, y_strides, grid,
            mask, lanes, N, K, LANES, B_WORD, C_WORD, CONSTANT_B, CONSTANT_C, HAS_D, HAS_Z, STATES_ONLY, DT_SOFTPLUS,
            UNROLL, COMPUTE,
        )  # fmt: skip

    # The steps that fill no block, one by one: masks in all blocks would take a tenth more instructions.
    if UNROLL > 1:
        for t in range(start + blocks * UNROLL, end):
            if WRITE_CHECKPOINTS:
                if (t - start) % CHECKPOINT_INTERVAL == 0:
                    store_states(checkpoint_states_ptr, h, mask, lane, N, K)
                    checkpoint_states_ptr += row_size
            dts = load_steps(dt_ptr, t, dt_strides[1], grid, None, 1)
            us = load_steps(u_ptr, t, u_strides[1], grid, None, 1)
            zs = load_steps(z_ptr, t, z_strides[1], grid, None, 1) if LOAD_Z else ()
            h, dt_sum = _scan_block(
                t, h, dt_sum, dts, us, zs, a, b, c, D, dt_bias, B_ptr, C_ptr, y_ptr, B_strides, C_strides, y_strides,
                grid, mask, lanes, N, K, LANES, B_WORD, C_WORD, CONSTANT_B, CONSTANT_C, HAS_D, HAS_Z, STATES_ONLY,
                DT_SOFTPLUS, 1, COMPUTE,
            )  # fmt: skip

    if STATES_ONLY:
        store_states(segment_states_ptr + segment * row_size + state_offsets, h, mask, lane, N, K)
        tl.store(dt_sum_ptr + segment * (num_groups * group_channels) + channel, dt_sum, mask)
    else:
        row = tl.where(is_last, tl.load(final_state_rows_ptr + known_sequence), -1).to(tl.int64)
        final_state_ptr = final_states_ptr + row * row_size + state_offsets
        store_states(final_state_ptr, h, and_scalar(mask, row >= 0), lane, N, K)


@triton.jit
def _copy_rows(
    row_ptr, copy_ptr, row_strides, batch, group, start, end, length, num_groups, group_channels,
    N: tl.constexpr, PADDED_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Copy this program's share of the rows of B or C (B, L, G, N) at positions `start` to `end`."""
    tiles = tl.cdiv(group_channels, BLOCK_E)
    n = tl.arange(0, PADDED_N)[None, :]
    row_ptr += batch * row_strides[0] + group * row_strides[2] + n
    copy_ptr += (batch * length * num_groups + group) * N + n
    for first in range(start + tl.program_id(0) % tiles * COPIED_ROWS, end, tiles * COPIED_ROWS):
        t = (first + tl.arange(0, COPIED_ROWS)[:, None]).to(tl.int64)
        mask = (t < end) & (n < N)
        row = tl.load(row_ptr + t * row_strides[1], mask)  # (COPIED_ROWS, PADDED_N)
        tl.store(copy_ptr + t * num_groups * N, row.to(copy_ptr.dtype.element_ty), mask)


@triton.jit
def _scan_block(
    t0, h, dt_sum, dts, us, zs, a, b, c, D, dt_bias, B_ptr, C_ptr, y_ptr, B_strides, C_strides, y_strides, grid,
    mask, lanes,
    N: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, B_WORD: tl.constexpr, C_WORD: tl.constexpr,
    CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    STATES_ONLY: tl.constexpr, DT_SOFTPLUS: tl.constexpr, STEPS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Return the states after STEPS steps from t0 on; write y, or with STATES_ONLY add the steps' dt to `dt_sum`."""
    ys = ()
    for i in tl.static_range(STEPS):
        dt = step_size(dts[i].to(COMPUTE), dt_bias, DT_SOFTPLUS)  # (BLOCK_E, LANES)
        u = us[i].to(COMPUTE)
        if not CONSTANT_B:
            b = load_row(step_ptr(B_ptr, t0, i, B_strides[1], grid), lanes, None, N, K, LANES, B_WORD, COMPUTE)

        # Equation 2a of arXiv 2312.00752: h_t = exp(dt A) h_{t-1} + dt B u_t.
        h = advance_states(h, a, b, dt, dt * u, K)

        if STATES_ONLY:
            dt_sum += dt
        else:
            # Equation 2b: y_t = C h_t; then skip connection and gate.
            if not CONSTANT_C:
                c = load_row(step_ptr(C_ptr, t0, i, C_strides[1], grid), lanes, None, N, K, LANES, C_WORD, COMPUTE)
            y = dot_states(c, h, K, LANES)  # (BLOCK_E, LANES or 1)
            if HAS_D:
                y += D * u
            if HAS_Z:
                y *= silu(zs[i].to(COMPUTE))
            ys = ys + (y,)

    # Stores come after all loads of the block, so that these need not wait for them.
    if not STATES_ONLY:
        for i in tl.static_range(STEPS):
            tl.store(step_ptr(y_ptr, t0, i, y_strides[1], grid), ys[i].to(y_ptr.dtype.element_ty), mask)
    return h, dt_sum
