"""The caches of decoding: the position of a batch, and the states of each mixer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..causal_conv1d import causal_conv1d_varlen_states

if TYPE_CHECKING:
    from ....modules import MixerState


@dataclass
class InferenceParams:
    """The position of a batch in decoding, and the caches of its layers, by layer index."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    """Tokens before the next one, in all sequences; 0 is a prompt, which fills the caches."""
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None
    """(B,) `seqlen_offset` of each sequence, on the device."""

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Start again in the same memory.

        Args:
            max_seqlen, max_batch_size: tokens and sequences of the next batch, at most.
        """
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


class CachedMixer:
    """The two caches of a mixer: `conv_state`, its last K inputs (B, channels, K), and `ssm_state`."""

    layer_idx: int | None

    if TYPE_CHECKING:  # of `ssm_kernels.modules.Mamba` and `Mamba2`, and of the subclasses

        def new_state(self, batch: int) -> MixerState: ...

        def mix(
            self, projected: Tensor, state: MixerState | None = None, cu_seqlens: Tensor | None = None
        ) -> Tensor: ...

        def allocate_inference_cache(
            self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
        ) -> tuple[Tensor, Tensor]: ...

    def _get_states_from_cache(
        self, inference_params: InferenceParams, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the caches of this layer, allocated on first use; `initialize_states` zeroes them.

        Raises:
            ValueError: the layer has no `layer_idx`, or the caches are of another batch size.
        """
        conv_state, ssm_state = states_from_cache(self, self.layer_idx, inference_params, batch_size, initialize_states)
        return conv_state, ssm_state

    def _prefill(
        self, projected: Tensor, conv_inputs: Tensor, caches: tuple[Tensor, Tensor], cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Run a prompt, or packed ones, from its first token and fill the caches.

        Args:
            projected: (B, L, ...) output of `in_proj`.
            conv_inputs: (B, L, channels) those of the convolution.
            caches: conv_state and ssm_state, written in place.
            cu_seqlens: (S + 1,) bounds of packed prompts, or None.

        Returns:
            (B, L, D).
        """
        conv_state, ssm_state = caches
        # A state holds K - 1 inputs in the parameters' dtype; the caches hold K, in any.
        state = self.new_state(len(conv_state))
        out = self.mix(projected, state, cu_seqlens)
        width, conv_inputs = conv_state.shape[2], conv_inputs.detach()
        if cu_seqlens is None:  # the last K, after zeros where the prompt is shorter
            last = F.pad(conv_inputs.transpose(1, 2), (width - conv_inputs.shape[1], 0))  # (B, channels, K)
        else:
            last = causal_conv1d_varlen_states(conv_inputs.squeeze(0), cu_seqlens, width)  # (S, channels, K)
        conv_state.copy_(last)
        ssm_state.copy_(state.ssm)
        return out


class _HasCaches(Protocol):
    """A mixer whose caches can be allocated."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, ...]: ...


def states_from_cache(
    mixer: _HasCaches,
    layer_idx: int | None,
    inference_params: InferenceParams,
    batch_size: int,
    initialize_states: bool = False,
) -> tuple[Tensor, ...]:
    """Return the caches of a layer, allocated on first use; `initialize_states` zeroes them.

    Raises:
        ValueError: the layer has no `layer_idx`, or the caches are of another batch size.
    """
    if layer_idx is None:
        raise ValueError(f"{type(mixer).__name__} needs a layer_idx for inference_params, got None")
    caches = inference_params.key_value_memory_dict
    if layer_idx not in caches:
        caches[layer_idx] = mixer.allocate_inference_cache(batch_size, inference_params.max_seqlen)
    elif initialize_states:
        for cache in caches[layer_idx]:
            cache.zero_()
    found = caches[layer_idx]
    if len(found[0]) != batch_size:
        raise ValueError(
            f"inference_params holds caches of layer {layer_idx} for {len(found[0])} sequences, got {batch_size}"
        )
    return found


def check_one_token(hidden_states: Tensor) -> None:
    """Raise a ValueError unless the shape is (B, 1, D)."""
    if hidden_states.dim() != 3 or hidden_states.shape[1] != 1:
        raise ValueError(f"hidden_states must have shape (B, 1, D), got {tuple(hidden_states.shape)}")
