"""Settings of generation, as plain values: nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GenerationConfig:
    """How the next token is chosen, and when to end."""

    max_new_tokens: int = 128
    """Where an answer is cut off."""
    temperature: float = 0.0
    """0 takes the likeliest token; otherwise one is drawn."""
    top_k: int = 0
    """Draw among so many likeliest tokens; 0 among all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together are so probable."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that have occurred, prompt included."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""
    seed: int = 0
    """Of the drawing, for each sequence alike, so that an answer does not depend on its neighbours."""
    prefill_chunk: int = 4096
    """Tokens of the prompts that are run at once; it bounds the memory that a long prompt takes."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must not be negative, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be positive, got {self.repetition_penalty}")
        if any(not s for s in self.stop):
            raise ValueError("stop must not hold an empty text")
        if self.prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be at least 1, got {self.prefill_chunk}")
