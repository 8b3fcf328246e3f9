"""Backward of the selective scan in Triton, from the states that the forward saved every CHECKPOINT_INTERVAL steps.

Segments have CHECKPOINT_INTERVAL steps here. `_adjoint_kernel` computes what each segment adds to the gradient of the
state before it, `state_passing` in reverse turns that into the gradient of the state after each segment, and then
`_backward_kernel` computes all gradients, with all segments in parallel.
"""

# The stubs know neither launches nor what jit functions return.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._core.memory_layout import empty_like
from ..._triton.device import FUSED_MULTIPLY_ADD, capability, maxnreg_option, num_sms, on_device
from ..._triton.primitives import (
    LN2,
    LOG2E,
    and_scalar,
    d_softplus,
    load_segment,
    sigmoid,
    silu,
    silu_backward,
    unpack_direction,
    zero_padding,
)
from ..._triton.segment_table import SegmentTable, build_segment_table
from ..._triton.state_passing import state_passing
from ..arguments import ScanArguments, ScanGradients
from . import CHECKPOINT_INTERVAL
from .tile import (
    REGISTERS,
    ScanInputs,
    add_scaled,
    advance_states,
    channel_stride,
    dot_states,
    fill_tile,
    forward_tile,
    jit_with_opaque_strides,
    load_channels,
    load_row,
    load_states,
    load_steps,
    load_vector,
    scale_states,
    split_program,
    step_ptr,
    step_size,
    store_states,
    strides,
    tile_channels,
    tile_lanes,
    unroll,
    with_close_steps,
    zero_states,
)

PART_STEPS = 16
"""Steps whose states are in scratch at a time, a multiple of `_unroll`.

With all 64 steps of a segment, the scratch of the programs that run at once on an H100 is 86 MB, and its L2 cache has
50 MB; with 16 it is 30 MB. Scanning three parts of four once more for the state before each takes 13 % more
instructions; more checkpoint states would take memory for the time between forward and backward.
"""
PROGRAMS_PER_SM = 16
"""Programs of `_backward_kernel` for each SM, of one warp each: twice as many as registers allow at once."""


def backward(*args) -> ScanGradients:
    """Compute the gradients of the differentiable arguments. Body of `selective_scan_triton_backward`.

    Args:
        args: the fields of `ScanArguments`, the checkpoint states, and the gradients of y and of the final states.
    """
    *fields, checkpoint_states, dy, dfinal_states = args
    arguments = ScanArguments(*fields)
    inputs = ScanInputs(arguments)
    dy, dfinal_states = with_close_steps(dy), dfinal_states.contiguous()
    segments = build_segment_table(
        inputs.batch, inputs.length, CHECKPOINT_INTERVAL, inputs.cu_seqlens, inputs.seq_idx, inputs.device
    )
    dstates, dinitial_states = _compute_state_gradients(inputs, segments, dy, dfinal_states)
    grads = _compute_gradients(inputs, segments, checkpoint_states, dstates, dy)
    grads["initial_states"] = dinitial_states

    for name, x in arguments._asdict().items():
        if name in grads:
            grads[name] = dy.new_empty(0) if x is None else grads[name].to(x.dtype)
    zero_padding(segments, *(grads[name] for name in ("u", "dt", "z", "B", "C") if grads[name].dim() == 4))
    return ScanGradients(**grads)


def _compute_state_gradients(
    inputs: ScanInputs, segments: SegmentTable, dy: Tensor, dfinal_states: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the gradient of the state after each segment, (M, G * E, N), and of the initial states."""
    num_segments = len(segments.entries) if inputs.A.numel() else 0
    dstates = torch.empty((num_segments, *inputs.A.shape), dtype=inputs.state_dtype, device=inputs.device)
    dt_sum = dstates.new_empty(num_segments, inputs.dim)
    dinitial_states = dstates.new_empty(dfinal_states.shape)
    dt, C, z = inputs.dt, inputs.C, inputs.z
    tile = forward_tile(inputs.d_state, inputs.device)
    num_tiles = inputs.groups * triton.cdiv(inputs.group_channels, tile["BLOCK_E"])
    options = {k: v for k, v in inputs.options(tile).items() if k not in ("B_WORD", "CONSTANT_B", "HAS_D")}
    with on_device(dy):
        if num_segments:
            _adjoint_kernel[(num_segments * num_tiles,)](
                dt, inputs.A, C, z, inputs.dt_bias, dy, dstates, dt_sum, segments.entries, *inputs.sizes,
                strides(dt), strides(C), strides(z), strides(dy),
                channel_stride(dt), channel_stride(z), channel_stride(dy),
                UNROLL=unroll(inputs), **options, **maxnreg_option(REGISTERS, inputs.device),
                **FUSED_MULTIPLY_ADD,
            )  # fmt: skip
        state_passing(
            segments, dstates, inputs.A.flatten(), dt_sum, dfinal_states, dinitial_states, reverse=True
        )  # fmt: skip
    return dstates, dinitial_states


def _compute_gradients(
    inputs: ScanInputs, segments: SegmentTable, checkpoint_states: Tensor, dstates: Tensor, dy: Tensor
) -> dict[str, Tensor]:
    """Compute the gradients of all tensors but the initial states, by name.

    Sums over programs are partial sums, added here: sums over time (A, D, dt_bias, constant B and C) have a row for
    each run of segments, and those over channels (B and C) one for each split of a group's channels.
    """
    u, dt, A, B, C, D, z = inputs.u, inputs.dt, inputs.A, inputs.B, inputs.C, inputs.D, inputs.z
    tile = _backward_tile(inputs.d_state)
    num_segments, max_programs = len(dstates), PROGRAMS_PER_SM * num_sms(inputs.device)
    run_segments = max(1, triton.cdiv(num_segments * inputs.groups, max_programs))
    num_runs = triton.cdiv(num_segments, run_segments)
    num_tiles = triton.cdiv(inputs.group_channels, tile["BLOCK_E"])
    num_splits = max(1, min(num_tiles, max_programs // max(1, num_runs * inputs.groups)))

    def empty_sums(x: Tensor | None, count: int) -> Tensor | None:
        return None if x is None else dstates.new_empty(count, *x.shape)

    dA, dD, ddt_bias = (empty_sums(x, num_runs) for x in (A, D, inputs.dt_bias))
    dB, dC = (empty_sums(m, num_runs if m.dim() == 2 else num_splits) for m in (B, C))
    du, ddt = empty_like(u), empty_like(dt)  # (B, L, G, E)
    dz = None if z is None else empty_like(z)
    if num_segments:
        num_programs, unrolled = num_runs * inputs.groups * num_splits, _unroll(inputs)
        # States of the blocks of a part, states of the parts, and two values of each step: as the kernel says.
        num_states = PART_STEPS // unrolled + triton.cdiv(CHECKPOINT_INTERVAL, PART_STEPS)
        scratch_elements = tile["BLOCK_E"] * (tile["LANES"] * tile["K"] * num_states + 2 * PART_STEPS)
        scratch = dstates.new_empty(num_programs, scratch_elements)
        with on_device(u):
            _backward_kernel[(num_programs,)](
                u, dt, A, B, C, D, z, inputs.dt_bias, checkpoint_states, dstates, dy,
                du, ddt, dA, dB, dC, dD, dz, ddt_bias, scratch,
                segments.entries, inputs.batch, *inputs.sizes, num_segments, run_segments, num_splits,
                1, tile["BLOCK_E"], strides(u), channel_stride(u), strides(dt), channel_stride(dt), strides(z),
                channel_stride(z), strides(dy), channel_stride(dy), strides(du), channel_stride(du), strides(ddt),
                channel_stride(ddt), strides(dz), channel_stride(dz), strides(B), strides(C),
                CHECKPOINT_INTERVAL=CHECKPOINT_INTERVAL, PART_STEPS=PART_STEPS, UNROLL=unrolled,
                WHOLE_TILES=inputs.group_channels % tile["BLOCK_E"] == 0,
                WHOLE_BLOCKS=not inputs.is_packed and inputs.length % unrolled == 0, **inputs.options(tile),
                **FUSED_MULTIPLY_ADD,
            )  # fmt: skip
    sums = {"A": dA, "B": dB, "C": dC, "D": dD, "dt_bias": ddt_bias}
    summed = {name: None if x is None else x.sum(0) for name, x in sums.items()}
    return {"u": du, "dt": ddt, "z": dz} | summed


def _backward_tile(n: int) -> dict[str, int]:
    """Choose the tile of `_backward_kernel`: one warp, at most 8 states of two channels a thread.

    Adding over channels in a thread saves adding over threads; four channels would spill.
    """
    tile = fill_tile(n, 8)
    return tile | {"PADDED_K": triton.next_power_of_2(tile["K"]), "num_warps": 1}


def _unroll(inputs: ScanInputs) -> int:
    """Choose how many steps of `_backward_kernel` have their states recomputed together.

    It divides CHECKPOINT_INTERVAL. Four would take the compiler five times as long, and on Ampere spill; so would two
    along directions on consumer Blackwell.
    """
    vendor, version = capability(inputs.device)
    return 1 if inputs.has_directions and vendor == "cuda" and int(version) >= 120 else 2


@jit_with_opaque_strides
def _adjoint_kernel(
    dt_ptr,  # (B, L, G, E)
    A_ptr,  # (G * E, N)
    C_ptr,  # (B, L, G, N), or (G * E, N) where constant in time
    z_ptr,  # (B, L, G, E)
    dt_bias_ptr,  # (G * E,)
    dy_ptr,  # (B, L, G, E)
    dstates_ptr,  # (M, G * E, N), written
    dt_sum_ptr,  # (M, G * E), written
    segments_ptr,  # (M, 4)
    length, height, directions, num_groups, group_channels,
    dt_strides, C_strides, z_strides, dy_strides,  # of batch, time and group
    stride_dt_channel, stride_z_channel, stride_dy_channel,
    N: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, BLOCK_E: tl.constexpr, C_WORD: tl.constexpr,
    CONSTANT_C: tl.constexpr, HAS_Z: tl.constexpr, HAS_DT_BIAS: tl.constexpr, DT_SOFTPLUS: tl.constexpr,
    NUM_DIRECTIONS: tl.constexpr, UNROLL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute what one segment adds to the gradient of the state before it, and the sum of its dt.

    Grid: segments x groups x tiles of E. Tiles: inputs (BLOCK_E, LANES), each lane alike; C K x (1, LANES); gradient of
    the state K x (BLOCK_E, LANES).
    """
    segment, group, e, lane = split_program(num_groups, group_channels, BLOCK_E, LANES)
    lanes = tl.arange(0, LANES)[None, :]
    mask = e < group_channels
    e_loaded = tl.minimum(e, group_channels - 1)  # loads in the loop need no mask
    channel = group * group_channels + e
    batch, start, end, _ = load_segment(segments_ptr, segment)
    grid = (unpack_direction(directions, group), length, height) if NUM_DIRECTIONS else None

    a = load_states(A_ptr + channel * N, mask, lane, N, K, LOG2E, COMPUTE)
    c = ()
    if CONSTANT_C:
        c = load_states(C_ptr + channel * N, mask, lane, N, K, 1.0, COMPUTE)
    else:
        C_ptr += batch * C_strides[0] + group * C_strides[2] + lanes * K
    dt_bias = load_vector(dt_bias_ptr + channel, mask, COMPUTE) if HAS_DT_BIAS else 0.0
    dt_ptr += batch * dt_strides[0] + group * dt_strides[2] + e_loaded * stride_dt_channel
    dy_ptr += batch * dy_strides[0] + group * dy_strides[2] + e_loaded * stride_dy_channel
    if HAS_Z:
        z_ptr += batch * z_strides[0] + group * z_strides[2] + e_loaded * stride_z_channel

    dh = zero_states(BLOCK_E, LANES, K, COMPUTE)
    dt_sum = tl.zeros((BLOCK_E, LANES), COMPUTE)
    # The steps that fill no block, then blocks of UNROLL steps. Their dt, dy and z are loaded a block ahead.
    blocks = (end - start) // UNROLL
    if UNROLL > 1:
        for step in range(end - start - blocks * UNROLL):
            t = end - 1 - step
            dts = load_steps(dt_ptr, t, dt_strides[1], grid, None, 1)
            dys = load_steps(dy_ptr, t, dy_strides[1], grid, None, 1)
            zs = load_steps(z_ptr, t, z_strides[1], grid, None, 1) if HAS_Z else ()
            dh, dt_sum = _adjoint_block(
                t, dh, dt_sum, dts, dys, zs, a, c, dt_bias, C_ptr, lanes, C_strides, grid,
                N, K, LANES, C_WORD, CONSTANT_C, HAS_Z, DT_SOFTPLUS, COMPUTE, 1,
            )  # fmt: skip
    is_any = and_scalar(mask, blocks > 0)
    t_next = start + (blocks - 1) * UNROLL
    next_dts = load_steps(dt_ptr, t_next, dt_strides[1], grid, is_any, UNROLL)
    next_dys = load_steps(dy_ptr, t_next, dy_strides[1], grid, is_any, UNROLL)
    next_zs = load_steps(z_ptr, t_next, z_strides[1], grid, is_any, UNROLL) if HAS_Z else ()
    for block in range(blocks):
        t0 = start + (blocks - 1 - block) * UNROLL
        dts, dys, zs = next_dts, next_dys, next_zs
        t_next = tl.maximum(t0 - UNROLL, start)
        next_dts = load_steps(dt_ptr, t_next, dt_strides[1], grid, None, UNROLL)
        next_dys = load_steps(dy_ptr, t_next, dy_strides[1], grid, None, UNROLL)
        next_zs = load_steps(z_ptr, t_next, z_strides[1], grid, None, UNROLL) if HAS_Z else ()
        dh, dt_sum = _adjoint_block(
            t0, dh, dt_sum, dts, dys, zs, a, c, dt_bias, C_ptr, lanes, C_strides, grid,
            N, K, LANES, C_WORD, CONSTANT_C, HAS_Z, DT_SOFTPLUS, COMPUTE, UNROLL,
        )  # fmt: skip

    row_size = tl.cast(num_groups, tl.int64) * group_channels * N
    store_states(dstates_ptr + segment * row_size + channel * N, dh, mask, lane, N, K)
    tl.store(dt_sum_ptr + segment * (num_groups * group_channels) + channel, dt_sum, mask)


@triton.jit
def _adjoint_block(
    t0, dh, dt_sum, dts, dys, zs, a, c, dt_bias, C_ptr, lanes, C_strides, grid,
    N: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, C_WORD: tl.constexpr, CONSTANT_C: tl.constexpr,
    HAS_Z: tl.constexpr, DT_SOFTPLUS: tl.constexpr, COMPUTE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Return the gradient of the state before STEPS steps from t0 on, and `dt_sum` with theirs."""
    for i in tl.static_range(STEPS - 1, -1, -1):
        dt = step_size(dts[i].to(COMPUTE), dt_bias, DT_SOFTPLUS)  # (BLOCK_E, LANES)
        dout = dys[i].to(COMPUTE)
        if HAS_Z:
            dout *= silu(zs[i].to(COMPUTE))
        if not CONSTANT_C:
            c = load_row(step_ptr(C_ptr, t0, i, C_strides[1], grid), lanes, None, N, K, LANES, C_WORD, COMPUTE)

        # Adjoint of equations 2: dh_{t-1} = exp(dt A) (dh_t + C dout_t).
        dh_before = ()
        for k in tl.static_range(K):
            dh_before = dh_before + (tl.exp2(dt * a[k]) * (dh[k] + dout * c[k]),)
        dh = dh_before
        dt_sum += dt
    return dh, dt_sum


@jit_with_opaque_strides
def _backward_kernel(
    u_ptr, dt_ptr,  # (B, L, G, E)
    A_ptr,  # (G * E, N)
    B_ptr, C_ptr,  # (B, L, G, N), or (G * E, N) where constant in time
    D_ptr,  # (G * E,)
    z_ptr,  # (B, L, G, E)
    dt_bias_ptr,  # (G * E,)
    checkpoint_states_ptr, dstates_ptr,  # (M, G * E, N): state before each segment, gradient of the state after it
    dy_ptr,  # (B, L, G, E)
    du_ptr, ddt_ptr,  # (B, L, G, E), written
    dA_ptr,  # (runs, G * E, N), written
    dB_ptr, dC_ptr,  # (splits, B, L, G, N), or (runs, G * E, N) where constant in time, written
    dD_ptr,  # (runs, G * E), written
    dz_ptr,  # (B, L, G, E), written
    ddt_bias_ptr,  # (runs, G * E), written
    scratch_ptr,  # (programs, ...)
    segments_ptr,  # (M, 4)
    num_batches, length, height, directions, num_groups, group_channels, num_segments, run_segments, num_splits,
    stride_scratch_channel, stride_scratch_lane,
    u_strides, stride_u_channel, dt_strides, stride_dt_channel, z_strides, stride_z_channel, dy_strides,
    stride_dy_channel, du_strides, stride_du_channel, ddt_strides, stride_ddt_channel, dz_strides, stride_dz_channel,
    B_strides, C_strides,
    N: tl.constexpr, K: tl.constexpr, PADDED_K: tl.constexpr, LANES: tl.constexpr, BLOCK_E: tl.constexpr,
    B_WORD: tl.constexpr, C_WORD: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_DT_BIAS: tl.constexpr, DT_SOFTPLUS: tl.constexpr, NUM_DIRECTIONS: tl.constexpr,
    CHECKPOINT_INTERVAL: tl.constexpr, PART_STEPS: tl.constexpr, UNROLL: tl.constexpr, WHOLE_TILES: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute all gradients of a run of segments, for every `num_splits`-th tile of a group's channels.

    Grid: runs x groups x splits. Tiles: inputs (BLOCK_E, LANES), each lane alike; B, C K x (1, LANES); state
    K x (BLOCK_E, LANES).

    Each segment is scanned for the state before each of its parts of PART_STEPS steps. Then, from the last part to the
    first, a part is scanned forward, for dC and dz. That saves in scratch the state before every UNROLL steps, and dt
    and the gradient of the output before the gate for each step. Then it is scanned backward, UNROLL steps at a time,
    whose states are recomputed in registers.

    Where all tiles are full and all segments have a multiple of UNROLL steps (WHOLE_TILES, WHOLE_BLOCKS), no load needs
    a mask; else the second step of the last block is masked: 3 % more instructions, where a loop of its own for that
    step would double the time to compile.

    dB and dC are sums over channels: over a tile's in registers, over tiles in rows (splits, B, L, G, N) that no other
    program touches. dA, dD and ddt_bias, and dB and dC of matrices constant in time, are sums over time: a row a run.
    """
    program = tl.program_id(0)
    split, group = program % num_splits, (program // num_splits % num_groups).to(tl.int64)
    run = program // num_splits // num_groups
    grid = (unpack_direction(directions, group), length, height) if NUM_DIRECTIONS else None
    lanes = tl.arange(0, LANES)[None, :]
    row_size = tl.cast(num_groups, tl.int64) * group_channels * N

    # Scratch of this program: K states a thread for each block of a part, and for each part; dt and dout of each step.
    PARTS: tl.constexpr = BLOCK_E * LANES * K * (PART_STEPS // UNROLL)
    STEPS: tl.constexpr = PARTS + BLOCK_E * LANES * K * ((CHECKPOINT_INTERVAL + PART_STEPS - 1) // PART_STEPS)
    scratch_ptr += program.to(tl.int64) * (STEPS + 2 * BLOCK_E * PART_STEPS)
    parts_ptr, steps_ptr = scratch_ptr + PARTS, scratch_ptr + STEPS
    lane = tile_lanes(BLOCK_E, LANES)
    tile_channel = (tl.arange(0, BLOCK_E)[:, None] + tl.zeros((1, LANES), tl.int32)) * stride_scratch_channel
    tile_states = lane * stride_scratch_lane + tile_channel

    for tile in range(split, tl.cdiv(group_channels, BLOCK_E), num_splits):
        e = tile_channels(tile, BLOCK_E, LANES)
        mask = e < group_channels
        channel = group * group_channels + e

        # Parameters of the channels, and sums over time.
        a = load_states(A_ptr + channel * N, mask, lane, N, K, LOG2E, COMPUTE)
        dA = zero_states(BLOCK_E, LANES, K, COMPUTE)
        b, dB_sum, c, dC_sum = (), (), (), ()
        if CONSTANT_B:
            b = load_states(B_ptr + channel * N, mask, lane, N, K, 1.0, COMPUTE)
            dB_sum = zero_states(BLOCK_E, LANES, K, COMPUTE)
        if CONSTANT_C:
            c = load_states(C_ptr + channel * N, mask, lane, N, K, 1.0, COMPUTE)
            dC_sum = zero_states(BLOCK_E, LANES, K, COMPUTE)
        dt_bias = load_vector(dt_bias_ptr + channel, mask, COMPUTE) if HAS_DT_BIAS else 0.0
        D = load_vector(D_ptr + channel, mask, COMPUTE) if HAS_D else 0.0
        dD = tl.zeros((BLOCK_E, LANES), COMPUTE)
        ddt_bias = tl.zeros((BLOCK_E, LANES), COMPUTE)

        for segment in range(run * run_segments, tl.minimum(run * run_segments + run_segments, num_segments)):
            batch, start, end, _ = load_segment(segments_ptr, tl.cast(segment, tl.int32))
            state_offsets = tl.cast(segment, tl.int64) * row_size + channel * N
            u_row = u_ptr + batch * u_strides[0] + group * u_strides[2] + e * stride_u_channel
            dt_row = dt_ptr + batch * dt_strides[0] + group * dt_strides[2] + e * stride_dt_channel
            dy_row = dy_ptr + batch * dy_strides[0] + group * dy_strides[2] + e * stride_dy_channel
            du_row = du_ptr + batch * du_strides[0] + group * du_strides[2] + e * stride_du_channel
            ddt_row = ddt_ptr + batch * ddt_strides[0] + group * ddt_strides[2] + e * stride_ddt_channel
            z_row, dz_row, B_row, C_row, dB_row, dC_row = None, None, None, None, None, None
            if HAS_Z:
                z_row = z_ptr + batch * z_strides[0] + group * z_strides[2] + e * stride_z_channel
                dz_row = dz_ptr + batch * dz_strides[0] + group * dz_strides[2] + e * stride_dz_channel
            sums_offset = (((split * num_batches + batch) * length) * num_groups + group) * N  # in dB, dC
            if not CONSTANT_B:
                B_row = B_ptr + batch * B_strides[0] + group * B_strides[2] + lanes * K
                dB_row = dB_ptr + sums_offset
            if not CONSTANT_C:
                C_row = C_ptr + batch * C_strides[0] + group * C_strides[2] + lanes * K
                dC_row = dC_ptr + sums_offset

            # The state before each part.
            tl.debug_barrier()  # other threads of this program may still read scratch, or have written sums
            parts = tl.cdiv(end - start, PART_STEPS)
            h = load_states(checkpoint_states_ptr + state_offsets, mask, lane, N, K, 1.0, COMPUTE)
            for part in range(parts):
                _save(parts_ptr + part * (BLOCK_E * LANES * K), tile_states, h, K, BLOCK_E * LANES)
                if part + 1 < parts:
                    for block in range(PART_STEPS // UNROLL):
                        h = _advance_block(
                            start + part * PART_STEPS + block * UNROLL, h, a, b, dt_bias, u_row, dt_row, B_row,
                            u_strides, dt_strides, B_strides, grid, mask, lanes,
                            N, K, LANES, B_WORD, CONSTANT_B, DT_SOFTPLUS, WHOLE_TILES, UNROLL, COMPUTE,
                        )  # fmt: skip

            # From the last part to the first: forward, then backward.
            dh = load_states(dstates_ptr + state_offsets, mask, lane, N, K, 1.0, COMPUTE)
            for parts_after in range(parts):
                part = parts - 1 - parts_after
                first = start + part * PART_STEPS
                blocks = tl.cdiv(tl.minimum(PART_STEPS, end - first), UNROLL)
                tl.debug_barrier()
                h = _restore(parts_ptr + part * (BLOCK_E * LANES * K), tile_states, K, BLOCK_E * LANES)
                for block in range(blocks):
                    h, dC_sum = _recompute_block(
                        first + block * UNROLL, end, block, h, dC_sum, a, b, c, D, dt_bias,
                        u_row, dt_row, z_row, dy_row, dz_row, B_row, C_row, dC_row, scratch_ptr, steps_ptr,
                        u_strides, dt_strides, z_strides, dy_strides, dz_strides, B_strides, C_strides, num_groups * N,
                        grid, mask, lanes, tile_states, tile_channel, tile > split,
                        N, K, PADDED_K, LANES, BLOCK_E, B_WORD, C_WORD, CONSTANT_B, CONSTANT_C, HAS_D, HAS_Z,
                        DT_SOFTPLUS, WHOLE_TILES, WHOLE_BLOCKS, UNROLL, COMPUTE,
                    )  # fmt: skip
                tl.debug_barrier()
                for blocks_after in range(blocks):
                    block = blocks - 1 - blocks_after
                    dh, dA, dB_sum, dD, ddt_bias = _reverse_block(
                        first + block * UNROLL, end, block, dh, dA, dB_sum, dD, ddt_bias, a, b, c, D, dt_bias,
                        u_row, dt_row, du_row, ddt_row, B_row, C_row, dB_row, scratch_ptr, steps_ptr,
                        u_strides, dt_strides, du_strides, ddt_strides, B_strides, C_strides, num_groups * N,
                        grid, mask, lanes, tile_states, tile_channel, tile > split,
                        N, K, PADDED_K, LANES, BLOCK_E, B_WORD, C_WORD, CONSTANT_B, CONSTANT_C, HAS_D, HAS_DT_BIAS,
                        DT_SOFTPLUS, WHOLE_TILES, WHOLE_BLOCKS, UNROLL, COMPUTE,
                    )  # fmt: skip

        # Sums over the time of this run.
        run_offsets = run.to(tl.int64) * row_size + channel * N
        store_states(dA_ptr + run_offsets, dA, mask, lane, N, K)
        if CONSTANT_B:
            store_states(dB_ptr + run_offsets, dB_sum, mask, lane, N, K)
        if CONSTANT_C:
            store_states(dC_ptr + run_offsets, dC_sum, mask, lane, N, K)
        run_offsets = run.to(tl.int64) * (num_groups * group_channels) + channel
        if HAS_D:
            tl.store(dD_ptr + run_offsets, dD, mask)
        if HAS_DT_BIAS:
            tl.store(ddt_bias_ptr + run_offsets, ddt_bias, mask)


@triton.jit
def _advance_block(
    t0, h, a, b, dt_bias, u_row, dt_row, B_row, u_strides, dt_strides, B_strides, grid, mask, lanes,
    N: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, B_WORD: tl.constexpr, CONSTANT_B: tl.constexpr,
    DT_SOFTPLUS: tl.constexpr, WHOLE_TILES: tl.constexpr, UNROLL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Return the states after UNROLL steps from t0 on."""
    for i in tl.static_range(UNROLL):
        inside = None if WHOLE_TILES else mask
        dt = load_channels(step_ptr(dt_row, t0, i, dt_strides[1], grid), inside, COMPUTE)
        dt = step_size(dt, dt_bias, DT_SOFTPLUS)
        u = load_channels(step_ptr(u_row, t0, i, u_strides[1], grid), inside, COMPUTE)
        if not CONSTANT_B:
            b = load_row(step_ptr(B_row, t0, i, B_strides[1], grid), lanes, None, N, K, LANES, B_WORD, COMPUTE)
        h = advance_states(h, a, b, dt, dt * u, K)
    return h


@triton.jit
def _recompute_block(
    t0, end, block, h, dC_sum, a, b, c, D, dt_bias,
    u_row, dt_row, z_row, dy_row, dz_row, B_row, C_row, dC_row, scratch_ptr, steps_ptr,
    u_strides, dt_strides, z_strides, dy_strides, dz_strides, B_strides, C_strides, stride_sum,
    grid, mask, lanes, tile_states, tile_channel, add,
    N: tl.constexpr, K: tl.constexpr, PADDED_K: tl.constexpr, LANES: tl.constexpr, BLOCK_E: tl.constexpr,
    B_WORD: tl.constexpr, C_WORD: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr, DT_SOFTPLUS: tl.constexpr, WHOLE_TILES: tl.constexpr, WHOLE_BLOCKS: tl.constexpr,
    UNROLL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Return the states after UNROLL steps from t0 on, and `dC_sum` with theirs; write dC and dz.

    Save the state before them, and of each step dt and the gradient of the output before the gate.
    """
    _save(scratch_ptr + block * (BLOCK_E * LANES * K), tile_states, h, K, BLOCK_E * LANES)
    dzs, saved, dCs = (), (), ()
    for i in tl.static_range(UNROLL):
        # Load.
        is_step = None if i == 0 or WHOLE_BLOCKS else t0 + i < end
        inside = _inside(mask, is_step, WHOLE_TILES)
        dt = load_channels(step_ptr(dt_row, t0, i, dt_strides[1], grid), inside, COMPUTE)
        dt = step_size(dt, dt_bias, DT_SOFTPLUS)
        if is_step is not None:
            dt = tl.where(inside, dt, 0.0)  # leaves the state as it is
        u = load_channels(step_ptr(u_row, t0, i, u_strides[1], grid), inside, COMPUTE)
        dy = load_channels(step_ptr(dy_row, t0, i, dy_strides[1], grid), inside, COMPUTE)
        if not CONSTANT_B:
            b = load_row(step_ptr(B_row, t0, i, B_strides[1], grid), lanes, is_step, N, K, LANES, B_WORD, COMPUTE)

        # Equation 2a of arXiv 2312.00752: h_t = exp(dt A) h_{t-1} + dt B u_t.
        h = advance_states(h, a, b, dt, dt * u, K)

        # Adjoint of the gate y = out silu(z), with out = C h + D u.
        dout = dy
        if HAS_Z:
            if not CONSTANT_C:
                c = load_row(step_ptr(C_row, t0, i, C_strides[1], grid), lanes, is_step, N, K, LANES, C_WORD, COMPUTE)
            z = load_channels(step_ptr(z_row, t0, i, z_strides[1], grid), inside, COMPUTE)
            out = dot_states(c, h, K, LANES)
            if HAS_D:
                out += D * u
            dout = dy * z * sigmoid(z)
            dzs = dzs + (silu_backward(dy * out, z),)

        # Adjoint of equation 2b: dC_t = sum over channels of h_t dout_t.
        if CONSTANT_C:
            dC_sum = add_scaled(dC_sum, dout, h, K)
        else:
            dCs = dCs + (_sum_channels(scale_states(h, dout, K), K, PADDED_K, BLOCK_E, LANES),)
        saved = saved + (dt, dout)

    # Store.
    _save(steps_ptr + block * (2 * UNROLL * BLOCK_E), tile_channel, saved, 2 * UNROLL, BLOCK_E)
    for i in tl.static_range(UNROLL):
        is_step = None if i == 0 or WHOLE_BLOCKS else t0 + i < end
        if HAS_Z:
            dz_step_ptr = step_ptr(dz_row, t0, i, dz_strides[1], grid)
            tl.store(dz_step_ptr, dzs[i].to(dz_row.dtype.element_ty), _inside(mask, is_step, False))
        if not CONSTANT_C:
            dC_step_ptr = step_ptr(dC_row, t0, i, stride_sum, grid)
            _add_sums(dC_step_ptr, dCs[i], is_step, add, N, K, PADDED_K, BLOCK_E, LANES)
    return h, dC_sum


@triton.jit
def _reverse_block(
    t0, end, block, dh, dA, dB_sum, dD, ddt_bias, a, b, c, D, dt_bias,
    u_row, dt_row, du_row, ddt_row, B_row, C_row, dB_row, scratch_ptr, steps_ptr,
    u_strides, dt_strides, du_strides, ddt_strides, B_strides, C_strides, stride_sum,
    grid, mask, lanes, tile_states, tile_channel, add,
    N: tl.constexpr, K: tl.constexpr, PADDED_K: tl.constexpr, LANES: tl.constexpr, BLOCK_E: tl.constexpr,
    B_WORD: tl.constexpr, C_WORD: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, HAS_D: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr, DT_SOFTPLUS: tl.constexpr, WHOLE_TILES: tl.constexpr, WHOLE_BLOCKS: tl.constexpr,
    UNROLL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Return the gradient of the state before UNROLL steps from t0 on, and the sums over time with theirs.

    Write du, ddt and dB.
    """
    # The state before the last of the steps, and of each step before it exp(dt A) h, K each.
    h = _restore(scratch_ptr + block * (BLOCK_E * LANES * K), tile_states, K, BLOCK_E * LANES)
    saved = _restore(steps_ptr + block * (2 * UNROLL * BLOCK_E), tile_channel, 2 * UNROLL, BLOCK_E)
    us, decayed = (), ()
    for i in tl.static_range(UNROLL):
        is_step = None if i == 0 or WHOLE_BLOCKS else t0 + i < end
        inside = _inside(mask, is_step, WHOLE_TILES)
        us = us + (load_channels(step_ptr(u_row, t0, i, u_strides[1], grid), inside, COMPUTE),)
        if i + 1 < UNROLL:
            if not CONSTANT_B:
                b = load_row(step_ptr(B_row, t0, i, B_strides[1], grid), lanes, is_step, N, K, LANES, B_WORD, COMPUTE)
            dt, before = saved[2 * i], h
            h = ()
            for k in tl.static_range(K):
                decayed = decayed + (tl.exp2(dt * a[k]) * before[k],)
                h = h + (decayed[i * K + k] + dt * us[i] * b[k],)

    for i in tl.static_range(UNROLL - 1, -1, -1):
        is_step = None if i == 0 or WHOLE_BLOCKS else t0 + i < end
        dt, dout, u = saved[2 * i], saved[2 * i + 1], us[i]
        if not CONSTANT_B:
            b = load_row(step_ptr(B_row, t0, i, B_strides[1], grid), lanes, is_step, N, K, LANES, B_WORD, COMPUTE)
        if not CONSTANT_C:
            c = load_row(step_ptr(C_row, t0, i, C_strides[1], grid), lanes, is_step, N, K, LANES, C_WORD, COMPUTE)

        # Adjoint of equation 2b: dh_t += C dout_t; and of dt B u_t in 2a.
        dh = add_scaled(dh, dout, c, K)
        dinput = dot_states(b, dh, K, LANES)  # gradient of dt * u, (BLOCK_E, LANES or 1)
        if CONSTANT_B:
            dB_sum = add_scaled(dB_sum, dt * u, dh, K)
        else:
            dB = _sum_channels(scale_states(dh, dt * u, K), K, PADDED_K, BLOCK_E, LANES)
            _add_sums(step_ptr(dB_row, t0, i, stride_sum, grid), dB, is_step, add, N, K, PADDED_K, BLOCK_E, LANES)

        # Adjoint of exp(dt A) h_{t-1} in 2a.
        dh_before, dlog_decay = (), ()
        for k in tl.static_range(K):
            decay = tl.exp2(dt * a[k])
            if i + 1 == UNROLL:
                decayed = decayed + (decay * h[k],)
            # Not by `dh_before`, which a growing decay may make infinite where the state is 0.
            dlog_decay = dlog_decay + (dh[k] * decayed[i * K + k],)
            dh_before = dh_before + (decay * dh[k],)
        dh = dh_before
        dA = add_scaled(dA, dt, dlog_decay, K)
        ddt = dot_states(a, dlog_decay, K, LANES) * LN2 + dinput * u  # a has LOG2E in it
        du = dt * dinput
        if HAS_D:
            du += D * dout
            dD += u * dout
        if DT_SOFTPLUS:
            inside = _inside(mask, is_step, WHOLE_TILES)
            ddt *= d_softplus(load_channels(step_ptr(dt_row, t0, i, dt_strides[1], grid), inside, COMPUTE) + dt_bias)
        if HAS_DT_BIAS:
            ddt_bias += ddt if is_step is None else tl.where(_inside(mask, is_step, False), ddt, 0.0)

        # Store.
        inside = _inside(mask, is_step, False)
        tl.store(step_ptr(du_row, t0, i, du_strides[1], grid), du.to(du_row.dtype.element_ty), inside)
        tl.store(step_ptr(ddt_row, t0, i, ddt_strides[1], grid), ddt.to(ddt_row.dtype.element_ty), inside)
    return dh, dA, dB_sum, dD, ddt_bias


@triton.jit
def _inside(mask, is_step, WHOLE_TILES: tl.constexpr):
    """Return the channels of a step: `mask`, where there is such a step; None for all of them."""
    if is_step is None:
        inside = None if WHOLE_TILES else mask
    else:
        inside = and_scalar(mask, is_step)
    return inside


# --- scratch --------------------------------------------------------------------------------------------------------


@triton.jit
def _save(ptr, offset, values, COUNT: tl.constexpr, STRIDE: tl.constexpr):
    """Store COUNT tensors from the scalar `ptr` on, STRIDE elements apart; of 32 bits, two in a store."""
    if ptr.dtype.element_ty == tl.float64 or COUNT % 2 != 0:
        for k in tl.static_range(COUNT):
            tl.store(ptr + k * STRIDE + offset, values[k])
    else:
        pair_ptr = ptr.to(tl.pointer_type(tl.int64), bitcast=True)
        for k in tl.static_range(COUNT // 2):
            low = values[2 * k].to(tl.uint32, bitcast=True).to(tl.int64)
            high = values[2 * k + 1].to(tl.uint32, bitcast=True).to(tl.int64)
            tl.store(pair_ptr + k * STRIDE + offset, (high << 32) | low)


@triton.jit
def _restore(ptr, offset, COUNT: tl.constexpr, STRIDE: tl.constexpr):
    """Load what `_save` stored."""
    values = ()
    if ptr.dtype.element_ty == tl.float64 or COUNT % 2 != 0:
        for k in tl.static_range(COUNT):
            values = values + (tl.load(ptr + k * STRIDE + offset),)
    else:
        pair_ptr = ptr.to(tl.pointer_type(tl.int64), bitcast=True)
        for k in tl.static_range(COUNT // 2):
            pair = tl.load(pair_ptr + k * STRIDE + offset)
            low, high = pair.to(tl.int32), (pair >> 32).to(tl.int32)
            values = values + (low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True))
    return values


# --- sums over channels ---------------------------------------------------------------------------------------------


@triton.jit
def _sum_channels(values, K: tl.constexpr, PADDED_K: tl.constexpr, BLOCK_E: tl.constexpr, LANES: tl.constexpr):
    """Sum K tensors (BLOCK_E, LANES) over channels, by a reduce-scatter: threads end with different sums.

    A butterfly would give each of the K sums to all threads, by K log2(BLOCK_E) shuffles. Here two threads exchange
    half of their values, then each exchanges half of what it has left with another, and so on: about K shuffles.

    Returns:
        PADDED_K / ROWS tensors (ROWS * LANES,), with ROWS = min(PADDED_K, BLOCK_E / 2). Element [row * LANES + lane] of
        tensor j is the sum of the lane's state row * PADDED_K / ROWS + j.
    """
    ROWS: tl.constexpr = PADDED_K if PADDED_K < BLOCK_E // 2 else BLOCK_E // 2
    OUTER: tl.constexpr = BLOCK_E // 2 // ROWS
    sums = ()
    for k in tl.static_range(K):
        # The two channels of a thread.
        sums = sums + (tl.sum(tl.reshape(values[k], (2, BLOCK_E // 2 * LANES)), axis=0),)
    for _ in tl.static_range(PADDED_K - K):
        sums = sums + (tl.zeros_like(sums[0]),)
    for level in tl.static_range(5):
        if (1 << level) < ROWS:
            sums = _exchange_halves(sums, PADDED_K >> level, OUTER << level, (ROWS * LANES) >> (level + 1))
    if OUTER > 1:
        rows = ()
        for j in tl.static_range(PADDED_K // ROWS):
            rows = rows + (tl.sum(tl.reshape(sums[j], (OUTER, ROWS * LANES)), axis=0),)
        sums = rows
    return sums


@triton.jit
def _exchange_halves(values, COUNT: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Add COUNT tensors (OUTER * 2 * INNER,) over the middle axis: its index 0 gets the first half, 1 the second."""
    is_second = tl.arange(0, 2)[None, :, None] == 1  # (1, 2, 1)
    bits = tl.int64 if values[0].dtype == tl.float64 else tl.int32
    sums = ()
    for j in tl.static_range(COUNT // 2):
        first = tl.reshape(values[j], (OUTER, 2, INNER))
        second = tl.reshape(values[j + COUNT // 2], (OUTER, 2, INNER))
        kept = tl.where(is_second, second, first)
        sent = tl.where(is_second, first, second).to(bits, bitcast=True)
        # The partner's is what both have sent, less the own: a shuffle and nothing else, when compiled.
        received = (tl.sum(sent, axis=1, keep_dims=True) - sent).to(kept.dtype, bitcast=True)
        sums = sums + (tl.reshape(kept + received, (OUTER * 2 * INNER,)),)
    return sums


@triton.jit
def _add_sums(
    ptr, sums, is_step, add,
    N: tl.constexpr, K: tl.constexpr, PADDED_K: tl.constexpr, BLOCK_E: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write the N sums that `_sum_channels` returned from the scalar `ptr` on, or with `add` add them to what is there.

    `is_step` is None, or whether there is such a step.
    """
    ROWS: tl.constexpr = PADDED_K if PADDED_K < BLOCK_E // 2 else BLOCK_E // 2
    element = tl.arange(0, ROWS * LANES)
    for j in tl.static_range(PADDED_K // ROWS):
        k = element // LANES * (PADDED_K // ROWS) + j
        n = element % LANES * K + k
        mask = (k < K) & (n < N)
        if is_step is not None:
            mask = and_scalar(mask, is_step)
        before = tl.load(ptr + n, and_scalar(mask, add), other=0.0)
        tl.store(ptr + n, before + sums[j], mask)
