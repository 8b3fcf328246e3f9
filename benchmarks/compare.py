"""`ssm-bench compare`: regressions between two files of `ssm-bench run` or `sweep`.

Cases are matched by their sizes; `ours` is compared with `ours`, whichever backend that was.

The test is Mann and Whitney's, two-sided, on the times of single calls: exact where both sides together have at most
`EXACT` calls and no ties, else by the normal approximation with its correction for ties. The p values of one
comparison are adjusted by Holm's method, so that many rows do not make one of them significant. The ratio is of the
medians.

The test shows that the times differ, not that the code is the reason: the state of the machine during a run affects all
of its calls. Where its speed drifts between runs, compare relative to an implementation that did not change:
implementations are timed in turn, so each call is divided by that one's call beside it. On a shared machine this too
may fail where nothing changed; then measure again.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .op_report import read
from .options import Compare

EXACT = 60
"""Most calls on both sides together for which the p value is exact."""


def run_compare(command: Compare) -> None:
    """`ssm-bench compare`."""
    rows = compare(command.before, command.after, command.relative_to)
    print(table(rows, command.threshold, command.alpha, command.relative_to))
    for line in unmatched(command.before, command.after):
        print(line)
    if regressions(rows, command.threshold, command.alpha):
        sys.exit(1)


@dataclass(frozen=True)
class Row:
    case: str
    """Name of the sizes in the later file."""
    impl: str
    mode: str
    before: float
    """Median seconds, or their ratio to those of the implementation `relative_to`."""
    after: float
    p: float
    """Adjusted p value; 1 where a side has a single call."""

    @property
    def ratio(self) -> float:
        return self.after / self.before


def compare(before: Path, after: Path, relative_to: str | None = None) -> list[Row]:
    """Match the rows of both files, as seconds or relative to an implementation.

    Raises:
        ValueError: the files are not of the same op on the same device, or have no row of times in common.
    """
    a, b = read(before), read(after)
    for field in ("op", "dtype", "device", "threads"):
        if a.get(field) != b.get(field):
            raise ValueError(
                f"{before} and {after} do not compare: {field} is {a.get(field)} in one and {b.get(field)} in the other"
            )
    sides = [_times(report) for report in (a, b)]
    common = [key for key in sides[0] if key in sides[1]]
    if not common:
        raise ValueError(f"{before} and {after} have no sizes, implementation and mode in common, timed in both")
    for path, side in zip((before, after), sides, strict=True):
        if any("seconds" not in side[key] for key in common):
            raise ValueError(f"{path} has no times of single calls: measure again with this version of ssm-bench run")
    if relative_to is not None:
        for path, side in zip((before, after), sides, strict=True):
            lacking = [key for key in common if len(_calls(side, key, relative_to)) != side[key]["calls"]]
            if lacking:
                raise ValueError(
                    f"{path} has not as many calls of {relative_to} in mode {lacking[0][2]} as of the rest"
                )
        common = [key for key in common if key[1] != relative_to]
    samples = [[_samples(side, key, relative_to) for side in sides] for key in common]
    p = holm([mann_whitney(x, y) for x, y in samples])
    medians = [(statistics.median(x), statistics.median(y)) for x, y in samples]
    names = {_sizes(case): case["name"] for case in b["cases"]}
    rows = zip(common, medians, p, strict=True)
    return [Row(names[sizes], impl, mode, *both, q) for (sizes, impl, mode), both, q in rows]


def unmatched(before: Path, after: Path) -> list[str]:
    """Lines that name the rows timed in one of the files only."""
    reports = [read(before), read(after)]
    sides = [_times(report) for report in reports]
    lines = []
    for path, report, side, other in zip((before, after), reports, sides, reversed(sides), strict=True):
        names = {_sizes(case): case["name"] for case in report["cases"]}
        alone = [f"{names[sizes]} {impl} {mode}" for sizes, impl, mode in side if (sizes, impl, mode) not in other]
        lines += [f"only in {path}: {', '.join(alone)}"] if alone else []
    return lines


Key = tuple[str, str, str]
"""Sizes, implementation and mode."""


def _times(report: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    rows = [(_sizes(case), row) for case in report["cases"] for row in case["rows"] if "time" in row]
    return {(sizes, row["impl"], row["mode"]): row["time"] for sizes, row in rows}


def _sizes(case: dict[str, Any]) -> str:
    return json.dumps([case["shape"], case.get("chunk_size")], sort_keys=True)


def _calls(side: dict[Key, dict[str, Any]], key: Key, impl: str) -> list[float]:
    return side.get((key[0], impl, key[2]), {}).get("seconds", [])


def _samples(side: dict[Key, dict[str, Any]], key: Key, relative_to: str | None) -> list[float]:
    seconds = side[key]["seconds"]
    if relative_to is None:
        return seconds
    return [a / b for a, b in zip(seconds, _calls(side, key, relative_to), strict=True)]


def mann_whitney(x: list[float], y: list[float]) -> float:
    """Two-sided p value of the hypothesis that x and y come from one distribution."""
    n, m = len(x), len(y)
    if min(n, m) < 2:
        return 1.0
    u = sum((a > b) + (a == b) / 2 for a in x for b in y)
    ties = [t for t in Counter([*x, *y]).values() if t > 1]
    if n + m <= EXACT and not ties:
        counts = _orders_by_u(n, m)
        tail = sum(counts[: int(min(u, n * m - u)) + 1])
        return min(1.0, 2 * tail / math.comb(n + m, n))
    total = n + m
    variance = n * m / 12 * (total + 1 - sum(t**3 - t for t in ties) / (total * (total - 1)))
    if variance == 0:
        return 1.0
    z = max(0.0, abs(u - n * m / 2) - 0.5) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2))


def _orders_by_u(n: int, m: int) -> list[int]:
    """Number of orders of n and m values for which U is 0, 1, ..., n m: coefficients of the Gaussian binomial."""
    counts = [1] + [0] * (n * m)
    for i in range(1, n + 1):
        for u in range(n * m, m + i - 1, -1):  # times 1 - q^(m + i)
            counts[u] -= counts[u - m - i]
        for u in range(i, n * m + 1):  # over 1 - q^i
            counts[u] += counts[u - i]
    return counts


def holm(p: list[float]) -> list[float]:
    """p values adjusted for their number by Holm's method."""
    adjusted, least = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = least
    return adjusted


def regressions(rows: list[Row], threshold: float, alpha: float) -> list[Row]:
    """Rows that are slower by more than `threshold`, significantly at level `alpha`."""
    return [row for row in rows if row.ratio > 1 + threshold and row.p < alpha]


def table(rows: list[Row], threshold: float, alpha: float, relative_to: str | None = None) -> str:
    """All rows as text; regressions are marked."""
    slower = regressions(rows, threshold, alpha)
    unit, scale = ("ms", 1e3) if relative_to is None else ("times", 1)
    width = max(len(row.case) for row in rows) + 2
    lines = [f"{'':<{width + 22}}{unit + ' before':>14}{unit + ' after':>14}{'ratio':>8}{'p':>10}"]
    for row in rows:
        mark = "  REGRESSION" if row in slower else "" if row.p < alpha else "  not significant"
        lines.append(
            f"{row.case:<{width}}{row.impl:<14}{row.mode:<8}{scale * row.before:>14.3f}{scale * row.after:>14.3f}"
            f"{row.ratio:>8.3f}{row.p:>10.2g}{mark}"
        )
    return "\n".join(lines)
