"""Validation of dataclass fields by their annotations: types, and intervals of numbers.

>>> @dataclass(frozen=True)
... class Settings:
...     share: Annotated[float, Interval("(0, 1]")] = 1.0
...     def __post_init__(self) -> None:
...         check_fields(self)
>>> Settings(share=0)
Traceback (most recent call last):
ValueError: share must be in (0, 1], got 0
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any


@dataclasses.dataclass(frozen=True)
class Interval:
    """Range of a numeric field in mathematical notation: `Interval("(0, 1]")` excludes 0.

    Infinity and NaN are in no interval, except an end that is closed at infinity, as in `"[0, inf]"`.
    """

    text: str

    @functools.cached_property
    def ends(self) -> tuple[float, float]:
        """Lower and upper bound."""
        low, high = self.text[1:-1].split(",")
        return float(low), float(high)

    def __contains__(self, value: Any) -> bool:
        low, high = self.ends
        above = value >= low if self.text[0] == "[" else value > low
        return bool(above and (value <= high if self.text[-1] == "]" else value < high))

    def why_not(self, value: Any) -> str:
        """Describe the rule that a number breaks, as a phrase after the name of its field."""
        low, high = self.ends
        if math.isfinite(low) and math.isfinite(high):
            return f"must be in {self.text}"
        if not _is_finite(value):
            return "must be a finite number"
        if low == 0:
            return "must be positive" if self.text[0] == "(" else "must not be negative"
        return f"must be at least {low:g}"


Finite = Interval("(-inf, inf)")
Count = Annotated[int, Interval("[1, inf)")]
"""Positive integer."""
Seed = Annotated[int, Interval(f"[0, {2**63})")]
Size = Annotated[int, Interval("[1, 1048576]")]
"""Dimension of a model. The limit rejects a damaged config before memory is allocated; published sizes are below
20,000, and vocabularies below 300,000."""


def check_fields(config: Any, named: Callable[[str], str] = str) -> None:
    """Check every field of a dataclass against its annotation.

    Args:
        config: the dataclass; its annotations are plain types, `Literal`, tuples, optional ones, dataclasses, or an
            `Annotated` number with an `Interval`. A number without one must be finite.
        named: converts the name of a field to that in errors.

    Raises:
        ValueError: a value has another type, or is outside its interval. The message has the field, the value and the
            expectation.
    """
    for name, hint in _hints(type(config)).items():
        check_value(hint, getattr(config, name), named(name))


def check_value(hint: Any, value: Any, name: str) -> None:
    """Check one value against an annotation, as `check_fields` does.

    Raises:
        ValueError: it does not fit.
    """
    interval = Finite
    if typing.get_origin(hint) is Annotated:
        hint, *metadata = typing.get_args(hint)
        interval = next((m for m in metadata if isinstance(m, Interval)), Finite)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return
        inner = next(a for a in args if a is not type(None))
        check_value(Annotated[inner, interval] if interval is not Finite else inner, value, name)
    elif origin is typing.Literal:
        if not any(value == known and type(value) is type(known) for known in args):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, args))}; got {value!r}")
    elif origin is tuple:
        if not isinstance(value, tuple):
            raise ValueError(f"{name} must be a tuple, got {value!r}")
        hints = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(hints) != len(value):
            raise ValueError(f"{name} must have {len(hints)} entries, got {len(value)}")
        for i, (inner, v) in enumerate(zip(hints, value, strict=True)):
            check_value(inner, v, f"{name}[{i}]")
    elif hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        # bool is an int to Python, but not in a config.
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} must be {hint.__name__}, got {value!r}")
        # An integer beyond the range of float passes every comparison.
        too_long = hint is float and isinstance(value, int) and not _is_finite(value)
        if value not in interval or too_long:
            raise ValueError(f"{name} {interval.why_not(value)}, got {_shown(value)}")
    elif isinstance(hint, type) and not isinstance(value, hint):
        raise ValueError(f"{name} must be {hint.__name__}, got {value!r}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _shown(value: Any) -> str:
    """Format a number; a very long one by its size."""
    return repr(value) if abs(value) < 10**30 or not isinstance(value, int) else "an integer beyond 10**30"
