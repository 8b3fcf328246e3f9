"""The ops in terms of PyTorch's own, for exported graphs that run where these ops are not.

`exported.run_decompositions(decompositions())` leaves ATen ops only, with dynamic batch and length. No step of them is
a loop over the length, which a graph of ATen ops cannot have:

- SSD is its chunked form (arXiv 2405.21060, listing 1), where the states pass between chunks by one matrix product;
- the selective scan is cut into chunks of CHUNK steps, whose steps run one after the other in all chunks at once. The
  ends of the chunks are a sequence that is scanned in the same way, and the ends of those by one product over pairs.

Decays are exponentials of sums of steps, masked before the exponential, and never ratios. Forward alone; packed
sequences and scan directions are refused by name.

Letters: B batch, L length, D channels, H heads, P head dimension, N state, G groups, E channels or heads of a group,
T steps of a sequence, c chunks of Q steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._core.library import NAMESPACE
from .norm import reference as norm_reference
from .selective_scan.arguments import ScanArguments as SelectiveScanArguments
from .ssd.arguments import ScanArguments as SSDArguments

CHUNK = 16
"""Steps of a chunk of the selective scan. Each is a few nodes of the graph."""
LEVELS = 2
"""Times that a selective scan is cut before the product over pairs, of which there are (L / CHUNK**LEVELS)**2."""
SSD_CHUNK = 64
"""Steps of a chunk of SSD."""


def decompositions() -> dict[Any, Callable]:
    """Return the table of this package's forward ops for `torch.export.ExportedProgram.run_decompositions`.

    Returns:
        functions by op. Decoding steps are not among them: exported mixers scan their one step. Add
        `torch.export.default_decompositions()` for graphs of core ATen ops.
    """
    # The modules that register the ops.
    from . import causal_conv1d, norm, selective_scan, ssd  # noqa: F401

    functions = {
        "selective_scan_torch": _selective_scan_torch,
        "selective_scan_numba": _selective_scan,
        "selective_scan_triton": _selective_scan,
        "ssd_torch": _ssd_torch,
        "ssd_numba": _ssd,
        "ssd_triton": _ssd,
        "causal_conv1d_torch": _causal_conv1d_torch,
        "causal_conv1d_numba": _causal_conv1d,
        "causal_conv1d_triton": _causal_conv1d,
        "norm_numba": _norm,
        "norm_triton": _norm,
    }
    ops = getattr(torch.ops, NAMESPACE)
    return {getattr(ops, name).default: function for name, function in functions.items()}


# --- selective scan ---------------------------------------------------------------------------------------------


def _selective_scan(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, _ = args
    a = SelectiveScanArguments(*arguments)
    _refuse(a.cu_seqlens, a.seq_idx, a.directions)
    dtype = torch.promote_types(a.u.dtype, torch.float32)
    groups, u = a.u.shape[2], a.u.to(dtype)  # (B, L, G, E)
    dt = a.dt.to(dtype)
    if a.dt_bias is not None:
        dt = dt + a.dt_bias.to(dtype).view(groups, -1)
    dt = F.softplus(dt) if a.dt_softplus else dt
    y, final_states = _scan(u, dt, a.A.to(dtype), a.B.to(dtype), a.C.to(dtype), a.initial_states)
    if a.D is not None:
        y = y + a.D.to(dtype).view(groups, -1) * u
    if a.z is not None:
        y = y * F.silu(a.z.to(dtype))
    return y.to(a.u.dtype), final_states, final_states.new_zeros(0)


def _selective_scan_torch(u, dt, A, B, C, initial_states, cu_seqlens, seq_idx) -> tuple[Tensor, Tensor, Tensor]:
    _refuse(cu_seqlens, seq_idx)
    u, dt = (t.to(A.dtype).unflatten(2, (B.shape[2], -1)) for t in (u, dt))  # (B, L, G, E)
    y, final_states = _scan(u, dt, A, B.to(A.dtype), C.to(A.dtype), initial_states)
    return y.flatten(2), final_states, final_states.new_zeros(0)


def _scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scan u and dt (B, L, G, E), with B and C (B, L, G, N) or (D, N): y (B, L, G, E) and final states (B, D, N)."""
    groups = u.shape[2]
    start = u.new_zeros(u.shape[0], *A.shape) if initial is None else initial.to(u.dtype)

    def per_channel(m: Tensor) -> Tensor:  # (B, L, G, 1, N) or (G, E, N)
        return m.unflatten(0, (groups, -1)) if m.dim() == 2 else m.unsqueeze(3)

    inputs = (dt * u).unsqueeze(-1) * per_channel(B)  # (B, L, G, E, N)
    states = _linear_scan(dt.flatten(2), A, inputs.flatten(2, 3), start, LEVELS)  # (B, L, D, N)
    y = (states.unflatten(2, (groups, -1)) * per_channel(C)).sum(-1)  # equation 2b of arXiv 2312.00752
    return y, torch.cat([start.unsqueeze(1), states], dim=1)[:, -1]


def _linear_scan(dt: Tensor, A: Tensor, inputs: Tensor, start: Tensor, levels: int) -> Tensor:
    """Scan `h_t = exp(dt_t A) h_{t-1} + inputs_t` from `start`.

    Args:
        dt: (B, T, D) steps, or sums of the steps of chunks.
        A: (D, N).
        inputs: (B, T, D, N).
        start: (B, D, N).
        levels: times that the sequence may be cut into chunks.

    Returns:
        h (B, T, D, N).
    """
    length = dt.shape[1]
    if isinstance(length, int) and length <= CHUNK:
        return _steps(torch.exp(dt.unsqueeze(-1) * A), inputs, start)
    if levels == 0:
        return _over_pairs(dt, A, inputs, start)
    n_chunks = _n_chunks(length, CHUNK)
    missing = n_chunks * CHUNK - length
    # A padded step has dt = 0 and no input: it keeps the state.
    dt = F.pad(dt, (0, 0, 0, missing)).unflatten(1, (n_chunks, CHUNK))  # (B, c, Q, D)
    inputs = F.pad(inputs, (0, 0, 0, 0, 0, missing)).unflatten(1, (n_chunks, CHUNK))  # (B, c, Q, D, N)
    decay = torch.exp(dt.unsqueeze(-1) * A)
    local = _steps(decay.flatten(0, 1), inputs.flatten(0, 1), torch.zeros_like(inputs[:, :, 0]).flatten(0, 1))
    local = local.unflatten(0, (-1, n_chunks))  # (B, c, Q, D, N) from zero states
    ends = _linear_scan(dt.sum(2), A, local[:, :, -1], start, levels - 1)  # (B, c, D, N)
    before = torch.cat([start.unsqueeze(1), ends], dim=1)[:, :n_chunks]  # (B, c, D, N)
    decay_from_start = torch.exp(dt.cumsum(2).unsqueeze(-1) * A)  # (B, c, Q, D, N)
    return (local + decay_from_start * before.unsqueeze(2)).flatten(1, 2)[:, :length]


def _steps(decay: Tensor, inputs: Tensor, state: Tensor) -> Tensor:
    """Run a fixed number of steps one after the other: decay and inputs (B, T, D, N), state (B, D, N)."""
    states = []
    for decay_t, input_t in zip(decay.unbind(1), inputs.unbind(1), strict=True):
        state = decay_t * state + input_t
        states.append(state)
    return torch.stack(states, dim=1)


def _over_pairs(dt: Tensor, A: Tensor, inputs: Tensor, start: Tensor) -> Tensor:
    """Sum every earlier input, decayed by the steps since then: (B, T, D, N)."""
    elapsed, is_earlier = _segment_sums(dt.mT)  # (B, D, T, T), (T, T)
    decay = torch.exp(elapsed.permute(0, 2, 3, 1).unsqueeze(-1) * A)  # (B, T, T, D, N)
    decay = decay.masked_fill(~is_earlier[:, :, None, None], 0)
    decay_from_start = torch.exp(dt.cumsum(1).unsqueeze(-1) * A)  # (B, T, D, N)
    return (decay * inputs.unsqueeze(1)).sum(2) + decay_from_start * start.unsqueeze(1)


def _n_chunks(length: int, size: int) -> int:
    """Return the chunks that hold `length` steps; one more where it is dynamic, since a graph that may have one chunk
    or several is traced for several.
    """
    return (length + size - 1) // size + (not isinstance(length, int))


def _segment_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums of x (..., T) over j < k <= i as (..., T, T) at [i, j], 0 for i < j; and the mask i >= j (T, T).

    Each is summed from its own terms: a difference of running sums would lose the digits of the smaller ones.
    """
    step = torch.arange(x.shape[-1], device=x.device)
    terms = x.unsqueeze(-1).masked_fill(step.unsqueeze(1) <= step, 0)  # x_k at [k, j] for k > j
    return terms.cumsum(-2), step.unsqueeze(1) >= step


# --- SSD --------------------------------------------------------------------------------------------------------


def _ssd(*args: Any) -> tuple[Tensor, ...]:
    a = SSDArguments(*args[: len(SSDArguments._fields)])
    _refuse(a.cu_seqlens, a.seq_idx, a.directions)
    dtype = torch.promote_types(a.x.dtype, torch.float32)
    dt, x = a.dt.to(dtype), a.x.to(dtype)
    if a.dt_bias is not None:
        dt = dt + a.dt_bias.to(dtype)
    dt = (F.softplus(dt) if a.dt_softplus else dt).clamp(a.dt_min, a.dt_max)
    weights = dt if a.input_weights is None else a.input_weights.to(dtype)
    y, final_states = _chunked_ssd(x, dt * a.A.to(dtype), weights, a.B.to(dtype), a.C.to(dtype), a.initial_states)
    if a.D is not None:
        y = y + a.D.to(dtype) * x
    results = y.to(a.out_dtype), final_states
    # Numba's op returns the states that it saves too.
    return results if len(args) == len(a) else (*results, final_states.new_zeros(0))


def _ssd_torch(x, dt, A, B, C, input_weights, initial_states, cu_seqlens, seq_idx, _) -> tuple[Tensor, ...]:
    _refuse(cu_seqlens, seq_idx)
    x, B, C = (t.to(A.dtype) for t in (x, B, C))
    weights = dt if input_weights is None else input_weights.to(A.dtype)
    y, final_states = _chunked_ssd(x, dt * A, weights, B, C, initial_states)
    return y, final_states, final_states.new_zeros(0)


def _chunked_ssd(
    x: Tensor, log_decay: Tensor, weights: Tensor, B: Tensor, C: Tensor, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scan x (B, L, H, P), with log decays and weights of the inputs (B, L, H) and B and C (B, L, G, N).

    Returns:
        y (B, L, H, P) and the final states (B, H, P, N).
    """
    batch, length, heads, headdim = x.shape
    groups = B.shape[2]
    per_group = heads // groups
    chunk = min(length, SSD_CHUNK) if isinstance(length, int) else SSD_CHUNK
    n_chunks = _n_chunks(length, chunk)
    missing = n_chunks * chunk - length

    def chunks(t: Tensor) -> Tensor:
        """(B, L, ...) -> (B, c, Q, ...), zero where padded: such a step keeps the state."""
        return F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing)).unflatten(1, (n_chunks, chunk))

    B, C = (chunks(t).transpose(2, 3) for t in (B, C))  # (B, c, G, Q, N)
    log_decay = chunks(log_decay).transpose(2, 3)  # (B, c, H, Q)
    inputs = chunks(x * weights.unsqueeze(-1)).transpose(2, 3)  # (B, c, H, Q, P)

    # 1. Outputs of a chunk's own inputs: (L o C B^T) x, L the decays between steps.
    decays, total = _decay_matrix(log_decay)  # (B, c, H, Q, Q), (B, c, H)
    scores = (C @ B.mT).unsqueeze(3) * decays.unflatten(2, (groups, per_group))  # (B, c, G, E, Q, Q)
    y = scores @ inputs.unflatten(2, (groups, per_group))  # (B, c, G, E, Q, P)
    # 2. The state that each chunk adds.
    decayed = (inputs * decays[..., -1, :].unsqueeze(-1)).unflatten(2, (groups, per_group))
    added = decayed.mT @ B.unsqueeze(3)  # (B, c, G, E, P, N)
    # 3. States between chunks: those added, and the initial one, decayed over the chunks since.
    if initial is None:
        start = x.new_zeros(batch, 1, heads, headdim * B.shape[-1])
    else:
        start = initial.to(x.dtype).flatten(2).unsqueeze(1)  # (B, 1, H, P N)
    states = torch.cat([start, added.flatten(2, 3).flatten(3)], dim=1).transpose(1, 2)  # (B, H, c + 1, P N)
    between, _ = _decay_matrix(F.pad(total, (0, 0, 1, 0)).transpose(1, 2))  # (B, H, c + 1, c + 1)
    states = (between @ states).unflatten(3, (headdim, -1))  # (B, H, c + 1, P, N)
    # 4. Outputs of the state before a chunk: exp(a) C S.
    before = states[:, :, :-1].transpose(1, 2).unflatten(2, (groups, per_group))  # (B, c, G, E, P, N)
    decay_from_start = torch.exp(log_decay.cumsum(-1)).unsqueeze(-1)  # (B, c, H, Q, 1)
    y = y + (C.unsqueeze(3) @ before.mT) * decay_from_start.unflatten(2, (groups, per_group))
    y = y.flatten(2, 3).transpose(2, 3).flatten(1, 2)[:, :length]  # (B, L, H, P)
    return y, states[:, :, -1]


def _decay_matrix(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp of the sums over j < k <= i (..., T, T), 0 for i < j (listing 1); and the sum of all (...)."""
    sums, is_earlier = _segment_sums(log_decay)
    return torch.exp(sums).masked_fill(~is_earlier, 0), log_decay.sum(-1)


# --- convolution and norms --------------------------------------------------------------------------------------


def _causal_conv1d(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx, directions, _) -> tuple[Tensor, Tensor]:
    _refuse(cu_seqlens, seq_idx, directions)
    y, final_states = _convolve(x.flatten(2), weight, bias, silu, initial_states)
    return y.to(x.dtype).view(x.shape), final_states.to(x.dtype)


def _causal_conv1d_torch(x, weight, bias, silu, initial_states, cu_seqlens, seq_idx) -> tuple[Tensor, Tensor]:
    _refuse(cu_seqlens, seq_idx)
    return _convolve(x, weight, bias, silu, initial_states)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Convolve x (B, L, D) after the initial states (B, K - 1, D): y (B, L, D), and the last K - 1 inputs."""
    dtype, width = torch.promote_types(x.dtype, torch.float32), weight.shape[1]
    start = x.new_zeros(x.shape[0], width - 1, x.shape[2], dtype=dtype) if initial is None else initial.to(dtype)
    inputs = torch.cat([start, x.to(dtype)], dim=1)  # (B, K - 1 + L, D)
    bias = None if bias is None else bias.to(dtype)
    y = F.conv1d(inputs.mT, weight.to(dtype).unsqueeze(1), bias, groups=x.shape[2]).mT  # (B, L, D)
    return F.silu(y) if silu else y, inputs[:, x.shape[1] :]


def _norm(x, residual, weight, z, eps, group_size, norm_before_gate, residual_dtype) -> tuple[Tensor, Tensor, Tensor]:
    if residual is None:
        y = norm_reference.rms_norm(x, weight, z, eps, group_size, norm_before_gate)
        return y, x.new_zeros(0, dtype=residual_dtype), x.new_zeros(0)
    y, residual_out = norm_reference.add_rms_norm(x, residual, weight, eps, residual_dtype)
    return y, residual_out, x.new_zeros(0)


def _refuse(cu_seqlens: Tensor | None, seq_idx: Tensor | None, directions: list[int] | None = None) -> None:
    for name, value in (("cu_seqlens", cu_seqlens), ("seq_idx", seq_idx), ("directions", directions or None)):
        if value is not None:
            raise NotImplementedError(f"{name} must be None in a graph that is decomposed to ATen ops")
