"""Decoding step of SSD in Triton: the recurrence itself, a token at a time."""

# The stubs know neither launches nor what jit functions return.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import FUSED_MULTIPLY_ADD, on_device, with_contiguous_last_dim
from ..._triton.primitives import and_scalar, compute_type, silu
from ..._triton.state_format import block_of_state, load_state, store_slot, store_state
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
    input_weights: Tensor | None,
    sources: Tensor | None,
    destinations: Tensor | None,
    bounds: Tensor | None,
    state_scale: Tensor | None,
    seeds: Tensor | None,
) -> Tensor:
    """Compute y (B, T, H, P) and update `state` (B, H, P, N), or slots of it. Body of `ssd_triton_step`."""
    shape, has_plan = x.shape, sources is not None
    if has_plan:  # one row of all tokens
        x, dt, B, C = (t.flatten(0, 1).unsqueeze(0) for t in (x, dt, B, C))  # (1, M, ...)
        z, input_weights = (None if t is None else t.flatten(0, 1).unsqueeze(0) for t in (z, input_weights))
    _, tokens, heads, headdim = x.shape
    batch = x.shape[0] if sources is None else len(sources)
    groups, d_state = B.shape[2:]
    x, B, C = (with_contiguous_last_dim(t) for t in (x, B, C))
    z = None if z is None else with_contiguous_last_dim(z)
    D = None if D is None else D.expand(heads, headdim)
    y = (torch.zeros if has_plan else torch.empty)(shape, dtype=x.dtype, device=x.device)
    block_n = block_of_state(state, d_state)
    block_p = max(1, min(triton.next_power_of_2(headdim), STATE_ELEMENTS // block_n))
    num_programs = batch * heads * triton.cdiv(headdim, block_p)
    if not num_programs or not tokens:
        return y
    with on_device(x):
        _step_kernel[(num_programs,)](
            state, x, dt, A.contiguous(), B, C, D, z, None if dt_bias is None else dt_bias.contiguous(), y,
            state.stride(), x.stride(), dt.stride(), B.stride(), C.stride(), None if D is None else D.stride(),
            None if z is None else z.stride(), tokens, input_weights,
            None if input_weights is None else input_weights.stride(), sources, destinations, bounds, state_scale,
            None if state_scale is None else state_scale.stride(), seeds,
            H=heads, P=headdim, N=d_state, G=groups, BLOCK_P=block_p, BLOCK_N=block_n, HAS_D=D is not None,
            HAS_Z=z is not None, HAS_WEIGHTS=input_weights is not None, HAS_PLAN=has_plan,
            **dt_constants(dt_bias, dt_softplus, dt_min, dt_max), HAS_SCALE=state_scale is not None,
            HAS_SEED=seeds is not None, COMPUTE=compute_type(state.dtype), num_warps=4,
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
    weights_ptr,  # (B, T, H)
    weights_strides,
    sources_ptr,  # (S,) slot that a sequence starts from; -1 where it is skipped
    destinations_ptr,  # (M,) slot that takes the state after a token; -1 where it is not kept
    bounds_ptr,  # (S + 1,) first token of a sequence
    scale_ptr,  # (B, H, P) of int8, updated
    scale_strides,
    seeds_ptr,  # (B T,)
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_PLAN: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr, HAS_DT_LIMIT: tl.constexpr, DT_SOFTPLUS: tl.constexpr, DT_MIN: tl.constexpr,
    DT_MAX: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SEED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Advance the state of BLOCK_P channels of one head by the tokens of one sequence: T of them, in place; or with
    HAS_PLAN those of its bounds, from and to slots.

    Grid: batch x heads x tiles of P. Tiles: x (BLOCK_P,); B, C (BLOCK_N,); state (BLOCK_P, BLOCK_N).
    """
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    batch, head = (program // (H * TILES)).to(tl.int64), (program // TILES % H).to(tl.int64)
    p, n = program % TILES * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    mask_p, mask_n = p < P, n < N
    mask_state, mask_row = mask_p[:, None] & mask_n[None, :], mask_p[:, None]
    row = (head * P + p)[:, None]  # of a state (H P, N)
    if HAS_PLAN:
        # Tokens of all sequences are in one row; a skipped sequence has none.
        source = tl.load(sources_ptr + batch)
        first_token, end_token = tl.load(bounds_ptr + batch), tl.load(bounds_ptr + batch + 1)
        end_token = tl.where(source < 0, first_token, end_token)
        mask_source, mask_source_row = and_scalar(mask_state, source >= 0), and_scalar(mask_row, source >= 0)
        batch = tl.cast(0, tl.int64)
    else:
        source, mask_source, mask_source_row = batch, mask_state, mask_row
        first_token, end_token = 0, tokens
    state_ptr += head * state_strides[1]
    state_offsets = p[:, None].to(tl.int64) * state_strides[2] + n[None, :] * state_strides[3]
    source_ptrs, scale_ptrs, scale_offsets = state_ptr + source * state_strides[0] + state_offsets, scale_ptr, 0
    if HAS_SCALE:
        scale_ptr += head * scale_strides[1]
        scale_offsets = p[:, None].to(tl.int64) * scale_strides[2]
        scale_ptrs = scale_ptr + source * scale_strides[0] + scale_offsets
    state = load_state(source_ptrs, scale_ptrs, mask_source, mask_source_row, HAS_SCALE, COMPUTE)  # (P, N)
    A = tl.load(A_ptr + head).to(COMPUTE)
    dt_bias = tl.load(dt_bias_ptr + head).to(COMPUTE) if HAS_DT_BIAS else 0.0
    if HAS_D:
        D = tl.load(D_ptr + head * D_strides[0] + p * D_strides[1], mask_p, other=0.0).to(COMPUTE)  # (P,)
    x_ptr += batch * x_strides[0] + head * x_strides[2]
    dt_ptr += batch * dt_strides[0] + head * dt_strides[2]
    B_ptr += batch * B_strides[0] + head // (H // G) * B_strides[2]
    C_ptr += batch * C_strides[0] + head // (H // G) * C_strides[2]

    for token in range(first_token, end_token):
        t = tl.cast(token, tl.int64)
        mask_t = tl.full((1,), True, tl.int1)
        dt_ptrs = dt_ptr + t * dt_strides[1] + tl.arange(0, 1)
        dt, _ = load_dt(dt_ptrs, mask_t, dt_bias, DT_SOFTPLUS, HAS_DT_LIMIT, DT_MIN, DT_MAX, COMPUTE)  # (1,)
        x = tl.load(x_ptr + t * x_strides[1] + p, mask_p, other=0.0).to(COMPUTE)  # (P,)
        B = tl.load(B_ptr + t * B_strides[1] + n, mask_n, other=0.0).to(COMPUTE)  # (N,)
        C = tl.load(C_ptr + t * C_strides[1] + n, mask_n, other=0.0).to(COMPUTE)  # (N,)

        # Equation 2: S_t = exp(dt A) S_{t-1} + dt x B^T, y = S_t C.
        weight = dt
        if HAS_WEIGHTS:
            weight = tl.load(
                weights_ptr + batch * weights_strides[0] + t * weights_strides[1] + head * weights_strides[2]
            )
            weight = weight.to(COMPUTE)
        state = state * tl.exp(dt * A)[:, None] + (weight * x)[:, None] * B[None, :]  # (P, N)
        y = tl.sum(state * C[None, :], axis=1)  # (P,)

        if HAS_D:
            y += D * x
        if HAS_Z:
            z_offsets = batch * z_strides[0] + t * z_strides[1] + head * z_strides[2] + p
            y *= silu(tl.load(z_ptr + z_offsets, mask_p, other=0.0).to(COMPUTE))
        tl.store(y_ptr + ((batch * tokens + t) * H + head) * P + p, y.to(y_ptr.dtype.element_ty), mask_p)
        if HAS_PLAN:
            state = store_slot(
                tl.load(destinations_ptr + t), state_ptr, state_strides[0], state_offsets, scale_ptr,
                scale_strides[0] if HAS_SCALE else 0, scale_offsets, state, mask_state, mask_row, seeds_ptr, t, row,
                HAS_SCALE, HAS_SEED, BLOCK_N,
            )  # fmt: skip
    if not HAS_PLAN:
        last = batch * tokens + tokens - 1
        store_state(
            source_ptrs, scale_ptrs, state, mask_state, mask_row, seeds_ptr, last, row, HAS_SCALE, HAS_SEED, BLOCK_N
        )
