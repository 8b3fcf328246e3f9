"""The suite for a GPU, at tiny sizes in the interpreter: every part, resumed after an interruption, and failing."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

import ssm_kernels
from ssm_kernels.testing import is_interpreted
from vlmamba.benchmarks import cli, compile_report, gpu_suite
from vlmamba.benchmarks.cases import Case, tiny

pytestmark = pytest.mark.triton
needs_interpreter = pytest.mark.skipif(not is_interpreted(), reason="the kernels need Triton's interpreter here")
PARTS = ["compile", "correctness", "peers", "tiles", "times"]


@pytest.fixture
def few(monkeypatch):
    """The norms and the cross scan alone: other ops take the interpreter longer, and the suite treats all alike."""
    chosen = ("rms_norm", "add_rms_norm", "cross_scan")
    monkeypatch.setattr(gpu_suite, "tiny", lambda: [c for c in tiny() if c.op in chosen])
    monkeypatch.setattr(gpu_suite, "CHOICES", [c for c in gpu_suite.CHOICES if c.op in chosen])


def suite(out, *arguments: str) -> None:
    cli.main(["gpu-suite", "--device", "cpu", "--out", str(out), *arguments])


def rows(out, part: str) -> list[dict]:
    return [row for job in json.loads(out.read_text())["parts"][part]["jobs"].values() for row in job]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "suite.json"


@needs_interpreter
def test_every_part_runs_and_says_what_it_depends_on(out, few, capsys):
    suite(out)
    report = json.loads(out.read_text())
    assert {"device", "driver", "packages", "commit"} <= report.keys() and report["interpreted"]
    assert list(report["parts"]) == PARTS
    assert all(part["left_out"] == [] and part["seconds"] >= 0 for part in report["parts"].values())
    assert [row["error"] for row in rows(out, "correctness")] == [None] * 3
    times = rows(out, "times")
    assert {(r["impl"], r["mode"]) for r in times} == {(i, m) for i in ("triton", "torch") for m in ("fwd", "fwd+bwd")}
    assert all(r["low"] <= r["median"] <= r["high"] and r["difference"] < 1e-5 for r in times + rows(out, "tiles"))
    assert [row["impl"] for row in rows(out, "tiles")] == ["TILE 512", "TILE 1024 (shipped)", "TILE 2048", "TILE 4096"]
    assert "3 of 3 without an error" in capsys.readouterr().out


@needs_interpreter
def test_every_op_with_kernels_is_right(out, monkeypatch):
    monkeypatch.setattr(gpu_suite, "PARTS", {"correctness": gpu_suite.PARTS["correctness"]})
    suite(out)
    assert {row["case"] for row in rows(out, "correctness")} == {str(c) for c in tiny()}


@pytest.fixture
def quick(monkeypatch, few):
    """Nothing is run: each job has a row that says so. Gives the timed cases, in order."""
    calls = []

    def time_case(here, case, mode, implementations):
        calls.append(f"{case} {mode}")
        return [{"case": str(case), "mode": mode, "impl": "triton", "error": "not run"}]

    monkeypatch.setattr(gpu_suite, "check", lambda case, device: None)
    monkeypatch.setattr(gpu_suite, "_timed_case", time_case)
    monkeypatch.setattr(gpu_suite, "_time_values", lambda here, case, choice: time_case(here, case, "", ()))
    return calls


@pytest.fixture
def timed(monkeypatch, quick):
    """The timed cases, in order; the second is interrupted."""
    time_case = gpu_suite._timed_case

    def interrupted(here, case, mode, implementations):
        rows = time_case(here, case, mode, implementations)
        if len(quick) == 2:
            raise KeyboardInterrupt
        return rows

    monkeypatch.setattr(gpu_suite, "_timed_case", interrupted)
    return quick


@needs_interpreter
def test_an_interrupted_suite_goes_on_where_it_was(out, timed):
    with pytest.raises(SystemExit) as ended:
        suite(out)
    assert ended.value.code == 130
    report = json.loads(out.read_text())
    assert list(report["parts"]["peers"]["jobs"]) == timed[:1] and len(rows(out, "correctness")) == 3
    suite(out)
    peers, tiles, times = timed[2:7], timed[7], timed[8:]
    assert peers[0] == timed[1] and times == timed[:1] + peers and "cross_scan" in tiles
    assert list(json.loads(out.read_text())["parts"]) == PARTS
    before = len(timed)
    suite(out)
    assert len(timed) == before
    suite(out, "--again")
    assert len(timed) > before


@needs_interpreter
def test_a_case_that_ended_the_process_is_not_tried_again(out, timed):
    with pytest.raises(SystemExit):
        suite(out)
    out.write_text(json.dumps(json.loads(out.read_text()) | {"running": ["peers", timed[1]]}))  # as a kill leaves it
    suite(out)
    assert timed[1] not in timed[2:6]
    (failed,) = [row for row in rows(out, "peers") if row["case"] == timed[1]]
    assert failed["error"] == "the process ended while this ran"


@needs_interpreter
def test_a_lost_device_ends_the_process_and_is_in_the_file(out, quick, monkeypatch):
    def lost(here, case, choice):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(gpu_suite, "_time_values", lost)
        with pytest.raises((RuntimeError, SystemExit)):
            suite(out)
    assert "illegal memory access" in rows(out, "tiles")[0]["error"] and "times" not in json.loads(out.read_text())
    suite(out)
    assert len(rows(out, "tiles")) == 1 and rows(out, "times")


@needs_interpreter
def test_a_file_of_another_commit_is_not_mixed_with_this_one(out, quick):
    suite(out, "--minutes", "1e-9")
    out.write_text(json.dumps(json.loads(out.read_text()) | {"commit": "before"}))
    with pytest.raises(SystemExit, match="is of commit before, and this is .*: give another --out, or --again"):
        suite(out)


@needs_interpreter
def test_a_wrong_op_is_recorded_and_fails_the_suite_at_its_end(out, few, monkeypatch):
    monkeypatch.setattr(gpu_suite, "PARTS", {part: gpu_suite.PARTS[part] for part in ("correctness", "tiles")})
    right = ssm_kernels.add_rms_norm

    def wrong(x, weight, residual=None, *, backend: ssm_kernels.Backend = "auto"):
        out = right(x, weight, residual, backend=backend)
        return out._replace(y=out.y * 1.01) if backend == "triton" else out

    monkeypatch.setattr(ssm_kernels, "add_rms_norm", wrong)
    for _ in range(2):  # when it is run, and when its file is read
        with pytest.raises(SystemExit) as stopped:
            suite(out)
        assert stopped.value.code == 1
    errors = {row["case"].split()[0]: row["error"] for row in rows(out, "correctness")}
    assert errors["rms_norm"] is None
    assert "AssertionError: y: off by" in errors["add_rms_norm"]
    assert rows(out, "tiles")


@needs_interpreter
def test_a_peer_that_is_missing_is_shown_as_such(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rows = gpu_suite._timed_case(gpu_suite.Run("cpu"), Case("ssd"), "fwd", ["fla"])
    assert "pip install flash-linear-attention" in rows[0]["error"]
    assert "not installed" in gpu_suite._table(rows)


@needs_interpreter
def test_what_there_is_no_time_for_is_said_and_done_later(out, quick, capsys):
    suite(out, "--minutes", "1e-9")
    assert len(json.loads(out.read_text())["parts"]["correctness"]["left_out"]) == 3
    assert "no time for 3 more" in capsys.readouterr().out
    suite(out)
    assert json.loads(out.read_text())["parts"]["correctness"]["left_out"] == []


def test_each_choice_changes_a_launch_and_is_the_shipped_one_afterwards(monkeypatch):
    """On the sizes that the suite times, recorded with no GPU."""
    jit = pytest.importorskip("triton.runtime.jit")
    if is_interpreted():
        pytest.skip("the interpreter launches nothing")
    launches, run = [], jit.JITFunction.run

    def record(self, *args, grid, **options):
        scalars = tuple(a for a in args if isinstance(a, int))
        launches.append((self.fn.__name__, grid, scalars, *(v for v in options.values() if isinstance(v, int))))
        return run(self, *args, grid=grid, **options)

    monkeypatch.setattr(jit.JITFunction, "run", record)
    by_op = {case.op: case for case in gpu_suite.connector() + gpu_suite._layers()}
    for choice in gpu_suite.CHOICES:
        shipped, seen = choice.shipped, set()
        assert shipped in choice.values and list(choice.values) == sorted(choice.values)
        for value in choice.values:
            launches.clear()
            with choice.set_to(value):
                compile_report.record([by_op[choice.op]], "sm_90")
            seen.add(tuple(launches))
        assert len(seen) == len(choice.values), choice
        assert choice.shipped == shipped


@pytest.mark.skipif(is_interpreted(), reason="the interpreter is on")
def test_without_a_gpu_it_says_so_in_one_line(out):
    with pytest.raises(SystemExit, match=r"^ssm-bench: gpu-suite needs a GPU;.*TRITON_INTERPRET=1$"):
        suite(out)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="torch sees no GPU"):
            cli.main(["gpu-suite", "--out", str(out)])


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
