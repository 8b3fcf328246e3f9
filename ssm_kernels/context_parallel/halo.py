"""The halo exchange of the convolution: the inputs before a rank's first step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.validation import check_tensor
from .exchange import all_gather, depend_on
from .sharding import RankShard, SequenceSharding


def conv_halo(
    sharding: SequenceSharding | None,
    x: Tensor,
    width: int,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Exchange the inputs with which this rank can convolve its shard alone.

    A backward that convolves again need not communicate.

    Args:
        sharding: steps of each rank; None returns the arguments as they are.
        x: (B, L, D) this rank's steps.
        width: K, taps of the convolution.
        initial_states: (B or S, K - 1, D) inputs before the complete sequence, or None.
        cu_seqlens: (S + 1,) bounds of the complete sequence, or None.

    Returns:
        `x`, `initial_states` and `cu_seqlens` for the local `causal_conv1d`.

    Raises:
        ValueError: the length is not this rank's, or a shape does not fit.
    """
    if sharding is None:
        return x, initial_states, cu_seqlens
    check_tensor("x", x, ("B", "L", "D"))
    shard = RankShard.of(sharding, "x", x, cu_seqlens)
    n_halo = width - 1
    shard.check_states(initial_states, x, (n_halo, x.shape[2]))
    last = x[:, max(0, x.shape[1] - n_halo) :]
    last = F.pad(last, (0, 0, n_halo - last.shape[1], 0))  # (B, K - 1, D), zeros before a shorter shard
    ends = all_gather(last, x, sharding.group)  # (W, B, K - 1, D)
    x = depend_on(x, ends)
    if initial_states is not None:  # which may come from an exchange, and have no use on this rank
        x = depend_on(x, initial_states)
    if shard.incoming is None:
        return x, initial_states, shard.cu_seqlens
    rows = shard.rows(shard.incoming, shard.incoming + 1)
    halo = _halo(shard, shard.incoming, ends, None if initial_states is None else initial_states[rows])
    if shard.cu_seqlens is None:
        return x, halo, None
    if initial_states is None:
        initial_states = x.new_zeros(shard.n_sequences, n_halo, x.shape[2])
    # The halo takes the row of the incoming sequence. (S, K - 1, D)
    rows_around = initial_states[: rows.start], halo.to(initial_states.dtype), initial_states[rows.stop :]
    return x, torch.cat(rows_around), shard.cu_seqlens


def _halo(shard: RankShard, incoming: int, ends: Tensor, initial_states: Tensor | None) -> Tensor:
    """Collect the K - 1 inputs before this shard from earlier ranks, and before them the initial states.

    Args:
        shard: this rank's shard.
        incoming: sequence that the inputs are of.
        ends: (W, B, K - 1, D) last inputs of each rank.
        initial_states: (B, K - 1, D) of the incoming sequence, or None for zeros.

    Returns:
        (B, K - 1, D).
    """
    offsets, n_halo = shard.sharding.offsets, ends.shape[2]
    sequence_start, start = shard.bounds[incoming], offsets[shard.rank]
    found = []
    n_missing = n_halo - (start - sequence_start)
    if n_missing > 0:
        zeros = ends.new_zeros(ends.shape[1], n_missing, ends.shape[3])
        found = [zeros if initial_states is None else initial_states[:, -n_missing:]]
    step = max(sequence_start, start - n_halo)
    while step < start:
        rank = shard.owner(step)
        stop = offsets[rank + 1]
        found.append(ends[rank, :, n_halo - (stop - step) :])
        step = stop
    return torch.cat([f.to(ends.dtype) for f in found], 1) if found else ends[0]
