"""Interface of a language model for generation and scoring. `MambaLM` implements it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ssm_kernels.modules import LayerState

from ..config import LMConfig
from ..tokenizer import Tokenizer

LMState = list[LayerState]
"""Recurrent state of a batch of sequences: one tuple per layer, each tensor of it with the batch first."""


class LMOutput(NamedTuple):
    """Result of a language model's forward pass."""

    logits: Tensor
    """(B, L, padded vocabulary); float32 unless the model is float64."""
    hidden: Tensor
    """(B, L, D) after the final norm."""
    state: LMState | None = None
    """State after the last step of each sequence, with gradients; with `return_state` only."""


class LanguageModel(Protocol):
    """A causal language model with a recurrent state."""

    config: LMConfig
    tokenizer: Tokenizer | None

    @property
    def device(self) -> torch.device: ...

    # (input_ids, *, inputs_embeds, state, cu_seqlens, logits_at, return_state, slots) -> LMOutput
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def embed(self, input_ids: Tensor) -> Tensor: ...

    def new_state(self, batch: int, dtype: torch.dtype | None = None) -> LMState: ...

    def obstacle_to_fusing(self) -> str | None: ...

    def fuse_step(self, state: LMState, tokens: int = 1) -> Callable[[Tensor], Tensor | None]: ...

    def parameters(self) -> Iterator[Tensor]: ...

    def buffers(self) -> Iterator[Tensor]: ...
