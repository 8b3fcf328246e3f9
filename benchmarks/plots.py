"""Plots of results as PNG: bars of `ssm-bench run`, lines of `sweep`, and helpers for other plots."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

COLORS = {
    "ours": "#1f5fa8", "torch": "#5fa2dd", "triton": "#123a66", "numba": "#3f8f6b", "reference": "#888888",
    "mamba_ssm": "#d9822b", "causal_conv1d": "#a0522d", "fla": "#7b4fa3", "transformers": "#c9a227",
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


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, with three significant digits or all before the point."""
    ms = 1e3 * seconds
    return f"{ms:,.0f}" if ms >= 1000 else f"{ms:.1f}" if ms >= 10 else f"{ms:.3f}"


def bars(report: Mapping[str, Any]) -> bytes:
    """Medians and quartiles of every implementation, a panel for each case and mode; the roofline is a dotted line."""
    plt = pyplot_headless()
    cases = report["cases"]
    modes = list(dict.fromkeys(row["mode"] for row in cases[0]["rows"]))
    impls = list(dict.fromkeys(row["impl"] for row in cases[0]["rows"]))
    size = (max(4.2, min(10.5, 4.2 * len(modes) + 1)), (0.34 * len(impls) + 1.05) * len(cases) + 0.3)
    figure, axes = plt.subplots(len(cases), len(modes), figsize=size, squeeze=False, sharey=True)
    for case, panels in zip(cases, axes, strict=True):
        for mode, axis in zip(modes, panels, strict=True):
            rows = [row for row in case["rows"] if row["mode"] == mode]
            title = f"{case['name']}, {mode}" if len(cases) > 1 else mode
            _bars(axis, rows, title)
    return png(figure, f"{report['op']}, {report['dtype']}, {report['device']}")


def _bars(axis: Any, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    ends = [1e3 * row["time"]["high"] for row in rows if "time" in row]
    least = [1e3 * row["time"]["median"] for row in rows if "time" in row]
    floors = [1e3 * row["floor"] for row in rows if row.get("floor")]
    is_log = bool(ends) and max(ends) > LOG * min(least + floors)
    if is_log:
        axis.set_xscale("log")
        axis.set_xlim(min(least + floors) / 3, 12 * max(ends))
    elif ends:
        axis.set_xlim(0, 1.45 * max(ends))
    for i, row in enumerate(rows):
        if "time" not in row:
            why = "not installed" if "not installed" in row.get("missing", "") else "not measured"
            x = axis.get_xlim()[0]
            axis.annotate(why, (x, i), (4, 0), textcoords="offset points", va="center", color="#888888", fontsize=8)
            continue
        low, median, high = (1e3 * row["time"][key] for key in ("low", "median", "high"))
        is_right = row.get("is_right", True)
        color = COLORS.get(row["impl"], "#444444") if is_right else WRONG
        spread = [[median - low], [high - median]]
        axis.barh(i, median, xerr=spread, color=color, height=0.62, capsize=3, ecolor="#222222")
        label = f"{milliseconds(median / 1e3)} ms" + ("" if is_right else "  wrong")
        axis.annotate(label, (high, i), (5, 0), textcoords="offset points", va="center", fontsize=8)
    if floors:
        axis.axvline(floors[0], color="black", linestyle=":", label="roofline")
        axis.legend(fontsize=8, loc="lower right")
    axis.set_yticks(range(len(rows)), [row["impl"] for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel("ms, logarithmic" if is_log else "ms", fontsize=8)
    axis.set_title(title, fontsize=9, loc="left")
    style_axis(axis)


def lines(report: Mapping[str, Any]) -> bytes:
    """Medians of a sweep on logarithmic axes, quartiles as bands, the roofline dashed; a panel for each mode.

    Over lengths and batches a dotted line continues the first point in proportion to the size.
    """
    plt = pyplot_headless()
    modes = list(dict.fromkeys(row["mode"] for row in report["cases"][0]["rows"]))
    impls = list(dict.fromkeys(row["impl"] for row in report["cases"][0]["rows"]))
    size = (max(5.6, min(10.5, 5.2 * len(modes))), 4.2)
    figure, axes = plt.subplots(1, len(modes), figsize=size, squeeze=False)
    for axis, mode in zip(axes[0], modes, strict=True):
        rows = [(case["value"], r) for case in report["cases"] for r in case["rows"] if r["mode"] == mode]
        for impl in impls:
            timed = [(value, row) for value, row in rows if row["impl"] == impl and "time" in row]
            if not timed:
                axis.plot([], [], color="#bbbbbb", label=f"{impl}: {_reason_missing(rows, impl)}")
                continue
            _line(axis, impl, timed, is_proportional=report["over"] in ("length", "batch"))
        floors = [(value, row["floor"]) for value, row in rows if row.get("floor")]
        if floors:
            axis.plot(*zip(*sorted(set(floors)), strict=True), "k--", linewidth=1.2, label="roofline")
        set_log_axes(axis, [case["value"] for case in report["cases"]], report["over"])
        axis.minorticks_off()
        axis.set_ylabel("seconds")
        axis.set_title(mode, fontsize=9, loc="left")
        axis.legend(fontsize=8, frameon=False)
    fixed = [f"{k} {v:,}" for k, v in report["cases"][0]["shape"].items() if k != report["over"]]
    return png(figure, f"{report['op']}, {report['dtype']}, {report['device']}\n{', '.join(fixed)}")


def _line(axis: Any, impl: str, timed: Sequence[tuple[int, Mapping[str, Any]]], *, is_proportional: bool) -> None:
    values = [value for value, _ in timed]
    low, median, high = ([row["time"][key] for _, row in timed] for key in ("low", "median", "high"))
    color = COLORS.get(impl, "#444444")
    axis.plot(values, median, "o-", color=color, markersize=4, label=impl)
    axis.fill_between(values, low, high, color=color, alpha=0.25, linewidth=0)
    if is_proportional and len(values) > 1:
        proportional = [median[0] * n / values[0] for n in values]
        axis.plot(values, proportional, ":", color=color, linewidth=1, label=f"{impl}, in proportion to the first")
    wrong = [(value, row["time"]["median"]) for value, row in timed if not row.get("is_right", True)]
    if wrong:
        axis.plot(*zip(*wrong, strict=True), "X", color=WRONG, markersize=9, label=f"{impl}: wrong")


def _reason_missing(rows: Sequence[tuple[int, Mapping[str, Any]]], impl: str) -> str:
    is_installed = not any("not installed" in row.get("missing", "") for _, row in rows if row["impl"] == impl)
    return "not measured" if is_installed else "not installed"
