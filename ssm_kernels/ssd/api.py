"""State-space duality (SSD), the recurrence of Mamba-2 (arXiv 2405.21060, section 6)."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .._core.dispatch import Backend, resolve_backend
from .._core.library import grad_off
from .._core.sharding import shardable
from .._core.slots import StateSlots, token_seeds
from .._core.state_format import STATE_DTYPES, check_format
from .._core.validation import check_divides, check_integer, check_no_nan, check_tensor
from .._core.varlen import check_packing, without_padding
from . import numba, pytorch, reference, triton


class SSDOutput(NamedTuple):
    """Result of `ssd`."""

    y: Tensor
    """(B, L, H, P) in the dtype of `x`."""
    final_states: Tensor
    """(B, H, P, N), or (S, H, P, N) with `cu_seqlens`; float32, or float64 where `x` is."""


@shardable
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_states: Tensor | None = None,
    *,
    input_weights: Tensor | None = None,
    chunk_size: int = 64,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: Backend = "auto",
) -> SSDOutput:
    """Scan `S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T`, `y_t = S_t C_t + D x_t`, gated by `silu(z_t)`.

    Letters: B batch, L length, H heads, P head dimension, N state, G groups, S sequences in a pack.

    Args:
        x: (B, L, H, P) input.
        dt: (B, L, H) step, in units of the time scale `1 / |A|`.
        A: (H,) decay rate, negative where the state should decay.
        B, C: (B, L, G, N) input and output matrices; G divides H, head h reads group h // (H / G).
        D: (H,) or (H, P) skip connection.
        z: (B, L, H, P) gate: the result is multiplied by `silu(z)`.
        dt_bias: (H,) added to `dt`.
        dt_softplus: whether `dt` passes through softplus, after the bias.
        dt_limit: bounds that `dt` is clamped to, after the softplus.
        initial_states: (B, H, P, N) state before the first step; (S, H, P, N) with `cu_seqlens`.
        input_weights: (B, L, H) weights w of the inputs, in place of dt: `S_t = exp(dt_t A) S_{t-1} + w_t x_t B_t^T`.
            dt and A are then the decay alone: `dt = -a` with A of -1 gives each step its own log decay `a <= 0`.
        chunk_size: steps that the fast backends treat as one matrix product. Results do not depend on it.
        cu_seqlens: (S + 1,) int32 or int64 bounds of packed sequences; needs batch 1. No state crosses a bound.
            Steps after the last bound are padding.
        seq_idx: (B, L) int32 or int64; a new sequence starts where the number changes, and steps with a negative
            number are padding. The initial state is that of each row's first sequence, the final state that of its
            last; for a row of padding alone, the final state is the initial one.
        backend: see `ssm_kernels.use_backend`.

    Padding belongs to no sequence: y is zero there, and neither states nor gradients depend on the inputs there.

    Inputs may be float64, float32, bfloat16 or float16, and of any strides. State and accumulation are float32
    (float64 where `x` is), under autocast too. Gradients flow to every floating-point argument. All but D, z and the
    initial states must be finite: the steps of a chunk meet in matrix products, where an infinity turns the steps
    before it into NaN too. So does the product of a chunk's decays where A is positive, once it is beyond the largest
    number of the compute type: A times the sum of dt over 64 steps must be less than 88 (709 in float64).

    Returns:
        y and the final states.

    Raises:
        TypeError: an argument is not a tensor or has a dtype that is not supported.
        ValueError: a shape, device or value does not fit; the message names the argument.
        RuntimeError: `backend` was chosen by name and cannot run here.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, seq_idx)
    if input_weights is not None:
        check_tensor("input_weights", input_weights, tuple(dt.shape), like=x)
    chunk_size = check_integer("chunk_size", chunk_size, 1)
    arguments = (
        x, dt, A, B, C, canonical_skip(D), z, dt_bias, dt_softplus, check_dt_limit(dt_limit), initial_states,
        cu_seqlens, seq_idx,
    )  # fmt: skip
    chosen = resolve_backend(backend, x.device, "ssd")
    if chosen == "reference":
        return SSDOutput(*reference.ssd(*arguments, input_weights=input_weights))
    scan = {"triton": triton.ssd, "numba": numba.ssd, "torch": pytorch.ssd}[chosen]
    return SSDOutput(*scan(*arguments, chunk_size=chunk_size, input_weights=input_weights))


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    *,
    input_weights: Tensor | None = None,
    slots: StateSlots | None = None,
    state_scale: Tensor | None = None,
    rand_seed: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Advance the scan by one token, or by a few, for decoding. No gradients.

    Args:
        state: (B, H, P, N), float32, float64, bfloat16, float16 or int8; with `slots` a pool with the slots first.
            **Updated in place**.
        x, z: (B, H, P), or (B, T, H, P) for T tokens.
        dt: (B, H), or (B, T, H).
        B, C: (B, G, N), or (B, T, G, N).
        A, D, dt_bias, dt_softplus, dt_limit: as in `ssd`.
        input_weights: (B, H), or (B, T, H), as in `ssd`.
        slots: slots of `state` that each sequence reads and writes; row b reads and writes state b by default.
        state_scale: (B, H, P) float32, or (slots, H, P): what a unit of int8 stands for in each row. **Updated in
            place**.
        rand_seed: (B,) int64, or (S,) of the sequences, or (1,): round a state in fewer bits stochastically;
            to the nearest by default. Pass another seed at each step: token t of a sequence has `rand_seed + t`.
        backend: see `ssm_kernels.use_backend`.

    A state is rounded when it is written, and a token after that starts from what was written. The computation is in
    float32, or float64 on a float64 state.

    Returns:
        y of the shape and dtype of `x`.

    Raises:
        TypeError, ValueError, RuntimeError: as `ssd`.
    """
    is_single = isinstance(x, Tensor) and x.dim() == 3
    if is_single:
        x, dt, B, C = (t.unsqueeze(1) for t in (x, dt, B, C))  # (B, 1, H, P), (B, 1, H), (B, 1, G, N)
        z, input_weights = (None if t is None else t.unsqueeze(1) for t in (z, input_weights))
    check_tensor("x", x, ("B", "T", "H", "P"))
    check_tensor("B", B, (*x.shape[:2], "G", "N"), like=x)
    shape = (x.shape[0] if slots is None else "slots", *x.shape[2:], B.shape[3])
    check_tensor("state", state, shape, like=x, dtypes=STATE_DTYPES)
    plan = None if slots is None else slots.plan(state, x.shape[0], x.shape[1])
    check_format(state, state_scale, rand_seed, x.shape[0] if plan is None else len(plan.sources))
    _check(x, dt if plan is None else plan.blank(dt), A, B, C, D, z, dt_bias, None)
    if input_weights is not None:
        check_tensor("input_weights", input_weights, tuple(dt.shape), like=x)
    arguments = (state, x, dt, A, B, C, canonical_skip(D), z, dt_bias, dt_softplus, check_dt_limit(dt_limit), plan)
    y = run_step(backend, *arguments, input_weights, state_scale, token_seeds(rand_seed, plan, *x.shape[:2]))
    return y.squeeze(1) if is_single else y


def run_step(backend: Backend, state: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    """Advance a state by T tokens with arguments in the canonical form of `reference.ssd_step`; x (B, T, H, P)."""
    chosen = resolve_backend(backend, x.device, "ssd")
    step = {
        "triton": triton.ssd_step,
        "numba": numba.ssd_step,
        "torch": pytorch.ssd_step,
        "reference": reference.ssd_step,
    }[chosen]
    with grad_off():
        return step(state, x, *arguments)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> None:
    check_tensor("x", x, ("B", "L", "H", "P"))
    batch, length, heads, headdim = x.shape
    check_packing(batch, length, cu_seqlens, seq_idx)
    check_tensor("dt", dt, (batch, length, heads), like=x)
    check_tensor("A", A, (heads,), like=x)
    check_tensor("B", B, (batch, length, "G", "N"), like=x)
    check_divides("G, the third size of B,", B.shape[2], "H", heads)
    check_tensor("C", C, tuple(B.shape), like=x)
    if D is not None:
        check_tensor("D", D, (heads, headdim) if D.dim() == 2 else (heads,), like=x)
    if z is not None:
        check_tensor("z", z, tuple(x.shape), like=x)
    if dt_bias is not None:
        check_tensor("dt_bias", dt_bias, (heads,), like=x)
    if initial_states is not None:
        rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
        check_tensor("initial_states", initial_states, (rows, heads, headdim, B.shape[3]), like=x)
    check_no_nan("dt", without_padding(dt, cu_seqlens, seq_idx))


def check_dt_limit(dt_limit: tuple[float, float]) -> tuple[float, float]:
    """Return the bounds of the step size as floats.

    Raises:
        ValueError: not (low, high) with 0 <= low <= high.
    """
    if len(dt_limit) != 2 or not 0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit must be (low, high) with 0 <= low <= high, got {dt_limit!r}")
    return float(dt_limit[0]), float(dt_limit[1])


def canonical_skip(D: Tensor | None) -> Tensor | None:
    """Return D (H,) as (H, 1), which broadcasts over channels as (H, P) does."""
    return D.unsqueeze(-1) if D is not None and D.dim() == 1 else D
