"""The forwards that the Mamba and Mamba-2 mixers share, around the part that each has of its own."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, overload

import torch
from torch import Tensor, nn

from .._core.slots import StateSlots
from .state import AnyMixerState, MixerOutput, MixerState, StateLayout, check_slots


class StatefulMixer(nn.Module):
    """A mixer of `in_proj`, a causal convolution, a scan and `out_proj`, with the state of the two in the middle."""

    in_proj: nn.Linear

    @abstractmethod
    def _state_layout(self) -> StateLayout: ...

    @abstractmethod
    def _run(
        self,
        projected: Tensor,
        state: AnyMixerState | None,
        cu_seqlens: Tensor | None,
        in_place: bool,
        slots: StateSlots | None = None,
    ) -> tuple[Tensor, MixerState | None]:
        """Mix the output of `in_proj` to (B, L, D), and return the final state unless it is written into `state`."""

    @overload
    def new_state(self, batch: int) -> MixerState: ...

    @overload
    def new_state(self, batch: int, dtype: torch.dtype | None) -> AnyMixerState: ...

    def new_state(self, batch: int, dtype: torch.dtype | None = None) -> AnyMixerState:
        """Make the state before the first token.

        Args:
            batch: number of sequences.
            dtype: of the scan's part: bfloat16, float16 or int8 for a `NarrowMixerState`; float32, or float64 in a
                model of that dtype, by default.

        Returns:
            zeros on the mixer's device.

        Raises:
            TypeError: another dtype.
        """
        layout = self._state_layout()
        return layout.zeros(batch) if dtype in (None, layout.ssm_dtype) else layout.narrow_zeros(batch, dtype)

    @overload
    def forward(
        self,
        hidden: Tensor,
        state: AnyMixerState | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        slots: StateSlots | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        hidden: Tensor,
        state: MixerState | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        return_state: Literal[True],
    ) -> MixerOutput: ...

    def forward(
        self,
        hidden: Tensor,
        state: AnyMixerState | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        return_state: bool = False,
        slots: StateSlots | None = None,
    ) -> Tensor | MixerOutput:
        """Mix over time.

        Args:
            hidden: (B, L, D).
            state: state before the first step, one row for each sequence; zeros by default. Without `return_state` it
                is updated in place, without gradients.
            cu_seqlens: (S + 1,) bounds of sequences packed in one row.
            return_state: return the final state too, with gradients, and leave `state` as it is.
            slots: take this forward as a decoding step of a few tokens on slots of `state`, which is then a pool. No
                gradients: call it within `torch.no_grad()`.

        Returns:
            (B, L, D); with `return_state`, a `MixerOutput`.

        Raises:
            TypeError, ValueError: `state` or `slots` does not fit; the message names the part.
        """
        if slots is not None:
            check_slots(state, cu_seqlens, return_state)
        y, final = self._run(self.in_proj(hidden), state, cu_seqlens, not return_state, slots)
        return y if final is None else MixerOutput(y, final)

    def mix(self, projected: Tensor, state: MixerState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Run everything after `in_proj`.

        Args:
            projected: (B, L, ...) output of `in_proj`: x and the gate z of `Mamba`; see `Mamba2.split_projected`.
            state, cu_seqlens: as in `forward`.

        Returns:
            (B, L, D).
        """
        return self._run(projected, state, cu_seqlens, in_place=True)[0]
