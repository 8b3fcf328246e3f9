"""Plots of results as PNG: bars of `ssm-bench run`, lines of `sweep`, and helpers for other plots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..train.plot_style import (
    COLORS,
    INK,
    SIZE,
    label_lines,
    line_styles,
    plain,
    png,
    set_plain_ticks,
    style_axis,
    subplots,
)
from .tables import milliseconds

OURS, PEER, WRONG = COLORS[0], INK, COLORS[1]
OWN = ("ours", "torch", "triton", "numba", "reference")
"""Implementations of this package."""
LOG = 30
"""Ratio of times beyond which their axis is logarithmic."""


def bars(report: Mapping[str, Any]) -> bytes:
    """Medians and quartiles of every implementation, a panel for each case and mode; the roofline is a dotted line.

    Bars start at zero. Where times differ so much that their axis is logarithmic, there are points in their place.
    """
    cases = report["cases"]
    modes, impls = (list(dict.fromkeys(r[key] for c in cases for r in c["rows"])) for key in ("mode", "impl"))
    figure, axes = subplots(len(cases), len(modes), (0.26 * len(impls) + 0.9) * len(cases) + 0.3, sharey=True)
    for case, panels in zip(cases, axes, strict=True):
        for mode, axis in zip(modes, panels, strict=True):
            _bars(axis, [row for row in case["rows"] if row["mode"] == mode])
            style_axis(axis, f"{case['op']} {case['name']}, {mode}")
            axis.grid(visible=False, axis="y")
    return png(titled(figure, f"{report['op']}, {report['dtype']}, {report['device']}"))


def titled(figure: Any, title: str) -> Any:
    """The figure with a title over all panels."""
    figure.suptitle(title, fontsize=SIZE, color=INK, x=0.01, ha="left")
    return figure


def _bars(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    timed = {i: [1e3 * row["time"][key] for key in ("low", "median", "high")] for i, row in _timed(enumerate(rows))}
    floors = [1e3 * row["floor"] for _, row in _timed(enumerate(rows)) if row["floor"]]
    longest = max([high for _, _, high in timed.values()] + floors, default=0.0)
    least = min([median for _, median, _ in timed.values()] + floors, default=0.0)
    is_log = longest > LOG * least
    if is_log:
        axis.set_xscale("log")
        # Space for the labels on the right of the points.
        axis.set_xlim(least / 3, 30 * longest)
        axis.xaxis.get_major_locator().set_params(numticks=5)
    elif timed:
        axis.set_xlim(0, 1.6 * longest)
    for i, row in enumerate(rows):
        x, label = axis.get_xlim()[0], _why_missing(row)
        if i in timed:
            low, median, x = timed[i]
            is_right = row.get("is_right", True)
            label = f"{milliseconds(median / 1e3)} ms" + "  wrong" * (not is_right)
            color = WRONG if not is_right else OURS if row["impl"] in OWN else PEER
            spread = {"xerr": [[median - low], [x - median]], "capsize": 2}
            if is_log:
                axis.errorbar(median, i, fmt="o", color=color, **spread)
            else:
                axis.barh(i, median, color=color, height=0.62, ecolor=INK, **spread)
        axis.annotate(label, (x, i), (5, 0), textcoords="offset points", va="center", color=INK, fontsize=SIZE)
    if floors:
        axis.axvline(floors[0], color=INK, linestyle=":")
        top = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
        axis.annotate("roofline", (floors[0], 1), (3, 2), color=INK, fontsize=SIZE - 1, **top)
    axis.set_yticks(range(len(rows)), [row["impl"] for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.9)  # the first row is on top, under the roofline's label
    axis.xaxis.set_major_formatter(plain)
    axis.set_xlabel("ms, logarithmic" if is_log else "ms")


def lines(report: Mapping[str, Any]) -> bytes:
    """Medians of a sweep on logarithmic axes, quartiles as bands, the roofline dashed; a panel for each mode.

    Over lengths and batches a dotted line continues the first point in proportion to the size.
    """
    cases, over = report["cases"], report["over"]
    modes, impls = (list(dict.fromkeys(row[key] for row in cases[0]["rows"])) for key in ("mode", "impl"))
    is_proportional, styles = over in ("length", "batch"), line_styles(impls)
    figure, axes = subplots(1, len(modes), 3.0)
    for axis, mode in zip(axes[0], modes, strict=True):
        rows = [(case["value"], row) for case in cases for row in case["rows"] if row["mode"] == mode]
        labels, missing = [], []
        for impl in impls:
            of_impl = [(value, row) for value, row in rows if row["impl"] == impl]
            if timed := list(_timed(of_impl)):
                labels.append(_line(axis, impl, timed, styles[impl], is_proportional))
            else:
                missing.append(f"{impl}: {_why_missing(of_impl[0][1])}")
        if floors := sorted({(value, 1e3 * row["floor"]) for value, row in _timed(rows) if row["floor"]}):
            axis.plot(*zip(*floors, strict=True), "--", color=INK, linewidth=1.2)
            labels.append((floors[-1][1], "roofline", INK))
        axis.text(0.02, 1, "\n".join(missing), color=INK, fontsize=SIZE, va="top", transform=axis.transAxes)
        axis.set_ylabel("ms")
        note = "; dotted: in proportion to the first" if is_proportional else ""
        set_log_axes(axis, [case["value"] for case in cases], over + note, mode)
        label_lines(axis, labels)
    fixed = [f"{k} {v:,}" for k, v in cases[0]["shape"].items() if k != over]
    return png(titled(figure, f"{report['op']}, {report['dtype']}, {report['device']}; {', '.join(fixed)}"))


Label = tuple[float, str, str]
"""Height, text and color of a line's label."""


def _line(
    axis: Any,
    impl: str,
    timed: Sequence[tuple[int, Mapping[str, Any]]],
    style: Mapping[str, Any],
    is_proportional: bool,
) -> Label:
    values, times = [value for value, _ in timed], [row["time"] for _, row in timed]
    medians = [1e3 * time["median"] for time in times]
    axis.plot(values, medians, marker="o", markersize=4, **style)
    band(axis, values, times, style["color"])
    if is_proportional and len(values) > 1:
        axis.plot(values, [medians[0] * n / values[0] for n in values], ":", color=style["color"], linewidth=1)
    wrong = [(value, 1e3 * row["time"]["median"]) for value, row in timed if not row.get("is_right", True)]
    if wrong:
        axis.plot(*zip(*wrong, strict=True), "X", color=WRONG, markersize=9)
    return medians[-1], impl + ": × is wrong" * bool(wrong), style["color"]


def set_log_axes(axis: Any, values: Sequence[int], label: str, title: str) -> None:
    """Make both axes logarithmic, with the values of the size as ticks."""
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    # From the last on, as many as have space for their numbers.
    shown = [values[-1]]
    for value in reversed(values):
        if (shown[-1] / value) ** 5 >= values[-1] / values[0] and value != values[-1]:
            shown.append(value)
    axis.set_xticks(shown, [f"{value:,}" for value in shown])
    axis.minorticks_off()
    axis.set_xlabel(label)
    style_axis(axis, title)
    set_plain_ticks(axis)


def band(axis: Any, x: Sequence[int], times: Sequence[Mapping[str, float]], color: str) -> None:
    """The area between the quartiles of times, in milliseconds."""
    low, high = ([1e3 * t[key] for t in times] for key in ("low", "high"))
    axis.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0)


def _timed(rows: Iterable[tuple[int, Mapping[str, Any]]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    return ((i, row) for i, row in rows if "time" in row)


def _why_missing(row: Mapping[str, Any]) -> str:
    return "not installed" if "not installed" in row.get("missing", "") else "not measured"
