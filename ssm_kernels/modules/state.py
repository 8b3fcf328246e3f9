"""The recurrent state of a mixer: its initial value, the states that a forward starts from, its update in place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..context_parallel import current_sharding, gather_final_states


class MixerState(NamedTuple):
    """Recurrent state of a batch of sequences. Its size does not depend on their length."""

    conv: Tensor
    """(B, K - 1, channels) last inputs of the convolution."""
    ssm: Tensor
    """State of the scan: (B, E, N), or (B, H, P, N) in Mamba-2. At least float32."""


class InitialStates(NamedTuple):
    """States that the ops of one forward start from; None is zeros."""

    conv: Tensor | None
    ssm: Tensor | None


def zero_state(conv_weight: Tensor, batch: int, ssm_shape: tuple[int, ...]) -> MixerState:
    """Return zeros on the device of the convolution's weight (channels, 1, K).

    Args:
        conv_weight: weight of the mixer's convolution.
        batch: sequences.
        ssm_shape: shape of one sequence's scan state.
    """
    channels, _, width = conv_weight.shape
    conv = conv_weight.new_zeros(batch, width - 1, channels)
    dtype = torch.promote_types(conv_weight.dtype, torch.float32)
    return MixerState(conv, conv_weight.new_zeros(batch, *ssm_shape, dtype=dtype))


def initial_states(state: MixerState | None) -> InitialStates:
    """Return the states that a forward starts from: copies where a backward may need them after the update."""
    if state is None:
        return InitialStates(None, None)
    if torch.is_grad_enabled():
        return InitialStates(state.conv.clone(), state.ssm.clone())
    return InitialStates(state.conv, state.ssm)


def update_state(
    state: MixerState | None, final_conv: Tensor, final_ssm: Tensor, length: int, cu_seqlens: Tensor | None
) -> None:
    """Write the states after a forward into `state`.

    Within `context_parallel` every rank writes those after the complete sequences.

    Args:
        state: updated in place; None does nothing.
        final_conv, final_ssm: final states of the ops.
        length: steps in the forward, on this rank.
        cu_seqlens: (S + 1,) bounds of packed sequences, or None.
    """
    if state is not None:
        for part, final in zip(state, (final_conv, final_ssm), strict=True):
            part.copy_(gather_final_states(current_sharding(), final.detach(), length, cu_seqlens))


def is_decoding_step(projected: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether a forward with a state may run the step ops: (B, 1, ...), no gradients, no other rank."""
    can_step = current_sharding() is None and not torch.is_grad_enabled()
    return can_step and cu_seqlens is None and projected.shape[1] == 1
