"""Plots of a run. matplotlib is imported when one is drawn."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..model.video import Video
from .records import Record
from .reproduction.intervals import Interval
from .sources import read_visual

WIDTH = 7.4
"""Inches. At 100 pixels each this is the width of a page of the documentation; files have twice as many."""
INK = "#7a828c"
"""Text and axes: to be read on a light and on a dark page, since the ground is transparent."""
COLORS = ("#2f7fc1", "#d98a1f", "#3fa37c", "#b06bb3")
"""Lines, told apart by the color-blind too."""
RIGHT, WRONG = ("#2f7fc1", "✓"), ("#d1602a", "✗")


def learning_curves(curves: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Plot loss against step: a panel for each stage, a line for each model.

    Args:
        curves: stage -> model -> losses.
        path: image file to write.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(curves), figsize=(WIDTH, 2.5), squeeze=False, layout="constrained")
    for axis, (stage, lines) in zip(axes[0], curves.items(), strict=True):
        for color, (name, losses) in zip(itertools.cycle(COLORS), lines.items(), strict=False):
            axis.plot(_smooth(losses), label=name, linewidth=1.2, color=color)
        # A log scale where losses span more than a decade.
        low, high = axis.get_ylim()
        axis.set(title=stage, xlabel="step", yscale="log" if low <= 0 or high > 10 * low else "linear")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        _style(axis)
    axes[0][0].set_ylabel("loss, nats a token")
    # One for all panels, each name in the color of its line.
    axes[0][-1].legend(frameon=False, labelcolor="linecolor", handlelength=0, fontsize=8)
    _save(figure, path)


def sample_page(records: Sequence[Record], answers: Mapping[str, Sequence[str]], path: Path, columns: int = 4) -> None:
    """Plot images with the question, the correct answer and each model's answer.

    Args:
        records: their images and first two turns are shown.
        answers: model -> answers, one for each record.
        path: image file to write.
        columns: images in a row.
    """
    plt = _pyplot()
    rows = -(-len(records) // columns)
    size = (WIDTH, (WIDTH / columns + 0.25) * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, record) in enumerate(zip(axes.flat, records, strict=False)):
        question, truth = (t.text for t in record.turns[:2])
        if record.images:
            first = read_visual(record.images[0])
            axis.imshow(first.frames(1)[0] if isinstance(first, Video) else first)
        axis.set_title(f"{textwrap.fill(question, 120 // columns)}\ntruth: {truth}", fontsize=8, color=INK)
        for k, (name, texts) in enumerate(answers.items()):
            color, mark = RIGHT if texts[i] == truth else WRONG
            axis.text(0.5, -0.06 - 0.13 * k, f"{mark} {name}: {texts[i]}", transform=axis.transAxes, ha="center",
                      va="top", fontsize=8, color=color)  # fmt: skip
    _save(figure, path)


def accuracy_intervals(
    accuracies: Mapping[str, Sequence[float]], intervals: Mapping[str, Interval], path: Path
) -> None:
    """Plot the accuracy of each row: its interval as a line, its seeds as dots.

    Args:
        accuracies: row -> accuracy with each seed.
        intervals: row -> mean and interval.
        path: image file to write.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(WIDTH, 0.9 + 0.5 * len(accuracies)), layout="constrained")
    for y, (name, values) in enumerate(accuracies.items()):
        i = intervals[name]
        axis.plot([100 * i.low, 100 * i.high], [y, y], color=COLORS[0], linewidth=6, alpha=0.35, solid_capstyle="butt")
        axis.plot([100 * v for v in values], [y] * len(values), ".", color=INK, markersize=5)
        axis.plot([100 * i.mean], [y], "|", color=COLORS[0], markersize=14, markeredgewidth=2)
    axis.set_yticks(range(len(accuracies)), list(accuracies))
    # From the top, in the order of the table.
    axis.invert_yaxis()
    axis.margins(y=0.2)
    axis.set_xlabel("accuracy, %: seeds as dots, their mean with its interval")
    _style(axis)
    _save(figure, path)


def _style(axis: Any) -> None:
    """Draw frame, ticks and titles in `INK`, with no frame above and on the right."""
    axis.grid(alpha=0.25, color=INK)
    axis.tick_params(colors=INK, labelsize=8)
    for side, spine in axis.spines.items():
        spine.set(color=INK, visible=side in ("bottom", "left"))
    for text, size in ((axis.title, 9), (axis.xaxis.label, 8), (axis.yaxis.label, 8)):
        text.set(color=INK, fontsize=size)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=200, transparent=True)
    _pyplot().close(figure)


def _smooth(values: Sequence[float], window: int = 10) -> list[float]:
    """Trailing mean."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def _pyplot():
    try:
        import matplotlib
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'vl-mamba[demo]'") from e
    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    return pyplot
