"""SSD in PyTorch operations alone: the formula of the derivatives that no kernel has.

Chunks are matrix products, as in listing 1 of arXiv 2405.21060; all of them are in memory at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._core.differentiable import PaddedSequences, linear_recurrence, softplus, steps_along, take_steps

CHUNK_SIZE = 32
"""Steps of a chunk, at most."""


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    directions: Sequence[int] = (),
    height: int = 1,
    input_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan with the arguments of `ScanArguments`.

    Returns:
        y (B, L, H, P) and the final states (rows, H, P, N), in float32, or float64 where x is.
    """
    length, heads = x.shape[1:3]
    heads_each = heads // B.shape[2]  # E heads of a group
    dtype = torch.promote_types(x.dtype, torch.float32)
    runs = max(1, len(directions))
    order = steps_along(directions, height, length, x.device) if directions else None  # (L, K)
    packing = PaddedSequences(x, cu_seqlens, seq_idx)

    def along(m: Tensor, order: Tensor | None) -> Tensor:
        """(B, L, H or G, ...) -> the same, each run of heads or groups at its own positions."""
        return m if order is None else take_steps(m.unflatten(2, (runs, -1)), order).flatten(2, 3)

    def to_steps(m: Tensor) -> Tensor:
        return packing.gather(along(m, order)).to(dtype)

    x, dt, B, C = (to_steps(m) for m in (x, dt, B, C))  # (S, T, H, P), (S, T, H), (S, T, G, N) twice
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    dt = softplus(dt) if dt_softplus else dt
    dt = dt.clamp(*dt_limit).masked_fill(~packing.has_step(dt), 0)  # a state stays as it is
    B, C = (m.repeat_interleave(heads_each, 2) for m in (B, C))  # (S, T, H, N)
    if initial_states is None:
        initial = x.new_zeros(len(x), *x.shape[2:], B.shape[3])
    else:
        initial = packing.initial(initial_states.to(dtype))  # (S, H, P, N)
    weights = dt if input_weights is None else to_steps(input_weights)
    y, final_states = _scan_chunks(x * weights.unsqueeze(-1), dt * A.to(dtype), B, C, initial)
    if D is not None:
        y = y + D.to(dtype) * x
    y = along(packing.scatter(y), None if order is None else order.argsort(0))
    return y, packing.final(final_states)


def _scan_chunks(inputs: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """inputs (S, T, H, P), log_decay (S, T, H), B and C (S, T, H, N), initial (S, H, P, N) -> y, last states."""
    steps = inputs.shape[1]
    if steps == 0:
        return inputs, initial
    size = min(CHUNK_SIZE, steps)  # Q
    inputs, log_decay, B, C = (_chunks(m, size) for m in (inputs, log_decay, B, C))  # (S, m, H, Q, ...)

    # Listing 1, step 1: sums of the log decays of steps j + 1 to i. As differences of running sums they would cancel.
    below = torch.ones(size, size, dtype=torch.bool, device=inputs.device).tril(-1)
    sums = torch.where(below, log_decay.unsqueeze(-1), 0).cumsum(-2)  # (S, m, H, Q, Q)
    decay = sums.masked_fill(below.T, -torch.inf).exp()
    y_of_inputs = (decay * (C @ B.mT)) @ inputs  # (S, m, H, Q, P)
    # Step 2: the state that each chunk adds.
    chunk_states = (inputs * decay[..., -1, :].unsqueeze(-1)).mT @ B  # (S, m, H, P, N)
    # Step 3: from chunk to chunk.
    from_start = log_decay.cumsum(-1).exp().unsqueeze(-1)  # (S, m, H, Q, 1)
    states = linear_recurrence(from_start[..., -1:, :], chunk_states, initial)  # (S, m, H, P, N)
    before = torch.cat([initial.unsqueeze(1), states[:, :-1]], 1)
    # Step 4: the output of the state before the chunk.
    y = y_of_inputs + (C @ before.mT) * from_start  # (S, m, H, Q, P)
    return y.transpose(2, 3).flatten(1, 2)[:, :steps], states[:, -1]


def _chunks(m: Tensor, size: int) -> Tensor:
    """(S, T, H, ...) -> (S, chunks, H, Q, ...), zero after the last step."""
    missing = -m.shape[1] % size
    padded = torch.cat([m, m.new_zeros(len(m), missing, *m.shape[2:])], 1)
    return padded.unflatten(1, (-1, size)).transpose(2, 3)
