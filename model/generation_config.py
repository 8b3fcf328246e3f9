"""Settings of generation, as plain values: nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .fields import Count, Interval, Seed, check_fields


@dataclass(frozen=True)
class GenerationConfig:
    """How the next token is chosen, and when to end."""

    max_new_tokens: Annotated[int, Interval("[0, inf)")] = 128
    """Where an answer is cut off."""
    temperature: Annotated[float, Interval("[0, inf)")] = 0.0
    """0 takes the likeliest token; otherwise one is drawn."""
    top_k: Annotated[int, Interval("[0, inf)")] = 0
    """Draw among so many likeliest tokens; 0 among all."""
    top_p: Annotated[float, Interval("(0, 1]")] = 1.0
    """Draw among the likeliest tokens that together are so probable."""
    repetition_penalty: Annotated[float, Interval("(0, inf)")] = 1.0
    """Divides positive and multiplies negative logits of tokens that have occurred, prompt included."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""
    seed: Seed = 0
    """Of the drawing, for each sequence alike, so that an answer does not depend on its neighbours."""
    prefill_chunk: Count = 4096
    """Tokens of the prompts that are run at once; it bounds the memory that a long prompt takes."""

    def __post_init__(self) -> None:
        check_fields(self)
        if any(not s for s in self.stop):
            raise ValueError("stop must not hold an empty text")
