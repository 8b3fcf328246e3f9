"""Rates of the processor, the limit that they set, and other work on the machine."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from vlmamba.benchmarks import cli, other_work, processor
from vlmamba.benchmarks.cases import Case, Shape
from vlmamba.benchmarks.other_work import OtherWork, other_cores
from vlmamba.benchmarks.processor import Rates
from vlmamba.benchmarks.roofline import cost, least_time_here, roofline_share


@pytest.mark.parametrize("has_numba", [True, False])
def test_rates_are_measured_with_and_without_numba(has_numba, monkeypatch):
    monkeypatch.setattr(processor, "FOOTPRINTS", (2**14, 2**16))
    monkeypatch.setattr(processor, "ROUNDS", 2)
    monkeypatch.setattr(processor, "SECONDS", 1e-3)
    if has_numba:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    own = torch.get_num_threads()
    for threads in (1, 2):
        rates = processor.measure_rates.__wrapped__(threads)
        found = [*rates.read.values(), *rates.copy.values(), rates.operations, rates.exponentials]
        assert rates.threads == threads and all(1e6 < rate < 1e15 for rate in found)
    assert torch.get_num_threads() == own
    assert str(rates).startswith("2 cores: ") and "exponentials/s" in str(rates)


def test_the_loops_compute_what_they_are_named_for():
    kernels = pytest.importorskip("vlmamba.benchmarks.processor_kernels", exc_type=ImportError)
    x = torch.linspace(-50, 50, 64)
    factors = x[: kernels.POWERS] = torch.tensor([2.0, -0.5, 0.1, 1.0])
    out = torch.zeros(64)
    kernels.exponentiate(x.numpy(), out.numpy(), 1)
    torch.testing.assert_close(out, (x.double()[:, None] * factors).exp2().sum(1).float())
    kernels.multiply_add(torch.full((64,), 0.5).numpy(), out.zero_().numpy(), 1)
    assert torch.equal(out, torch.full((64,), 1 - 0.5**kernels.CHAIN))
    kernels.copy(x.numpy(), out.numpy(), 1)
    assert torch.equal(out, x)
    x = torch.randn(256)
    for read in (kernels.read, kernels.read_places):
        read(x.numpy(), out.zero_().numpy(), 1)
        torch.testing.assert_close(out[0], x.sum())


# 8 steps of 4 channels with 2 states, fp32, without D, gate or softplus.
SCAN = Case("selective_scan", Shape(1, 8, 4, 2), D=False, dt_softplus=False)
ELEMENTS = 8 * 4  # of u, dt and y
STATES = ELEMENTS * 2


def test_each_limit_is_the_work_of_the_op_over_its_rate():
    bytes_moved = 4 * (3 * ELEMENTS + 4 * 2 + 2 * 8 * 2 + 4 * 2)  # u, dt, y; A; B, C; the final states
    operations = 6 * STATES + ELEMENTS  # the recurrence and y; dt u
    needs = cost(SCAN, "fwd")
    assert (needs.bytes, needs.matrix + needs.other, needs.exponentials) == (bytes_moved, operations, STATES)
    for slow, work in (("memory", bytes_moved), ("arithmetic", operations), ("exponentials", STATES)):
        rate = {bound: 100.0 if bound == slow else 1e12 for bound in ("memory", "arithmetic", "exponentials")}
        rates = Rates(1, {1: rate["memory"]}, {1: 1.0}, rate["arithmetic"], rate["exponentials"])
        least = least_time_here(SCAN, "fwd", rates)
        assert (least.bound, least.seconds) == (slow, pytest.approx(work / 100))
        assert roofline_share(SCAN, "fwd", 2 * least.seconds, "cpu", rates)["share"] == pytest.approx(0.5)


def test_the_times_of_operations_and_exponentials_add():
    needs = cost(SCAN, "fwd")
    rates = Rates(1, {1: 1e12}, {1: 1.0}, float(needs.matrix + needs.other), needs.exponentials / 2)
    least = least_time_here(SCAN, "fwd", rates)
    assert (least.bound, least.seconds) == ("exponentials", pytest.approx(1 + 2))


def test_memory_is_as_fast_as_the_largest_measured_footprint_that_a_call_touches(rates):
    assert [rates.bandwidth(n) for n in (1, 2**10, 2**20 - 1, 2**20, 2**40)] == [1e11, 1e11, 1e11, 1e10, 1e10]


def test_ssd_s_limit_is_that_of_the_best_chunk_size():
    rates = Rates(1, {1: 1e15}, {1: 1e15}, 1.0, 1e15)
    case = Case("ssd", Shape(1, 64, heads=2, headdim=8, d_state=16))
    # Chunks of one step, forward: C B^T a group (2 N); a head its product with x (2 P), C S and S + B^T x (2 N P each),
    # mask, difference and decay (3), the state's decay (N P), rows of C S and x (2 P), D (2 P), and dt (3).
    n, p = 16, 8
    one = 2 * n + 2 * (2 * p + 4 * n * p + 3 + n * p + 2 * p + 2 * p + 3)
    assert least_time_here(case, "fwd", rates).seconds <= 64 * one
    by_size = [least_time_here(case, "fwd", rates).seconds for case in (case, Case("ssd", case.shape, chunk_size=256))]
    assert by_size[0] == by_size[1]


def test_cores_of_others_are_what_is_busy_and_not_this_process():
    assert other_cores(2.0, 3.0, 1.0) == 1.0
    assert other_cores(2.0, 1.0, 1.01) == 0.0  # the counters are coarse
    assert other_cores(0.05, 1.0, 0.0) is None


def test_other_work_is_noticed_and_written(tmp_path, monkeypatch, capsys):
    counters = iter([(0.0, 10.0, 1.0), (2.0, 13.0, 2.0)])
    monkeypatch.setattr(other_work, "_counters", lambda: next(counters))
    out = tmp_path / "a.json"
    command = "run rms_norm --impl torch --mode fwd --shape tiny --calls 1 --metric time".split()
    cli.main([*command, "--out", str(out)])
    assert f"other work took 1.0 of {os.cpu_count()} cores" in capsys.readouterr().err
    assert '"other_cores": 1.0' in out.read_text()


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="Linux tells")
def test_another_process_is_other_work_and_this_one_is_not():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            with OtherWork() as other:
                busy_wait(0.5)
        finally:
            busy.kill()
    assert other.cores is not None and other.cores > 0


def busy_wait(seconds: float) -> None:
    import time

    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
