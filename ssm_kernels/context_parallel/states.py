"""Final states of the complete sequences, from those after each rank's shard."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .sharding import RankShard, SequenceSharding


def gather_final_states(
    sharding: SequenceSharding | None, final_states: Tensor, length: int, cu_seqlens: Tensor | None
) -> Tensor:
    """Give every rank the final states of the complete sequences. Without gradients.

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
    is_owned = torch.tensor([o == shard.rank for o in owners], device=final_states.device)
    is_owned = is_owned.view(-1, *[1] * (final_states.dim() - 1))  # (S or 1, 1, ...)
    with torch.no_grad():
        # A sum in which every state has one addend that is not zero.
        gathered = torch.where(is_owned, final_states, 0)
        dist.all_reduce(gathered, group=sharding.group)
    return gathered
