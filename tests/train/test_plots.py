"""Plots: what is drawn, read from the axes."""

import io
import itertools
import re

import matplotlib
import numpy as np
import pytest
from PIL import Image

from vlmamba.train import plot_style, plots
from vlmamba.train.reproduction.intervals import Interval

from .makers import qa_record

matplotlib.use("Agg")


@pytest.fixture
def drawn(monkeypatch):
    """The figures of the test, which would be closed after they are saved."""
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    yield figures
    monkeypatch.undo()
    pyplot.close("all")


def test_a_curve_is_the_mean_of_the_last_ten_losses(tmp_path, drawn):
    losses = [float(i) for i in range(1, 31)]
    plots.learning_curves({"align": {"a": losses, "b": losses[:3]}, "finetune": {"a": [2.0, 1.0]}}, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    align, finetune = drawn[0].axes
    assert [axis.get_title(loc="left") for axis in (align, finetune)] == ["align", "finetune"]
    assert not align.texts and [text.get_text() for text in finetune.texts] == ["a"]
    long, short = (line.get_ydata() for line in align.get_lines())
    assert list(short) == [1.0, 1.5, 2.0]
    assert long[9] == np.mean(losses[:10]) and long[-1] == np.mean(losses[-10:])


@pytest.mark.parametrize(("losses", "scale"), [([2.0, 1.5, 1.0], "linear"), ([20.0] * 10 + [0.1] * 40, "log")])
def test_a_loss_that_spans_more_than_a_decade_is_on_a_log_scale(losses, scale, tmp_path, drawn):
    plots.learning_curves({"align": {"a": losses}}, tmp_path / "c.png")
    (axis,) = drawn[0].axes
    assert axis.get_yscale() == scale
    assert all(re.fullmatch(r"[\d,.]*", tick.get_text()) for tick in axis.get_yticklabels())


def test_an_answer_is_marked_right_or_wrong_and_a_record_needs_no_image(tmp_path, drawn):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    records = [qa_record("Color?", "red", tmp_path / "a.png"), qa_record("Shape?", "circle")]
    plots.sample_page(records, {"m": ["red", "square"]}, tmp_path / "s.png", columns=3)
    first, second, empty = drawn[0].axes
    assert first.get_title() == "Color?\ntruth: red" and second.get_title() == "Shape?\ntruth: circle"
    assert [(t.get_text(), t.get_color()) for t in (*first.texts, *second.texts)] == [
        ("✓ m: red", plots.RIGHT[0]), ("✗ m: square", plots.WRONG[0])
    ]  # fmt: skip
    assert len(first.images) == 1 and not second.images and not empty.texts and not empty.images


def test_a_row_has_its_interval_its_seeds_and_their_mean(tmp_path, drawn):
    intervals = {"mlp": Interval(0.6, 0.5, 0.7), "vss-l2": Interval(0.9, 0.9, 0.9)}
    plots.accuracy_intervals({"mlp": [0.5, 0.7], "vss-l2": [0.9]}, intervals, tmp_path / "a.png")
    (axis,) = drawn[0].axes
    lines = [list(line.get_xdata()) for line in axis.get_lines()]
    assert lines == [pytest.approx(x) for x in ([50, 70], [50, 70], [60], [90, 90], [90], [90])]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["mlp", "vss-l2"]


def test_labels_move_apart_no_further_than_they_must():
    assert plot_style.spread([0.0, 1.0, 0.5], 0.4) == pytest.approx([0.0, 1.0, 0.5])
    assert plot_style.spread([5.0, 5.0, 5.2, 9.0], 1.0) == pytest.approx([61 / 15, 76 / 15, 91 / 15, 9.0])


def test_numbers_of_an_axis_are_written_out(drawn):
    numbers = [plot_style.plain(x) for x in (0.0005, 0.5, 20.0, 1e3, 3e7)]
    assert numbers == ["0.0005", "0.5", "20", "1,000", "30,000,000"]
    _, axes = plot_style.subplots(1, 1, 3.0)
    axes[0][0].plot([100_000.01, 100_000.02])  # where matplotlib would write an offset
    plot_style.set_plain_ticks(axes[0][0])
    axes[0][0].figure.draw_without_rendering()
    assert axes[0][0].yaxis.get_offset_text().get_text() == ""


def test_twelve_lines_differ_in_color_or_dashes():
    styles = plot_style.line_styles([str(i) for i in range(12)])
    assert all(a != b for a, b in itertools.combinations(styles.values(), 2))


def luminance(color) -> float:
    """Relative luminance by WCAG 2."""
    from matplotlib.colors import to_rgb

    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("ground", ["#ffffff", "#131416"], ids=["light", "dark"])
def test_a_picture_is_read_on_a_light_and_on_a_dark_page(ground):
    def contrast(color) -> float:
        low, high = sorted((luminance(color), luminance(ground)))
        return (high + 0.05) / (low + 0.05)

    assert contrast(plot_style.INK) > 4.2
    assert all(contrast(color) > 3 for color in plot_style.COLORS)
    figure, axes = plot_style.subplots(1, 1, 2.0)
    plot_style.style_axis(axes[0][0], "title")
    image = Image.open(io.BytesIO(plot_style.png(figure)))
    assert image.mode == "RGBA" and image.getpixel((0, 0))[3] == 0
    assert image.width == plot_style.WIDTH * plot_style.DPI
