"""The backward kernels and their launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._triton.device import capability, maxnreg_option, num_sms, on_device, pack_directions, with_contiguous_last_dim
from ..._triton.primitives import and_scalar, load_segment, sigmoid, zero_padding
from ..._triton.segment_table import build_segment_table
from ..._triton.state_passing import state_passing
from . import CHECKPOINT_INTERVAL, empty_like
from .tile import (
    LN2,
    LOG2E,
    REGISTERS,
    advance,
    compile_options,
    contiguous,
    dot,
    fill_tile,
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

# Programs of the backward for each multiprocessor, of one warp each: twice as many as registers allow at once.
PROGRAMS = 16


@jit_unspecialized
def _adjoint_kernel(
    dt, A, C, z, dt_bias, dy, arrivals, times, table, length, height, codes, G, E,
    dt_0, dt_1, dt_2, dt_3, z_0, z_1, z_2, z_3, dy_0, dy_1, dy_2, dy_3, C_0, C_1, C_2,
    N: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, BLOCK_E: tl.constexpr, C_WORD: tl.constexpr,
    CONSTANT_C: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    ROUTED: tl.constexpr, UNROLL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """What one chunk adds to the gradient of the state before it, and the sum of its steps. Grid as the forward's."""
    chunk, group, e, lane = place_program(G, E, BLOCK_E, LANES)
    lanes = tl.arange(0, LANES)[None, :]
    mask = e < E
    channel = group * E + e
    row, start, end, _ = load_segment(table, chunk)
    way = (codes >> (2 * group) & 3, length, height) if ROUTED else None
    a = load_states(A + channel * N, mask, lane, N, K, LOG2E, COMPUTE)
    if CONSTANT_C:
        c = load_states(C + channel * N, mask, lane, N, K, 1.0, COMPUTE)
    else:
        C += row * C_0 + group * C_2 + lanes * K
    bias = tl.load(dt_bias + channel, mask, other=0.0).to(COMPUTE) if HAS_BIAS else 0.0
    dt += row * dt_0 + group * dt_2 + e * dt_3
    dy += row * dy_0 + group * dy_2 + e * dy_3
    if HAS_Z:
        z += row * z_0 + group * z_2 + e * z_3

    g = zero_states(BLOCK_E, LANES, K, COMPUTE)
    total = tl.zeros((BLOCK_E, LANES), COMPUTE)
    blocks = tl.cdiv(end - start, UNROLL)
    for block in range(blocks):
        t0 = start + (blocks - 1 - block) * UNROLL
        far = tl.cast(t0, tl.int64) if way is None else 0
        for i in tl.static_range(UNROLL - 1, -1, -1):
            inside = and_scalar(mask, t0 + i < end)
            near = near_offset(t0, i, end, way)
            delta = load_delta(dt + far * dt_1 + near * dt_1, inside, bias, SOFTPLUS, COMPUTE)
            d = load(dy + far * dy_1 + near * dy_1, inside, COMPUTE)
            if HAS_Z:
                gate = load(z + far * z_1 + near * z_1, inside, COMPUTE)
                d *= gate * sigmoid(gate)
            if not CONSTANT_C:
                c_row = C + far * C_1 + near * C_1
                c = load_matrix(c_row, lanes, t0 + i < end, N, K, C_WORD, COMPUTE)
            g_next = ()
            for k in tl.static_range(K):
                g_next = g_next + (tl.exp2(delta * a[k]) * (g[k] + d * c[k]),)
            g = g_next
            total += delta
    size = tl.cast(G, tl.int64) * E * N
    store_states(arrivals + chunk * size + channel * N, g, mask, lane, N, K)
    tl.store(times + chunk * (G * E) + channel, total, mask)


@jit_unspecialized
def _backward_kernel(
    u, dt, A, B, C, D, z, dt_bias, kept, arrivals, dy, du, ddt, dA, dB, dC, dD, dz, dbias, scratch,
    table, batch, length, height, codes, G, E, chunks, run, splits, scratch_0, scratch_1,
    u_0, u_1, u_2, u_3, dt_0, dt_1, dt_2, dt_3, z_0, z_1, z_2, z_3, dy_0, dy_1, dy_2, dy_3,
    du_0, du_1, du_2, du_3, ddt_0, ddt_1, ddt_2, ddt_3, dz_0, dz_1, dz_2, dz_3, B_0, B_1, B_2, C_0, C_1, C_2,
    N: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, BLOCK_E: tl.constexpr, B_WORD: tl.constexpr,
    C_WORD: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, ROUTED: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """All gradients of a run of chunks, for every `splits`-th tile of a group's channels. Grid: runs * G * splits.

    Each chunk is walked forward from its kept state, for dC and dz, which leaves in `scratch` the state before every
    SUB steps, and of each step its size and the gradient of what was gated. Then it is walked in reverse, SUB steps at
    a time, whose states are computed again in registers. dB and dC are sums over channels: over a tile's in registers,
    over tiles in this program's part of (splits, B, L, G, N), which nobody else touches. dA, dD and dbias, and dB and
    dC of matrices constant in time, are sums over time: one row a run.
    """
    program = tl.program_id(0)
    split, group = program % splits, (program // splits % G).to(tl.int64)
    at_run = program // splits // G
    way = (codes >> (2 * group) & 3, length, height) if ROUTED else None
    lane = tl.arange(0, LANES)[None, :] + tl.zeros((BLOCK_E, 1), tl.int32)
    lanes = tl.arange(0, LANES)[None, :]
    size = tl.cast(G, tl.int64) * E * N
    tile_size: tl.constexpr = BLOCK_E * LANES
    # Of this program: the states, K a thread, and then the steps, one a channel.
    states = scratch + program.to(tl.int64) * (tile_size * (CHUNK // SUB) * K + 2 * BLOCK_E * CHUNK)
    channels = (tl.arange(0, BLOCK_E)[:, None] + tl.zeros((1, LANES), tl.int32)) * scratch_0
    deltas = states + tile_size * (CHUNK // SUB) * K + channels
    states += lane * scratch_1 + channels

    for tile in range(split, tl.cdiv(E, BLOCK_E), splits):
        e = (tile * BLOCK_E + tl.arange(0, BLOCK_E)[:, None] + tl.zeros((1, LANES), tl.int32)).to(tl.int64)
        mask = e < E
        channel = group * E + e
        a = load_states(A + channel * N, mask, lane, N, K, LOG2E, COMPUTE)
        da = zero_states(BLOCK_E, LANES, K, COMPUTE)
        if CONSTANT_B:
            b = load_states(B + channel * N, mask, lane, N, K, 1.0, COMPUTE)
            db_sum = zero_states(BLOCK_E, LANES, K, COMPUTE)
        if CONSTANT_C:
            c = load_states(C + channel * N, mask, lane, N, K, 1.0, COMPUTE)
            dc_sum = zero_states(BLOCK_E, LANES, K, COMPUTE)
        bias = tl.load(dt_bias + channel, mask, other=0.0).to(COMPUTE) if HAS_BIAS else 0.0
        skip = tl.load(D + channel, mask, other=0.0).to(COMPUTE) if HAS_D else 0.0
        dskip = tl.zeros((BLOCK_E, LANES), COMPUTE)
        dbias_sum = tl.zeros((BLOCK_E, LANES), COMPUTE)

        for chunk in range(at_run * run, tl.minimum(at_run * run + run, chunks)):
            row, start, end, _ = load_segment(table, tl.cast(chunk, tl.int32))
            here = tl.cast(chunk, tl.int64) * size + channel * N
            u_row = u + row * u_0 + group * u_2 + e * u_3
            dt_row = dt + row * dt_0 + group * dt_2 + e * dt_3
            B_row = B + row * B_0 + group * B_2 + lanes * K
            C_row = C + row * C_0 + group * C_2 + lanes * K
            dy_row = dy + row * dy_0 + group * dy_2 + e * dy_3
            du_row = du + row * du_0 + group * du_2 + e * du_3
            ddt_row = ddt + row * ddt_0 + group * ddt_2 + e * ddt_3
            part = (((split * batch + row) * length) * G + group) * N + lanes * K  # in dB and dC, (1, LANES)
            if HAS_Z:
                z_row = z + row * z_0 + group * z_2 + e * z_3
                dz_row = dz + row * dz_0 + group * dz_2 + e * dz_3

            tl.debug_barrier()  # others of this program's threads may still read scratch, or have written sums
            h = load_states(kept + here, mask, lane, N, K, 1.0, COMPUTE)
            for t0 in range(start, end, SUB):
                slot = (t0 - start) // SUB
                for k in tl.static_range(K):
                    tl.store(states + (slot * K + k) * tile_size, h[k])
                step_sizes, ds, dcs, dgates = (), (), (), ()
                far = tl.cast(t0, tl.int64) if way is None else 0
                for i in tl.static_range(SUB):
                    inside = and_scalar(mask, t0 + i < end)
                    near = near_offset(t0, i, end, way)
                    delta = load_delta(dt_row + far * dt_1 + near * dt_1, inside, bias, SOFTPLUS, COMPUTE)
                    x = load(u_row + far * u_1 + near * u_1, inside, COMPUTE)
                    dout = load(dy_row + far * dy_1 + near * dy_1, inside, COMPUTE)
                    if not CONSTANT_B:
                        b = load_matrix(B_row + far * B_1 + near * B_1, lanes, t0 + i < end, N, K, B_WORD, COMPUTE)
                    h = advance(h, a, b, delta, delta * x, K)
                    d = dout
                    if HAS_Z:
                        if not CONSTANT_C:
                            c = load_matrix(C_row + far * C_1 + near * C_1, lanes, t0 + i < end, N, K, C_WORD, COMPUTE)
                        gate = load(z_row + far * z_1 + near * z_1, inside, COMPUTE)
                        out = sum_over_lanes(dot(c, h, K), LANES)
                        if HAS_D:
                            out += skip * x
                        is_open = sigmoid(gate)
                        d = dout * gate * is_open
                        dgates = dgates + (dout * out * is_open * (1 + gate * (1 - is_open)),)
                    if CONSTANT_C:
                        dc_sum = _add_scaled(dc_sum, d, h, K)
                    else:
                        for k in tl.static_range(K):
                            dcs = dcs + (tl.sum(h[k] * d, axis=0, keep_dims=True),)
                    step_sizes = step_sizes + (delta,)
                    ds = ds + (d,)
                for i in tl.static_range(SUB):
                    near = near_offset(t0, i, end, way)
                    tl.store(deltas + (slot * SUB + i) * BLOCK_E, step_sizes[i])
                    tl.store(deltas + (slot * SUB + i + CHUNK) * BLOCK_E, ds[i])
                    if HAS_Z:
                        dz_at = dz_row + far * dz_1 + near * dz_1
                        tl.store(dz_at, dgates[i].to(dz.dtype.element_ty), and_scalar(mask, t0 + i < end))
                    if not CONSTANT_C:
                        sums = dC + part + far * (G * N) + near * (G * N)
                        _add_sums(sums, dcs, i * K, lanes, t0 + i < end, tile > split, N, K)
            tl.debug_barrier()

            g = load_states(arrivals + here, mask, lane, N, K, 1.0, COMPUTE)
            blocks = tl.cdiv(end - start, SUB)
            for block in range(blocks):
                slot = blocks - 1 - block
                t0 = start + slot * SUB
                far = tl.cast(t0, tl.int64) if way is None else 0
                h = ()
                for k in tl.static_range(K):
                    h = h + (tl.load(states + (slot * K + k) * tile_size),)
                hs = h  # before each of the steps, K each
                for i in tl.static_range(SUB - 1):
                    near = near_offset(t0, i, end, way)
                    delta = tl.load(deltas + (slot * SUB + i) * BLOCK_E)
                    x = load(u_row + far * u_1 + near * u_1, and_scalar(mask, t0 + i < end), COMPUTE)
                    if not CONSTANT_B:
                        b = load_matrix(B_row + far * B_1 + near * B_1, lanes, t0 + i < end, N, K, B_WORD, COMPUTE)
                    h = advance(h, a, b, delta, delta * x, K)
                    hs = hs + h
                for i in tl.static_range(SUB - 1, -1, -1):
                    inside = and_scalar(mask, t0 + i < end)
                    near = near_offset(t0, i, end, way)
                    delta = tl.load(deltas + (slot * SUB + i) * BLOCK_E)
                    d = tl.load(deltas + (slot * SUB + i + CHUNK) * BLOCK_E)
                    x = load(u_row + far * u_1 + near * u_1, inside, COMPUTE)
                    if not CONSTANT_B:
                        b = load_matrix(B_row + far * B_1 + near * B_1, lanes, t0 + i < end, N, K, B_WORD, COMPUTE)
                    if not CONSTANT_C:
                        c = load_matrix(C_row + far * C_1 + near * C_1, lanes, t0 + i < end, N, K, C_WORD, COMPUTE)
                    g = _add_scaled(g, d, c, K)  # the gradient of the state after the step ...
                    d_input = sum_over_lanes(dot(b, g, K), LANES)  # ... and that of delta * x
                    if CONSTANT_B:
                        db_sum = _add_scaled(db_sum, delta * x, g, K)
                    else:
                        dbs = ()
                        for k in tl.static_range(K):
                            dbs = dbs + (tl.sum(g[k] * (delta * x), axis=0, keep_dims=True),)
                        sums = dB + part + far * (G * N) + near * (G * N)
                        _add_sums(sums, dbs, 0, lanes, t0 + i < end, tile > split, N, K)
                    before, of_exponent = (), ()
                    for k in tl.static_range(K):
                        before = before + (tl.exp2(delta * a[k]) * g[k],)
                        of_exponent = of_exponent + (before[k] * hs[i * K + k],)
                    g = before
                    da = _add_scaled(da, delta, of_exponent, K)
                    d_delta = sum_over_lanes(dot(a, of_exponent, K), LANES) * LN2 + d_input * x
                    dx = delta * d_input
                    if HAS_D:
                        dx += skip * d
                        dskip += x * d
                    if SOFTPLUS:
                        d_delta *= sigmoid(load(dt_row + far * dt_1 + near * dt_1, inside, COMPUTE) + bias)
                    if HAS_BIAS:
                        dbias_sum += tl.where(inside, d_delta, 0.0)
                    tl.store(du_row + far * du_1 + near * du_1, dx.to(du.dtype.element_ty), inside)
                    tl.store(ddt_row + far * ddt_1 + near * ddt_1, d_delta.to(ddt.dtype.element_ty), inside)

        here = at_run.to(tl.int64) * size + channel * N
        store_states(dA + here, da, mask, lane, N, K)
        if CONSTANT_B:
            store_states(dB + here, db_sum, mask, lane, N, K)
        if CONSTANT_C:
            store_states(dC + here, dc_sum, mask, lane, N, K)
        here = at_run.to(tl.int64) * (G * E) + channel
        if HAS_D:
            tl.store(dD + here, dskip, mask)
        if HAS_BIAS:
            tl.store(dbias + here, dbias_sum, mask)


@triton.jit
def _add_scaled(x, scale, y, K: tl.constexpr):
    total = ()
    for k in tl.static_range(K):
        total = total + (x[k] + scale * y[k],)
    return total


@triton.jit
def _add_sums(
    pointer, sums, first: tl.constexpr, lanes, inside, add, N: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """Write K of the sums (1, LANES) to `pointer` (1, LANES), or with `add` add them to what is there."""
    for k in tl.static_range(K):
        mask = and_scalar(lanes * K + k < N, inside)
        before = tl.load(pointer + k, and_scalar(mask, add), other=0.0)
        tl.store(pointer + k, before + sums[first + k], mask)


def backward(
    u, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, seq_idx, kept, dy, dfinal, dt_softplus, directions, height
):  # fmt: skip
    """As `selective_scan_triton_backward`: gradients of the tensors up to `initial_states`; empty for None."""
    batch, length, groups, channels = u.shape
    dtypes = [None if x is None else x.dtype for x in (A, B, C, D, dt_bias, initial_states)]
    A, D, dt_bias, dfinal = (contiguous(x) for x in (A, D, dt_bias, dfinal))
    B, C = (contiguous(m) if m.dim() == 2 else with_contiguous_last_dim(m) for m in (B, C))
    u, dt, z, dy, B, C = (with_near_steps(x) for x in (u, dt, z, dy, B, C))
    constants = (u, dt_softplus, A, B, C, D, z, dt_bias, directions)
    options = compile_options(forward_tile(A.shape[1], u.device), *constants)
    compute, device = kept.dtype, u.device
    dim, n = A.shape
    chunks = build_segment_table(batch, length, CHECKPOINT_INTERVAL, cu_seqlens, seq_idx, device)
    n_chunks = len(chunks.entries) if A.numel() else 0
    sizes = (length, height, pack_directions(directions), groups, channels)

    def empty(*size):
        return torch.empty(size, dtype=compute, device=device)

    du, ddt, dz = (torch.empty(0, dtype=u.dtype, device=device) if x is None else empty_like(x) for x in (u, dt, z))
    arrivals, times = empty(n_chunks, dim, n), empty(n_chunks, dim)
    dinitial = empty(*dfinal.shape)
    shared = {k: options[k] for k in options if k not in ("B_WORD", "CONSTANT_B", "HAS_D")}
    tiles = groups * triton.cdiv(channels, options["BLOCK_E"])
    with on_device(u):
        if n_chunks:
            _adjoint_kernel[(n_chunks * tiles,)](
                dt, A, C, z, dt_bias, dy, arrivals, times, chunks.entries, *sizes,
                *dt.stride(), *strides_of(z, 4), *dy.stride(), *strides_of(C, 3), UNROLL=unroll(directions, device), **shared,
                **maxnreg_option(REGISTERS, device),
            )  # fmt: skip
        state_passing(chunks, arrivals, A.flatten(), times, dfinal, dinitial, reverse=True)

    options = compile_options(_backward_tile(n), *constants)
    tiles = triton.cdiv(channels, options["BLOCK_E"])
    programs = PROGRAMS * num_sms(device)
    run = max(1, triton.cdiv(n_chunks * groups, programs))
    runs = triton.cdiv(n_chunks, run)
    splits = max(1, min(tiles, programs // max(1, runs * groups)))
    dA = empty(runs, dim, n)
    dD, dbias = (None if x is None else empty(runs, dim) for x in (D, dt_bias))
    dB, dC = (empty(runs, dim, n) if m.dim() == 2 else empty(splits, *m.shape) for m in (B, C))
    if n_chunks:
        programs = runs * groups * splits
        block, lanes = options["BLOCK_E"], options["LANES"]
        sub = _sub(directions, device)
        scratch = kept.new_empty(
            programs, block * (lanes * options["K"] * (CHECKPOINT_INTERVAL // sub) + 2 * CHECKPOINT_INTERVAL)
        )
        with on_device(u):
            _backward_kernel[(programs,)](
                u, dt, A, B, C, D, z, dt_bias, kept, arrivals, dy, du, ddt, dA, dB, dC, dD, dz, dbias, scratch,
                chunks.entries, batch, *sizes, n_chunks, run, splits, 1, block,
                *u.stride(), *dt.stride(), *strides_of(z, 4), *dy.stride(), *du.stride(), *ddt.stride(),
                *strides_of(None if z is None else dz, 4), *strides_of(B, 3), *strides_of(C, 3),
                CHUNK=CHECKPOINT_INTERVAL, SUB=sub, **options,
            )  # fmt: skip
    sums = [None if x is None else x.sum(0) for x in (dA, dB, dC, dD, dbias)]
    dA, dB, dC, dD, dbias, dinitial = (
        torch.empty(0, dtype=u.dtype, device=device) if dtype is None else x.to(dtype)
        for x, dtype in zip((*sums, dinitial), dtypes, strict=True)
    )
    zero_padding(chunks, *(x for x in (du, ddt, dz, dB, dC) if x.dim() > 2))
    return du, ddt, dA, dB, dC, dD, dz, dbias, dinitial


def _sub(directions, device: torch.device) -> int:
    """Steps of the backward whose states are computed again together; it divides CHECKPOINT_INTERVAL.

    Four would take the compiler five times as long, and on Ampere spill; so would two on consumer Blackwell's directions.
    """
    vendor, version = capability(device)
    return 1 if directions and vendor == "cuda" and version >= 120 else 2


def _backward_tile(n: int) -> dict[str, int]:
    """For the backward: one warp, and at most 8 states of two channels a thread.

    Adding over channels in a thread saves adding over threads; four of them would spill.
    """
    return fill_tile(n, 8) | {"num_warps": 1}
