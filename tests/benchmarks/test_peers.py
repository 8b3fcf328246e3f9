"""Peers compute the same results as our ops, so that their times compare. Those not installed are skipped."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from dataclasses import replace

import pytest
import torch

from ssm_kernels import selective_scan
from vlmamba.benchmarks.cases import OPS, Case, Shape
from vlmamba.benchmarks.peers import CALLS, INSTALL, ON_CPU, ON_GPU, PACKAGES, bind_peer, check_installed
from vlmamba.benchmarks.timing import prepare
from vlmamba.benchmarks.workloads import build_case

SHAPE = Shape(batch=2, length=40, channels=32, d_state=8, heads=4, headdim=8)


@pytest.mark.parametrize(("name", "op"), [(name, op) for name, ops in CALLS.items() for op in ops])
def test_a_peer_gives_the_same(name, op):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    device = "cpu" if name in ON_CPU else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{name} needs a GPU")
    for case in (Case(op, SHAPE, dt_bias=True), Case(op, SHAPE, z=op != "ssd" and op != "add_rms_norm")):
        inputs = case.inputs(device)
        want = case.call(inputs, "torch")[0]
        torch.testing.assert_close(bind_peer(name, case, inputs)(), want, rtol=1e-3, atol=1e-3)


def test_a_peer_that_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install flash-linear-attention"):
        bind_peer("fla", Case("ssd"), {})


@pytest.fixture
def copying_scan(monkeypatch) -> list[str]:
    """A `mamba_ssm` whose scan records the names of the tensors that the real one would copy to make contiguous."""
    copied: list[str] = []

    def note(name: str, t: torch.Tensor) -> None:
        if t.stride(-1) != 1:
            copied.append(name)

    def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        for name, t in (("u", u), ("delta", delta), ("B", B), ("C", C), ("z", z)):
            note(name, t)
        u, delta, z = (t.transpose(1, 2) for t in (u, delta, z))
        B, C = (t.movedim(-1, 1) for t in (B, C))
        y = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend="torch").y
        y = y.transpose(1, 2).contiguous()  # (B, D, L), as the CUDA scan returns it
        y.register_hook(lambda dout: note("dout", dout))
        return y

    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    vars(interface)["selective_scan_fn"] = selective_scan_fn
    for module in ("mamba_ssm", "mamba_ssm.ops", "selective_scan_cuda"):
        found = types.ModuleType(module)
        found.__spec__ = importlib.machinery.ModuleSpec(module, None)
        found.__path__ = []
        monkeypatch.setitem(sys.modules, module, found)
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    return copied


@pytest.mark.parametrize("groups", [1, 2])
def test_nothing_is_copied_for_a_peer_inside_the_timing(copying_scan, groups):
    case = Case("selective_scan", replace(SHAPE, groups=groups), z=True, dt_bias=True)
    ours, theirs = (build_case(case, impl, "cpu") for impl in ("torch", "mamba_ssm"))
    (y, gradients), (peer_y, peer_gradients) = (prepare(w, "fwd+bwd")() for w in (ours, theirs))
    assert not copying_scan
    torch.testing.assert_close(peer_y, y)
    torch.testing.assert_close(peer_gradients, gradients)


def test_a_mamba_ssm_without_its_cuda_scan_says_how_to_build_it(copying_scan, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "selective_scan_cuda" else name)
    with pytest.raises(ModuleNotFoundError, match="MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm"):
        bind_peer("mamba_ssm", Case("selective_scan"), {})
    check_installed("mamba_ssm", "ssd")  # in Triton


def test_what_a_peer_does_not_have_is_refused():
    for case in (
        Case("cross_scan"),
        Case("rms_norm", z=True, norm_before_gate=True),
        Case("ssd", initial_states=True),
        Case("ssd", sequences=2),
        Case("ssd", D=False),
    ):
        with pytest.raises(ValueError, match="transformers is not compared on"):
            bind_peer("transformers", replace(case, shape=SHAPE), {})


def test_peers_have_no_op_that_we_do_not_have():
    assert CALLS.keys() == PACKAGES.keys() == INSTALL.keys() == {*ON_CPU, *ON_GPU}
    assert {op for ops in CALLS.values() for op in ops} <= set(OPS)
