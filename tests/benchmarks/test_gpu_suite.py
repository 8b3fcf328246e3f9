"""The suite for a GPU, at tiny sizes in the interpreter: every part, resumed after an interruption, and failing."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

import ssm_kernels
from ssm_kernels.testing import is_interpreted
from vlmamba.benchmarks import cli, gpu_suite
from vlmamba.benchmarks.cases import Case, tiny

pytestmark = pytest.mark.triton
needs_interpreter = pytest.mark.skipif(not is_interpreted(), reason="the kernels need Triton's interpreter here")
PARTS = ["compile", "correctness", "times", "peers"]


@pytest.fixture
def few(monkeypatch):
    """The norms alone: other ops take the interpreter longer, and the suite treats all alike."""
    monkeypatch.setattr(gpu_suite, "tiny", lambda: [c for c in tiny() if "norm" in c.op])


def suite(out, *arguments: str) -> None:
    cli.main(["gpu-suite", "--device", "cpu", "--out", str(out), *arguments])


def report(out, part: str) -> dict:
    return json.loads((out / f"{part}.json").read_text())


@needs_interpreter
def test_every_part_runs_and_says_what_it_depends_on(tmp_path, few, capsys):
    suite(tmp_path)
    assert sorted(p.stem for p in tmp_path.iterdir()) == sorted(PARTS)
    for part in PARTS:
        assert {"device", "driver", "packages", "commit", "seconds", "left_out"} <= report(tmp_path, part).keys()
    assert [row["error"] for row in report(tmp_path, "correctness")["rows"]] == [None, None]
    times = report(tmp_path, "times")["rows"]
    assert {(r["impl"], r["mode"]) for r in times} == {(i, m) for i in ("triton", "torch") for m in ("fwd", "fwd+bwd")}
    assert all(r["low"] <= r["median"] <= r["high"] and r["difference"] < 1e-5 for r in times)
    assert "2 of 2 without an error" in capsys.readouterr().out


@needs_interpreter
def test_every_op_with_kernels_is_right(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "PARTS", {"correctness": gpu_suite.PARTS["correctness"]})
    suite(tmp_path)
    found = report(tmp_path, "correctness")
    assert {row["case"] for row in found["rows"]} == {str(c) for c in tiny()}


@needs_interpreter
def test_an_interrupted_suite_goes_on_where_it_was(tmp_path, few, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(gpu_suite.PARTS, "peers", (interrupted, 1.0))
        with pytest.raises(SystemExit) as ended:
            suite(tmp_path)
    assert ended.value.code == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["compile.json", "correctness.json", "times.json"]
    before = (tmp_path / "times.json").stat().st_mtime_ns
    suite(tmp_path)
    assert sorted(p.stem for p in tmp_path.iterdir()) == sorted(PARTS)
    assert (tmp_path / "times.json").stat().st_mtime_ns == before
    suite(tmp_path, "--again")
    assert (tmp_path / "times.json").stat().st_mtime_ns > before


@needs_interpreter
def test_a_wrong_op_is_recorded_and_fails_the_suite_at_its_end(tmp_path, few, monkeypatch):
    right = ssm_kernels.add_rms_norm

    def wrong(x, weight, residual=None, *, backend="auto"):
        out = right(x, weight, residual, backend=backend)
        return out._replace(y=out.y * 1.01) if backend == "triton" else out

    monkeypatch.setattr(ssm_kernels, "add_rms_norm", wrong)
    for _ in range(2):  # when it is run, and when its file is read
        with pytest.raises(SystemExit) as stopped:
            suite(tmp_path)
        assert stopped.value.code == 1
    errors = {row["case"].split()[0]: row["error"] for row in report(tmp_path, "correctness")["rows"]}
    assert errors["rms_norm"] is None
    assert "AssertionError: y: off by" in errors["add_rms_norm"]
    assert (tmp_path / "peers.json").exists()


@needs_interpreter
def test_a_peer_that_is_missing_is_shown_as_such(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rows = gpu_suite._timed_case(gpu_suite.Run("cpu"), Case("ssd"), "fwd", ["fla"])
    assert "pip install flash-linear-attention" in rows[0]["error"]
    assert "not installed" in gpu_suite._table(rows)


@needs_interpreter
def test_what_there_is_no_time_for_is_said(tmp_path, few, capsys):
    suite(tmp_path, "--minutes", "1e-9")
    assert len(report(tmp_path, "correctness")["left_out"]) == 2
    assert "no time for 2 more" in capsys.readouterr().out


@pytest.mark.skipif(is_interpreted(), reason="the interpreter is on")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^ssm-bench: gpu-suite needs a GPU;.*TRITON_INTERPRET=1$"):
        suite(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="torch sees no GPU"):
            cli.main(["gpu-suite", "--out", str(tmp_path)])


def test_input_sets_fill_the_cache_twice(monkeypatch):
    class Properties:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    case = next(c for c in gpu_suite.layer("mamba2", "2.7b") if c.op == "ssd_step")
    assert gpu_suite._num_sets(case, "cuda") == 3  # 42 MB each
    assert gpu_suite._num_sets(Case("causal_conv1d_step"), "cuda") == gpu_suite.MAX_SETS
    assert gpu_suite._num_sets(case, "cpu") == 1


def test_each_case_is_named_apart():
    cases = set(gpu_suite._correctness_cases(gpu_suite.Run("cuda"))) | set(
        gpu_suite._timed_cases(gpu_suite.Run("cuda"))
    )
    assert len({str(c) for c in cases}) == len(cases)
