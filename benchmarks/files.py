"""Result files: JSON and CSV, complete or not there at all."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..model.files import write_atomic, writing_atomic


def write_json(path: Path | None, result: Mapping[str, Any], *, indent: int = 2, quietly: bool = False) -> None:
    """Write a result where a path was asked for, and create the folders on the way to it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(result, indent=indent) + "\n")
        if not quietly:
            print(f"wrote {path}")


def write_csv(path: Path, columns: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> None:
    """Write lines under their columns; other keys of a line are left out."""
    with writing_atomic(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(lines)
