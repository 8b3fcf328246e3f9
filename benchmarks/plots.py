"""Plots of results as PNG: bars of `ssm-bench run`, lines of `sweep`, and helpers for other plots."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .tables import milliseconds

COLORS = {
    "ours": "#1f5fa8", "torch": "#5fa2dd", "triton": "#123a66", "numba": "#3f8f6b", "reference": "#888888",
    "mamba_ssm": "#d9822b", "causal_conv1d": "#a0522d", "fla": "#7b4fa3", "transformers": "#c9a227",
    "mambapy": "#b0413e", "compiled": "#6d8f9c",
}  # fmt: skip
WRONG = "#c62828"
LOG = 30
"""Ratio of times beyond which their axis is logarithmic."""
DPI = 160


def pyplot_headless() -> Any:
    """Matplotlib's pyplot, drawing to memory.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("plots need matplotlib: pip install matplotlib") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def png(figure: Any, title: str) -> bytes:
    """A figure under its title as PNG; the figure is closed."""
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    pyplot_headless().close(figure)
    return buffer.getvalue()


def set_log_axes(axis: Any, values: Sequence[int], label: str) -> None:
    """Make both axes logarithmic, with the values of the size as ticks."""
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(values, [f"{value:,}" for value in values], rotation=30)
    axis.set_xlabel(label, fontsize=8)
    axis.grid(alpha=0.25, which="major")
    style_axis(axis)


def style_axis(axis: Any) -> None:
    """Small labels, and no frame above and on the right."""
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def bars(report: Mapping[str, Any]) -> bytes:
    """Medians and quartiles of every implementation, a panel for each case and mode; the roofline is a dotted line."""
    plt = pyplot_headless()
    cases = report["cases"]
    modes, impls = (list(dict.fromkeys(r[key] for c in cases for r in c["rows"])) for key in ("mode", "impl"))
    size = (max(4.2, min(10.5, 4.2 * len(modes) + 1)), (0.34 * len(impls) + 1.05) * len(cases) + 0.3)
    figure, axes = plt.subplots(len(cases), len(modes), figsize=size, squeeze=False, sharey=True)
    for case, panels in zip(cases, axes, strict=True):
        for mode, axis in zip(modes, panels, strict=True):
            _bars(axis, [row for row in case["rows"] if row["mode"] == mode])
            axis.set_title(f"{case['op']} {case['name']}, {mode}", fontsize=9, loc="left")
    return png(figure, f"{report['op']}, {report['dtype']}, {report['device']}")


def _bars(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    timed = {i: [1e3 * row["time"][key] for key in ("low", "median", "high")] for i, row in _timed(enumerate(rows))}
    floors = [1e3 * row["floor"] for _, row in _timed(enumerate(rows)) if row["floor"]]
    longest = max((high for _, _, high in timed.values()), default=0.0)
    least = min([median for _, median, _ in timed.values()] + floors, default=0.0)
    is_log = longest > LOG * least
    if is_log:
        axis.set_xscale("log")
        # Space for the labels on the right of the bars.
        axis.set_xlim(least / 3, 12 * longest)
    elif timed:
        axis.set_xlim(0, 1.45 * longest)
    for i, row in enumerate(rows):
        x, label, color = axis.get_xlim()[0], _why_missing(row), "#888888"
        if i in timed:
            low, median, x = timed[i]
            is_right, color = row.get("is_right", True), "black"
            label = f"{milliseconds(median / 1e3)} ms" + "  wrong" * (not is_right)
            fill = COLORS.get(row["impl"], "#444444") if is_right else WRONG
            axis.barh(i, median, xerr=[[median - low], [x - median]], color=fill, height=0.62, capsize=3)
        axis.annotate(label, (x, i), (5, 0), textcoords="offset points", va="center", color=color, fontsize=8)
    if floors:
        axis.axvline(floors[0], color="black", linestyle=":", label="roofline")
        axis.legend(fontsize=8, loc="lower right")
    axis.set_yticks(range(len(rows)), [row["impl"] for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)  # the first row is on top
    axis.set_xlabel("ms, logarithmic" if is_log else "ms", fontsize=8)
    style_axis(axis)


def lines(report: Mapping[str, Any]) -> bytes:
    """Medians of a sweep on logarithmic axes, quartiles as bands, the roofline dashed; a panel for each mode.

    Over lengths and batches a dotted line continues the first point in proportion to the size.
    """
    plt = pyplot_headless()
    cases, over = report["cases"], report["over"]
    modes, impls = (list(dict.fromkeys(row[key] for row in cases[0]["rows"])) for key in ("mode", "impl"))
    figure, axes = plt.subplots(1, len(modes), figsize=(max(5.6, min(10.5, 5.2 * len(modes))), 4.2), squeeze=False)
    for axis, mode in zip(axes[0], modes, strict=True):
        rows = [(case["value"], row) for case in cases for row in case["rows"] if row["mode"] == mode]
        for impl in impls:
            of_impl = [(value, row) for value, row in rows if row["impl"] == impl]
            if timed := list(_timed(of_impl)):
                _line(axis, impl, timed, is_proportional=over in ("length", "batch"))
            else:
                axis.plot([], [], color="#bbbbbb", label=f"{impl}: {_why_missing(of_impl[0][1])}")
        if floors := sorted({(value, row["floor"]) for value, row in _timed(rows) if row["floor"]}):
            axis.plot(*zip(*floors, strict=True), "k--", linewidth=1.2, label="roofline")
        set_log_axes(axis, [case["value"] for case in cases], over)
        axis.minorticks_off()
        axis.set_ylabel("seconds")
        axis.set_title(mode, fontsize=9, loc="left")
        axis.legend(fontsize=8, frameon=False)
    fixed = [f"{k} {v:,}" for k, v in cases[0]["shape"].items() if k != over]
    return png(figure, f"{report['op']}, {report['dtype']}, {report['device']}\n{', '.join(fixed)}")


def _line(axis: Any, impl: str, timed: Sequence[tuple[int, Mapping[str, Any]]], *, is_proportional: bool) -> None:
    values, times = [value for value, _ in timed], [row["time"] for _, row in timed]
    color, first = COLORS.get(impl, "#444444"), times[0]["median"]
    axis.plot(values, [t["median"] for t in times], "o-", color=color, markersize=4, label=impl)
    band(axis, values, times, color)
    if is_proportional and len(values) > 1:
        proportional = [first * n / values[0] for n in values]
        axis.plot(values, proportional, ":", color=color, linewidth=1, label=f"{impl}, in proportion to the first")
    if wrong := [(value, row["time"]["median"]) for value, row in timed if not row.get("is_right", True)]:
        axis.plot(*zip(*wrong, strict=True), "X", color=WRONG, markersize=9, label=f"{impl}: wrong")


def band(axis: Any, x: Sequence[int], times: Sequence[Mapping[str, float]], color: str) -> None:
    """The area between the quartiles of times."""
    axis.fill_between(x, [t["low"] for t in times], [t["high"] for t in times], color=color, alpha=0.25, linewidth=0)


def _timed(rows: Iterable[tuple[int, Mapping[str, Any]]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    return ((i, row) for i, row in rows if "time" in row)


def _why_missing(row: Mapping[str, Any]) -> str:
    return "not installed" if "not installed" in row.get("missing", "") else "not measured"
