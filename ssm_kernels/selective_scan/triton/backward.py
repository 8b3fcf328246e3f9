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

from ..._triton.device import capability, empty_like, maxnreg_option, num_sms, on_device
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
    base_step,
    channel_stride,
    dot_states,
    fill_tile,
    forward_tile,
    jit_with_opaque_strides,
    load_dt,
    load_row,
    load_states,
    load_step,
    load_vector,
    local_step,
    split_program,
    step_ptr,
    store_states,
    strides,
    tile_channels,
    tile_lanes,
    unroll,
    with_close_steps,
    zero_states,
)

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
        slots = CHECKPOINT_INTERVAL // unrolled  # blocks of steps whose first state is in scratch
        scratch_elements = tile["BLOCK_E"] * (tile["LANES"] * tile["K"] * slots + 2 * CHECKPOINT_INTERVAL)
        scratch = dstates.new_empty(num_programs, scratch_elements)
        with on_device(u):
            _backward_kernel[(num_programs,)](
                u, dt, A, B, C, D, z, inputs.dt_bias, checkpoint_states, dstates, dy,
                du, ddt, dA, dB, dC, dD, dz, ddt_bias, scratch,
                segments.entries, inputs.batch, *inputs.sizes, num_segments, run_segments, num_splits,
                1, tile["BLOCK_E"], strides(u), channel_stride(u), strides(dt), channel_stride(dt), strides(z),
                channel_stride(z), strides(dy), channel_stride(dy), strides(du), channel_stride(du), strides(ddt),
                channel_stride(ddt), strides(dz), channel_stride(dz), strides(B), strides(C),
                CHECKPOINT_INTERVAL=CHECKPOINT_INTERVAL, UNROLL=unrolled, **inputs.options(tile),
            )  # fmt: skip
    sums = {"A": dA, "B": dB, "C": dC, "D": dD, "dt_bias": ddt_bias}
    summed = {name: None if x is None else x.sum(0) for name, x in sums.items()}
    return {"u": du, "dt": ddt, "z": dz} | summed


def _backward_tile(n: int) -> dict[str, int]:
    """Choose the tile of `_backward_kernel`: one warp, at most 8 states of two channels a thread.

    Adding over channels in a thread saves adding over threads; four channels would spill.
    """
    return fill_tile(n, 8) | {"num_warps": 1}


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
    channel = group * group_channels + e
    batch, start, end, _ = load_segment(segments_ptr, segment)
    direction = unpack_direction(directions, group) if NUM_DIRECTIONS else None

    a = load_states(A_ptr + channel * N, mask, lane, N, K, LOG2E, COMPUTE)
    if CONSTANT_C:
        c = load_states(C_ptr + channel * N, mask, lane, N, K, 1.0, COMPUTE)
    else:
        C_ptr += batch * C_strides[0] + group * C_strides[2] + lanes * K
    dt_bias = load_vector(dt_bias_ptr + channel, mask, COMPUTE) if HAS_DT_BIAS else 0.0
    dt_ptr += batch * dt_strides[0] + group * dt_strides[2] + e * stride_dt_channel
    dy_ptr += batch * dy_strides[0] + group * dy_strides[2] + e * stride_dy_channel
    if HAS_Z:
        z_ptr += batch * z_strides[0] + group * z_strides[2] + e * stride_z_channel

    dh = zero_states(BLOCK_E, LANES, K, COMPUTE)
    dt_sum = tl.zeros((BLOCK_E, LANES), COMPUTE)
    blocks = tl.cdiv(end - start, UNROLL)
    for block in range(blocks):
        t0 = start + (blocks - 1 - block) * UNROLL
        base = base_step(t0, direction)
        for i in tl.static_range(UNROLL - 1, -1, -1):
            # Load.
            inside = and_scalar(mask, t0 + i < end)
            local = local_step(t0, i, end, direction, length, height)
            dt = load_dt(dt_ptr, base, local, dt_strides[1], inside, dt_bias, DT_SOFTPLUS, COMPUTE)  # (BLOCK_E, LANES)
            dout = load_step(dy_ptr, base, local, dy_strides[1], inside, COMPUTE)
            if HAS_Z:
                dout *= silu(load_step(z_ptr, base, local, z_strides[1], inside, COMPUTE))
            if not CONSTANT_C:
                c = load_row(C_ptr, base, local, C_strides[1], lanes, t0 + i < end, N, K, C_WORD, COMPUTE)

            # Adjoint of equations 2: dh_{t-1} = exp(dt A) (dh_t + C dout_t).
            dh_before = ()
            for k in tl.static_range(K):
                dh_before = dh_before + (tl.exp2(dt * a[k]) * (dh[k] + dout * c[k]),)
            dh = dh_before
            dt_sum += dt

    row_size = tl.cast(num_groups, tl.int64) * group_channels * N
    store_states(dstates_ptr + segment * row_size + channel * N, dh, mask, lane, N, K)
    tl.store(dt_sum_ptr + segment * (num_groups * group_channels) + channel, dt_sum, mask)


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
    N: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, BLOCK_E: tl.constexpr, B_WORD: tl.constexpr,
    C_WORD: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr, DT_SOFTPLUS: tl.constexpr, NUM_DIRECTIONS: tl.constexpr,
    CHECKPOINT_INTERVAL: tl.constexpr, UNROLL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute all gradients of a run of segments, for every `num_splits`-th tile of a group's channels.

    Grid: runs x groups x splits. Tiles: inputs (BLOCK_E, LANES), each lane alike; B, C K x (1, LANES); state
    K x (BLOCK_E, LANES).

    Each segment is scanned forward from its checkpoint state, for dC and dz. That saves in scratch the state before
    every UNROLL steps, and dt and the gradient of the output before the gate for each step. Then it is scanned
    backward, UNROLL steps at a time, whose states are recomputed in registers.

    dB and dC are sums over channels: over a tile's in registers, over tiles in rows (splits, B, L, G, N) that no other
    program touches. dA, dD and ddt_bias, and dB and dC of matrices constant in time, are sums over time: a row a run.
    """
    program = tl.program_id(0)
    split, group = program % num_splits, (program // num_splits % num_groups).to(tl.int64)
    run = program // num_splits // num_groups
    direction = unpack_direction(directions, group) if NUM_DIRECTIONS else None
    lanes = tl.arange(0, LANES)[None, :]
    row_size = tl.cast(num_groups, tl.int64) * group_channels * N

    # Scratch of this program: K states a thread for each block of UNROLL steps, then dt and dout of each step.
    TILE: tl.constexpr = BLOCK_E * LANES
    STATES: tl.constexpr = TILE * (CHECKPOINT_INTERVAL // UNROLL) * K
    scratch_ptr += program.to(tl.int64) * (STATES + 2 * BLOCK_E * CHECKPOINT_INTERVAL)
    tile_channel = tl.arange(0, BLOCK_E)[:, None] + tl.zeros((1, LANES), tl.int32)
    lane = tile_lanes(BLOCK_E, LANES)
    # Steps before states: in the other order ptxas spills 8 bytes on sm_80 along directions.
    saved_steps_ptr = scratch_ptr + STATES + tile_channel * stride_scratch_channel
    saved_states_ptr = scratch_ptr + (lane * stride_scratch_lane + tile_channel * stride_scratch_channel)

    for tile in range(split, tl.cdiv(group_channels, BLOCK_E), num_splits):
        e = tile_channels(tile, BLOCK_E, LANES)
        mask = e < group_channels
        channel = group * group_channels + e

        # Parameters of the channels, and sums over time.
        a = load_states(A_ptr + channel * N, mask, lane, N, K, LOG2E, COMPUTE)
        dA = zero_states(BLOCK_E, LANES, K, COMPUTE)
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
            if not CONSTANT_B:
                B_row = B_ptr + batch * B_strides[0] + group * B_strides[2] + lanes * K
            if not CONSTANT_C:
                C_row = C_ptr + batch * C_strides[0] + group * C_strides[2] + lanes * K
            dy_row = dy_ptr + batch * dy_strides[0] + group * dy_strides[2] + e * stride_dy_channel
            du_row = du_ptr + batch * du_strides[0] + group * du_strides[2] + e * stride_du_channel
            ddt_row = ddt_ptr + batch * ddt_strides[0] + group * ddt_strides[2] + e * stride_ddt_channel
            partial_sums = (((split * num_batches + batch) * length) * num_groups + group) * N + lanes * K  # in dB, dC
            if HAS_Z:
                z_row = z_ptr + batch * z_strides[0] + group * z_strides[2] + e * stride_z_channel
                dz_row = dz_ptr + batch * dz_strides[0] + group * dz_strides[2] + e * stride_dz_channel

            # Forward.
            tl.debug_barrier()  # other threads of this program may still read scratch, or have written sums
            h = load_states(checkpoint_states_ptr + state_offsets, mask, lane, N, K, 1.0, COMPUTE)
            for t0 in range(start, end, UNROLL):
                slot = (t0 - start) // UNROLL
                for k in tl.static_range(K):
                    tl.store(saved_states_ptr + (slot * K + k) * TILE, h[k])
                dts, douts, dzs, dCs = (), (), (), ()
                base = base_step(t0, direction)
                for i in tl.static_range(UNROLL):
                    # Load.
                    inside = and_scalar(mask, t0 + i < end)
                    local = local_step(t0, i, end, direction, length, height)
                    dt = load_dt(dt_row, base, local, dt_strides[1], inside, dt_bias, DT_SOFTPLUS, COMPUTE)
                    u = load_step(u_row, base, local, u_strides[1], inside, COMPUTE)
                    dy = load_step(dy_row, base, local, dy_strides[1], inside, COMPUTE)
                    if not CONSTANT_B:
                        b = load_row(B_row, base, local, B_strides[1], lanes, t0 + i < end, N, K, B_WORD, COMPUTE)

                    # Equation 2a of arXiv 2312.00752: h_t = exp(dt A) h_{t-1} + dt B u_t.
                    h = advance_states(h, a, b, dt, dt * u, K)

                    # Adjoint of the gate y = out silu(z), with out = C h + D u.
                    dout = dy
                    if HAS_Z:
                        if not CONSTANT_C:
                            c = load_row(C_row, base, local, C_strides[1], lanes, t0 + i < end, N, K, C_WORD, COMPUTE)
                        z = load_step(z_row, base, local, z_strides[1], inside, COMPUTE)
                        out = dot_states(c, h, K, LANES)
                        if HAS_D:
                            out += D * u
                        dout = dy * z * sigmoid(z)
                        dzs = dzs + (silu_backward(dy * out, z),)

                    # Adjoint of equation 2b: dC_t = sum over channels of h_t dout_t.
                    if CONSTANT_C:
                        dC_sum = add_scaled(dC_sum, dout, h, K)
                    else:
                        for k in tl.static_range(K):
                            dCs = dCs + (tl.sum(h[k] * dout, axis=0, keep_dims=True),)  # (1, LANES)
                    dts = dts + (dt,)
                    douts = douts + (dout,)

                # Store.
                for i in tl.static_range(UNROLL):
                    local = local_step(t0, i, end, direction, length, height)
                    tl.store(saved_steps_ptr + (slot * UNROLL + i) * BLOCK_E, dts[i])
                    tl.store(saved_steps_ptr + (slot * UNROLL + i + CHECKPOINT_INTERVAL) * BLOCK_E, douts[i])
                    if HAS_Z:
                        dz_step_ptr = step_ptr(dz_row, base, local, dz_strides[1])
                        tl.store(dz_step_ptr, dzs[i].to(dz_ptr.dtype.element_ty), and_scalar(mask, t0 + i < end))
                    if not CONSTANT_C:
                        dC_step_ptr = step_ptr(dC_ptr + partial_sums, base, local, num_groups * N)
                        _add_row(dC_step_ptr, dCs, i * K, lanes, t0 + i < end, tile > split, N, K)
            tl.debug_barrier()

            # Backward.
            dh = load_states(dstates_ptr + state_offsets, mask, lane, N, K, 1.0, COMPUTE)
            blocks = tl.cdiv(end - start, UNROLL)
            for block in range(blocks):
                slot = blocks - 1 - block
                t0 = start + slot * UNROLL
                base = base_step(t0, direction)

                # The states before each of the UNROLL steps, K each.
                h = ()
                for k in tl.static_range(K):
                    h = h + (tl.load(saved_states_ptr + (slot * K + k) * TILE),)
                hs = h
                for i in tl.static_range(UNROLL - 1):
                    local = local_step(t0, i, end, direction, length, height)
                    dt = tl.load(saved_steps_ptr + (slot * UNROLL + i) * BLOCK_E)
                    u = load_step(u_row, base, local, u_strides[1], and_scalar(mask, t0 + i < end), COMPUTE)
                    if not CONSTANT_B:
                        b = load_row(B_row, base, local, B_strides[1], lanes, t0 + i < end, N, K, B_WORD, COMPUTE)
                    h = advance_states(h, a, b, dt, dt * u, K)
                    hs = hs + h

                for i in tl.static_range(UNROLL - 1, -1, -1):
                    # Load.
                    inside = and_scalar(mask, t0 + i < end)
                    local = local_step(t0, i, end, direction, length, height)
                    dt = tl.load(saved_steps_ptr + (slot * UNROLL + i) * BLOCK_E)
                    dout = tl.load(saved_steps_ptr + (slot * UNROLL + i + CHECKPOINT_INTERVAL) * BLOCK_E)
                    u = load_step(u_row, base, local, u_strides[1], inside, COMPUTE)
                    if not CONSTANT_B:
                        b = load_row(B_row, base, local, B_strides[1], lanes, t0 + i < end, N, K, B_WORD, COMPUTE)
                    if not CONSTANT_C:
                        c = load_row(C_row, base, local, C_strides[1], lanes, t0 + i < end, N, K, C_WORD, COMPUTE)

                    # Adjoint of equation 2b: dh_t += C dout_t; and of dt B u_t in 2a.
                    dh = add_scaled(dh, dout, c, K)
                    dinput = dot_states(b, dh, K, LANES)  # gradient of dt * u, (BLOCK_E, LANES or 1)
                    if CONSTANT_B:
                        dB_sum = add_scaled(dB_sum, dt * u, dh, K)
                    else:
                        dBs = ()
                        for k in tl.static_range(K):
                            dBs = dBs + (tl.sum(dh[k] * (dt * u), axis=0, keep_dims=True),)  # (1, LANES)
                        dB_step_ptr = step_ptr(dB_ptr + partial_sums, base, local, num_groups * N)
                        _add_row(dB_step_ptr, dBs, 0, lanes, t0 + i < end, tile > split, N, K)

                    # Adjoint of exp(dt A) h_{t-1} in 2a.
                    dh_before, dlog_decay = (), ()
                    for k in tl.static_range(K):
                        dh_before = dh_before + (tl.exp2(dt * a[k]) * dh[k],)
                        dlog_decay = dlog_decay + (dh_before[k] * hs[i * K + k],)
                    dh = dh_before
                    dA = add_scaled(dA, dt, dlog_decay, K)
                    ddt = dot_states(a, dlog_decay, K, LANES) * LN2 + dinput * u  # a has LOG2E in it
                    du = dt * dinput
                    if HAS_D:
                        du += D * dout
                        dD += u * dout
                    if DT_SOFTPLUS:
                        raw_dt = load_step(dt_row, base, local, dt_strides[1], inside, COMPUTE) + dt_bias
                        ddt *= d_softplus(raw_dt)
                    if HAS_DT_BIAS:
                        ddt_bias += tl.where(inside, ddt, 0.0)

                    # Store.
                    du_step_ptr = step_ptr(du_row, base, local, du_strides[1])
                    tl.store(du_step_ptr, du.to(du_ptr.dtype.element_ty), inside)
                    ddt_step_ptr = step_ptr(ddt_row, base, local, ddt_strides[1])
                    tl.store(ddt_step_ptr, ddt.to(ddt_ptr.dtype.element_ty), inside)

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
def _add_row(
    ptr, sums, first: tl.constexpr, lanes, inside, add, N: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """Write K of the sums (1, LANES) to `ptr` (1, LANES), or with `add` add them to what is there."""
    for k in tl.static_range(K):
        mask = and_scalar(lanes * K + k < N, inside)
        before = tl.load(ptr + k, and_scalar(mask, add), other=0.0)
        tl.store(ptr + k, before + sums[first + k], mask)
