"""Plots of a run. matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .records import Record
from .reproduction.intervals import Interval
from .sources import read_image


def learning_curves(curves: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Plot loss against step: a panel for each stage, a line for each model.

    Args:
        curves: stage -> model -> losses.
        path: image file to write.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.2), squeeze=False)
    for axis, (stage, lines) in zip(axes[0], curves.items(), strict=True):
        for name, losses in lines.items():
            axis.plot(_smooth(losses), label=name, linewidth=1.2)
        # A log scale where losses span more than a decade.
        low, high = axis.get_ylim()
        axis.set(title=stage, xlabel="step", ylabel="loss", yscale="log" if low <= 0 or high > 10 * low else "linear")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 3.1 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, record) in enumerate(zip(axes.flat, records, strict=False)):
        question, truth = (t.text for t in record.turns[:2])
        if record.images:
            axis.imshow(read_image(record.images[0]))
        axis.set_title(f"{question}\ntruth: {truth}", fontsize=9)
        for k, (name, texts) in enumerate(answers.items()):
            color = "tab:green" if texts[i] == truth else "tab:red"
            axis.text(0.5, -0.06 - 0.1 * k, f"{name}: {texts[i]}", transform=axis.transAxes, ha="center", va="top",
                      fontsize=9, color=color)  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
    figure, axis = plt.subplots(figsize=(7, 0.9 + 0.5 * len(accuracies)))
    for y, (name, values) in enumerate(accuracies.items()):
        i = intervals[name]
        axis.plot([100 * i.low, 100 * i.high], [y, y], color="tab:blue", linewidth=6, alpha=0.35, solid_capstyle="butt")
        axis.plot([100 * v for v in values], [y] * len(values), ".", color="0.45", markersize=5)
        axis.plot([100 * i.mean], [y], "|", color="tab:blue", markersize=14, markeredgewidth=2)
    axis.set_yticks(range(len(accuracies)), list(accuracies))
    # From the top, in the order of the table.
    axis.invert_yaxis()
    axis.margins(y=0.2)
    axis.set_xlabel("accuracy, %: seeds as dots, their mean with its interval")
    axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
