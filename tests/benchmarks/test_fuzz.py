"""ssm-bench fuzz: a seed determines a trial, faults are found and shrunk, infinities are compared as documented."""

from __future__ import annotations

import functools
import importlib.util
import json
import math

import pytest
import torch

from ssm_kernels.causal_conv1d import pytorch
from vlmamba.benchmarks import cli, fuzz
from vlmamba.benchmarks.cases import OPS, Case, Shape
from vlmamba.benchmarks.correctness import disagreement, expected, results
from vlmamba.benchmarks.environment import backends
from vlmamba.benchmarks.fuzz import KINDS, LAYOUTS, Trial, draw

QUICK = ("causal_conv1d", "cross_scan", "cross_merge", "causal_conv1d_step")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.stride() == b.stride() and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def test_a_seed_determines_a_trial():
    for seed in range(40):
        trial = draw(seed)
        assert trial == draw(seed)
        first, again = trial.inputs("cpu"), trial.inputs("cpu")
        assert first.keys() == again.keys() and all(same(first[k], again[k]) for k in first)


def test_every_op_magnitude_layout_and_packing_is_drawn():
    trials = [draw(seed) for seed in range(600)]
    assert {t.case.op for t in trials} == set(OPS)
    assert {kind for t in trials for _, kind in t.kinds} == set(KINDS)
    assert {layout for t in trials for _, layout in t.layouts} == set(LAYOUTS)
    assert {t.case.dtype for t in trials} == {"fp32", "fp64", "bf16", "fp16"}
    assert any(t.case.seq_idx for t in trials)
    packed = [t.inputs("cpu")["cu_seqlens"] for t in trials if t.case.sequences > 3][:20]
    assert any((bounds.diff() == 0).any() for bounds in packed)
    assert all((bounds.diff() >= 0).all() for bounds in packed)


def test_arguments_that_must_be_finite_are():
    seen = set()
    for seed in range(4000):
        trial = draw(seed)
        infinite = {name for name, kind in trial.kinds if kind == "infinite"}
        seen |= {(trial.case.op, name) for name in infinite}
        tensors = trial.inputs("cpu")
        for name in fuzz.MUST_BE_FINITE.get(trial.case.op, ()):
            assert name not in tensors or tensors[name].isfinite().all(), trial
    assert {("ssd", "z"), ("selective_scan", "B"), ("rms_norm", "x"), ("ssd_step", "x")} <= seen


def test_every_fast_backend_of_an_op_is_compared():
    compiled = ("torch", "numba") if importlib.util.find_spec("numba") else ("torch",)
    for op in ("selective_scan", "cross_ssd", "mamba3_step", "causal_conv1d", "rms_norm", "add_rms_norm"):
        assert backends("cpu", op)[:2] == compiled
    assert "numba" not in backends("cpu", "cross_merge")


def test_gradients_are_compared_where_states_grow():
    """With steps below zero and no softplus the states grow to 1e300, and so does a product inside of a gradient."""
    shape = Shape(batch=1, length=36, channels=8, d_state=8, heads=3, headdim=15, width=1, height=4)
    case = Case("cross_selective_scan", shape, "fp64", D=False, dt_bias=True, dt_softplus=False, silu=False)
    trial = Trial(case, 996000544)
    y = results(functools.partial(case.function, backend="reference"), trial.inputs("cpu"), gradients=False)["y"]
    assert y.isfinite().all() and y.abs().max() > 1e200
    for backend in backends("cpu", case.op):
        assert fuzz.wrong(trial, backend, "cpu") == ""


def test_the_sensitivity_to_a_product_is_seen_at_every_element():
    """The signs of the noise of two factors may cancel in every random draw."""
    factors = {"a": torch.full((64,), 700.0).double(), "b": torch.ones(64).double()}
    right = expected(lambda a, b: torch.exp(a * b), factors, gradients=False)
    moved = torch.stack([p["y"] / right.exact["y"] - 1 for p in right.perturbed]).abs().amax(0)
    assert (moved > 1000 * torch.finfo(torch.float64).eps).all()


def test_correct_backends_pass(tmp_path, capsys):
    out = tmp_path / "found.json"
    cli.main(["fuzz", "--seed", "0", "--trials", "40", "--minutes", "5", "--op", *QUICK, "--out", str(out)])
    assert "40 trials from seed 0; 0 kinds of disagreement" in capsys.readouterr().out
    assert json.loads(out.read_text())["findings"] == []


def test_a_fault_is_found_repeated_by_its_seed_and_shrunk(monkeypatch, capsys):
    right = pytorch.causal_conv1d

    def wrong(x, weight, bias, *rest):  # only for a packed sequence does the bias get lost
        return right(x, weight, None if rest[2] is not None else bias, *rest)

    monkeypatch.setattr(pytorch, "causal_conv1d", wrong)
    command = ["fuzz", "--seed", "0", "--trials", "40", "--minutes", "5", "--op", "causal_conv1d"]
    with pytest.raises(SystemExit) as e:
        cli.main(command)
    assert e.value.code == 1
    text = capsys.readouterr().out
    block = text.split("FAILED torch: ")[1]
    smallest = block.split("smallest: ")[1].splitlines()[0]
    assert "length=1 " in smallest and "channels=1 " in smallest and "sequences=" in smallest
    again = block.split("again: ssm-bench ")[1].splitlines()[0].split()
    with pytest.raises(SystemExit):
        cli.main(again)
    assert capsys.readouterr().out.split("FAILED torch: ")[1].splitlines()[:4] == block.splitlines()[:4]
    made = eval(block.splitlines()[4], {"Trial": Trial, "Case": Case, "Shape": Shape})
    assert fuzz.wrong(made, "torch", "cpu")
    monkeypatch.setattr(pytorch, "causal_conv1d", right)
    assert not fuzz.wrong(made, "torch", "cpu")


def judged(x: torch.Tensor, actual: torch.Tensor) -> str:
    return disagreement(expected(lambda x: x * 2, {"x": x}, gradients=False), {"y": actual})


def test_infinities_are_compared_by_position():
    x = torch.tensor([1.0, math.inf, 3.0])
    assert judged(x, torch.tensor([2.0, math.inf, 6.0])) == ""
    assert judged(x, torch.tensor([2.0, math.nan, 6.0])) == ""
    assert "finite where the reference is not at 1 of 3" in judged(x, torch.tensor([2.0, 4.0, 6.0]))
    assert "not finite at 1 of 3 elements, the worst (0,)" in judged(x, torch.tensor([math.nan, math.inf, 6.0]))
    assert "off at 1 of 3 elements, the worst (2,)" in judged(x, torch.tensor([2.0, math.inf, 6.1]))


def test_values_that_the_dtype_cannot_hold_are_allowed():
    x = torch.tensor([1.0, 60000.0], dtype=torch.float16)
    for got in (math.inf, 65504.0, math.nan):
        assert judged(x, torch.tensor([2.0, got], dtype=torch.float16)) == ""


def test_a_shape_or_dtype_that_differs_is_reported():
    x = torch.ones(3)
    assert "shape (2,), expected (3,)" in judged(x, torch.ones(2))
    assert "dtype torch.float64, expected torch.float32" in judged(x, 2 * torch.ones(3, dtype=torch.float64))


def test_cancellation_of_the_definition_is_allowed():
    x = torch.linspace(1, 2, 64)
    x[-1] = 0
    x[-1] = -x.double().sum().float()
    ours = results(lambda x: sum(x.unbind()).view(1), {"x": x}, gradients=False)
    # A reference that is exact: its own error tells nothing of what the cancellation costs.
    right = expected(lambda x: x.double().sum(0, keepdim=True).to(x.dtype), {"x": x}, gradients=False)
    assert abs(ours["y"] - right.exact["y"]).item() > 1e-7
    assert disagreement(right, ours) == ""
    ours["y"] = ours["y"] + 0.01
    assert disagreement(right, ours)
