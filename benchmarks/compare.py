"""`ssm-bench compare`: regressions between two files of `ssm-bench run` or `sweep`.

Cases are matched by op, sizes and threads; `ours` is compared with `ours`, whichever backend that was. With one thread
processor times are compared, else times by the clock.

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
from .tables import Row, as_text

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
class Comparison:
    """An implementation at the sizes of a case, in a mode."""

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


def compare(before: Path, after: Path, relative_to: str | None = None) -> list[Comparison]:
    """Match the rows of both files, as seconds or relative to an implementation.

    Raises:
        ValueError: the files are not of the same dtype on the same device, or have no row of times in common.
    """
    a, b = read(before), read(after)
    for field in ("dtype", "device"):
        if a.get(field) != b.get(field):
            raise ValueError(
                f"{before} and {after} do not compare: {field} is {a.get(field)} in one and {b.get(field)} in the other"
            )
    sides = [_seconds(report) for report in (a, b)]
    common = [key for key in sides[0] if key in sides[1] and key[1] != relative_to]
    if not common:
        raise ValueError(f"{before} and {after} have no sizes, implementation and mode in common, timed in both")
    if relative_to is not None:
        sides = [_relative(path, side, common, relative_to) for path, side in zip((before, after), sides, strict=True)]
    p = holm([mann_whitney(*(side[key] for side in sides)) for key in common])
    earlier, later = ([statistics.median(side[key]) for key in common] for side in sides)
    names = _names(b)
    rows = zip(common, earlier, later, p, strict=True)
    return [Comparison(names[sizes], impl, mode, x, y, q) for (sizes, impl, mode), x, y, q in rows]


def unmatched(before: Path, after: Path) -> list[str]:
    """Lines that name the rows timed in one of the files only."""
    lines = []
    for path, other in ((before, after), (after, before)):
        report, there = read(path), _seconds(read(other))
        names, here = _names(report), _seconds(report)
        alone = [f"{names[sizes]} {impl} {mode}" for sizes, impl, mode in here if (sizes, impl, mode) not in there]
        lines += [f"only in {path}: {', '.join(alone)}"] if alone else []
    return lines


Side = dict[tuple[str, str, str], list[float]]
"""Seconds of each call by case, implementation and mode."""


def _seconds(report: dict[str, Any]) -> Side:
    found = {}
    for case in report["cases"]:
        clock = "processor_seconds" if case["threads"] == 1 else "seconds"
        for row in case["rows"]:
            if "time" in row:  # on a GPU without processor times
                seconds = row["time"].get(clock) or row["time"]["seconds"]
                found[_key(case), row["impl"], row["mode"]] = seconds
    return found


def _names(report: dict[str, Any]) -> dict[str, str]:
    many = len({case["threads"] for case in report["cases"]}) > 1
    return {_key(c): f"{c['op']} {c['name']}" + f", {c['threads']} threads" * many for c in report["cases"]}


def _key(case: dict[str, Any]) -> str:
    return json.dumps([case["op"], case["shape"], case.get("chunk_size"), case["threads"]], sort_keys=True)


def _relative(path: Path, side: Side, keys: list[tuple[str, str, str]], impl: str) -> Side:
    """Each call divided by the call of `impl` beside it."""
    found = {}
    for sizes, of, mode in keys:
        seconds, base = side[sizes, of, mode], side.get((sizes, impl, mode), [])
        if len(seconds) != len(base):
            raise ValueError(f"{path} has not as many calls of {impl} in mode {mode} as of the rest")
        found[sizes, of, mode] = [a / b for a, b in zip(seconds, base, strict=True)]
    return found


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


def regressions(rows: list[Comparison], threshold: float, alpha: float) -> list[Comparison]:
    """Rows that are slower by more than `threshold`, significantly at level `alpha`."""
    return [row for row in rows if row.ratio > 1 + threshold and row.p < alpha]


def table(rows: list[Comparison], threshold: float, alpha: float, relative_to: str | None = None) -> str:
    """All rows as text; regressions are marked."""
    slower = regressions(rows, threshold, alpha)
    unit, scale = ("ms", 1e3) if relative_to is None else ("times", 1)
    lines = []
    for row in rows:
        times = (f"{scale * row.before:.3f}", f"{scale * row.after:.3f}", f"{row.ratio:.3f}", f"{row.p:.2g}")
        mark = "REGRESSION" if row in slower else "" if row.p < alpha else "not significant"
        lines.append(Row((row.case, row.impl, row.mode, *times), mark))
    heads = ("case", "implementation", "mode", f"{unit} before", f"{unit} after", "ratio", "p")
    return as_text(heads, lines, names=(0, 1, 2))
