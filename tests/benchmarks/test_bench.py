"""ssm-bench on small shapes: implementations agree, figures are plausible, reports are complete."""

from __future__ import annotations

import csv
import importlib.util
import json
import multiprocessing
import re
import time
from dataclasses import replace
from typing import get_args

import pytest
import torch

from ssm_kernels import Backend, resolve_backend, use_backend
from ssm_kernels._core import dispatch
from tests.ctrl_c import a_process_starts, press_ctrl_c_when
from vlmamba.benchmarks import cli, options, peers, run, timing
from vlmamba.benchmarks.accuracy import ground_truth
from vlmamba.benchmarks.cases import Case, Shape
from vlmamba.benchmarks.memory import in_fresh_process, peak_memory
from vlmamba.benchmarks.timing import (
    first_call,
    predict_excess,
    prepare,
    run_once,
    time_together,
    upstream_gradient,
)
from vlmamba.benchmarks.workloads import Workload, build, named_shape

IMPLEMENTATIONS = ("ours", "torch", "reference", "transformers")
SMALL = Shape(batch=2, length=40, channels=32, d_state=8, heads=4, headdim=8, height=5)


@pytest.mark.parametrize("op", get_args(options.Op))
def test_every_implementation_computes_the_same_and_has_the_same_gradients(op):
    mode = "fwd" if op.endswith("_step") else "fwd+bwd"
    known = ground_truth(op, SMALL, torch.float32, gradients=mode != "fwd")
    assert known.by == "reference"
    for impl in IMPLEMENTATIONS:
        if impl == "transformers" and op.startswith(("cross_", "mamba3")):
            with pytest.raises(ValueError, match=f"transformers is not compared on {op}"):
                build(op, impl, SMALL)
            continue
        result, _ = first_call(build(op, impl, SMALL), mode)
        found = known.judge(result)
        assert found["is_right"], (impl, found)
        assert len(result.gradients) == len(known.result.gradients) and (
            mode == "fwd" or found["gradient_error"] < 1e-5
        )


def test_ours_is_what_auto_takes(monkeypatch):
    seen = []
    monkeypatch.setattr("ssm_kernels.ssd", lambda **inputs: seen.append(inputs["backend"]) or inputs["x"])
    for impl in ("ours", "reference"):
        build("ssd", impl, SMALL).run()
    assert seen == ["auto", "reference"]


def test_a_case_runs_on_the_backend_of_the_block_around_it():
    case = Case("ssd", SMALL)
    inputs = case.inputs()
    with use_backend("reference"):
        y, _ = case.run(inputs)
    assert torch.equal(y, case.run(inputs, "reference")[0])
    assert not torch.equal(y, case.run(inputs, "torch")[0])


def test_implementations_are_timed_in_turn():
    order = []
    works = {n: Workload(lambda n=n: order.append(n) or torch.zeros(1), []) for n in ("a", "b")}
    timings = time_together(works, "fwd", 3)
    assert order == ["a", "b"] * 4
    assert all(t.calls == 3 and t.low <= t.median <= t.high for t in timings.values())


def test_peak_memory_grows_with_what_is_allocated():
    short, long = (peak_memory("ssd", "torch", replace(SMALL, length=n), "fwd+bwd") for n in (256, 4096))
    assert long > short + 8 * 2**20
    # Of a backward alone, it is beyond the tensors that the forward saved.
    assert 0 < peak_memory("ssd", "torch", replace(SMALL, length=4096), "bwd") < long


class Clock:
    """Stands in for `time`: the forward takes 100 seconds, the backward 1."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def process_time(self):
        return self.now / 2

    def work(self):
        clock = self

        class Spends(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                clock.now += 100
                return 2 * x

            @staticmethod
            def backward(ctx, dy):
                clock.now += 1
                return 2 * dy

        x = torch.ones(3, requires_grad=True)
        return Workload(lambda: Spends.apply(x), [x])


@pytest.mark.parametrize(("mode", "seconds"), [("fwd", 100), ("bwd", 1), ("fwd+bwd", 101)])
def test_a_mode_s_time_has_nothing_else_in_it(mode, seconds, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    work = clock.work()
    assert first_call(work, mode)[1] == (seconds, seconds / 2)
    times = time_together({"a": work}, mode, 3)["a"]
    assert times.seconds == (seconds,) * 3 and times.processor == seconds / 2
    result = prepare(work, mode)()
    expected = () if mode == "fwd" else (2 * upstream_gradient(result.y),)
    assert len(result.gradients) == len(expected) and all(map(torch.equal, result.gradients, expected))


def test_calls_fit_the_budget(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    monkeypatch.setattr(run, "build", lambda *args, **options: clock.work())
    out = tmp_path / "a.json"
    command = ["run", "ssd", "--impl", "reference", "--mode", "fwd", "bwd", "--metric", "time", "--length", "16"]
    for budget, slow_calls in (("350", 3), ("150", 1)):
        clock.now = 0
        cli.main([*command, "--budget", budget, "--out", str(out)])
        slow, fast = json.loads(out.read_text())["cases"][0]["rows"]
        assert (slow["time"]["calls"], slow["time"]["median"]) == (slow_calls, 100)
        assert (fast["time"]["calls"], fast["time"]["median"]) == (15, 1)
        # A first call, and for several a warm-up before them.
        assert clock.now == 100 * (1 if slow_calls == 1 else 2 + slow_calls) + 17 * 101


def test_the_time_of_a_first_call_that_compiles_is_not_a_result(tmp_path, monkeypatch):
    clock, calls = Clock(), []

    def work():
        calls.append(1)
        clock.now += 60 if len(calls) == 1 else 1
        return torch.zeros(1)

    monkeypatch.setattr(timing, "time", clock)
    monkeypatch.setattr(run, "build", lambda *args, **options: Workload(work, []))
    out = tmp_path / "a.json"
    cli.main(["run", "ssd_step", "--impl", "ours", "--metric", "time", "--budget", "2", "--out", str(out)])
    (row,) = json.loads(out.read_text())["cases"][0]["rows"]
    assert (row["time"]["calls"], row["time"]["median"]) == (2, 1)


def test_an_excess_is_predicted_from_short_calls():
    linear, quadratic = (lambda n: n / 1000), (lambda n: (n / 100) ** 2)
    seen = []
    for call_at, length, budget, expected in (
        (linear, 1024, 66, None), (linear, 1024, 1, 1.024), (linear, 8, 1e-9, None),
        (quadratic, 1024, 110, None), (quadratic, 1024, 50, 512**2 / 1e4 * 2), (quadratic, 1024, 10, 128**2 / 1e4 * 8),
    ):  # fmt: skip
        found = predict_excess(lambda n, call=call_at: seen.append(n) or call(n), length, budget)
        assert found == (expected and pytest.approx(expected))
    assert all(n < 1024 for n in seen)
    predict_excess(lambda n: seen.append(n) or 0.0, 2**18, 1.0)
    assert seen[-1] == 2**12  # no more than 64 times is extrapolated


def test_threads_are_cases_of_their_own_without_peers(tmp_path, capsys):
    out, before = tmp_path / "a.json", torch.get_num_threads()
    command = "run causal_conv1d --impl torch transformers --mode fwd --calls 1 --shape tiny --metric time".split()
    cli.main([*command, "--threads", "1", "2", "--out", str(out)])
    one, two = json.loads(out.read_text())["cases"]
    assert [(c["threads"], [row["impl"] for row in c["rows"]]) for c in (one, two)] == [
        (1, ["torch", "transformers"]), (2, ["torch"])
    ]  # fmt: skip
    expected = one["rows"][0]["time"]["median"] / two["rows"][0]["time"]["median"]
    assert two["rows"][0]["scaling"] == expected and torch.get_num_threads() == before
    assert "speed-up" in capsys.readouterr().out


def test_without_a_choice_ours_and_torch_run_beside_the_peers_that_are_installed(tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "mambapy" else found(n, *a))
    out = tmp_path / "a.json"
    run._say_once.cache_clear()
    command = "run selective_scan rms_norm --mode fwd --shape tiny --calls 1 --metric time".split()
    cli.main([*command, "--out", str(out)])
    scan, norm = json.loads(out.read_text())["cases"]
    expected = ["ours", "torch", "transformers"]
    assert [row["impl"] for row in norm["rows"]] == expected
    assert [row["impl"] for row in scan["rows"]][:3] == expected and "mambapy" not in str(scan["rows"])
    said = capsys.readouterr().err
    assert said.count("not compared: mambapy is not installed: pip install mambapy") == 1
    assert re.search(r"selective_scan tiny fwd torch: [\d.]+ ms, once", said)  # as it comes


def test_a_run_prints_and_writes_everything(tmp_path, capsys):
    out = tmp_path / "run.json"
    modes = ["fwd", "bwd", "fwd+bwd"]
    sizes = ["--length", "40", "--batch", "1", "--heads", "2", "--calls", "3"]
    impl = ["--impl", "ours", "transformers"]
    cli.main(["run", "ssd", "--mode", *modes, "--metric", "time", "error", *sizes, *impl, "--out", str(out)])
    report = json.loads(out.read_text())
    (case,) = report["cases"]
    expected = [(impl, mode) for mode in modes for impl in ("ours", "transformers")]
    assert [(row["impl"], row["mode"]) for row in case["rows"]] == expected
    for row in case["rows"]:
        assert row["time"]["median"] > 0
        assert row["error"] < 1e-4
        assert ("gradient_error" in row) == (row["mode"] != "fwd")
        assert "peak_memory" not in row
    assert {"device", "threads", "packages", "commit", "date"} <= report.keys()
    assert report["ours"] == resolve_backend("auto", torch.device("cpu"), "ssd")
    options = f"--impl ours transformers --mode {' '.join(modes)} --calls 3"
    assert report["command"] == f"ssm-bench run ssd --batch 1 --length 40 --heads 2 {options}"
    assert re.search(r"transformers +fwd\+bwd", capsys.readouterr().out)


def test_a_run_logs_no_choice_of_an_op_that_it_does_not_measure(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "HAS_NUMBA", False)
    monkeypatch.setattr(dispatch, "_already_logged", set())
    cli.main(["run", "rms_norm", "--shape", "tiny", "--impl", "ours", "--metric", "error"])
    (said,) = [record.getMessage() for record in caplog.records if record.name == "ssm_kernels"]
    assert said.startswith("backend='auto' runs rms_norm in pure PyTorch on cpu")


def test_ctrl_c_ends_the_process_that_measures_memory():
    press_ctrl_c_when(a_process_starts())
    with pytest.raises(KeyboardInterrupt):
        in_fresh_process(time.sleep, 60)
    end = time.monotonic() + 60
    while multiprocessing.active_children():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_run_measures_memory(tmp_path):
    out = tmp_path / "run.json"
    command = "run ssd --impl ours --mode fwd --metric memory --batch 1 --length 4096".split()
    cli.main([*command, "--batch", "1", "--chunk-size", "32", "--out", str(out)])
    (case,) = json.loads(out.read_text())["cases"]
    assert case["chunk_size"] == 32
    assert case["rows"][0]["peak_memory"] > 4096 * 512 * 4  # y at least
    assert not case["rows"][0].keys() & {"time", "error"} and not out.with_suffix(".png").exists()


def test_where_memory_cannot_be_measured_the_rest_is_kept_and_it_is_said(tmp_path, capsys, monkeypatch):
    with pytest.raises(RuntimeError, match="the process that measures memory failed: .*op must be one of"):
        peak_memory("attention", "ours", SMALL, "fwd")

    def failing(*args, **options):
        raise RuntimeError("killed")

    monkeypatch.setattr(run, "peak_memory", failing)
    out = tmp_path / "run.json"
    command = "run ssd --impl ours --length 20 --mode fwd --calls 1 --metric time memory error --out".split()
    cli.main([*command, str(out)])
    (row,) = json.loads(out.read_text())["cases"][0]["rows"]
    assert "peak_memory" not in row and row["time"]["calls"] == 1 and row["is_right"]
    assert "ssd default fwd ours: no peak memory: killed" in capsys.readouterr().err


def test_several_shapes_are_cases_of_one_report(tmp_path, capsys):
    out = tmp_path / "run.json"
    shapes = ["--shape", "130m", "2.7b", "130m", "--batch", "1", "--length", "8"]
    cli.main(["run", "ssd", *shapes, "--impl", "ours", "fla", "--calls", "1", "--metric", "time", "--out", str(out)])
    cases = json.loads(out.read_text())["cases"]
    assert [(case["name"], case["shape"]["heads"], case["shape"]["length"]) for case in cases] == [
        ("130m", 24, 8),
        ("2.7b", 80, 8),
    ]
    with out.with_suffix(".csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["case"], line["heads"], line["impl"]) for line in lines][::2] == [
        (name, heads, "ours") for name, heads in (("130m", "24"), ("2.7b", "80")) for _ in range(2)
    ]
    page = out.with_suffix(".html").read_text()
    assert page.count('<td class="name">ssd 130m</td>') == page.count('<td class="name">ssd 2.7b</td>') == 4
    assert page.count("<img") == 1 and page.count("pip install flash-linear-attention") == 4
    assert capsys.readouterr().out.count("fla is not installed") == 4


def test_a_sweep_writes_a_table_a_page_and_a_plot(tmp_path):
    out = tmp_path / "sweep.json"
    command = ["sweep", "causal_conv1d", "--values", "64", "16", "32", "--impl", "ours", "transformers", "mamba_ssm"]
    cli.main([*command, "--mode", "bwd", "fwd+bwd", "--calls", "3", "--out", str(out)])
    report = json.loads(out.read_text())
    assert (report["over"], [case["value"] for case in report["cases"]]) == ("length", [16, 32, 64])
    for case in report["cases"]:
        assert case["shape"]["length"] == case["value"] and case["shape"]["batch"] == 1
        rows = case["rows"]
        assert [(row["impl"], row["mode"]) for row in rows] == [
            (impl, mode) for mode in ("bwd", "fwd+bwd") for impl in ("ours", "transformers", "mamba_ssm")
        ]
        for row in rows:
            if row["impl"] == "mamba_ssm":
                assert "not installed" in row["missing"]
            else:
                assert row["error"] < 1e-5 and row["gradient_error"] < 1e-5
                assert len(row["time"]["seconds"]) == 3 and row["time"]["low"] <= row["time"]["high"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page = out.with_suffix(".html").read_text()
    assert (
        page.count("<img") == 1 and page.count("<tr") >= 18 and '<td class="name">causal_conv1d length 64</td>' in page
    )
    with out.with_suffix(".csv").open() as file:
        assert [line["length"] for line in csv.DictReader(file)][::6] == ["16", "32", "64"]


def test_a_sweep_goes_over_one_other_size(tmp_path):
    out = tmp_path / "a.json"
    command = ["sweep", "ssd", "--length", "16", "--mode", "fwd", "--calls", "1", "--out", str(out)]
    for name in ("chunk_size", "batch", "d_state"):
        cli.main([*command, "--over", name, "--values", "4", "8", "--impl", "torch", "fla"])
        report = json.loads(out.read_text())
        assert (report["over"], [case["value"] for case in report["cases"]]) == (name, [4, 8])
        for case in report["cases"]:
            assert (case | case["shape"])[name] == case["value"] and case["shape"]["length"] == 16
            assert case["rows"][0]["is_right"] and "not installed" in case["rows"][1]["missing"]


def test_a_sweep_leaves_out_at_larger_sizes_what_was_slow(tmp_path, monkeypatch):
    out, seen = tmp_path / "a.json", []

    def slow(op, impl, shape, *args, **options):
        seen.append((impl, shape.length))
        clock = Clock()
        monkeypatch.setattr(timing, "time", clock)
        return clock.work()

    monkeypatch.setattr(run, "build", slow)
    command = ["sweep", "ssd", "--impl", "ours", "--mode", "fwd", "--values", "16", "32", "--metric", "time"]
    cli.main([*command, "--budget", "150", "--out", str(out)])
    rows = [case["rows"][0] for case in json.loads(out.read_text())["cases"]]
    assert "time" in rows[0] and rows[1]["missing"] == "left out: a call takes 200 s or more, beyond --budget 150"
    assert {length for _, length in seen} == {16}
    cli.main([*command, "--budget", "500", "--out", str(out)])
    assert all("time" in case["rows"][0] for case in json.loads(out.read_text())["cases"])


def test_what_fails_when_called_has_a_line_that_says_so(tmp_path, monkeypatch):
    def failing(op, impl, *args, **options):
        work = build(op, impl, *args, **options)

        def run():
            raise RuntimeError("no kernel image\nis available")

        return work._replace(run=run) if impl == "torch" else work

    monkeypatch.setattr(run, "build", failing)
    command = [*"run causal_conv1d --length 8 --mode fwd --calls 1 --out".split(), str(tmp_path / "a.json")]
    cli.main([*command, "--impl", "torch", "ours"])
    bad, good = json.loads((tmp_path / "a.json").read_text())["cases"][0]["rows"]
    assert bad["missing"] == "no kernel image" and "time" not in bad and "time" in good
    with pytest.raises(SystemExit, match="ssm-bench: no kernel image"):
        cli.main([*command, "--impl", "torch"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "ssd", "--over", "d_state"], "values must name at least one d_state; got none"),
        (
            ["sweep", "causal_conv1d", "--over", "chunk_size", "--values", "8"],
            "causal_conv1d has no chunk_size; its sizes are batch, len",
        ),
        (["sweep", "ssd_step"], "ssd_step has no length; its sizes are batch, heads, headdim, d_state, groups"),
        (["run", "causal_conv1d", "--heads", "8"], "causal_conv1d has no heads"),
        (["run", "cross_scan", "--chunk-size", "8"], "cross_scan has no chunk_size"),
        (["run", "cross_scan", "--length", "40"], "height must divide length.*; got height 32 and length 40"),
        (["run", "ssd", "--groups", "3"], "groups must divide heads; got 3 groups and 8 heads"),
        (["run", "mamba2_block", "--headdim", "100"], "headdim must divide channels; got headdim 100 and channels 512"),
        (["run", "ssd", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["run", "ssd_step", "--mode", "fwd", "bwd"], "ssd_step has no backward: mode must be fwd; got fwd, bwd"),
        (["run", "ssd", "--impl", "mamba_ssm", "--length", "8"], "mamba_ssm is not installed"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(SystemExit, match=f"ssm-bench: .*{message}"):
        cli.main(arguments)


def test_the_chunk_size_and_a_norm_s_and_a_step_s_options_are_those_of_the_models():
    assert build("rms_norm", "torch", SMALL).inputs[2].shape == (2, 40, 32)  # the gate
    for name in get_args(options.ShapeName):
        for op in get_args(options.Op):
            shape = named_shape(op, name)
            assert not op.startswith("cross_") or (shape.height > 1 and shape.length % shape.height == 0)
    assert named_shape("add_rms_norm", "2.7b").channels == 2560
    assert named_shape("rms_norm", "2.7b").channels == 5120
    assert (named_shape("cross_ssd", "130m").length, named_shape("cross_ssd", "130m").height) == (729, 27)


def test_a_chunk_size_reaches_the_op(monkeypatch):
    seen = []
    monkeypatch.setattr("ssm_kernels.ssd", lambda **options: seen.append(options["chunk_size"]) or options["x"])
    build("ssd", "torch", SMALL, chunk_size=7).run()
    assert seen == [7]


def test_several_input_sets_are_used_in_turn():
    order = []
    works = {"a": [Workload(lambda i=i: order.append(i) or torch.zeros(1), []) for i in range(2)]}
    time_together(works, "fwd", 4)
    assert order == [0, 0, 1, 0, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        cli.main(["run", "ssd", "--device", "cuda"])


def test_the_names_of_the_options_are_those_of_the_tables():
    assert set(get_args(options.Impl)) == {"ours", "compiled", *get_args(Backend), *peers.PACKAGES} - {"auto"}


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="op must be one of"):
        build("attention", "torch", SMALL)
    with pytest.raises(ValueError, match="impl must be one of"):
        build("ssd", "cuda", SMALL)


def test_the_stated_shapes():
    assert named_shape("selective_scan", "default") == Shape(2, 1024, 512, 16)
    assert named_shape("ssd", "default") == Shape(2, 1024, 512, 128, heads=8, headdim=64)


def test_one_call_gives_gradients_of_all_inputs():
    work = build("ssd", "torch", SMALL)
    assert run_once(work, "fwd+bwd").requires_grad
    assert not run_once(work, "fwd").requires_grad
    assert len(prepare(work, "bwd")().gradients) == len(work.inputs)
