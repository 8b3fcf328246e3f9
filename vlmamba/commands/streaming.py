"""Streamed answers on a terminal."""

from __future__ import annotations

from collections.abc import Iterator


def hold_first(texts: Iterator[str]) -> Iterator[str]:
    """Yield the parts of an answer, the first two as one.

    The first decoding step may log something, for example that it compiles kernels. On a terminal that line is then
    before the answer, and not inside it.
    """
    first = next(texts, "")
    try:
        first += next(texts, "")
    finally:  # an answer that is stopped here has its first part
        if first:
            yield first
    yield from texts
