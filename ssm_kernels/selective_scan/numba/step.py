"""Steps of the compiled selective scan, for decoding."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..._core.state_format import compute_dtype
from ..._numba.compile import Kernel
from ..._numba.functions import LOG2_E, exp2, sigmoid
from ..._numba.lanes import (
    aligned_empty,
    clear,
    element,
    fma,
    lane_count,
    load,
    locate_tile,
    read_lanes,
    read_rows,
    set_element,
    splat,
    store,
    total,
    write_lanes,
    write_rows,
)
from ..._numba.launch import BLOCK, as_array, as_dtype, count_tiles, memory_of, plan_arrays
from ..._numba.state_format import keep_state, open_state, random_scratch, state_rows
from ..._numba.threads import run_tiles
from .tiles import prepare_steps


def step(
    state, u, dt, A, B, C, D, z, dt_bias, dt_softplus, sources, destinations, bounds, state_scale, seeds
) -> Tensor:  # fmt: skip
    """Return y (M, D) in the dtype of u. `state` (B, D, N), or a pool of slots, is updated in place.

    u, dt and z are (M, D); B and C (M, G, N) or (D, N).
    """
    (tokens, dim), compute = u.shape, compute_dtype(state)
    # Zero where no sequence has the token
    y = (u.new_empty if sources is None else u.new_zeros)(tokens, dim, dtype=compute)
    plan = plan_arrays(sources, destinations, bounds, tokens, 1)
    inputs = [memory_of(state), as_array(state_scale, torch.float32, 2)]
    inputs += [as_array(x, compute, 3) for x in (u, dt, A)]
    # (M, G, N), or a group for each channel that all tokens share
    inputs += [as_array(m.expand(tokens, *m.shape) if m.dim() == 2 else m, compute, 3) for m in (B, C)]
    inputs += [as_array(x, compute, 3) for x in (D, z, dt_bias)]
    args = (*inputs, as_array(y, compute, 3), *plan, as_array(seeds, torch.int64, 1), dt_softplus)
    n_tiles = (tokens if sources is None else len(sources)) * count_tiles(dim, 1)
    run_tiles(lambda first, end: step_tiles(*args, first, end), n_tiles, tokens * dim * A.shape[1])
    return as_dtype(y, u.dtype)


@Kernel
def step_tiles(
    state, scale, u, dt, A, B, C, D, z, dt_bias, y, sources, destinations, bounds, seeds, dt_softplus, first, end
):  # fmt: skip
    """Advance the states of the tiles from `first` to `end` - 1: a sequence and BLOCK channels each.

    state (slots, D, N); scale (slots, D); u, dt, z, y (1, M, D); A (1, D, N); B, C (M, G, N); D, dt_bias (1, 1, D);
    sources (S,); destinations, seeds (M,); bounds (S + 1,). Lanes hold states.
    """
    zero, one = np.int64(0), np.int64(1)  # numba compiles a function again for each literal
    dim, n = A.shape[1:]
    row_size = one * BLOCK
    u_tile, dt_tile, input_tile = aligned_empty(u, row_size), aligned_empty(u, row_size), aligned_empty(u, row_size)
    y_tile, z_tile, bias = aligned_empty(u, row_size), aligned_empty(u, row_size), aligned_empty(u, row_size)
    scratch = aligned_empty(u, one * lane_count(u))
    clear(bias, zero, row_size)
    kept = aligned_empty(u, row_size * n).reshape(one, row_size, n)  # a state that no slot takes, or in another format
    values, bits = aligned_empty(u, n + lane_count(u)), random_scratch(n)

    for tile in range(first, end):
        row, _, channel, width = locate_tile(tile, dim, one)
        if sources[row] < 0:
            continue
        if dt_bias.size:
            read_rows(dt_bias, zero, zero, one, channel, width, bias)
        slot, last = sources[row], channel + width
        before = open_state(state[slot : slot + 1, channel:last], scale[slot : slot + 1, channel:last], kept)
        for token in range(bounds[row], bounds[row + 1]):
            slot = destinations[token]
            after = state_rows(state[slot : slot + 1, channel:last], kept) if slot >= 0 else kept  # (1, width, N)
            read_rows(u, zero, token, one, channel, width, u_tile)
            read_rows(dt, zero, token, one, channel, width, dt_tile)
            prepare_steps(one, width, bias, dt_softplus, u_tile, dt_tile, input_tile)
            for i in range(width):
                B_group, C_group = (channel + i) // (dim // B.shape[1]), (channel + i) // (dim // C.shape[1])
                step_size, dt_u = element(dt_tile, i) * LOG2_E, element(input_tile, i)
                result = splat(u, 0.0)
                for j in range(0, n, lane_count(u)):
                    a, b = read_lanes(A, zero, channel + i, j, scratch), read_lanes(B, token, B_group, j, scratch)
                    h, c = read_lanes(before, zero, i, j, scratch), read_lanes(C, token, C_group, j, scratch)
                    # h = exp(dt A) h + dt B u, y = C h (equation 2)
                    h = fma(exp2(a * step_size), h, b * dt_u)
                    result = fma(c, h, result)
                    write_lanes(h, after, zero, i, j, scratch)
                set_element(y_tile, i, total(result))
            if D.size:
                # `dt_tile` is free: it holds D from here on.
                read_rows(D, zero, zero, one, channel, width, dt_tile)
                for i in range(0, width, lane_count(u)):
                    store(y_tile, i, fma(load(dt_tile, i), load(u_tile, i), load(y_tile, i)))
            if z.size:
                read_rows(z, zero, token, one, channel, width, z_tile)
                for i in range(0, width, lane_count(u)):
                    gate = load(z_tile, i)
                    store(y_tile, i, load(y_tile, i) * (gate * sigmoid(gate)))
            write_rows(y_tile, y, zero, token, one, channel, width)
            if slot >= 0:
                seed = seeds[token] if seeds.size else 0
                stored, scales = state[slot : slot + 1, channel:last], scale[slot : slot + 1, channel:last]
                keep_state(after, stored, scales, seed, seeds.size > 0, channel, values, bits)
            before = after
