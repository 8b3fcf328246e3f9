"""The kernel of one step, for decoding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._triton.device import on_device, with_contiguous_last_dim
from ..._triton.primitives import compute_type, sigmoid, softplus
from .tile import LOG2E, contiguous, load


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
    delta = load(dt + row * dt_0 + d * dt_1, mask, COMPUTE)
    if HAS_BIAS:
        delta += load(dt_bias + d, mask, COMPUTE)
    if SOFTPLUS:
        delta = softplus(delta)
    x = load(u + row * u_0 + d * u_1, mask, COMPUTE)
    a = load(A + d * N + n, inside, COMPUTE)
    b = load(B + row * B_0 + d // b_channels * B_1 + n, inside, COMPUTE)
    c = load(C + row * C_0 + d // c_channels * C_1 + n, inside, COMPUTE)
    here = state + row * state_0 + d * state_1 + n * state_2
    h = tl.exp2(delta * (a * LOG2E)) * tl.load(here, inside, other=0.0) + delta * x * b
    tl.store(here, h, inside)
    out = tl.sum(c * h, axis=1, keep_dims=True)  # (BLOCK_E, 1)
    if HAS_D:
        out += load(D + d, mask, COMPUTE) * x
    if HAS_Z:
        gate = load(z + row * z_0 + d * z_1, mask, COMPUTE)
        out *= gate * sigmoid(gate)
    tl.store(y + row * dim + d, out.to(y.dtype.element_ty), mask)


def step(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus):
    """As `selective_scan_triton_step`: y of one step, having advanced the state."""
    batch, dim = u.shape
    n = A.shape[1]
    A, D, dt_bias = (contiguous(x) for x in (A, D, dt_bias))
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
