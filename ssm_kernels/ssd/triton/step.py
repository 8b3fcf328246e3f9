"""Decoding step of SSD in Triton: the recurrence itself, a token at a time."""

# The stubs know neither launches nor what jit functions return.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import FUSED_MULTIPLY_ADD, on_device, with_contiguous_last_dim
from ..._triton.primitives import compute_type, silu
from .chunk import dt_constants, load_dt

STATE_ELEMENTS = 2048
"""Elements of a program's tile of the state."""


def step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> Tensor:
    """Compute y (B, T, H, P) and update `state` (B, H, P, N). Body of `ssd_triton_step`."""
    batch, tokens, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    x, B, C = (with_contiguous_last_dim(t) for t in (x, B, C))
    z = None if z is None else with_contiguous_last_dim(z)
    D = None if D is None else D.expand(heads, headdim)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_n = triton.next_power_of_2(d_state)
    block_p = max(1, min(triton.next_power_of_2(headdim), STATE_ELEMENTS // block_n))
    num_programs = batch * heads * triton.cdiv(headdim, block_p)
    if not num_programs or not tokens:
        return y
    with on_device(x):
        _step_kernel[(num_programs,)](
            state, x, dt, A.contiguous(), B, C, D, z, None if dt_bias is None else dt_bias.contiguous(), y,
            state.stride(), x.stride(), dt.stride(), B.stride(), C.stride(), None if D is None else D.stride(),
            None if z is None else z.stride(), tokens,
            H=heads, P=headdim, N=d_state, G=groups, BLOCK_P=block_p, BLOCK_N=block_n, HAS_D=D is not None,
            HAS_Z=z is not None, **dt_constants(dt_bias, dt_softplus, dt_min, dt_max),
            COMPUTE=compute_type(state.dtype), num_warps=4,
            **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    return y


@triton.jit
def _step_kernel(
    state_ptr,  # (B, H, P, N), updated
    x_ptr,  # (B, T, H, P)
    dt_ptr,  # (B, T, H)
    A_ptr,  # (H,)
    B_ptr, C_ptr,  # (B, T, G, N)
    D_ptr,  # (H, P)
    z_ptr,  # (B, T, H, P)
    dt_bias_ptr,  # (H,)
    y_ptr,  # (B, T, H, P), written
    state_strides, x_strides, dt_strides, B_strides, C_strides, D_strides, z_strides, tokens,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_DT_BIAS: tl.constexpr, HAS_DT_LIMIT: tl.constexpr,
    DT_SOFTPLUS: tl.constexpr, DT_MIN: tl.constexpr, DT_MAX: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Advance the state of BLOCK_P channels of one head, in place, by T tokens of one sequence.

    Grid: batch x heads x tiles of P. Tiles: x (BLOCK_P,); B, C (BLOCK_N,); state (BLOCK_P, BLOCK_N).
    """
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    batch, head = (program // (H * TILES)).to(tl.int64), (program // TILES % H).to(tl.int64)
    p, n = program % TILES * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    mask_p, mask_n = p < P, n < N
    mask_state = mask_p[:, None] & mask_n[None, :]
    state_ptr += batch * state_strides[0] + head * state_strides[1]
    state_offsets = p[:, None].to(tl.int64) * state_strides[2] + n[None, :] * state_strides[3]
    state = tl.load(state_ptr + state_offsets, mask_state, other=0.0).to(COMPUTE)  # (P, N)
    A = tl.load(A_ptr + head).to(COMPUTE)
    dt_bias = tl.load(dt_bias_ptr + head).to(COMPUTE) if HAS_DT_BIAS else 0.0
    if HAS_D:
        D = tl.load(D_ptr + head * D_strides[0] + p * D_strides[1], mask_p, other=0.0).to(COMPUTE)  # (P,)
    x_ptr += batch * x_strides[0] + head * x_strides[2]
    dt_ptr += batch * dt_strides[0] + head * dt_strides[2]
    B_ptr += batch * B_strides[0] + head // (H // G) * B_strides[2]
    C_ptr += batch * C_strides[0] + head // (H // G) * C_strides[2]

    for token in range(tokens):
        t = tl.cast(token, tl.int64)
        mask_t = tl.full((1,), True, tl.int1)
        dt_ptrs = dt_ptr + t * dt_strides[1] + tl.arange(0, 1)
        dt, _ = load_dt(dt_ptrs, mask_t, dt_bias, DT_SOFTPLUS, HAS_DT_LIMIT, DT_MIN, DT_MAX, COMPUTE)  # (1,)
        x = tl.load(x_ptr + t * x_strides[1] + p, mask_p, other=0.0).to(COMPUTE)  # (P,)
        B = tl.load(B_ptr + t * B_strides[1] + n, mask_n, other=0.0).to(COMPUTE)  # (N,)
        C = tl.load(C_ptr + t * C_strides[1] + n, mask_n, other=0.0).to(COMPUTE)  # (N,)

        # Equation 2: S_t = exp(dt A) S_{t-1} + dt x B^T, y = S_t C.
        state = state * tl.exp(dt * A)[:, None] + (dt * x)[:, None] * B[None, :]  # (P, N)
        y = tl.sum(state * C[None, :], axis=1)  # (P,)

        if HAS_D:
            y += D * x
        if HAS_Z:
            z_offsets = batch * z_strides[0] + t * z_strides[1] + head * z_strides[2] + p
            y *= silu(tl.load(z_ptr + z_offsets, mask_p, other=0.0).to(COMPUTE))
        tl.store(y_ptr + ((batch * tokens + t) * H + head) * P + p, y.to(y_ptr.dtype.element_ty), mask_p)
    tl.store(state_ptr + state_offsets, state.to(state_ptr.dtype.element_ty), mask_state)
