"""The selective scan without a parallel scan: a thread owns a channel, or a part of its states, and walks time.

The N states of a channel lie in a Triton tuple of K tensors (BLOCK_E, LANES), so that they stay in registers: state
lane * K + k of channel e is element [e, lane] of tensor k. A program works on BLOCK_E channels of one group. Programs
are numbered along one axis, neighbours in number being neighbours in channels, since they read the same B and C.

Decays are powers of two, `exp2(dt A log2(e))`, the exponential that the hardware has. Channels' strides are not
specialised: told that one is 1, the compiler would give each load a layout of its own and convert between them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import capability, maxnreg_option, num_sms, on_device, pack_directions, with_contiguous_last_dim
from ..._triton.primitives import and_scalar, compute_type, grid_offset, load_segment, sigmoid, softplus, zero_padding
from ..._triton.segment_table import build_segment_table
from ..._triton.state_passing import state_passing
from . import CHUNK, empty_like

# Programs of the backward for each processor, of one warp each: twice as many as registers allow at once.
PROGRAMS = 16
# A thread of the other kernels that walk time: 16 warps a processor, more than most calls give it.
REGISTERS = 128
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

_STRIDES = [f"{x}_{i}" for x in ("u", "dt", "z", "y", "dy", "du", "ddt", "dz") for i in range(4)]
_STRIDES += [f"{x}_{i}" for x in "BC" for i in range(3)] + ["scratch_0", "scratch_1"]


def _jit(kernel):
    """Compile a kernel whose strides are not specialised."""
    return triton.jit(kernel, do_not_specialize=[s for s in _STRIDES if s in kernel.__code__.co_varnames])


@_jit
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
    segment, group, e, lane = _place_program(G, E, BLOCK_E, LANES)
    lanes = tl.arange(0, LANES)[None, :]
    mask = e < E
    channel = group * E + e
    row, start, end, sequence = load_segment(table, segment)
    is_last = (sequence >= 0) & (segment + 1 == tl.load(first + tl.maximum(sequence, 0) + 1))
    if ENDS_ONLY:
        end = tl.where(is_last, start, end)
    way = (codes >> (2 * group) & 3, length, height) if ROUTED else None

    a = _load_states(A + channel * N, mask, lane, N, K, LOG2E, COMPUTE)
    if CONSTANT_B:
        b = _load_states(B + channel * N, mask, lane, N, K, 1.0, COMPUTE)
    if CONSTANT_C:
        c = _load_states(C + channel * N, mask, lane, N, K, 1.0, COMPUTE)
    bias = tl.load(dt_bias + channel, mask, other=0.0).to(COMPUTE) if HAS_BIAS else 0.0
    if HAS_D:
        skip = tl.load(D + channel, mask, other=0.0).to(COMPUTE)
    state = channel * N  # in one row of states
    size = tl.cast(G, tl.int64) * E * N
    if HAS_STARTS:
        h = _load_states(starts + segment * size + state, mask, lane, N, K, 1.0, COMPUTE)
    elif HAS_INITIAL:
        initial = tl.where(sequence >= 0, tl.load(initial_row + tl.maximum(sequence, 0)), -1).to(tl.int64)
        h = _load_states(
            initial_states + initial * size + state, and_scalar(mask, initial >= 0), lane, N, K, 1.0, COMPUTE
        )
    else:
        h = _zeros(BLOCK_E, LANES, K, COMPUTE)
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
                _store_states(kept, h, mask, lane, N, K)
                kept += size
        ys = ()
        far = tl.cast(t0, tl.int64) if way is None else 0
        for i in tl.static_range(UNROLL):
            inside = and_scalar(mask, t0 + i < end)
            near = _near(t0, i, end, way)
            delta = _load_delta(dt + far * dt_1 + near * dt_1, inside, bias, SOFTPLUS, COMPUTE)
            x = _load(u + far * u_1 + near * u_1, inside, COMPUTE)
            if not CONSTANT_B:
                b_row = B + far * B_1 + near * B_1
                b = _load_matrix(b_row, lanes, t0 + i < end, N, K, B_WORD, COMPUTE)
            h = _advance(h, a, b, delta, delta * x, K)
            if ENDS_ONLY:
                total += delta
            else:
                if not CONSTANT_C:
                    c_row = C + far * C_1 + near * C_1
                    c = _load_matrix(c_row, lanes, t0 + i < end, N, K, C_WORD, COMPUTE)
                out = _over_lanes(_dot(c, h, K), LANES)
                if HAS_D:
                    out += skip * x
                if HAS_Z:
                    gate = _load(z + far * z_1 + near * z_1, inside, COMPUTE)
                    out *= gate * sigmoid(gate)
                ys = ys + (out,)
        if not ENDS_ONLY:
            for i in tl.static_range(UNROLL):
                y_at = y + far * y_1 + _near(t0, i, end, way) * y_1
                tl.store(y_at, ys[i].to(y.dtype.element_ty), and_scalar(mask, t0 + i < end))

    if ENDS_ONLY:
        _store_states(starts + segment * size + state, h, mask, lane, N, K)
        tl.store(times + segment * (G * E) + channel, total, mask)
    else:
        final = tl.where(is_last, tl.load(final_row + tl.maximum(sequence, 0)), -1).to(tl.int64)
        _store_states(final_states + final * size + state, h, and_scalar(mask, final >= 0), lane, N, K)


@_jit
def _adjoint_kernel(
    dt, A, C, z, dt_bias, dy, arrivals, times, table, length, height, codes, G, E,
    dt_0, dt_1, dt_2, dt_3, z_0, z_1, z_2, z_3, dy_0, dy_1, dy_2, dy_3, C_0, C_1, C_2,
    N: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, BLOCK_E: tl.constexpr, C_WORD: tl.constexpr,
    CONSTANT_C: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    ROUTED: tl.constexpr, UNROLL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """What one chunk adds to the gradient of the state before it, and the sum of its steps. Grid as the forward's."""
    chunk, group, e, lane = _place_program(G, E, BLOCK_E, LANES)
    lanes = tl.arange(0, LANES)[None, :]
    mask = e < E
    channel = group * E + e
    row, start, end, _ = load_segment(table, chunk)
    way = (codes >> (2 * group) & 3, length, height) if ROUTED else None
    a = _load_states(A + channel * N, mask, lane, N, K, LOG2E, COMPUTE)
    if CONSTANT_C:
        c = _load_states(C + channel * N, mask, lane, N, K, 1.0, COMPUTE)
    else:
        C += row * C_0 + group * C_2 + lanes * K
    bias = tl.load(dt_bias + channel, mask, other=0.0).to(COMPUTE) if HAS_BIAS else 0.0
    dt += row * dt_0 + group * dt_2 + e * dt_3
    dy += row * dy_0 + group * dy_2 + e * dy_3
    if HAS_Z:
        z += row * z_0 + group * z_2 + e * z_3

    g = _zeros(BLOCK_E, LANES, K, COMPUTE)
    total = tl.zeros((BLOCK_E, LANES), COMPUTE)
    blocks = tl.cdiv(end - start, UNROLL)
    for block in range(blocks):
        t0 = start + (blocks - 1 - block) * UNROLL
        far = tl.cast(t0, tl.int64) if way is None else 0
        for i in tl.static_range(UNROLL - 1, -1, -1):
            inside = and_scalar(mask, t0 + i < end)
            near = _near(t0, i, end, way)
            delta = _load_delta(dt + far * dt_1 + near * dt_1, inside, bias, SOFTPLUS, COMPUTE)
            d = _load(dy + far * dy_1 + near * dy_1, inside, COMPUTE)
            if HAS_Z:
                gate = _load(z + far * z_1 + near * z_1, inside, COMPUTE)
                d *= gate * sigmoid(gate)
            if not CONSTANT_C:
                c_row = C + far * C_1 + near * C_1
                c = _load_matrix(c_row, lanes, t0 + i < end, N, K, C_WORD, COMPUTE)
            g_next = ()
            for k in tl.static_range(K):
                g_next = g_next + (tl.exp2(delta * a[k]) * (g[k] + d * c[k]),)
            g = g_next
            total += delta
    size = tl.cast(G, tl.int64) * E * N
    _store_states(arrivals + chunk * size + channel * N, g, mask, lane, N, K)
    tl.store(times + chunk * (G * E) + channel, total, mask)


@_jit
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
        a = _load_states(A + channel * N, mask, lane, N, K, LOG2E, COMPUTE)
        da = _zeros(BLOCK_E, LANES, K, COMPUTE)
        if CONSTANT_B:
            b = _load_states(B + channel * N, mask, lane, N, K, 1.0, COMPUTE)
            db_sum = _zeros(BLOCK_E, LANES, K, COMPUTE)
        if CONSTANT_C:
            c = _load_states(C + channel * N, mask, lane, N, K, 1.0, COMPUTE)
            dc_sum = _zeros(BLOCK_E, LANES, K, COMPUTE)
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
            h = _load_states(kept + here, mask, lane, N, K, 1.0, COMPUTE)
            for t0 in range(start, end, SUB):
                slot = (t0 - start) // SUB
                for k in tl.static_range(K):
                    tl.store(states + (slot * K + k) * tile_size, h[k])
                step_sizes, ds, dcs, dgates = (), (), (), ()
                far = tl.cast(t0, tl.int64) if way is None else 0
                for i in tl.static_range(SUB):
                    inside = and_scalar(mask, t0 + i < end)
                    near = _near(t0, i, end, way)
                    delta = _load_delta(dt_row + far * dt_1 + near * dt_1, inside, bias, SOFTPLUS, COMPUTE)
                    x = _load(u_row + far * u_1 + near * u_1, inside, COMPUTE)
                    dout = _load(dy_row + far * dy_1 + near * dy_1, inside, COMPUTE)
                    if not CONSTANT_B:
                        b = _load_matrix(B_row + far * B_1 + near * B_1, lanes, t0 + i < end, N, K, B_WORD, COMPUTE)
                    h = _advance(h, a, b, delta, delta * x, K)
                    d = dout
                    if HAS_Z:
                        if not CONSTANT_C:
                            c = _load_matrix(C_row + far * C_1 + near * C_1, lanes, t0 + i < end, N, K, C_WORD, COMPUTE)
                        gate = _load(z_row + far * z_1 + near * z_1, inside, COMPUTE)
                        out = _over_lanes(_dot(c, h, K), LANES)
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
                    near = _near(t0, i, end, way)
                    tl.store(deltas + (slot * SUB + i) * BLOCK_E, step_sizes[i])
                    tl.store(deltas + (slot * SUB + i + CHUNK) * BLOCK_E, ds[i])
                    if HAS_Z:
                        dz_at = dz_row + far * dz_1 + near * dz_1
                        tl.store(dz_at, dgates[i].to(dz.dtype.element_ty), and_scalar(mask, t0 + i < end))
                    if not CONSTANT_C:
                        sums = dC + part + far * (G * N) + near * (G * N)
                        _add_sums(sums, dcs, i * K, lanes, t0 + i < end, tile > split, N, K)
            tl.debug_barrier()

            g = _load_states(arrivals + here, mask, lane, N, K, 1.0, COMPUTE)
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
                    near = _near(t0, i, end, way)
                    delta = tl.load(deltas + (slot * SUB + i) * BLOCK_E)
                    x = _load(u_row + far * u_1 + near * u_1, and_scalar(mask, t0 + i < end), COMPUTE)
                    if not CONSTANT_B:
                        b = _load_matrix(B_row + far * B_1 + near * B_1, lanes, t0 + i < end, N, K, B_WORD, COMPUTE)
                    h = _advance(h, a, b, delta, delta * x, K)
                    hs = hs + h
                for i in tl.static_range(SUB - 1, -1, -1):
                    inside = and_scalar(mask, t0 + i < end)
                    near = _near(t0, i, end, way)
                    delta = tl.load(deltas + (slot * SUB + i) * BLOCK_E)
                    d = tl.load(deltas + (slot * SUB + i + CHUNK) * BLOCK_E)
                    x = _load(u_row + far * u_1 + near * u_1, inside, COMPUTE)
                    if not CONSTANT_B:
                        b = _load_matrix(B_row + far * B_1 + near * B_1, lanes, t0 + i < end, N, K, B_WORD, COMPUTE)
                    if not CONSTANT_C:
                        c = _load_matrix(C_row + far * C_1 + near * C_1, lanes, t0 + i < end, N, K, C_WORD, COMPUTE)
                    g = _add_scaled(g, d, c, K)  # the gradient of the state after the step ...
                    d_input = _over_lanes(_dot(b, g, K), LANES)  # ... and that of delta * x
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
                    d_delta = _over_lanes(_dot(a, of_exponent, K), LANES) * LN2 + d_input * x
                    dx = delta * d_input
                    if HAS_D:
                        dx += skip * d
                        dskip += x * d
                    if SOFTPLUS:
                        d_delta *= sigmoid(_load(dt_row + far * dt_1 + near * dt_1, inside, COMPUTE) + bias)
                    if HAS_BIAS:
                        dbias_sum += tl.where(inside, d_delta, 0.0)
                    tl.store(du_row + far * du_1 + near * du_1, dx.to(du.dtype.element_ty), inside)
                    tl.store(ddt_row + far * ddt_1 + near * ddt_1, d_delta.to(ddt.dtype.element_ty), inside)

        here = at_run.to(tl.int64) * size + channel * N
        _store_states(dA + here, da, mask, lane, N, K)
        if CONSTANT_B:
            _store_states(dB + here, db_sum, mask, lane, N, K)
        if CONSTANT_C:
            _store_states(dC + here, dc_sum, mask, lane, N, K)
        here = at_run.to(tl.int64) * (G * E) + channel
        if HAS_D:
            tl.store(dD + here, dskip, mask)
        if HAS_BIAS:
            tl.store(dbias + here, dbias_sum, mask)


@triton.jit
def _step_kernel(
    state, u, dt, A, B, C, D, z, dt_bias, y, dim, b_channels, c_channels,
    state_0, state_1, state_2, u_0, u_1, dt_0, dt_1, z_0, z_1, B_0, B_1, C_0, C_1,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One step of BLOCK_E channels of one batch row, their states (BLOCK_E, BLOCK_N) included. Grid: B * tiles.

    Channel d reads row d // b_channels of B, and d // c_channels of C.
    """
    tiles = tl.cdiv(dim, BLOCK_E)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    d = (tl.program_id(0) % tiles * BLOCK_E + tl.arange(0, BLOCK_E)[:, None]).to(tl.int64)
    n = tl.arange(0, BLOCK_N)[None, :]
    mask = d < dim
    inside = mask & (n < N)
    delta = _load(dt + row * dt_0 + d * dt_1, mask, COMPUTE)
    if HAS_BIAS:
        delta += _load(dt_bias + d, mask, COMPUTE)
    if SOFTPLUS:
        delta = softplus(delta)
    x = _load(u + row * u_0 + d * u_1, mask, COMPUTE)
    a = _load(A + d * N + n, inside, COMPUTE)
    b = _load(B + row * B_0 + d // b_channels * B_1 + n, inside, COMPUTE)
    c = _load(C + row * C_0 + d // c_channels * C_1 + n, inside, COMPUTE)
    here = state + row * state_0 + d * state_1 + n * state_2
    h = tl.exp2(delta * (a * LOG2E)) * tl.load(here, inside, other=0.0) + delta * x * b
    tl.store(here, h, inside)
    out = tl.sum(c * h, axis=1, keep_dims=True)  # (BLOCK_E, 1)
    if HAS_D:
        out += _load(D + d, mask, COMPUTE) * x
    if HAS_Z:
        gate = _load(z + row * z_0 + d * z_1, mask, COMPUTE)
        out *= gate * sigmoid(gate)
    tl.store(y + row * dim + d, out.to(y.dtype.element_ty), mask)


@triton.jit
def _place_program(G, E, BLOCK_E: tl.constexpr, LANES: tl.constexpr):
    """Piece and group of this program, (BLOCK_E, LANES) channels in the group, and lanes. All int64."""
    tiles = tl.cdiv(E, BLOCK_E)
    program = tl.program_id(0)
    e = program % tiles * BLOCK_E + tl.arange(0, BLOCK_E)[:, None] + tl.zeros((1, LANES), tl.int32)
    lane = tl.arange(0, LANES)[None, :] + tl.zeros((BLOCK_E, 1), tl.int32)
    unit = (program // tiles).to(tl.int64)
    return unit // G, unit % G, e.to(tl.int64), lane


@triton.jit
def _near(t0, i: tl.constexpr, end, way):
    """Where step t0 + i lies, or the last step if that is before; `way`: None, or a direction, the grid's size and height.

    Counted from t0 where there is no direction: a small number, so that a block of steps needs one 64-bit product, `far`.
    """
    if way is None:
        near = tl.minimum(i, end - 1 - t0)
    else:
        near = grid_offset(tl.minimum(t0 + i, end - 1), way[0], way[1], way[2]).to(tl.int64)
    return near


@triton.jit
def _zeros(BLOCK_E: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr, COMPUTE: tl.constexpr):
    values = ()
    for _ in tl.static_range(K):
        values = values + (tl.zeros((BLOCK_E, LANES), COMPUTE),)
    return values


@triton.jit
def _load_states(pointer, mask, lane, N: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr, COMPUTE: tl.constexpr):
    """The states of a channel, times SCALE, as a tuple; zero for those beyond N. pointer (BLOCK_E, LANES)."""
    values = ()
    for k in tl.static_range(K):
        n = lane * K + k
        values = values + (tl.load(pointer + n, mask & (n < N), other=0.0).to(COMPUTE) * SCALE,)
    return values


@triton.jit
def _store_states(pointer, values, mask, lane, N: tl.constexpr, K: tl.constexpr):
    for k in tl.static_range(K):
        n = lane * K + k
        tl.store(pointer + n, values[k].to(pointer.dtype.element_ty), mask & (n < N))


@triton.jit
def _load_matrix(
    pointer, lanes, inside, N: tl.constexpr, K: tl.constexpr, WORD: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """K values (1, LANES) of a row of B or C for all channels, the first at `pointer`; WORD values a load.

    Zero where the step is not `inside`: an infinity of the row that stands for it would meet a step size of zero.
    """
    values = ()
    if WORD == 1:
        for k in tl.static_range(K):
            values = values + (tl.load(pointer + k, and_scalar(lanes * K + k < N, inside), other=0.0).to(COMPUTE),)
    else:
        words = pointer.to(tl.pointer_type(tl.int64), bitcast=True)
        for i in tl.static_range(K // WORD):
            word = tl.load(words + i, and_scalar(lanes >= 0, inside), other=0)
            for j in tl.static_range(WORD):
                values = values + (_unpack(word, j, WORD, pointer.dtype.element_ty).to(COMPUTE),)
    return values


@triton.jit
def _unpack(word, j: tl.constexpr, WORD: tl.constexpr, dtype: tl.constexpr):
    """Value j of the WORD values in a 64-bit word."""
    half = (word >> (64 // WORD * j // 32 * 32)).to(tl.int32)
    if WORD == 2:
        value = half.to(dtype, bitcast=True)
    elif dtype == tl.float16:
        value = (half >> (16 * (j % 2))).to(tl.int16).to(tl.float16, bitcast=True)
    else:  # bfloat16 is the upper half of float32
        value = (half & -65536 if j % 2 else half << 16).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _load(pointer, mask, COMPUTE: tl.constexpr):
    return tl.load(pointer, mask, other=0.0).to(COMPUTE)


@triton.jit
def _load_delta(pointer, mask, bias, SOFTPLUS: tl.constexpr, COMPUTE: tl.constexpr):
    """The step size; zero, which leaves the state as it is, outside of the mask."""
    delta = _load(pointer, mask, COMPUTE) + bias
    if SOFTPLUS:
        delta = softplus(delta)
    return tl.where(mask, delta, 0.0)


@triton.jit
def _advance(h, a, b, delta, dx, K: tl.constexpr):
    """The states after a step."""
    after = ()
    for k in tl.static_range(K):
        after = after + (tl.exp2(delta * a[k]) * h[k] + dx * b[k],)
    return after


@triton.jit
def _dot(x, y, K: tl.constexpr):
    total = x[0] * y[0]
    for k in tl.static_range(1, K):
        total += x[k] * y[k]
    return total


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


@triton.jit
def _over_lanes(x, LANES: tl.constexpr):
    """(BLOCK_E, LANES) -> sums over the lanes (BLOCK_E, 1)."""
    if LANES == 1:
        return x
    else:
        return tl.sum(x, axis=1, keep_dims=True)


def forward(
    u, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, seq_idx, dt_softplus, directions, height, keep
):  # fmt: skip
    """As `selective_scan_triton`: y, the final states, and the state at the start of each chunk, if kept."""
    batch, length, groups, _ = u.shape
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    compute = torch.promote_types(u.dtype, torch.float32)
    packed = cu_seqlens is not None or seq_idx is not None
    A, D, dt_bias, initial_states = (_contiguous(x) for x in (A, D, dt_bias, initial_states))
    B, C = (_contiguous(m) if m.dim() == 2 else with_contiguous_last_dim(m) for m in (B, C))
    u, dt, z, B, C = (_close(x) for x in (u, dt, z, B, C))
    options = _options(_tile(A.shape[1], u.device), u, dt_softplus, A, B, C, D, z, dt_bias, directions)
    tiles = groups * triton.cdiv(u.shape[3], options["BLOCK_E"])

    y = empty_like(u)
    final_states = torch.empty((rows, *A.shape), dtype=compute, device=u.device)
    segments = build_segment_table(
        batch, length, _segment_size(batch, length, tiles, u.device), cu_seqlens, seq_idx, u.device
    )
    chunks = build_segment_table(batch, length, CHUNK, cu_seqlens, seq_idx, u.device) if keep else segments
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
            *u.stride(), *dt.stride(), *_strides(z, 4), *y.stride(), *_strides(B, 3), *_strides(C, 3),
            HAS_STARTS=starts is not None and not ends_only, HAS_INITIAL=initial_states is not None and not ends_only,
            KEEP=keep, ENDS_ONLY=ends_only, CHUNK=CHUNK, UNROLL=_unroll(directions, u.device), **options,
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


def backward(
    u, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, seq_idx, kept, dy, dfinal, dt_softplus, directions, height
):  # fmt: skip
    """As `selective_scan_triton_backward`: gradients of the tensors up to `initial_states`; empty for None."""
    batch, length, groups, channels = u.shape
    dtypes = [None if x is None else x.dtype for x in (A, B, C, D, dt_bias, initial_states)]
    A, D, dt_bias, dfinal = (_contiguous(x) for x in (A, D, dt_bias, dfinal))
    B, C = (_contiguous(m) if m.dim() == 2 else with_contiguous_last_dim(m) for m in (B, C))
    u, dt, z, dy, B, C = (_close(x) for x in (u, dt, z, dy, B, C))
    constants = (u, dt_softplus, A, B, C, D, z, dt_bias, directions)
    options = _options(_tile(A.shape[1], u.device), *constants)
    compute, device = kept.dtype, u.device
    dim, n = A.shape
    chunks = build_segment_table(batch, length, CHUNK, cu_seqlens, seq_idx, device)
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
                *dt.stride(), *_strides(z, 4), *dy.stride(), *_strides(C, 3), UNROLL=_unroll(directions, device), **shared,
                **maxnreg_option(REGISTERS, device),
            )  # fmt: skip
        state_passing(chunks, arrivals, A.flatten(), times, dfinal, dinitial, reverse=True)

    options = _options(_backward_tile(n), *constants)
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
        scratch = kept.new_empty(programs, block * (lanes * options["K"] * (CHUNK // sub) + 2 * CHUNK))
        with on_device(u):
            _backward_kernel[(programs,)](
                u, dt, A, B, C, D, z, dt_bias, kept, arrivals, dy, du, ddt, dA, dB, dC, dD, dz, dbias, scratch,
                chunks.entries, batch, *sizes, n_chunks, run, splits, 1, block,
                *u.stride(), *dt.stride(), *_strides(z, 4), *dy.stride(), *du.stride(), *ddt.stride(),
                *_strides(None if z is None else dz, 4), *_strides(B, 3), *_strides(C, 3),
                CHUNK=CHUNK, SUB=sub, **options,
            )  # fmt: skip
    sums = [None if x is None else x.sum(0) for x in (dA, dB, dC, dD, dbias)]
    dA, dB, dC, dD, dbias, dinitial = (
        torch.empty(0, dtype=u.dtype, device=device) if dtype is None else x.to(dtype)
        for x, dtype in zip((*sums, dinitial), dtypes, strict=True)
    )
    zero_padding(chunks, *(x for x in (du, ddt, dz, dB, dC) if x.dim() > 2))
    return du, ddt, dA, dB, dC, dD, dz, dbias, dinitial


def step(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus):
    """As `selective_scan_triton_step`: y of one step, having advanced the state."""
    batch, dim = u.shape
    n = A.shape[1]
    A, D, dt_bias = (_contiguous(x) for x in (A, D, dt_bias))
    B, C = with_contiguous_last_dim(B), with_contiguous_last_dim(C)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    block_n = triton.next_power_of_2(n)
    block_e = max(1, 512 // block_n)  # four elements a thread, one load of 16 bytes of the state
    rows = (
        (0, m.stride(0), 1) if m.dim() == 2 else (m.stride(0), m.stride(1), dim // m.shape[1]) for m in (B, C)
    )  # of batch, of group, and channels in a group
    (b_batch, b_group, b_channels), (c_batch, c_group, c_channels) = rows
    if y.numel():
        with on_device(u):
            _step_kernel[(batch * triton.cdiv(dim, block_e),)](
                state, u, dt, A, B, C, D, z, dt_bias, y, dim, b_channels, c_channels,
                *state.stride(), *u.stride(), *dt.stride(), *((0, 0) if z is None else z.stride()),
                b_batch, b_group, c_batch, c_group,
                N=n, BLOCK_N=block_n, BLOCK_E=block_e, HAS_D=D is not None, HAS_Z=z is not None,
                HAS_BIAS=dt_bias is not None, SOFTPLUS=dt_softplus, COMPUTE=compute_type(state.dtype), num_warps=4,
            )  # fmt: skip
    return y


def _segment_size(batch: int, length: int, tiles: int, device: torch.device) -> int:
    """Whole sequences where they give every processor two programs; else for four, at up to twice the work."""
    whole = triton.cdiv(max(length, 1), CHUNK) * CHUNK
    programs = batch * tiles
    if programs == 0 or programs >= 2 * num_sms(device):
        return whole
    parts = triton.cdiv(4 * num_sms(device), programs)
    return triton.cdiv(triton.cdiv(whole, parts), CHUNK) * CHUNK


def _options(tile, u, dt_softplus, A, B, C, D, z, dt_bias, directions) -> dict[str, object]:
    """What the kernels that walk time are compiled for."""
    return tile | {
        "N": A.shape[1],
        "B_WORD": _word(B, tile),
        "C_WORD": _word(C, tile),
        "CONSTANT_B": B.dim() == 2,
        "CONSTANT_C": C.dim() == 2,
        "HAS_D": D is not None,
        "HAS_Z": z is not None,
        "HAS_BIAS": dt_bias is not None,
        "SOFTPLUS": dt_softplus,
        "ROUTED": bool(directions),
        "COMPUTE": compute_type(u.dtype),
    }


def _unroll(directions, device: torch.device) -> int:
    """Steps that are computed together, so that loads need not wait for stores; it divides CHUNK.

    Fewer on a direction, where each step's place takes registers, and where NVIDIA's compiler would spill: before Hopper,
    and on consumer Blackwell.
    """
    vendor, version = capability(device)
    return 1 if directions else 2 if vendor == "cuda" and not 90 <= version < 120 else 4


def _sub(directions, device: torch.device) -> int:
    """Steps of the backward whose states are computed again together; it divides CHUNK.

    Four would take the compiler five times as long, and on Ampere spill; so would two on consumer Blackwell's directions.
    """
    vendor, version = capability(device)
    return 1 if directions and vendor == "cuda" and version >= 120 else 2


def _tile(n: int, device: torch.device) -> dict[str, int]:
    """For the forward: 64 threads, of at most 16 states each."""
    return _fill(n, 16) | {"num_warps": 1 if capability(device)[0] == "hip" else 2}


def _backward_tile(n: int) -> dict[str, int]:
    """For the backward: one warp, and at most 8 states of two channels a thread.

    Adding over channels in a thread saves adding over threads; four of them would spill.
    """
    return _fill(n, 8) | {"num_warps": 1}


def _fill(n: int, states: int) -> dict[str, int]:
    """A tile of 64 elements of `states` states."""
    lanes = triton.next_power_of_2(triton.cdiv(n, states))
    return {"LANES": lanes, "K": triton.cdiv(n, lanes), "BLOCK_E": max(1, 64 // lanes)}


def _word(matrix: Tensor, tile: dict[str, int]) -> int:
    """How many values of B or C one load of 64 bits takes: one by one unless all loads lie at multiples of it."""
    size = matrix.element_size()
    per_word = 8 // size
    is_whole = tile["K"] % per_word == 0 and tile["K"] * tile["LANES"] == matrix.shape[-1]
    is_aligned = matrix.data_ptr() % 8 == 0 and all(s * size % 8 == 0 for s in matrix.stride()[:-1])
    return per_word if matrix.dim() == 4 and is_whole and is_aligned else 1


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _close(x: Tensor | None) -> Tensor | None:
    """The tensor itself unless its steps are so far apart that offsets within a block of them pass 32 bits."""
    return x.contiguous() if x is not None and x.dim() == 4 and x.stride(1) >= 1 << 28 else x


def _strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    """The first strides of a tensor; zeros where it is None or constant in time."""
    return (0,) * count if x is None or x.dim() == 2 else x.stride()[:count]
