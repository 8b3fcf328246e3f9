"""Shrinking of a failing case to a smaller one that still fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import TypeVar

from .cases import SIZES, Case, Shape

T = TypeVar("T")
ATTEMPTS = 300
"""Most cases that are tried."""
SIMPLEST = {name: type(value)() for name, value in vars(Case("ssd")).items() if name not in ("op", "shape")}
SIMPLEST |= {"dtype": Case.dtype, "chunk_size": Case.chunk_size}
"""The value of each option that a case shrinks to."""


def shrink(start: T, why: str, smaller: Callable[[T], Iterable[T]], wrong: Callable[[T], str]) -> tuple[T, str]:
    """Take the first smaller case that is still wrong, again and again, until none is or `ATTEMPTS` are spent.

    Args:
        why: description of the failure of the case that it starts from.
        wrong: describes the failure of a case; empty if it passes. An error that it raises says that the op does not
            have the case.

    Returns:
        The smallest case found, and the description of its failure.
    """
    candidates, attempts = iter(smaller(start)), 0
    while (candidate := next(candidates, None)) is not None and (attempts := attempts + 1) <= ATTEMPTS:
        # After each success the search starts again at the largest reductions.
        try:
            found = wrong(candidate)
        except (ValueError, IndexError, RuntimeError):
            continue
        if found:
            start, why, candidates = candidate, found, iter(smaller(candidate))
    return start, why


def brief(value: object) -> str:
    """A dataclass as the expression that makes it, without fields at their defaults."""
    if not is_dataclass(value) or isinstance(value, type):
        return repr(value)
    own = [(f.name, getattr(value, f.name)) for f in fields(value) if getattr(value, f.name) != f.default]
    return f"{type(value).__name__}({', '.join(f'{name}={brief(v)}' for name, v in own)})"


def smaller_cases(case: Case) -> Iterator[Case]:
    """Cases with one option less, or one smaller size, the largest reduction first. Not all are valid."""
    for name, simplest in SIMPLEST.items():
        if getattr(case, name) != simplest:
            yield replace(case, **{name: simplest})
    for name in SIZES[case.op]:
        size = getattr(case.shape, name)
        for less in sorted({1, size // 2, size - 1}):
            if 0 < less < size and (shape := _with_size(case, name, less)) is not None:
                yield replace(case, shape=shape)


def _with_size(case: Case, name: str, size: int) -> Shape | None:
    """The shape with that size, or None; the length and the height of a grid change by complete columns."""
    shape = replace(case.shape, **{name: size})
    if "height" in SIZES[case.op] and name in ("length", "height"):
        columns = case.shape.length // case.shape.height
        if name == "height":
            return replace(shape, length=columns * size)
        return replace(shape, length=size * shape.height) if size < columns else None
    if shape.channels % shape.groups or shape.heads % shape.groups and case.folder == "ssd":
        return None
    return shape
