"""Style of all plots: size, colors, axes, labels beside lines. matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 7.4
"""Inches. At 100 pixels each this is the width of a page of the documentation."""
DPI = 200
"""Pixels an inch in a file: two for each of the page."""
INK = "#757c85"
"""Text and axes, which contrast alike (4.2) with a white and with a dark page: the ground is transparent."""
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Blue, vermilion, green and purple of the palette of Okabe and Ito (2008), which the color-blind can tell apart.

The palette's others do not stand out from a white page.
"""
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
"""Lines of the first four names, of the next four, and so on."""
SIZE = 9
"""Points of text: 12 pixels where the picture has the width of a page."""


def pyplot() -> Any:
    """Matplotlib's pyplot, drawing to memory.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("plots need matplotlib: pip install matplotlib") from e
    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    return pyplot


def subplots(rows: int, columns: int, height: float, **options: Any) -> tuple[Any, Any]:
    """Make a figure as wide as a page, and its axes as an array (rows, columns)."""
    return pyplot().subplots(
        rows, columns, figsize=(WIDTH, height), squeeze=False, layout="constrained", **options
    )  # fmt: skip


def line_styles(names: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
    """Color and dashes of the line of each name, different for the first twelve."""
    n = len(COLORS)
    return {
        name: {"color": COLORS[i % n], "linestyle": DASHES[i // n % len(DASHES)]} for i, name in enumerate(names)
    }  # fmt: skip


def style_axis(axis: Any, title: str = "") -> None:
    """Draw frame, ticks and texts in `INK`, with no frame above and on the right."""
    axis.set_title(title, loc="left", color=INK, fontsize=SIZE)
    axis.set_axisbelow(True)
    axis.grid(alpha=0.25, color=INK, linewidth=0.6)
    axis.tick_params(which="both", colors=INK, labelsize=SIZE)
    for side, spine in axis.spines.items():
        spine.set(color=INK, visible=side in ("bottom", "left"))
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set(color=INK, fontsize=SIZE)


def set_plain_ticks(axis: Any) -> None:
    """Write the numbers of the y axis out, without powers of ten or an offset; call it when the limits are final."""
    from matplotlib.ticker import LogLocator, NullLocator

    if axis.get_yscale() == "log":
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 200 * low else (1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(plain)


def plain(value: float, _: int | None = None) -> str:
    """A number of an axis written out: 1,000 and 0.5."""
    return f"{value:,.10g}"


def label_lines(axis: Any, labels: Sequence[tuple[float, str, Any]]) -> None:
    """Write labels on the right of an axis, in the color of their lines, none over another.

    Args:
        axis: axis whose limits are final.
        labels: height in the data, text and color of each.
    """
    axis.figure.draw_without_rendering()  # the height is known only after the layout
    # Heights as fractions of the axis, and the distance that a line of text needs.
    points = axis.transData.transform([(axis.get_xlim()[1], height) for height, _, _ in labels])
    heights = axis.transAxes.inverted().transform(points)[:, 1]
    gap = 1.3 * SIZE / 72 * axis.figure.dpi / axis.get_window_extent().height
    for y, (_, text, color) in zip(spread(heights.tolist(), gap), labels, strict=True):
        axis.text(1.02, y, text, color=color, fontsize=SIZE, va="center", transform=axis.transAxes)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Move positions to a distance of at least `gap`, with the least sum of squared moves."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    # Isotonic regression of the positions less their ranks' gaps: blocks that overlap are put at their mean.
    blocks: list[tuple[float, int]] = []
    for rank, i in enumerate(order):
        mean, count = wanted[i] - gap * rank, 1
        while blocks and blocks[-1][0] > mean:
            before, n = blocks.pop()
            mean, count = (before * n + mean * count) / (n + count), n + count
        blocks.append((mean, count))
    moved = [mean for mean, count in blocks for _ in range(count)]
    at = dict(zip(order, (position + gap * rank for rank, position in enumerate(moved)), strict=True))
    return [at[i] for i in range(len(wanted))]


def png(figure: Any) -> bytes:
    """Draw a figure as PNG with a transparent ground, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png", transparent=True)
    pyplot().close(figure)
    return buffer.getvalue()
