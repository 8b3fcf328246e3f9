"""Plots: what is drawn, read from the axes."""

import matplotlib
import numpy as np
import pytest
from PIL import Image

from vlmamba.train import plots
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
    assert [axis.get_title() for axis in (align, finetune)] == ["align", "finetune"]
    long, short = (line.get_ydata() for line in align.get_lines())
    assert list(short) == [1.0, 1.5, 2.0]
    assert long[9] == np.mean(losses[:10]) and long[-1] == np.mean(losses[-10:])


@pytest.mark.parametrize(("losses", "scale"), [([2.0, 1.5, 1.0], "linear"), ([20.0] * 10 + [0.1] * 40, "log")])
def test_a_loss_that_spans_more_than_a_decade_is_on_a_log_scale(losses, scale, tmp_path, drawn):
    plots.learning_curves({"align": {"a": losses}}, tmp_path / "c.png")
    assert drawn[0].axes[0].get_yscale() == scale


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
