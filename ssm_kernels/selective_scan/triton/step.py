"""Decoding step of the selective scan in Triton."""

# The stubs know neither launches nor what jit functions return.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import FUSED_MULTIPLY_ADD, on_device, with_contiguous_last_dim
from ..._triton.primitives import LOG2E, and_scalar, compute_type, silu, softplus
from ..._triton.state_format import block_of_state, load_state, store_slot, store_state
from .tile import load_vector

STATE_ELEMENTS = 512
"""Elements of a program's tile of the state: four for each thread, one load of 16 bytes."""


def step(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    sources: Tensor | None,
    destinations: Tensor | None,
    bounds: Tensor | None,
    state_scale: Tensor | None,
    seeds: Tensor | None,
) -> Tensor:
    """Compute y (M, D) and update `state` (B, D, N), or slots of it. Body of `selective_scan_triton_step`."""
    has_plan, dim = sources is not None, u.shape[1]
    batch = u.shape[0] if sources is None else len(sources)
    n = A.shape[1]
    B, C = with_contiguous_last_dim(B), with_contiguous_last_dim(C)
    y = (torch.zeros if has_plan else torch.empty)(u.shape, dtype=u.dtype, device=u.device)
    block_n = block_of_state(state, n)
    block_d = max(1, STATE_ELEMENTS // block_n)
    if y.numel():
        with on_device(u):
            _step_kernel[(batch * triton.cdiv(dim, block_d),)](
                state, u, dt, A.contiguous(), B, C, None if D is None else D.contiguous(), z,
                None if dt_bias is None else dt_bias.contiguous(), y, dim, _channels_per_row(B, dim),
                _channels_per_row(C, dim), state.stride(), u.stride(), dt.stride(), _row_strides(B), _row_strides(C),
                None if z is None else z.stride(), sources, destinations, bounds, state_scale,
                None if state_scale is None else state_scale.stride(), seeds,
                N=n, BLOCK_N=block_n, BLOCK_D=block_d, HAS_D=D is not None, HAS_Z=z is not None,
                HAS_DT_BIAS=dt_bias is not None, HAS_PLAN=has_plan, DT_SOFTPLUS=dt_softplus,
                HAS_SCALE=state_scale is not None, HAS_SEED=seeds is not None,
                COMPUTE=compute_type(state.dtype), num_warps=4,
                **FUSED_MULTIPLY_ADD,
            )  # fmt: skip
    return y


def _channels_per_row(m: Tensor, dim: int) -> int:
    """Count the channels that read one row of B or C: those of a group, or one where it is constant in time."""
    return 1 if m.dim() == 2 else dim // m.shape[1]


def _row_strides(m: Tensor) -> tuple[int, int]:
    """Strides of batch and row of B or C: (B, G, N), or (D, N) for every batch alike."""
    return (0, m.stride(0)) if m.dim() == 2 else (m.stride(0), m.stride(1))


@triton.jit
def _step_kernel(
    state_ptr,  # (B, D, N), or slots of it; updated
    u_ptr, dt_ptr,  # (M, D)
    A_ptr,  # (D, N)
    B_ptr, C_ptr,  # (M, G, N) or (D, N)
    D_ptr,  # (D,)
    z_ptr,  # (M, D)
    dt_bias_ptr,  # (D,)
    y_ptr,  # (M, D), written
    dim, B_channels, C_channels,
    state_strides, u_strides, dt_strides, B_strides, C_strides, z_strides,
    sources_ptr,  # (S,) slot that a sequence starts from; -1 where it is skipped
    destinations_ptr,  # (M,) slot that takes the state after a token; -1 where it is not kept
    bounds_ptr,  # (S + 1,) first token of a sequence
    scale_ptr,  # (B, D) of int8, updated
    scale_strides,
    seeds_ptr,  # (M,)
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr, HAS_PLAN: tl.constexpr, DT_SOFTPLUS: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_SEED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Advance the state of BLOCK_D channels of one sequence and write y: by one token, in place; or with HAS_PLAN by
    the tokens of its bounds, from and to slots.

    Grid: batch x tiles of D. Tiles: inputs (BLOCK_D, 1); B, C and state (BLOCK_D, BLOCK_N). Channel d reads row
    d // B_channels of B and d // C_channels of C.
    """
    tiles = tl.cdiv(dim, BLOCK_D)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    d = (tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)[:, None]).to(tl.int64)
    n = tl.arange(0, BLOCK_N)[None, :]
    mask = d < dim
    mask_state = mask & (n < N)
    state_offsets = d * state_strides[1] + n * state_strides[2]
    scale_ptrs, scale_offsets = scale_ptr, 0
    if HAS_SCALE:
        scale_offsets = d * scale_strides[1]
    if not HAS_PLAN:
        state_ptrs = state_ptr + batch * state_strides[0] + state_offsets
        if HAS_SCALE:
            scale_ptrs = scale_ptr + batch * scale_strides[0] + scale_offsets
        h = load_state(state_ptrs, scale_ptrs, mask_state, mask, HAS_SCALE, COMPUTE)  # (D, N)
        h = _advance(
            h, batch, d, n, mask, mask_state, u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, dt_bias_ptr, y_ptr,
            dim, B_channels, C_channels, u_strides, dt_strides, B_strides, C_strides, z_strides, N, HAS_D, HAS_Z,
            HAS_DT_BIAS, DT_SOFTPLUS, COMPUTE,
        )  # fmt: skip
        store_state(state_ptrs, scale_ptrs, h, mask_state, mask, seeds_ptr, batch, d, HAS_SCALE, HAS_SEED, BLOCK_N)
    else:
        source = tl.load(sources_ptr + batch)
        first_token, end_token = tl.load(bounds_ptr + batch), tl.load(bounds_ptr + batch + 1)
        end_token = tl.where(source < 0, first_token, end_token)  # a skipped sequence has no token
        source_ptrs = state_ptr + source * state_strides[0] + state_offsets
        if HAS_SCALE:
            scale_ptrs = scale_ptr + source * scale_strides[0] + scale_offsets
        mask_source, mask_source_row = and_scalar(mask_state, source >= 0), and_scalar(mask, source >= 0)
        h = load_state(source_ptrs, scale_ptrs, mask_source, mask_source_row, HAS_SCALE, COMPUTE)  # (D, N)
        for token in range(first_token, end_token):
            h = _advance(
                h, tl.cast(token, tl.int64), d, n, mask, mask_state, u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr,
                dt_bias_ptr, y_ptr, dim, B_channels, C_channels, u_strides, dt_strides, B_strides, C_strides,
                z_strides, N, HAS_D, HAS_Z, HAS_DT_BIAS, DT_SOFTPLUS, COMPUTE,
            )  # fmt: skip
            h = store_slot(
                tl.load(destinations_ptr + token), state_ptr, state_strides[0], state_offsets, scale_ptr,
                scale_strides[0] if HAS_SCALE else 0, scale_offsets, h, mask_state, mask, seeds_ptr, token, d,
                HAS_SCALE, HAS_SEED, BLOCK_N,
            )  # fmt: skip


@triton.jit
def _advance(
    h, token, d, n, mask, mask_state, u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, dt_bias_ptr, y_ptr, dim,
    B_channels, C_channels, u_strides, dt_strides, B_strides, C_strides, z_strides,
    N: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_DT_BIAS: tl.constexpr, DT_SOFTPLUS: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Write y of one token, and return the state (BLOCK_D, BLOCK_N) after it."""
    # Load.
    dt = load_vector(dt_ptr + token * dt_strides[0] + d * dt_strides[1], mask, COMPUTE)  # (D, 1)
    if HAS_DT_BIAS:
        dt += load_vector(dt_bias_ptr + d, mask, COMPUTE)
    if DT_SOFTPLUS:
        dt = softplus(dt)
    u = load_vector(u_ptr + token * u_strides[0] + d * u_strides[1], mask, COMPUTE)  # (D, 1)
    a = load_vector(A_ptr + d * N + n, mask_state, COMPUTE)  # (D, N)
    b = load_vector(B_ptr + token * B_strides[0] + d // B_channels * B_strides[1] + n, mask_state, COMPUTE)
    c = load_vector(C_ptr + token * C_strides[0] + d // C_channels * C_strides[1] + n, mask_state, COMPUTE)

    # Equation 2a of arXiv 2312.00752: h_t = exp(dt A) h_{t-1} + dt B u_t.
    h = tl.exp2(dt * (a * LOG2E)) * h + dt * u * b  # (D, N)

    # Equation 2b: y_t = C h_t; then skip connection and gate.
    y = tl.sum(c * h, axis=1, keep_dims=True)  # (D, 1)
    if HAS_D:
        y += load_vector(D_ptr + d, mask, COMPUTE) * u
    if HAS_Z:
        y *= silu(load_vector(z_ptr + token * z_strides[0] + d * z_strides[1], mask, COMPUTE))
    tl.store(y_ptr + token * dim + d, y.to(y_ptr.dtype.element_ty), mask)
    return h
