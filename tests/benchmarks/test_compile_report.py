"""The compile report covers every kernel, and reports one that spills or needs too much shared memory."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

import ssm_kernels
from ssm_kernels.testing import is_interpreted
from tests.ctrl_c import a_process_starts, press_ctrl_c_when
from vlmamba.benchmarks import cli, compile_report, options
from vlmamba.benchmarks.cases import Case, Shape, shipped
from vlmamba.benchmarks.compile_report import Request, compile_one, record

pytestmark = pytest.mark.skipif(is_interpreted(), reason="kernels are compiled, not interpreted")

NORM = Case("rms_norm", Shape(2, 64, 1024), "bf16", z=True)
KERNELS = """
import triton
import triton.language as tl

@triton.jit
def spilling(x, N: tl.constexpr):
    at = tl.arange(0, N)
    first, second = tl.load(x + at), tl.load(x + N + at)
    tl.store(x + at, first * tl.sum(second))
    tl.store(x + N + at, second * tl.sum(first))

@triton.jit
def hungry(x, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a = tl.load(x + at)
    tl.store(x + at, tl.dot(a, tl.trans(a)).to(tl.float16))

@triton.jit
def wrong(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), tl.arange(0, 2 * N))
"""


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def request_of(tmp_path, monkeypatch):
    """Makes a request to compile one of the kernels above."""
    (tmp_path / "imagined_kernels.py").write_text(KERNELS)
    monkeypatch.syspath_prepend(tmp_path)

    def request(kernel: str, size: int, dtype: str, warps: int, target: str = "sm_90") -> Request:
        signature = {"x": f"*{dtype}", "N": "constexpr"}
        return Request("imagined_kernels", kernel, signature, {(1,): size}, {}, {"num_warps": warps}, target, "none")

    return request


@pytest.mark.parametrize(("target", "size", "warps"), [("sm_90", 8192, 1), ("gfx942", 131072, 16)])
def test_a_spill_is_a_problem(request_of, target, size, warps):
    row = compile_one(request_of("spilling", size, "fp32", warps, target))
    assert row.spills > 0
    assert "spilled" in row.problem
    assert compile_one(request_of("spilling", 256, "fp32", 4, target)).problem is None


def test_too_much_shared_memory_is_a_problem(request_of, monkeypatch):
    request = request_of("hungry", 64, "fp16", 4, "sm_86")
    shared = compile_one(request).shared
    assert shared > 0
    for limit, is_enough in ((shared, True), (shared - 1, False)):
        architecture = replace(compile_report.ARCHITECTURES["sm_86"], shared_block=limit)
        monkeypatch.setitem(compile_report.ARCHITECTURES, "sm_86", architecture)
        row = compile_one(request)
        assert is_enough == (row.problem is None)
        assert is_enough or f"a block may have {limit:,}" in row.problem


def test_a_compilation_error_is_a_problem(request_of):
    row = compile_one(request_of("wrong", 64, "fp32", 4))
    assert "CompilationError" in row.problem


def test_matrix_instructions_are_counted(request_of):
    small, hopper, amd = (
        compile_one(request_of("hungry", 64, "fp16", 4, target)) for target in ("sm_80", "sm_90", "gfx942")
    )
    assert small.matrix.keys() == {"HMMA"} and hopper.matrix.keys() == {"HGMMA"} and amd.matrix.keys() == {"v_mfma"}


def test_the_request_is_the_launcher_s():
    found = {r.kernel: r for r in record([NORM], "sm_90")}
    assert found.keys() == {"_forward_kernel", "_backward_kernel"}
    forward = found["_forward_kernel"]
    assert forward.signature["x_ptr"] == "*bf16"
    assert forward.signature["residual_ptr"] == "constexpr"  # None
    assert forward.constants[(12,)] == 1024  # SIZE
    assert forward.attributes[(0,)] == [["tt.divisibility", 16]]
    assert forward.options["num_warps"] == 4


def test_equal_launches_are_compiled_once():
    twice = [NORM, Case("rms_norm", Shape(4, 128, 1024), "bf16", z=True)]
    assert len(record(twice, "sm_90")) == len(record([NORM], "sm_90")) == 2


def test_launches_with_other_specializations_are_compiled_apart():
    odd = Case("rms_norm", Shape(1, 63, 1024), "bf16", z=True)  # rows not divisible by 16
    assert len(record([NORM, odd], "sm_90")) == 4


def test_every_kernel_is_compiled():
    """No kernel can be added that the report leaves out."""
    from triton.runtime.jit import JITFunction

    kernels = set()
    for module in pkgutil.walk_packages(ssm_kernels.__path__, "ssm_kernels."):
        if re.search(r"\._?triton\b", module.name):
            names = vars(importlib.import_module(module.name)).items()
            kernels |= {(module.name, k) for k, v in names if isinstance(v, JITFunction) and k.endswith("_kernel")}
    kernels = {(m, k) for m, k in kernels if getattr(importlib.import_module(m), k).__module__ == m}
    assert kernels == {(r.module, r.kernel) for r in record(shipped(), "sm_90")}


def test_the_command_fails_where_a_kernel_spills(tmp_path, monkeypatch, capsys):
    from ssm_kernels.norm.triton import tile

    monkeypatch.setattr(tile, "TILE", 1 << 16)
    out = tmp_path / "report.json"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compile-report", "add_rms_norm", "--quick", "--jobs", "1", "--out", str(out)])
    assert stopped.value.code == 1
    assert "FAILED sm_90 norm._backward_kernel" in capsys.readouterr().out
    assert any(row["spills"] for row in json.loads(out.read_text())["rows"])
    assert "FAILED" in out.with_suffix(".txt").read_text()


def test_a_killed_report_leaves_no_process_behind(tmp_path):
    command = [sys.executable, "-m", "vlmamba.benchmarks.cli", "compile-report", "--quick", "--jobs", "1"]
    report = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    children = Path(f"/proc/{report.pid}/task/{report.pid}/children")
    _wait_until(lambda: len(children.read_text().split()) == 2)  # the worker, and what tracks its resources
    workers = children.read_text().split()
    report.kill()
    report.wait()
    _wait_until(lambda: not any(_is_running(pid) for pid in workers))


def _wait_until(holds) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "waited a minute in vain"
        time.sleep(0.1)


def _is_running(pid: str) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="unset TRITON_INTERPRET"):
        cli.main(["compile-report"])


def test_occupancy_by_registers_shared_memory_and_warps():
    """Hopper: 64 warps, 65,536 registers and 228 KB a multiprocessor."""

    hopper = compile_report.ARCHITECTURES["sm_90"]
    assert compile_report.resident_blocks(hopper, 4, 32, 0) == 64 // 4
    assert compile_report.resident_blocks(hopper, 4, 128, 0) == 4  # of 4 warps x 32 lanes x 128 registers
    assert compile_report.resident_blocks(hopper, 4, 32, 100 << 10) == 2


@pytest.mark.parametrize("command", ["compile-report", "roofline"])
def test_an_unknown_op_is_named(command):
    with pytest.raises(SystemExit, match="op must be among selective_scan, .* got norm"):
        cli.main([command, "norm"])


@pytest.mark.parametrize("target", compile_report.ARCHITECTURES)
def test_every_target_compiles(request_of, target):
    row = compile_one(request_of("hungry", 32, "fp16", 4, target))
    assert row.problem is None and row.instructions > 0 and row.matrix and 0 < row.occupancy <= 1


def test_the_command_has_every_target():
    assert set(get_args(options.Target)) == set(compile_report.ARCHITECTURES)


def test_registers_of_rdna_are_allocated_by_24_of_1536():
    rdna = compile_report.ARCHITECTURES["gfx1100"]
    assert compile_report.resident_blocks(rdna, 1, 96, 0) == 32
    assert compile_report.resident_blocks(rdna, 1, 97, 0) == 2 * (1536 // 120)
    assert compile_report.resident_blocks(compile_report.ARCHITECTURES["gfx90a"], 1, 97, 0) == 4 * (512 // 104)


def test_ctrl_c_ends_the_processes_that_compile(tmp_path):
    """Also all that is queued for them."""
    before = set(multiprocessing.active_children())
    press_ctrl_c_when(a_process_starts())
    with pytest.raises(KeyboardInterrupt):
        compile_report.in_processes(time.sleep, [60.0] * 8, 1, tmp_path)
    assert set(multiprocessing.active_children()) == before
