"""Settings of a published config, read by tables of our names, theirs, and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from ..fields import Interval, check_value

REQUIRED = object()
"""Default of a setting that the file must have."""
Table = Mapping[str, tuple[str, Any]]
"""Settings of a layout: field of our config -> (key in the file, default of the layout)."""


class Settings:
    """Settings of a file, each read once; the rest is unknown and can be rejected."""

    def __init__(self, data: Mapping[str, Any], where: str):
        if not isinstance(data, Mapping):
            raise ValueError(f"{where} must be an object with named values, got {data!r}")
        self.unread, self.where = dict(data), where

    def take(self, key: str, default: Any = REQUIRED) -> Any:
        """Read a value of the default's type."""
        value = self.unread.pop(key, default)
        if value is REQUIRED:
            raise ValueError(f"{self.where} has no {key}")
        kind = type(default)
        # type(), since True is an int to isinstance.
        if kind in (int, bool) and type(value) is not kind:
            raise ValueError(f"{self.where}: {key} must be {kind.__name__}, got {value!r}")
        if kind is int:  # all of them are sizes or counts; the configs have limits of their own for each
            check_value(Annotated[int, Interval(f"[{min(default, 1)}, 16777216]")], value, f"{self.where}: {key}")
        if kind is float and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise ValueError(f"{self.where}: {key} must be a number, got {value!r}")
        return value

    def take_table(self, table: Table) -> dict[str, Any]:
        """Read the settings of a table, by our names."""
        return {ours: self.take(theirs, default) for ours, (theirs, default) in table.items()}

    def require(self, key: str, supported: Any, elsewhere: str | None = None) -> None:
        """Reject any other value. `elsewhere` names a class that supports it."""
        value = self.unread.pop(key, supported)
        if value != supported:
            hint = f" here; load it with {elsewhere}" if elsewhere else ""
            raise ValueError(f"{self.where}: {key} is {value!r}, but only {supported!r} is supported{hint}")

    def ignore(self, *keys: str) -> None:
        """Drop settings that do not change the results."""
        for key in keys:
            self.unread.pop(key, None)

    def reject_unread(self) -> None:
        """Raise a ValueError that names the settings that nothing has read."""
        if self.unread:
            raise ValueError(f"{self.where} has settings that are not known: {', '.join(map(repr, self.unread))}")
