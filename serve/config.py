"""Limits of a server as plain values. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..model.fields import Count, Interval, check_fields
from ..model.generation.config import StateDtype


@dataclass(frozen=True)
class ServeConfig:
    """Sizes of the running batch, and limits on what clients may ask for."""

    slots: Annotated[int, Interval("[1, 4096]")] = 64
    """Most requests that run at once, each in a slot of the batch; others wait."""
    max_waiting: Annotated[int, Interval("[0, inf)")] = 256
    """Most requests that wait for a slot. More are answered with status 429."""
    state_dtype: StateDtype = "float32"
    """Format of the states of running requests and of the cache. bfloat16, float16 and int8 take a half or a quarter of
    the memory of the scan's part; they are rounded stochastically at every step."""
    prefill_tokens: Annotated[int, Interval("[64, inf)")] = 1024
    """Prompt tokens that are run between two decoding steps. Fewer let running answers flow; more let new ones start
    sooner."""
    cache_mb: Annotated[float, Interval("[0, inf)")] = 256.0
    """Memory for states of prompts that were seen, in MiB; 0 keeps none."""
    feature_cache_mb: Annotated[float, Interval("[0, inf)")] = 64.0
    """Memory for features of images that were seen, in MiB; 0 keeps none."""
    max_prompt_tokens: Count = 32_768
    """Most tokens of a prompt, those of its images included."""
    max_new_tokens: Count = 2048
    """Most tokens of an answer, and the number where a request names none."""
    max_images: Annotated[int, Interval("[0, inf)")] = 16
    """Most images of a request."""
    max_body_mb: Annotated[float, Interval("(0, inf)")] = 32.0
    """Largest body of a request, in MiB."""
    client_seconds: Annotated[float, Interval("(0, inf)")] = 30.0
    """Longest time for a client to send its request, and to read a part of its answer."""

    def __post_init__(self) -> None:
        check_fields(self)
