"""The recurrent state of a mixer: its initial value and checks, the states that a forward starts from, its update."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..context_parallel import current_sharding, gather_final_states
from ..mamba3 import Mamba3States
from .conv import conv_weight


class MixerState(NamedTuple):
    """Recurrent state of a batch of sequences. Its size does not depend on their length."""

    conv: Tensor
    """(B, K - 1, channels) last inputs of the convolution."""
    ssm: Tensor
    """State of the scan: (B, E, N), or (B, H, P, N) in Mamba-2. At least float32."""


AnyState = TypeVar("AnyState", MixerState, Mamba3States)


class MixerOutput(NamedTuple):
    """Result of a mixer with `return_state=True`."""

    y: Tensor
    """(B, L, D)"""
    state: MixerState
    """State after the last step of each sequence. Gradients flow through it."""


class InitialStates(NamedTuple):
    """States that the ops of one forward start from; None is zeros."""

    conv: Tensor | None
    ssm: Tensor | None


class StateLayout(NamedTuple):
    """Sizes, dtypes and device of a mixer's state."""

    conv_shape: tuple[int, ...]
    """(K - 1, channels)"""
    ssm_shape: tuple[int, ...]
    conv_dtype: torch.dtype
    ssm_dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, conv: nn.Module, ssm_shape: tuple[int, ...]) -> StateLayout:
        """Return the layout for a mixer's `conv1d` and the shape of one sequence's scan state."""
        weight, _ = conv_weight("conv1d", conv)  # (channels, K)
        channels, width = weight.shape
        ssm_dtype = torch.promote_types(weight.dtype, torch.float32)
        return cls((width - 1, channels), ssm_shape, weight.dtype, ssm_dtype, weight.device)

    def zeros(self, batch: int) -> MixerState:
        """Return the state before the first token of `batch` sequences."""
        return MixerState(
            torch.zeros(batch, *self.conv_shape, dtype=self.conv_dtype, device=self.device),
            torch.zeros(batch, *self.ssm_shape, dtype=self.ssm_dtype, device=self.device),
        )

    def check(self, state: object, batch: int) -> None:
        """Check that a forward of `batch` sequences can start from `state`.

        Raises:
            TypeError: not a state, or a dtype that loses digits of the mixer's own.
            ValueError: another batch, the sizes of another layer, or another device.
        """
        if not isinstance(state, MixerState):
            raise TypeError(f"state must be a MixerState, got {type(state).__name__}")
        layouts = ((self.conv_shape, self.conv_dtype), (self.ssm_shape, self.ssm_dtype))
        for name, t, (shape, dtype) in zip(MixerState._fields, state, layouts, strict=True):
            if t.shape != (batch, *shape):
                expected = ", ".join(map(str, (batch, *shape)))
                rows = f"a row for each of {batch} sequences"
                raise ValueError(f"state.{name} must have shape ({expected}), {rows}; got {tuple(t.shape)}")
            check_digits(f"state.{name}", t, dtype)
            if t.device != self.device:
                raise ValueError(f"state.{name} must be on {self.device} like the layer, got {t.device}")


def check_digits(name: str, t: Tensor, dtype: torch.dtype) -> None:
    """Raise a TypeError if the dtype of a part of a state loses digits of the mixer's own."""
    if t.dtype != dtype and (not t.is_floating_point() or torch.promote_types(t.dtype, dtype) != t.dtype):
        raise TypeError(f"{name} must hold all digits of {dtype}, as new_state does; got {t.dtype}")


def check_no_gradients(state: MixerState | Mamba3States) -> None:
    """Raise a ValueError if gradients would flow to a state that a forward overwrites."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in state):
        raise ValueError("state requires gradients, so it cannot be updated in place: pass return_state=True")


def check_slots(state: object, cu_seqlens: Tensor | None, return_state: bool) -> None:
    """Raise a ValueError unless a forward with slots is a decoding step on a pool of states."""
    if state is None or return_state or cu_seqlens is not None:
        wrong = "no state" if state is None else "return_state" if return_state else "cu_seqlens apart from them"
        raise ValueError(f"slots need a pool as the state, which is updated in place, and hold cu_seqlens; got {wrong}")
    if torch.is_grad_enabled():
        raise ValueError("slots are for decoding, without gradients: call the step within torch.no_grad()")
    if current_sharding() is not None:
        raise ValueError("slots cannot be used within context_parallel")


def initial_states(state: MixerState | None, in_place: bool) -> InitialStates:
    """Return the states that a forward starts from: copies where a backward may need them after the update.

    Args:
        state: state before the first step; None is zeros.
        in_place: whether the forward will write the final states into `state`.

    Raises:
        ValueError: gradients would flow to a state that the forward overwrites.
    """
    if state is None:
        return InitialStates(None, None)
    if not in_place or not torch.is_grad_enabled():
        return InitialStates(state.conv, state.ssm)
    check_no_gradients(state)
    return InitialStates(state.conv.clone(), state.ssm.clone())


def copied(state: AnyState) -> AnyState:
    """Return a copy that a step op may change, or that stays as it is."""
    return state._make(t.clone() for t in state)


def finish(
    state: MixerState | None,
    final_conv: Tensor,
    final_ssm: Tensor,
    layout: StateLayout,
    length: int,
    cu_seqlens: Tensor | None,
    in_place: bool,
) -> MixerState | None:
    """Write the states after a forward into `state`, without gradients; or return them, with gradients.

    Within `context_parallel` every rank has those after the complete sequences.

    Args:
        state: state before the first step.
        final_conv, final_ssm: final states of the ops.
        layout: dtypes of the result where `state` is None; else they are those of `state`.
        length: steps in the forward, on this rank.
        cu_seqlens: (S + 1,) bounds of packed sequences, or None.
        in_place: whether to write them into `state`, if there is one.

    Returns:
        the final state, or None in place.
    """
    if in_place and state is None:
        return None
    sharding = current_sharding()
    finals = [gather_final_states(sharding, t, length, cu_seqlens) for t in (final_conv, final_ssm)]
    if not in_place:
        dtypes = (layout.conv_dtype, layout.ssm_dtype) if state is None else (state.conv.dtype, state.ssm.dtype)
        return MixerState(*(t.to(dtype) for t, dtype in zip(finals, dtypes, strict=True)))
    assert state is not None
    for part, final in zip(state, finals, strict=True):
        part.copy_(final.detach())
    return None


def n_sequences(projected: Tensor, cu_seqlens: Tensor | None) -> int:
    """Return the number of sequences in a forward of (B, L, ...): S of a pack, or B."""
    return projected.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1


def is_decoding_step(projected: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether a forward with a state may run the step ops: (B, 1, ...), no gradients, no other rank.

    An exported graph scans its one step: it has no op that changes a tensor, so every op of it can be decomposed.
    """
    can_step = current_sharding() is None and not torch.is_grad_enabled() and not torch.compiler.is_exporting()
    return can_step and cu_seqlens is None and projected.shape[1] == 1
