"""Files of ssm-bench run and sweep: JSON, CSV, plots and page; errors and the roofline in them."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from vlmamba.benchmarks import accuracy, cli, op_report, plots, run
from vlmamba.benchmarks.accuracy import allowed_error, ground_truth
from vlmamba.benchmarks.cases import Case
from vlmamba.benchmarks.devices import DEVICES
from vlmamba.benchmarks.roofline import cost, least_time, roofline_share
from vlmamba.benchmarks.timing import Result
from vlmamba.benchmarks.workloads import Workload, build, named_shape

SMALL = ["--batch", "1", "--length", "20", "--channels", "8", "--calls", "3", "--metric", "time", "error"]


class Sources(HTMLParser):
    """Collects the addresses that a page loads."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()
        self.parents: dict[str, set[str]] = {}
        self._before = ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.parents.setdefault(tag, set()).add(self._before)
        self._before = f"{tag} {dict(attrs).get('class', '')}"
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]


def test_a_run_writes_json_csv_png_and_a_page_that_loads_nothing(tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "mamba_ssm" else found(name, *a))
    out = tmp_path / "new" / "run.json"
    cli.main(["run", "selective_scan", "--impl", "torch", "mamba_ssm", "fla", *SMALL, "--out", str(out)])
    (case,) = json.loads(out.read_text())["cases"]
    rows = case["rows"]
    assert case["shape"] == {"batch": 1, "length": 20, "channels": 8, "d_state": 16, "groups": 1}
    assert [row["impl"] for row in rows] == ["torch", "mamba_ssm", "fla"] * 2
    assert len(rows[0]["time"]["seconds"]) == 3
    assert rows[0]["is_right"]
    assert "pip install mamba-ssm" in rows[1]["missing"]
    assert "pip install mamba-ssm" in capsys.readouterr().out
    with out.with_suffix(".csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["impl"] for line in lines] == ["torch", "mamba_ssm", "fla"] * 2
    assert float(lines[0]["median"]) == rows[0]["time"]["median"]
    assert lines[0]["length"] == "20"
    assert lines[0]["is_right"] == "True"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page = Sources()
    page.feed(text := out.with_suffix(".html").read_text())
    assert page.found and all(source.startswith("data:") for source in page.found)
    assert "script" not in page.tags and "url(" not in text and "@import" not in text
    assert "pip install mamba-ssm" in text and "torch" in text and "commit" in text
    # A phone takes the page as wide as it is, tables and the plot scroll alone, and a dark page has colors of its own.
    assert 'name="viewport"' in text and page.parents["table"] == page.parents["img"] == {"div wide"}
    assert all(
        f"{color}:" in text.partition("prefers-color-scheme: dark")[2] for color in re.findall(r"var\((.*?)\)", text)
    )


def test_a_fast_wrong_implementation_is_caught(tmp_path, capsys, monkeypatch):
    def wrong(op, impl, *args, **options):
        work = build(op, impl, *args, **options)
        return Workload(lambda: work.run() * 1.001, work.inputs) if impl == "torch" else work

    monkeypatch.setattr(run, "build", wrong)
    out = tmp_path / "run.json"
    with pytest.raises(SystemExit, match=r"wrong: torch fwd, torch fwd\+bwd; further"):
        cli.main(["run", "causal_conv1d", "--impl", "reference", "torch", *SMALL, "--out", str(out)])
    assert capsys.readouterr().out.count("WRONG") == 2
    assert [row["is_right"] for row in json.loads(out.read_text())["cases"][0]["rows"]] == [True, False] * 2
    assert out.with_suffix(".html").read_text().count("WRONG") == 2


def test_a_wrong_gradient_is_caught(capsys, monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * 1.001

    def wrong(op, impl, *args, **options):
        work = build(op, impl, *args, **options)
        return Workload(lambda: Wrong.apply(work.run()), work.inputs)

    monkeypatch.setattr(run, "build", wrong)
    for op in ("causal_conv1d", "ssd"):
        command = ["run", op, "--impl", "ours", "--batch", "1", "--length", "20", "--calls", "1", "--metric", "error"]
        cli.main([*command, "--mode", "fwd"])
        for mode in ("bwd", "fwd+bwd"):
            with pytest.raises(SystemExit, match=f"wrong: ours {re.escape(mode)}; further"):
                cli.main([*command, "--mode", mode])
    assert capsys.readouterr().out.count("WRONG") == 4


def test_what_is_not_finite_or_of_another_shape_or_lacks_a_gradient_is_wrong():
    shape = replace(named_shape("causal_conv1d", "default"), length=20)
    known = ground_truth("causal_conv1d", shape, torch.float32, gradients=True)
    y, gradients = known.result
    assert known.by == "reference"
    assert known.judge(Result(y, gradients))["is_right"]
    assert known.judge(Result(y * torch.nan, gradients)) == {
        "error": math.inf,
        "is_right": False,
        "gradient_error": 0.0,
    }
    assert known.judge(Result(y[:, 1:]))["error"] == math.inf
    found = known.judge(Result(y, (None, *gradients[1:])))
    assert (found["error"], found["gradient_error"], found["is_right"]) == (0.0, math.inf, False)


def test_the_torch_backend_is_the_ground_truth_where_the_reference_would_take_long(tmp_path, capsys, monkeypatch):
    shape = replace(named_shape("selective_scan", "default"), batch=1, length=300, channels=8)
    by_reference = ground_truth("selective_scan", shape, torch.float32)
    for limit in ("SECONDS", "BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(accuracy, limit, 1e-9)
            by_torch = ground_truth("selective_scan", shape, torch.float32)
            assert (by_reference.by, by_torch.by) == ("reference", "torch")
            torch.testing.assert_close(by_torch.result.y, by_reference.result.y, rtol=1e-10, atol=1e-10)
    monkeypatch.setattr(accuracy, "BYTES", 8 * 16 * 2 * 8 * 20)  # 20 steps of 8 channels
    lengths = ["--values", "20", "40", "--channels", "8", "--calls", "1"]
    cli.main(["sweep", "selective_scan", *lengths, "--out", str(tmp_path / "a.json")])
    assert [c["truth"] for c in json.loads((tmp_path / "a.json").read_text())["cases"]] == ["reference", "torch"]
    page = (tmp_path / "a.html").read_text()
    assert page.count("; y against the torch backend, the reference taking too long") == 1


def test_the_allowed_error_of_a_half_type_is_small():
    assert allowed_error(0.0, torch.bfloat16) < 0.1
    assert allowed_error(1e-7, torch.float32) < 1e-5


def test_the_roofline_is_reported_where_the_device_is_known(monkeypatch):
    shape = named_shape("ssd", "2.7b")
    assert (shape.batch, shape.length, shape.channels, shape.heads, shape.d_state) == (8, 2048, 5120, 80, 128)
    case = Case("ssd", shape, "bf16", chunk_size=32)
    assert roofline_share(case, "fwd", 1.0, "cpu")["share"] is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    for mode in ("fwd", "bwd", "fwd+bwd"):
        least = least_time(cost(case, mode), DEVICES["H100"], torch.bfloat16)
        expected = {"floor": least.seconds, "bound": least.bound, "share": 0.5}
        assert roofline_share(case, mode, 2 * least.seconds, "cuda") == expected
    assert roofline_share(replace(case, dtype="fp64"), "fwd", 1.0, "cuda")["share"] is None


def test_a_run_reports_the_roofline_of_the_op_it_times(tmp_path, monkeypatch):
    asked = []
    share = {"floor": 0.25, "bound": "memory", "share": 0.5}
    monkeypatch.setattr(run, "roofline_share", lambda case, mode, *others: asked.append((case, mode)) or share)
    command = "run ssd --impl ours --mode bwd --chunk-size 32 --metric time --length 20".split()
    cli.main([*command, "--out", str(tmp_path / "a.json")])
    ((case, mode),) = asked
    assert (case.op, case.shape.length, case.chunk_size, case.dtype, mode) == ("ssd", 20, 32, "fp32", "bwd")
    assert json.loads((tmp_path / "a.json").read_text())["cases"][0]["rows"][0]["share"] == 0.5
    cli.main(["run", "mamba2_block", "--impl", "ours", "--mode", "fwd", "--metric", "time", "--length", "20"])
    assert len(asked) == 1


def written(rows, *, over=None, truth="reference"):
    """A report of `run` or `sweep` with a case for each list of rows."""
    cases = [
        {
            "op": "ssd",
            "name": f"case {i}",
            "threads": 1,
            "value": 2**i,
            "shape": {"batch": 1, "length": 2**i},
            "truth": truth,
            "rows": some,
        }
        | {"allowed_error": 1e-5, "allowed_gradient_error": 1e-5}
        for i, some in enumerate(rows)
    ]
    result = {
        "command": "ssm-bench run ssd",
        "op": "ssd",
        "dtype": "fp32",
        "over": over,
        "cases": cases,
        "ours": "torch",
    }
    result |= {"packages": {}, "device": "a", "driver": None, "threads": 1, "cores": 1, "python": "3", "commit": None}
    return result | {"date": "2026-01-01"}


def timed(impl, seconds, **more):
    time = {"median": seconds, "low": 0.9 * seconds, "high": 1.1 * seconds, "calls": 3, "seconds": [seconds] * 3}
    row = {"impl": impl, "mode": "fwd", "time": time, "floor": None, "bound": None, "share": None, "error": 1e-7}
    return row | {"is_right": True} | more


def test_the_page_escapes_what_it_shows():
    result = written([[{"impl": "fla", "mode": "fwd", "missing": "<script>"}]]) | {"device": "<b>", "command": "a <i>"}
    text = op_report.page(result, [])
    assert "<script>" not in text and "<b>" not in text and "<i>" not in text and "<img" not in text
    assert "&lt;script&gt;" in text


def test_the_page_shows_shares_of_the_roofline_and_which_error_is_wrong():
    known = {"floor": 0.5, "bound": "memory", "share": 0.25}
    off = {"error": 1e-7, "gradient_error": 1e-3, "is_right": False}
    text = op_report.page(written([[timed("ours", 2.0, **known), timed("fla", 1.0, **off)]]), [])
    assert "<td>25% (memory)</td>" in text
    assert "<td>1.0e-03 WRONG</td>" in text and "<td>1.0e-07</td>" in text
    assert "<td>0.50</td>" in text  # of the first one's time
    assert "<th>of the limit</th>" not in op_report.page(written([[timed("ours", 2.0)]]), [])


def drawn(monkeypatch):
    """Axes of the figures that are drawn from now on."""
    found, png = [], plots.png
    monkeypatch.setattr(plots, "png", lambda figure: found.extend(figure.axes) or png(figure))
    return found


def test_bars_show_what_is_missing_and_what_is_wrong_and_the_roofline(monkeypatch):
    pytest.importorskip("matplotlib")
    axes = drawn(monkeypatch)
    rows = [timed("ours", 2.0, floor=0.5), timed("fla", 1.0, is_right=False)]
    rows.append({"impl": "mamba_ssm", "mode": "fwd", "missing": "mamba_ssm is not installed: pip install mamba-ssm"})
    plots.bars(written([rows, [timed("ours", 2.0), timed("fla", 400.0), rows[2]]]))
    first, second = axes
    assert [bar.get_width() for bar in first.patches] == [2000, 1000]
    assert [text.get_text() for text in first.texts] == ["2,000 ms", "1,000 ms  wrong", "not installed", "roofline"]
    assert [line.get_xdata()[0] for line in first.lines if line.get_linestyle() == ":"] == [500]
    assert (first.get_xscale(), second.get_xscale()) == ("linear", "log")
    assert first.get_xlim()[0] == 0 and first.get_xlim()[1] > 2200
    assert not second.patches  # a bar on a logarithmic axis would not start at zero
    assert [points.lines[0].get_xdata()[0] for points in second.containers] == [2000, 400_000]


def test_a_sweep_s_lines_have_spread_proportion_roofline_and_what_is_missing(monkeypatch):
    pytest.importorskip("matplotlib")
    axes = drawn(monkeypatch)
    absent = {"impl": "fla", "mode": "fwd", "missing": "fla is not installed: pip install flash-linear-attention"}
    cases = [[timed("ours", 2.0 * 3**i, floor=0.1 * 2**i, is_right=i < 2), absent] for i in range(3)]
    plots.lines(written(cases, over="length"))
    (axis,) = axes
    drawn_lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]
    sizes = [1, 2, 4]
    assert (sizes, [2000, 6000, 18_000]) in drawn_lines
    assert (sizes, [100, 200, 400]) in drawn_lines  # roofline
    assert (sizes, [2000, 4000, 8000]) in drawn_lines  # in proportion to the first
    assert ([4], [18_000]) in drawn_lines  # wrong
    texts = [text.get_text() for text in axis.texts]
    assert texts == ["fla: not installed", "ours: × is wrong", "roofline"]
    assert axis.get_legend() is None
    (band,) = axis.collections
    assert band.get_datalim(axis.transData).height == pytest.approx(1.1 * 18_000 - 0.9 * 2000)
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["4", "2", "1"]
