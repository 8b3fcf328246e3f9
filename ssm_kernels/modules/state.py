"""The recurrent state of a mixer: its initial value and checks, the states that a forward starts from, its update."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._core.slots import StateSlots, token_seeds
from .._core.state_format import NARROW_DTYPES, check_format, decode_state, write_states
from ..context_parallel import current_sharding, gather_final_states
from ..mamba3 import Mamba3States
from .conv import conv_weight


class MixerState(NamedTuple):
    """Recurrent state of a batch of sequences. Its size does not depend on their length."""

    conv: Tensor
    """(B, K - 1, channels) last inputs of the convolution."""
    ssm: Tensor
    """State of the scan: (B, E, N), or (B, H, P, N) in Mamba-2. At least float32."""


class NarrowMixerState(NamedTuple):
    """A `MixerState` with its scan part in fewer bits, rounded stochastically at every write. For inference, in place.

    Its draws depend on the number of writes alone, so that a sequence has the same state in any batch and any slot.
    """

    conv: Tensor
    """(B, K - 1, channels) last inputs of the convolution."""
    ssm: Tensor
    """State of the scan in bfloat16, float16 or int8."""
    ssm_scale: Tensor
    """float32 scales of its rows in int8, of the shape of `ssm` without N; (B, 0) in other formats."""
    rand_seed: Tensor
    """(B,) int64 seed of the next write: the number of those before."""


class NarrowMamba3States(NamedTuple):
    """`Mamba3States` whose `ssm` is kept in fewer bits, as in `NarrowMixerState`."""

    angles: Tensor
    """(B, H, K)"""
    ssm: Tensor
    """(B, H, P, N) in bfloat16, float16 or int8."""
    B: Tensor
    """(B, R, H, N)"""
    x: Tensor
    """(B, H, P)"""
    ssm_scale: Tensor
    """(B, H, P) float32 in int8; (B, 0) in other formats."""
    rand_seed: Tensor
    """(B,) int64"""


AnyMixerState = MixerState | NarrowMixerState
LayerState = MixerState | NarrowMixerState | Mamba3States | NarrowMamba3States
"""State of any mixer, in any format."""
NARROW_STATES = (NarrowMixerState, NarrowMamba3States)


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

    def narrow_zeros(self, batch: int, dtype: torch.dtype) -> NarrowMixerState:
        """Return the state before the first token, of a narrow format."""
        wide = self.zeros(batch)
        return NarrowMixerState(wide.conv, *narrow_parts(wide.ssm, dtype))

    def check(self, state: object, batch: int, in_place: bool) -> None:
        """Check that a forward of `batch` sequences can start from `state`.

        Raises:
            TypeError: not a state, or a dtype that loses digits of the mixer's own.
            ValueError: another batch, the sizes of another layer, another device, or a narrow state that is to be
                returned.
        """
        if isinstance(state, NarrowMixerState):
            check_narrow(state, in_place)
            # Its parts are checked as those of a state whose scan part has the mixer's own dtype.
            state = MixerState(state.conv, state.ssm.new_empty((), dtype=self.ssm_dtype).expand(state.ssm.shape))
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


def narrow_parts(zeros: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the zero state of a scan in a narrow format, its scales, and its seeds.

    Args:
        zeros: (B, ..., N) the state in the mixer's own dtype.
        dtype: bfloat16, float16 or int8.

    Raises:
        TypeError: another dtype.
    """
    if dtype not in NARROW_DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or int8, got {str(dtype).removeprefix('torch.')}")
    batch = len(zeros)
    scale_shape = tuple(zeros.shape[:-1]) if dtype == torch.int8 else (batch, 0)
    return (
        torch.zeros_like(zeros, dtype=dtype),
        zeros.new_zeros(scale_shape, dtype=torch.float32),
        zeros.new_zeros(batch, dtype=torch.int64),
    )


def check_narrow(state: NarrowMixerState | NarrowMamba3States, in_place: bool) -> None:
    """Raise a ValueError or TypeError if a narrow state has parts that do not fit, or a forward would return it."""
    if state.ssm.dtype not in NARROW_DTYPES:
        raise TypeError(f"state.ssm must be bfloat16, float16 or int8 in a narrow state, got {state.ssm.dtype}")
    if not in_place:
        raise ValueError("return_state must be False with a narrow state, which has no gradients; got True")
    check_format(state.ssm, _scale(state), state.rand_seed, len(state.ssm))


def _scale(state: NarrowMixerState | NarrowMamba3States) -> Tensor | None:
    return state.ssm_scale if state.ssm.dtype == torch.int8 else None


def read_ssm(state: LayerState) -> Tensor:
    """Return the scan part of a state as a scan starts from it: at least float32."""
    return decode_state(state.ssm, _scale(state)) if isinstance(state, NARROW_STATES) else state.ssm


def write_ssm(state: LayerState, final: Tensor) -> None:
    """Write the final state of a scan, (B, ..., N), to a state."""
    if not isinstance(state, NARROW_STATES):
        state.ssm.copy_(final.detach())
        return
    write_states(state.ssm, _scale(state), slice(None), final.detach().float(), state.rand_seed)
    state.rand_seed.add_(1)


def format_options(state: LayerState, slots: StateSlots | None) -> dict[str, Any]:
    """Return the arguments of a step op that tell the format of a state."""
    if not isinstance(state, NARROW_STATES):
        return {}
    seeds = state.rand_seed if slots is None else state.rand_seed[slots.sources.clamp(min=0)]
    return {"state_scale": _scale(state), "rand_seed": seeds}


def count_writes(state: LayerState, slots: StateSlots | None, batch: int, tokens: int) -> None:
    """Advance the seeds of a narrow state after a step of (batch, tokens, ...)."""
    if not isinstance(state, NARROW_STATES):
        return
    if slots is None:
        state.rand_seed.add_(tokens)
        return
    plan = slots.plan(state.rand_seed, batch, tokens)
    seeds = token_seeds(state.rand_seed[slots.sources.clamp(min=0)], plan, batch, tokens)
    assert seeds is not None
    plan.write(state.rand_seed, seeds + 1)


def check_no_gradients(state: LayerState) -> None:
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


def initial_states(state: AnyMixerState | None, in_place: bool) -> InitialStates:
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
        return InitialStates(state.conv, read_ssm(state))
    check_no_gradients(state)
    return InitialStates(state.conv.clone(), read_ssm(state).clone())


def copied(state: Mamba3States) -> Mamba3States:
    """Return a copy that a step op may change, or that stays as it is."""
    return state._make(t.clone() for t in state)


def finish(
    state: AnyMixerState | None,
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
    final_conv, final_ssm = (gather_final_states(sharding, t, length, cu_seqlens) for t in (final_conv, final_ssm))
    if not in_place:
        dtypes = (layout.conv_dtype, layout.ssm_dtype) if state is None else (state.conv.dtype, state.ssm.dtype)
        return MixerState(final_conv.to(dtypes[0]), final_ssm.to(dtypes[1]))
    assert state is not None
    state.conv.copy_(final_conv.detach())
    write_ssm(state, final_ssm)
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
