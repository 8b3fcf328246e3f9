"""Result files, each complete or not there at all: JSON, and the table, plot and page beside it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..model.files import write_atomic, writing_atomic


def write_json(path: Path | None, result: Mapping[str, Any], *, quietly: bool = False) -> None:
    """Write a result where a path was asked for, and create the folders on the way to it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(result, indent=1) + "\n")
        if not quietly:
            print(f"wrote {path}")


def write_report(
    path: Path,
    result: Mapping[str, Any],
    columns: Sequence[str],
    rows: Iterable[Mapping[str, Any]],
    plot: Callable[[], bytes] | None,
    page: Callable[[bytes], str],
) -> None:
    """Write a result as JSON and, beside it, its rows as CSV, a plot as PNG, and a page with both as HTML.

    Args:
        columns: columns of the CSV; other keys of a row are left out.
        plot: draws the plot; None where nothing was timed.
        page: the page of a plot, which is empty where there is none.
    """
    write_json(path, result)
    with writing_atomic(path.with_suffix(".csv")) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    png = b""
    if plot is not None:
        try:
            png = plot()
            write_atomic(path.with_suffix(".png"), png)
        except ModuleNotFoundError as e:
            print(f"no plot: {e}")
    write_atomic(path.with_suffix(".html"), page(png))
