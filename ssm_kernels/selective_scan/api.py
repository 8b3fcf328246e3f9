"""Selective scan, the recurrence of Mamba-1 (arXiv 2312.00752, equation 2 and algorithm 2)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._core.dispatch import Backend, resolve_backend
from .._core.library import grad_off
from .._core.sharding import shardable
from .._core.slots import StateSlots, plan_step, token_seeds
from .._core.state_format import STATE_DTYPES, check_format
from .._core.validation import check_divides, check_no_nan, check_tensor
from .._core.varlen import check_packing, without_padding
from . import numba, pytorch, reference, triton


class SelectiveScanOutput(NamedTuple):
    """Result of `selective_scan`."""

    y: Tensor
    """(B, L, D) in the dtype of `u`."""
    final_states: Tensor
    """(B, D, N), or (S, D, N) with `cu_seqlens`; float32, or float64 where `u` is."""


@shardable
def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_states: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: Backend = "auto",
) -> SelectiveScanOutput:
    """Scan `h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t`, `y_t = C_t . h_t + D u_t`, gated by `silu(z_t)`.

    Letters: B batch, L length, D channels, N state, G groups, S sequences in a pack.

    Args:
        u: (B, L, D) input.
        dt: (B, L, D) step, in units of the time scale `1 / |A|`; see `dt_bias` and `dt_softplus`.
        A: (D, N) decay rate, negative where the state should decay.
        B: (B, L, G, N) with G dividing D (channel d reads group d // (D / G)); (B, L, N) for one group;
            (D, N) for an input matrix that is constant in time.
        C: output matrix, of the same three shapes as `B`, chosen independently.
        D: (D,) skip connection.
        z: (B, L, D) gate: the result is multiplied by `silu(z)`.
        dt_bias: (D,) added to `dt`.
        dt_softplus: pass `dt` (after the bias) through softplus.
        initial_states: (B, D, N) state before the first step; (S, D, N) with `cu_seqlens`.
        cu_seqlens: (S + 1,) int32 or int64 bounds of packed sequences; needs batch 1. No state crosses a bound.
            Steps after the last bound are padding.
        seq_idx: (B, L) int32 or int64; a new sequence starts where the number changes, and steps with a negative
            number are padding. The initial state is that of each row's first sequence, the final state that of its
            last; a row of padding alone ends as it starts.
        backend: see `ssm_kernels.use_backend`.

    Padding belongs to no sequence: y is zero there, and no state and no gradient depends on what the inputs hold there.

    Inputs may be float64, float32, bfloat16 or float16, and of any strides. State and accumulation are float32
    (float64 where `u` is), under autocast too. Gradients flow to every floating-point argument. A must be finite.

    Returns:
        y (B, L, D) in the dtype of `u`, and the final states (B, D, N), or (S, D, N) with `cu_seqlens`.

    Raises:
        TypeError: an argument is not a tensor or has a dtype that is not supported.
        ValueError: a shape, device or value does not fit; the message names the argument.
        RuntimeError: `backend` was chosen by name and cannot run here.
    """
    _check(u, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, seq_idx)
    B, C = (m.unsqueeze(2) if m.dim() == 3 else m for m in (B, C))  # (B, L, G, N) or (D, N)
    chosen = resolve_backend(backend, u.device, "selective_scan")
    scan = {
        "triton": triton.selective_scan,
        "numba": numba.selective_scan,
        "torch": pytorch.selective_scan,
        "reference": reference.selective_scan,
    }[chosen]
    y, final_states = scan(u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_states, cu_seqlens, seq_idx)
    return SelectiveScanOutput(y, final_states)


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    slots: StateSlots | None = None,
    state_scale: Tensor | None = None,
    rand_seed: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Advance the scan by one token, or by a few, for decoding. It has no gradients.

    Args:
        state: (B, D, N), float32, float64, bfloat16, float16 or int8; with `slots` a pool with the slots first.
            **Updated in place**.
        u, dt, z: (B, D), or (B, T, D) for T tokens.
        B, C: (B, G, N), or (B, T, G, N); or (D, N) where constant in time: as in `selective_scan`, the number of
            dimensions tells, so that one group is (B, 1, N).
        A, D, dt_bias, dt_softplus: as in `selective_scan`.
        slots: slots of `state` that each sequence reads and writes; row b reads and writes state b by default.
        state_scale: (B, D) float32, or (slots, D): what a unit of int8 stands for in each row. **Updated in place**.
        rand_seed: (B,) int64, or (S,) of the sequences, or (1,): round a state in fewer bits stochastically;
            to the nearest by default. Pass another seed at each step: token t of a sequence has `rand_seed + t`.
        backend: see `ssm_kernels.use_backend`.

    A state is rounded when it is written, and a token after that starts from what was written. The computation is in
    float32, or float64 on a float64 state.

    The step has no host-device synchronization, so that it can be captured in a CUDA graph; on the torch backend this
    holds without `slots` and for one token.

    Returns:
        y of the shape and dtype of `u`.

    Raises:
        TypeError, ValueError, RuntimeError: as `selective_scan`.
    """
    is_single = isinstance(u, Tensor) and u.dim() == 2
    check_tensor("u", u, ("B", "D") if is_single else ("B", "T", "D"))
    dim, at = u.shape[-1], tuple(u.shape[:-1])  # (B,) or (B, T)
    check_tensor("A", A, (dim, "N"), like=u)
    rows, n = at[0] if slots is None else "slots", A.shape[1]
    check_tensor("state", state, (rows, dim, n), like=u, dtypes=STATE_DTYPES)
    check_tensor("dt", dt, (*at, dim), like=u)
    for name, m in (("B", B), ("C", C)):
        is_constant = isinstance(m, Tensor) and m.dim() == 2
        check_tensor(name, m, (dim, n) if is_constant else (*at, "G", n), like=u)
    if z is not None:
        check_tensor("z", z, (*at, dim), like=u)
    _check_parameters(u, {name: m.shape[-2] for name, m in (("B", B), ("C", C)) if m.dim() > 2}, D, dt_bias)
    batch, tokens = (at[0], 1) if is_single else at
    plan = plan_step(slots, state, batch, tokens)
    check_format(state, state_scale, rand_seed, batch if plan is None else len(plan.sources))
    check_no_nan("dt", dt if plan is None else plan.blank(dt.view(batch, tokens, dim)))
    if not is_single:
        u, dt = u.flatten(0, 1), dt.flatten(0, 1)  # (M, D)
        B, C = (m if m.dim() == 2 else m.flatten(0, 1) for m in (B, C))  # (D, N) or (M, G, N)
        z = None if z is None else z.flatten(0, 1)  # (M, D)
    chosen = resolve_backend(backend, u.device, "selective_scan")
    step = {
        "triton": triton.selective_scan_step,
        "numba": numba.selective_scan_step,
        "torch": pytorch.selective_scan_step,
        "reference": reference.selective_scan_step,
    }[chosen]
    with grad_off():
        seeds = token_seeds(rand_seed, plan, batch, tokens)  # (M,)
        y = step(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus, plan, state_scale, seeds)  # (M, D)
    return y if is_single else y.unflatten(0, at)


def _check(u, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens=None, seq_idx=None) -> None:
    check_tensor("u", u, ("B", "L", "D"))
    batch, length, dim = u.shape
    check_packing(batch, length, cu_seqlens, seq_idx)
    check_tensor("dt", dt, (batch, length, dim), like=u)
    check_tensor("A", A, (dim, "N"), like=u)
    n = A.shape[1]
    for name, m in (("B", B), ("C", C)):
        if isinstance(m, Tensor) and m.dim() == 4:
            check_tensor(name, m, (batch, length, "G", n), like=u)
        elif isinstance(m, Tensor) and m.dim() == 3:
            check_tensor(name, m, (batch, length, n), like=u)
        else:
            check_tensor(name, m, (dim, n), like=u)
    if z is not None:
        check_tensor("z", z, (batch, length, dim), like=u)
    _check_parameters(u, {name: m.shape[2] for name, m in (("B", B), ("C", C)) if m.dim() == 4}, D, dt_bias)
    if initial_states is not None:
        rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
        check_tensor("initial_states", initial_states, (rows, dim, n), like=u)
    # NaN in dt would reach every later step; padding may hold anything.
    check_no_nan("dt", without_padding(dt, cu_seqlens, seq_idx))


def _check_parameters(u: Tensor, groups: dict[str, int], D: Tensor | None, dt_bias: Tensor | None) -> None:
    """Check what has no dimension of time, and the number of groups of B and C, where they have several."""
    dim = u.shape[-1]
    for name, n_groups in groups.items():
        check_divides(f"G of {name}", n_groups, "D", dim)
    # A kernel's program scans channels of one group of both: the finer groups must be parts of the coarser ones.
    if len(groups) == 2:
        small, big = min(groups.values()), max(groups.values())
        check_divides("the groups of one of B and C", small, "those of the other", big)
    if D is not None:
        check_tensor("D", D, (dim,), like=u)
    if dt_bias is not None:
        check_tensor("dt_bias", dt_bias, (dim,), like=u)
