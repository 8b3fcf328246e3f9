"""Plots of a run."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..model.files import write_atomic
from ..model.video import Video
from .plot_style import (
    COLORS,
    INK,
    SIZE,
    WIDTH,
    label_lines,
    line_styles,
    plain,
    png,
    set_plain_ticks,
    style_axis,
    subplots,
)
from .records import Record
from .reproduction.intervals import Interval
from .sources import read_visual

RIGHT, WRONG = (INK, "✓"), (COLORS[1], "✗")


def learning_curves(curves: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Plot loss against step: a panel for each stage, a line for each model.

    Args:
        curves: stage -> model -> losses.
        path: image file to write.
    """
    figure, axes = subplots(1, len(curves), 2.6)
    names = list(dict.fromkeys(name for lines in curves.values() for name in lines))
    styles, last = line_styles(names), []
    axes[0][0].set_ylabel("loss, nats a token")
    for axis, (stage, lines) in zip(axes[0], curves.items(), strict=True):
        last = []
        for name, losses in lines.items():
            smooth = _smooth(losses)
            axis.plot(smooth, label=name, linewidth=1.2, **styles[name])
            last.append((smooth[-1], name, styles[name]["color"]))
        # A log scale where losses span more than a decade.
        low, high = axis.get_ylim()
        axis.set(xlabel="step", yscale="log" if low <= 0 or high > 10 * low else "linear")
        style_axis(axis, stage)
        set_plain_ticks(axis)
        axis.xaxis.set_major_formatter(plain)
    # The colors are the same in all panels.
    label_lines(axes[0][-1], last)
    write_atomic(path, png(figure))


def sample_page(records: Sequence[Record], answers: Mapping[str, Sequence[str]], path: Path, columns: int = 4) -> None:
    """Plot images with the question, the correct answer and each model's answer.

    Args:
        records: their images and first two turns are shown.
        answers: model -> answers, one for each record.
        path: image file to write.
        columns: images in a row.
    """
    rows = -(-len(records) // columns)
    # Points of a line of text: two of the question, one of the truth, one for each model.
    text = (3 + len(answers)) * 1.35 * SIZE / 72
    figure, axes = subplots(rows, columns, (0.75 * WIDTH / columns + text) * rows)
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, record) in enumerate(zip(axes.flat, records, strict=False)):
        question, truth = (t.text for t in record.turns[:2])
        if record.images:
            first = read_visual(record.images[0])
            axis.imshow(first.frames(1)[0] if isinstance(first, Video) else first)
        axis.set_title(f"{textwrap.fill(question, 96 // columns)}\ntruth: {truth}", fontsize=SIZE, color=INK)
        for k, (name, texts) in enumerate(answers.items()):
            color, mark = RIGHT if texts[i] == truth else WRONG
            axis.annotate(f"{mark} {name}: {texts[i]}", (0.5, 0), (0, -4 - 1.35 * SIZE * k), ha="center", va="top",
                          xycoords="axes fraction", textcoords="offset points", fontsize=SIZE, color=color)  # fmt: skip
    write_atomic(path, png(figure))


def accuracy_intervals(
    accuracies: Mapping[str, Sequence[float]], intervals: Mapping[str, Interval], path: Path
) -> None:
    """Plot the accuracy of each row: its interval as a line, its seeds as dots.

    Args:
        accuracies: row -> accuracy with each seed.
        intervals: row -> mean and interval.
        path: image file to write.
    """
    figure, axes = subplots(1, 1, 0.9 + 0.5 * len(accuracies))
    axis = axes[0][0]
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
    axis.ticklabel_format(axis="x", useOffset=False)
    style_axis(axis)
    write_atomic(path, png(figure))


def _smooth(values: Sequence[float], window: int = 10) -> list[float]:
    """Trailing mean."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
