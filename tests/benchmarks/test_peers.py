"""Peers compute the same results as our ops, so that their times compare. Those not installed are skipped."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from vlmamba.benchmarks.cases import OPS, Case, Shape
from vlmamba.benchmarks.peers import CALLS, PACKAGES, bind_peer

SHAPE = Shape(batch=2, length=40, channels=32, d_state=8, heads=4, headdim=8)


@pytest.mark.parametrize(("name", "op"), [(name, op) for name, ops in CALLS.items() for op in ops])
def test_a_peer_gives_the_same(name, op):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if name != "transformers" and not torch.cuda.is_available():
        pytest.skip(f"{name} needs a GPU")
    device = "cpu" if name == "transformers" else "cuda"
    for case in (Case(op, SHAPE, dt_bias=True), Case(op, SHAPE, z=op != "ssd" and op != "add_rms_norm")):
        inputs = case.inputs(device)
        want = case.call(inputs, "torch")[0]
        torch.testing.assert_close(bind_peer(name, case, inputs)(), want, rtol=1e-3, atol=1e-3)


def test_a_peer_that_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install flash-linear-attention"):
        bind_peer("fla", Case("ssd"), {})


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
    assert CALLS.keys() == PACKAGES.keys()
    assert {op for ops in CALLS.values() for op in ops} <= set(OPS)
