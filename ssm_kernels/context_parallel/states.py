"""Final states of the complete sequences, from those after each rank's shard."""

from __future__ import annotations

import torch
from torch import Tensor

from .exchange import all_gather
from .sharding import RankShard, SequenceSharding


def gather_final_states(
    sharding: SequenceSharding | None, final_states: Tensor, length: int, cu_seqlens: Tensor | None
) -> Tensor:
    """Give every rank the final states of the complete sequences. Gradients flow back to the ranks that own them.

    Args:
        sharding: steps of each rank; None returns the states as they are.
        final_states: (B or S, ...) states after this rank's shard.
        length: steps on this rank.
        cu_seqlens: (S + 1,) bounds of the complete sequence, or None.

    Returns:
        states like `final_states`, equal on every rank.
    """
    if sharding is None:
        return final_states
    like = final_states.new_empty(1 if cu_seqlens is not None else final_states.shape[0], length)
    shard = RankShard.of(sharding, "x", like, cu_seqlens)
    owners = [shard.owner(max(0, end - 1)) for end in shard.bounds[1:]]
    rows = torch.arange(len(final_states), device=final_states.device)
    received = all_gather(final_states, final_states, sharding.group)  # (W, B or S, ...)
    # One owner of each packed sequence, or one of all rows.
    return received[torch.tensor(owners, device=rows.device), rows]
