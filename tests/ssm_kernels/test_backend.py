"""The choice of a backend: for one thread, and seen by `torch.compile`."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from ssm_kernels import cross_scan, resolve_backend, ssd, use_backend
from ssm_kernels._core import dispatch
from ssm_kernels.cross_scan import pytorch, reference
from ssm_kernels.testing import Target, fake_target
from vlmamba.benchmarks.cases import Case, Shape

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def chosen() -> str:
    return resolve_backend("auto", CPU, "an op without Triton kernels")


def test_blocks_nest_and_end_with_an_error():
    with use_backend("reference"):
        with use_backend("torch"):
            assert chosen() == "torch"
        with pytest.raises(KeyError), use_backend("torch"):
            raise KeyError
        assert chosen() == "reference"
    assert chosen() == "torch"
    with pytest.raises(ValueError, match="backend must be one of auto"), use_backend("fast"):  # type: ignore[arg-type]
        pass


def test_crossing_blocks_of_two_threads_do_not_meet():
    """One thread enters, the other enters, the first leaves, the second leaves: each sees its own all the time."""
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    seen = {}

    def first():
        with use_backend("reference"):
            first_is_in.set()
            assert second_is_in.wait(60)
            seen["first, inside both"] = chosen()
        first_is_out.set()
        seen["first, after"] = chosen()

    def second():
        assert first_is_in.wait(60)
        seen["second, before"] = chosen()
        with use_backend("torch"), use_backend("reference"), use_backend("torch"):
            second_is_in.set()
            assert first_is_out.wait(60)
            seen["second, inside"] = chosen()
        with use_backend("auto"):
            seen["second, after"] = chosen()

    threads = [threading.Thread(target=f) for f in (first, second)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert seen == {
        "first, inside both": "reference",
        "first, after": "torch",
        "second, before": "torch",
        "second, inside": "torch",
        "second, after": "torch",
    }
    assert chosen() == "torch"


def test_compiled_code_follows_the_choice(monkeypatch):
    """Inside the graph, around it, and in another thread."""
    monkeypatch.setattr(pytorch, "cross_scan", lambda x, directions: x + 1)
    monkeypatch.setattr(reference, "cross_scan", lambda x, directions: x + 10)
    x = torch.zeros(1, 1, 1, 1)

    def both(x):
        with use_backend("reference"):
            inside = cross_scan(x)
        return cross_scan(x) * 100 + inside

    assert torch.compile(both, fullgraph=True, backend="eager")(x).item() == 110
    compiled = torch.compile(lambda x: cross_scan(x) * 1, fullgraph=True, backend="eager")
    assert compiled(x).item() == 1
    with use_backend("reference"):
        assert compiled(x).item() == 10
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(compiled(x).item()))
        thread.start()
        thread.join(60)
        assert elsewhere == [1]
    assert compiled(x).item() == 1


@pytest.mark.parametrize(("version", "choice"), [(75, "torch"), (80, "triton")])
def test_a_gpu_before_ampere_is_refused_by_name(version, choice):
    pytest.importorskip("triton")
    with fake_target(Target(("cuda", version), 40), "cpu"):
        assert resolve_backend("auto", CPU, "cross_scan") == choice
        if choice == "torch":
            refusal = r"cpu is sm_75, and the Triton kernels need sm_80 .* or later; backend='torch' runs there"
            with pytest.raises(RuntimeError, match=refusal):
                resolve_backend("triton", CPU, "cross_scan")


def test_products_in_float64_are_refused_where_triton_has_none(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.4.0")
    inputs = Case("ssd", Shape(1, 4, heads=1, headdim=4, d_state=4), "fp64").inputs()
    refusal = r"ssd in float64 needs Triton 3.5 or later .* got 3.4.0; backend='torch' runs there"
    with fake_target(Target(("cuda", 90), 2), "cpu"), pytest.raises(RuntimeError, match=refusal):
        ssd(**inputs, backend="triton")


def test_compiled_code_takes_another_backend_on_a_gpu_before_ampere(monkeypatch):
    monkeypatch.setattr(pytorch, "cross_scan", lambda x, directions: x + 1)
    with fake_target(Target(("cuda", 75), 40), "cpu"):
        compiled = torch.compile(lambda x: cross_scan(x) * 1, fullgraph=True, backend="eager")
        assert compiled(torch.zeros(1, 1, 1, 1)).item() == 1


def test_a_missing_numba_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "HAS_NUMBA", False)
    monkeypatch.setattr(dispatch, "_already_logged", set())
    with caplog.at_level("WARNING", logger="ssm_kernels"):
        assert [resolve_backend("auto", CPU, "selective_scan") for _ in range(2)] == ["torch", "torch"]
        assert resolve_backend("auto", CPU, "cross_scan") == "torch"
    assert len(caplog.records) == 1
    assert "pip install 'numba>=" in caplog.text
    assert f"{dispatch.NUMBA_SPEEDUPS['selective_scan']:g} times faster" in caplog.text
    with pytest.raises(RuntimeError, match="backend='numba' was requested, but the numba package is not installed"):
        resolve_backend("numba", CPU, "selective_scan")


@pytest.mark.parametrize("op", dispatch.NUMBA_SPEEDUPS)
def test_the_speedup_that_a_log_promises_is_the_measured_one(op):
    table = json.loads((ROOT / "benchmarks/results/cpu-ops.json").read_text())
    (case,) = (case for case in table["cases"] if case["op"] == op)
    medians = {(row["impl"], row["mode"]): row["time"]["median"] for row in case["rows"] if "time" in row}
    measured = [medians["torch", mode] / medians["ours", mode] for mode in ("fwd", "fwd+bwd")]
    assert min(measured) / 1.3 < dispatch.NUMBA_SPEEDUPS[op] < 1.3 * max(measured)


def test_numba_is_taken_on_a_cpu_by_the_ops_that_have_it(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_NUMBA", True)
    assert resolve_backend("auto", CPU, "selective_scan") == "numba"
    assert resolve_backend("auto", CPU, "add_rms_norm") == "numba"
    assert resolve_backend("auto", CPU, "cross_scan") == "torch"
    with pytest.raises(RuntimeError, match="cross_scan has no kernels in numba"):
        resolve_backend("numba", CPU, "cross_scan")
    with pytest.raises(RuntimeError, match="numba's kernels are for the CPU"):
        resolve_backend("numba", torch.device("meta"), "selective_scan")
