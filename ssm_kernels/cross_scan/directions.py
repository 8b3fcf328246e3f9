"""Scan directions over a grid (VMamba, arXiv 2401.10166, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

ScanDirection = Literal["rows", "columns", "rows_reversed", "columns_reversed"]
"""`rows` visits the grid row by row, `columns` column by column; the other two visit it in the reverse order."""

BIDIRECTIONAL: tuple[ScanDirection, ...] = ("rows", "rows_reversed")
CROSS: tuple[ScanDirection, ...] = ("rows", "columns", "rows_reversed", "columns_reversed")


def direction_codes(directions: Sequence[ScanDirection]) -> list[int]:
    """The codes of directions in the kernels, indices in `CROSS`: see `grid_offset`."""
    return [CROSS.index(direction) for direction in directions]


def check_directions(directions: Sequence[ScanDirection]) -> None:
    """Check an argument `directions`.

    Raises:
        ValueError: it is empty, or not a sequence of names of directions.
    """
    if isinstance(directions, str) or not directions or any([d not in CROSS for d in directions]):
        raise ValueError(f"directions must be a sequence of names among {', '.join(CROSS)}; got {directions!r}")
