"""The recurrence of Mamba-3 (arXiv 2603.15569)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._core.dispatch import Backend, resolve_backend
from .._core.sharding import current
from .._core.slots import StateSlots, plan_step, token_seeds
from .._core.state_format import STATE_DTYPES, check_format
from .._core.validation import (
    FLOATS,
    check_divides,
    check_integer,
    check_no_nan,
    check_tensor,
    has_readable_values,
    without_transforms,
)
from .._core.varlen import check_packing, without_padding
from . import pytorch, reference
from .arguments import Mamba3Arguments, Mamba3States


class Mamba3Output(NamedTuple):
    """Result of `mamba3`."""

    y: Tensor
    """(B, L, H, P) in the dtype of `x`; (B, L, R, H, P) for MIMO without `mimo_o`."""
    final_states: Mamba3States
    """After the last step of each row, or of each sequence with `cu_seqlens`; float32, or float64 where `x` is."""


def mamba3(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    initial_states: Mamba3States | None = None,
    *,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    chunk_size: int = 64,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: Backend = "auto",
) -> Mamba3Output:
    """Scan by the exponential-trapezoidal rule, with a state that decays and turns (arXiv 2603.15569, section 3).

    With `lambda_t = sigmoid(trap_t)` and R_t the rotation of K pairs of the state by `dt_t pi tanh(angles_t)`::

        h_t = exp(dt_t A_t) R_t (h_{t-1} + (1 - lambda_t) dt_t x_{t-1} B_{t-1}^T) + lambda_t dt_t x_t B_t^T
        y_t = h_t C_t + D x_t, gated by silu(z_t)

    MIMO has R inputs and outputs a head: `x_t B_t^T` is the sum over r of `(mimo_x_r x_t) B_{t,r}^T`, and y_t the sum
    over r of `mimo_o_r` times the output that C_{t,r} reads, gated by `silu(mimo_z_r z_t)`.

    Letters: B batch, L length, H heads, P head dimension, N state, G groups, K angles, R rank, S sequences in a pack.

    Args:
        x: (B, L, H, P) input.
        dt: (B, L, H) step, not negative.
        A: (B, L, H) decay rate, not positive.
        B, C: (B, L, G, N) input and output matrices, (B, L, R, G, N) for MIMO; head h reads group h // (H / G).
        trap: (B, L, H) logit of the weight that the trapezoid has at its end.
        angles: (B, L, K) angles before `pi tanh`, for all heads; K is at most N / 2. They turn entries 2k and 2k + 1
            of a state, in MIMO k and k + N / 2, as the published kernels do.
        B_bias, C_bias: (H, N), (H, R, N) for MIMO, added to B and C of each head before they are rotated.
        D: (H,) skip connection.
        z: (B, L, H, P) gate.
        initial_states: before the first step; its rows are sequences with `cu_seqlens`.
        mimo_x, mimo_z, mimo_o: (H, R, P) projections of x, z and y, which make it MIMO. Without `mimo_o` the outputs
            of the ranks stay apart.
        chunk_size: steps that SSD treats as one matrix product. Results do not depend on it.
        cu_seqlens: (S + 1,) int32 or int64 bounds of packed sequences; needs batch 1. Steps after the last bound are
            padding.
        seq_idx: (B, L) int32 or int64, as in `ssd`.
        backend: see `ssm_kernels.use_backend`.

    Inputs may be float64, float32, bfloat16 or float16, and of any strides. Gradients flow to every floating-point
    argument and to the initial states.

    Returns:
        y and the final states. Padding is zero in y.

    Raises:
        TypeError: an argument is not a tensor or has a dtype that is not supported.
        ValueError: a shape, device or value does not fit; the message names the argument.
        RuntimeError: `backend` was chosen by name and cannot run here, or `context_parallel` is in force.
    """
    if current() is not None:
        raise RuntimeError("mamba3 does not run within context_parallel: it has no exchange of its states")
    arguments = _canonical(
        Mamba3Arguments(
            x, dt, A, B, C, trap, angles, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o, initial_states, cu_seqlens,
            seq_idx,
        )
    )  # fmt: skip
    chunk_size = check_integer("chunk_size", chunk_size, 1)
    chosen = resolve_backend(backend, x.device, "ssd")
    if chosen == "reference":
        y, final_states = reference.mamba3(*arguments)
        return Mamba3Output(y, Mamba3States(*final_states))
    return Mamba3Output(*pytorch.mamba3(arguments, chunk_size, chosen))


def mamba3_step(
    states: Mamba3States,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    slots: StateSlots | None = None,
    state_scale: Tensor | None = None,
    rand_seed: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Advance the scan by one token, or by a few, for decoding. No gradients.

    Args:
        states: of B sequences, float32 or float64; with `slots` a pool with the slots first. `ssm` may be bfloat16,
            float16 or int8. **Updated in place**.
        x, z: (B, H, P), or (B, T, H, P) for T tokens.
        dt, A, trap: (B, H), or (B, T, H).
        B, C: (B, G, N) or (B, R, G, N); with T behind B for T tokens.
        angles: (B, K), or (B, T, K).
        B_bias, C_bias, D, mimo_x, mimo_z, mimo_o: as in `mamba3`.
        slots: slots of `states` that each sequence reads and writes; row b reads and writes state b by default.
        state_scale, rand_seed: of `states.ssm`, as in `ssd_step`.
        backend: see `ssm_kernels.use_backend`.

    Returns:
        y of the shape and dtype of `x`; (B, R, H, P) or (B, T, R, H, P) for MIMO without `mimo_o`.

    Raises:
        TypeError, ValueError, RuntimeError: as `mamba3`.
    """
    is_single = isinstance(x, Tensor) and x.dim() == 3
    if is_single:
        x, dt, A, B, C, trap, angles = (t.unsqueeze(1) for t in (x, dt, A, B, C, trap, angles))  # (B, 1, ...)
        z = None if z is None else z.unsqueeze(1)
    check_tensor("x", x, ("B", "T", "H", "P"))
    batch, tokens = x.shape[:2]
    states = _as_states("states", states)
    plan = plan_step(slots, states.ssm, batch, tokens)
    if plan is not None:
        check_tensor("dt", dt, tuple(x.shape[:3]), like=x)
        check_tensor("A", A, tuple(x.shape[:3]), like=x)
        dt, A = plan.blank(dt), plan.blank(A)
    arguments = _canonical(
        Mamba3Arguments(x, dt, A, B, C, trap, angles, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o, None, None, None)
    )
    states = _check_states("states", states, batch if slots is None else "slots", arguments, STATE_DTYPES)
    check_format(states.ssm, state_scale, rand_seed, batch if plan is None else len(plan.sources))
    seeds = token_seeds(rand_seed, plan, batch, tokens)  # (M,)
    chosen = resolve_backend(backend, x.device, "ssd")
    with torch.no_grad():
        if chosen == "reference":
            y = reference.mamba3_step(states, arguments, plan, state_scale, seeds)
        else:
            y = pytorch.mamba3_step(states, arguments, chosen, plan, state_scale, seeds)
    return y.squeeze(1) if is_single else y


def _as_states(name: str, states: object) -> Mamba3States:
    if not isinstance(states, tuple) or len(states) != len(Mamba3States._fields):
        got = f"{len(states)} parts" if isinstance(states, tuple) else type(states).__name__
        raise ValueError(f"{name} must be a Mamba3States, got {got}")
    return Mamba3States(*states)


def _check_states(
    name: str, states: object, rows: int | str, a: Mamba3Arguments, ssm_dtypes: tuple[torch.dtype, ...] = FLOATS
) -> Mamba3States:
    """Check states for arguments whose B has a rank."""
    states = _as_states(name, states)
    heads, headdim = a.x.shape[2:]
    rank, _, d_state = a.B.shape[2:]
    sizes = ((heads, a.angles.shape[2]), (heads, headdim, d_state), (rank, heads, d_state), (heads, headdim))
    for part, state, size in zip(Mamba3States._fields, states, sizes, strict=True):
        dtypes = ssm_dtypes if part == "ssm" else FLOATS
        check_tensor(f"{name}.{part}", state, (rows, *size), like=a.x, dtypes=dtypes)
    return states


def _canonical(arguments: Mamba3Arguments) -> Mamba3Arguments:
    """Check the arguments, and give B, C and their biases a rank."""
    (
        x, dt, A, B, C, trap, angles, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o, initial_states, cu_seqlens, seq_idx
    ) = arguments  # fmt: skip
    check_tensor("x", x, ("B", "L", "H", "P"))
    batch, length, heads, headdim = x.shape
    check_packing(batch, length, cu_seqlens, seq_idx)
    for name, value in (("dt", dt), ("A", A), ("trap", trap)):
        check_tensor(name, value, (batch, length, heads), like=x)
    ranks = () if mimo_x is None else ("R",)
    check_tensor("B", B, (batch, length, *ranks, "G", "N"), like=x)
    check_divides("G, the size of B before the last,", B.shape[-2], "H", heads)
    check_tensor("C", C, tuple(B.shape), like=x)
    rank, d_state = 1 if mimo_x is None else B.shape[2], B.shape[-1]
    check_tensor("angles", angles, (batch, length, "K"), like=x)
    if 2 * angles.shape[2] > d_state:
        raise ValueError(f"angles must have at most N / 2 = {d_state // 2} entries a step, got {angles.shape[2]}")
    if mimo_x is not None and d_state % 2:
        raise ValueError(f"N, the last size of B, must be even for MIMO, which turns pairs of halves; got {d_state}")
    for name, value in (("B_bias", B_bias), ("C_bias", C_bias)):
        if value is not None:
            check_tensor(name, value, (heads, *([] if mimo_x is None else [rank]), d_state), like=x)
    if D is not None:
        check_tensor("D", D, (heads,), like=x)
    if z is not None:
        check_tensor("z", z, tuple(x.shape), like=x)
    for name, value in (("mimo_x", mimo_x), ("mimo_z", mimo_z), ("mimo_o", mimo_o)):
        if value is not None:
            if mimo_x is None:
                raise ValueError(f"{name} needs mimo_x, which makes the scan MIMO")
            check_tensor(name, value, (heads, rank, headdim), like=x)
    dt_steps, A_steps = (without_padding(t.detach(), cu_seqlens, seq_idx) for t in (dt, A))
    check_no_nan("dt", dt_steps)
    check_no_nan("A", A_steps)
    dt_steps, A_steps = without_transforms(dt_steps), without_transforms(A_steps)
    if has_readable_values(x) and dt.numel():
        if (least := dt_steps.min()) < 0:
            raise ValueError(f"dt must not be negative, got {least:g}")
        if (most := A_steps.max()) > 0:
            raise ValueError(f"A must not be positive, got {most:g}")
    if mimo_x is None:
        B, C = B.unsqueeze(2), C.unsqueeze(2)  # (B, L, 1, G, N)
        B_bias, C_bias = (None if t is None else t.unsqueeze(1) for t in (B_bias, C_bias))  # (H, 1, N)
    arguments = arguments._replace(B=B, C=C, B_bias=B_bias, C_bias=C_bias)
    if initial_states is None:
        return arguments
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    return arguments._replace(initial_states=_check_states("initial_states", initial_states, rows, arguments))
