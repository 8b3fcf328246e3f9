"""What a run writes, and what two of them say beside each other."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
from html.parser import HTMLParser

import pytest
import torch

from vlmamba.benchmarks import cli, measure, report, run
from vlmamba.benchmarks.compare import compare, holm, mann_whitney, regressions
from vlmamba.benchmarks.measure import allowed_error
from vlmamba.benchmarks.roofline import Floor
from vlmamba.benchmarks.workloads import Workload, build, named_shape

SMALL = ["--batch", "1", "--length", "20", "--channels", "8", "--calls", "3", "--metric", "time", "error"]


class Sources(HTMLParser):
    """What a page asks for."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]


def test_a_run_writes_json_csv_png_and_a_page_that_asks_for_nothing(tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "mamba_ssm" else found(name, *a))
    out = tmp_path / "new" / "run.json"
    cli.main(["run", "selective_scan", "--impl", "torch", "mamba_ssm", "fla", *SMALL, "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
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


def test_a_fast_wrong_implementation_is_caught(tmp_path, capsys, monkeypatch):
    def wrong(op, impl, *args, **options):
        work = build(op, impl, *args, **options)
        return Workload(lambda: work.run() * 1.001, work.inputs) if impl == "torch" else work

    monkeypatch.setattr(run, "build", wrong)
    out = tmp_path / "run.json"
    with pytest.raises(SystemExit, match="wrong: torch; more than"):
        cli.main(["run", "causal_conv1d", "--impl", "reference", "torch", *SMALL, "--out", str(out)])
    assert capsys.readouterr().out.count("WRONG") == 2
    assert [row["is_right"] for row in json.loads(out.read_text())["rows"]] == [True, False] * 2
    assert out.with_suffix(".html").read_text().count("WRONG") == 2


def test_what_is_not_finite_or_of_another_shape_is_wrong():
    shape = named_shape("causal_conv1d", "default")
    for spoil in (lambda y: y * torch.nan, lambda y: y[:, 1:]):
        work = build("causal_conv1d", "torch", shape)
        spoiled = Workload(lambda work=work, spoil=spoil: spoil(work.run()), work.inputs)
        assert measure.error("causal_conv1d", spoiled, shape, torch.float32) == math.inf


def test_a_half_type_is_not_forgiven_half_of_the_result():
    assert allowed_error(0.0, torch.bfloat16) < 0.1
    assert allowed_error(1e-7, torch.float32) < 1e-5


def test_the_roofline_is_given_where_the_device_is_known(monkeypatch):
    shape = named_shape("ssd", "2.7b")
    assert (shape.batch, shape.length, shape.channels, shape.heads, shape.d_state) == (8, 2048, 5120, 80, 128)
    assert run._against_roofline("ssd", shape, "bf16", "fwd", 1.0, "cpu")["share"] is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(run, "floor", lambda *a: Floor(0.25, "memory"))
    reached = run._against_roofline("ssd", shape, "bf16", "fwd", 0.5, "cuda")
    assert reached == {"floor": 0.25, "bound": "memory", "share": 0.5}


def test_the_page_escapes_what_it_shows(tmp_path):
    result = {"op": "ssd", "dtype": "fp32", "shape": {}, "packages": {}, "device": "<b>", "driver": None}
    result |= {"threads": 1, "cores": 1, "python": "3", "commit": None}
    result["rows"] = [{"impl": "fla", "mode": "fwd", "missing": "<script>"}]
    report.to_html(result, None, tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert "<script>" not in text and "<b>" not in text and "<img" not in text


# --- compare --------------------------------------------------------------------------------------------------


def test_mann_whitney_is_that_of_the_tables():
    # Exact two-sided p values, of all orders: 2 / C(6, 3), and 4 / C(10, 5) for U = 1.
    assert mann_whitney([1, 2, 3], [4, 5, 6]) == pytest.approx(0.1)
    assert mann_whitney([1, 2, 3, 4, 6], [5, 7, 8, 9, 10]) == pytest.approx(4 / 252)
    assert mann_whitney([1.0] * 9, [1.0] * 9) == 1
    assert mann_whitney([1.0], [2.0, 3.0]) == 1


def test_mann_whitney_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    for n, m, digits in ((5, 8, 9), (15, 15, 9), (20, 30, 9), (40, 50, 9), (12, 12, 1)):
        x = torch.rand(n, generator=generator, dtype=torch.float64)
        y = torch.rand(m, generator=generator, dtype=torch.float64) + 0.2
        x, y = (t.mul(10**digits).round().tolist() for t in (x, y))  # of one digit: with ties
        is_exact = digits > 1 and n + m <= 60
        method = "exact" if is_exact else "asymptotic"
        assert mann_whitney(x, y) == pytest.approx(stats.mannwhitneyu(x, y, method=method).pvalue)


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def written(path, seconds, **changes):
    times = {"median": sorted(seconds)[len(seconds) // 2], "low": 0, "high": 0, "calls": len(seconds)}
    row = {"impl": "torch", "mode": "fwd", "time": {**times, "seconds": seconds}}
    result = {"op": "ssd", "dtype": "fp32", "shape": {"length": 8}, "device": "a", "threads": 1, "rows": [row]}
    path.write_text(json.dumps(result | changes))
    return path


def test_a_regression_is_slow_by_enough_and_not_by_chance(tmp_path, capsys):
    before = written(tmp_path / "a.json", [1 + 0.001 * i for i in range(15)])
    slower = written(tmp_path / "b.json", [1.2 + 0.001 * i for i in range(15)])
    barely = written(tmp_path / "c.json", [1.02 + 0.001 * i for i in range(15)])
    noisy = written(tmp_path / "d.json", [0.8, 0.9, 1.2, 1.3, 1.4])
    assert len(regressions(compare(before, slower), 0.05, 0.01)) == 1
    for after in (barely, noisy, before):
        assert not regressions(compare(before, after), 0.05, 0.01)
    assert not regressions(compare(slower, before), 0.05, 0.01)
    cli.main(["compare", str(before), str(barely)])
    with pytest.raises(SystemExit) as e:
        cli.main(["compare", str(before), str(slower)])
    assert e.value.code == 1
    assert "REGRESSION" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["compare", str(before), str(barely), "--threshold", "0.01"])


def test_a_drift_of_the_machine_is_no_regression_relative_to_what_did_not_change(tmp_path):
    def rows(torch_seconds, peer_seconds):
        sides = {"torch": torch_seconds, "fla": peer_seconds}
        times = {k: {"median": v[7], "calls": len(v), "seconds": v} for k, v in sides.items()}
        return [{"impl": impl, "mode": "fwd", "time": time} for impl, time in times.items()]

    drift = [1 + 0.01 * i for i in range(15)]
    before = written(tmp_path / "a.json", [1.0], rows=rows(drift, drift))
    drifted = written(tmp_path / "b.json", [1.0], rows=rows([2 * t for t in drift], [2 * t for t in drift]))
    slower = written(tmp_path / "c.json", [1.0], rows=rows([3 * t for t in drift], [2 * t for t in drift]))
    assert len(regressions(compare(before, drifted), 0.05, 0.01)) == 2
    assert not regressions(compare(before, drifted, "fla"), 0.05, 0.01)
    (row,) = regressions(compare(before, slower, "fla"), 0.05, 0.01)
    assert row.impl == "torch" and row.ratio == pytest.approx(1.5)
    with pytest.raises(ValueError, match="has not as many calls of transformers in mode fwd"):
        compare(before, slower, "transformers")


def test_files_that_do_not_compare_are_refused(tmp_path):
    before = written(tmp_path / "a.json", [1.0, 1.1])
    for field, value in {"device": "b", "op": "x", "dtype": "bf16", "shape": {"length": 9}, "threads": 2}.items():
        with pytest.raises(ValueError, match=f"do not compare: {field} is"):
            compare(before, written(tmp_path / "b.json", [1.0, 1.1], **{field: value}))
    with pytest.raises(ValueError, match="no implementation and mode in common"):
        compare(before, written(tmp_path / "b.json", [1.0], rows=[{"impl": "fla", "mode": "fwd", "missing": "no"}]))
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a report of ssm-bench run"):
        compare(before, tmp_path / "b.json")
    with pytest.raises(SystemExit, match="ssm-bench: .*absent.json"):
        cli.main(["compare", str(before), str(tmp_path / "absent.json")])
