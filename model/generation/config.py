"""Generation settings as plain values. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ..fields import Count, Interval, Seed, check_fields

StateDtype = Literal["float32", "bfloat16", "float16", "int8"]


@dataclass(frozen=True)
class GenerationConfig:
    """Sampling and stopping criteria."""

    max_new_tokens: Annotated[int, Interval("[0, inf)")] = 128
    """Maximum number of generated tokens."""
    temperature: Annotated[float, Interval("[0, inf)")] = 0.0
    """0 is greedy decoding; otherwise logits are divided by it and a token is sampled."""
    top_k: Annotated[int, Interval("[0, inf)")] = 0
    """Sample among the k most probable tokens; 0 samples among all."""
    top_p: Annotated[float, Interval("(0, 1]")] = 1.0
    """Sample among the most probable tokens whose cumulative probability reaches this (nucleus sampling)."""
    repetition_penalty: Annotated[float, Interval("(0, inf)")] = 1.0
    """Divides positive and multiplies negative logits of tokens that have occurred, prompt included."""
    stop: tuple[str, ...] = ()
    """Stop strings: they end the text and are not part of it."""
    seed: Seed = 0
    """Sampling seed. Every sequence draws the same noise, so results do not depend on batch composition."""
    draft_tokens: Annotated[int, Interval("[1, 16]")] = 4
    """Tokens that a draft model proposes a step, where there is one."""
    state_dtype: StateDtype = "float32"
    """Format in which the state is kept. Others than float32 take a half or a quarter of the memory, and are rounded
    stochastically at every step, which does not depend on `seed`."""
    prefill_chunk: Count = 4096
    """Prompt tokens per forward pass. Bounds the memory that a long prompt takes."""

    def __post_init__(self) -> None:
        check_fields(self)
        if any(not s for s in self.stop):
            raise ValueError("stop must not hold an empty text")
