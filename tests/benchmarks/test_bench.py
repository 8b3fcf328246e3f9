"""ssm-bench on small shapes: implementations agree, figures are plausible, reports are complete."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from vlmamba.benchmarks import cli
from vlmamba.benchmarks.cases import Shape
from vlmamba.benchmarks.measure import error, once, peak_memory, time_together
from vlmamba.benchmarks.workloads import OPS, Workload, build, default_shape

IMPLEMENTATIONS = ("torch", "reference", "transformers")
SMALL = Shape(batch=2, length=40, channels=32, d_state=8, heads=4, headdim=8, groups=1)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", OPS)
def test_every_implementation_computes_the_same(op, impl):
    shape = replace(SMALL, headdim=8)
    assert error(op, build(op, impl, shape), shape, torch.float32) < 1e-5


@pytest.mark.parametrize("op", OPS)
def test_gradients_agree_too(op):
    grads = {}
    for impl in IMPLEMENTATIONS:
        work = build(op, impl, SMALL, torch.float32)
        y = work.run()
        grads[impl] = torch.autograd.grad((y * torch.cos(torch.arange(y.numel())).view_as(y)).sum(), work.inputs[0])[0]
    for impl in ("torch", "transformers"):
        torch.testing.assert_close(grads[impl], grads["reference"], rtol=1e-3, atol=1e-4)


def test_implementations_are_timed_in_turn():
    order = []
    works = {n: Workload(lambda n=n: order.append(n) or torch.zeros(1), []) for n in ("a", "b")}
    timings = time_together(works, "fwd", 3)
    assert order == ["a", "b"] * 4
    assert all(t.calls == 3 and t.low <= t.median <= t.high for t in timings.values())


def test_peak_memory_grows_with_what_is_allocated():
    short, long = (peak_memory("ssd", "transformers", replace(SMALL, length=n), "fwd+bwd") for n in (256, 4096))
    assert long > short + 8 * 2**20


def test_a_run_prints_and_writes_everything(tmp_path, capsys):
    out = tmp_path / "run.json"
    cli.main(["run", "ssd", "--length", "40", "--batch", "1", "--heads", "2", "--calls", "3", "--out", str(out)])
    report = json.loads(out.read_text())
    assert {(r["impl"], r["mode"]) for r in report["rows"]} == {
        (i, m) for i in ("torch", "transformers") for m in ("fwd", "fwd+bwd")
    }
    for row in report["rows"]:
        assert row["time"]["median"] > 0
        assert row["error"] < 1e-4
        assert row["peak_memory"] >= 0
    assert {"device", "threads", "packages", "commit"} <= report.keys()
    text = capsys.readouterr().out
    assert "transformers fwd+bwd" in text


def test_a_sweep_writes_a_table_and_a_plot(tmp_path):
    out = tmp_path / "sweep.json"
    cli.main(["sweep", "causal_conv1d", "--lengths", "16", "32", "64", "--out", str(out)])
    report = json.loads(out.read_text())
    assert len(report["seconds"]["torch"]) == 3
    assert report["errors_at_the_first"]["torch"] < 1e-5
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_goes_over_one_other_size(tmp_path, capsys):
    command = ["sweep", "ssd", "--lengths", "16", "--mode", "fwd", "--calls", "1", "--out", str(tmp_path / "a.json")]
    for option, name in (("--chunk-sizes", "chunk_size"), ("--batches", "batch"), ("--d-states", "d_state")):
        cli.main([*command, option, "4", "8", "--impl", "torch", "fla"])
        report = json.loads((tmp_path / "a.json").read_text())
        assert (report["over"], report["values"], len(report["seconds"]["torch"])) == (name, [4, 8], 2)
        assert "fla" in report["missing"]
    with pytest.raises(SystemExit, match="one size at a time; got batch, d_state"):
        cli.main([*command, "--batches", "1", "--d-states", "8"])
    with pytest.raises(SystemExit, match="chunk_sizes are those of ssd"):
        cli.main(["sweep", "causal_conv1d", "--chunk-sizes", "8"])


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


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="op must be one of"):
        build("attention", "torch", SMALL)
    with pytest.raises(ValueError, match="impl must be one of"):
        build("ssd", "cuda", SMALL)


def test_the_stated_shapes():
    assert default_shape("selective_scan") == Shape(2, 1024, 512, 16)
    assert default_shape("ssd") == Shape(2, 1024, 512, 128, heads=8, headdim=64)


def test_one_call_gives_gradients_of_all_inputs():
    work = build("ssd", "torch", SMALL)
    assert once(work, "fwd+bwd").requires_grad
    assert not once(work, "fwd").requires_grad
