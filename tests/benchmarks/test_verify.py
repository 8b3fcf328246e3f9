"""ssm-bench verify: a correct function passes, and each kind of fault is found and shrunk."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vlmamba.benchmarks import cli
from vlmamba.benchmarks import verify as verification
from vlmamba.benchmarks.cases import OPS, Case, Shape, small
from vlmamba.benchmarks.shrink import SIMPLEST, shrink, smaller_cases
from vlmamba.benchmarks.verify import grid, load, verify

CONV = """
import torch
import torch.nn.functional as F

def conv(x, weight, bias=None, activation=None, initial_states=None):
    width = weight.shape[1]
    compute = torch.promote_types(x.dtype, torch.float32)
    if initial_states is None:
        initial_states = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    inputs = torch.cat([initial_states, x], 1)
    y = F.conv1d(inputs.to(compute).mT, weight.to(compute).unsqueeze(1), groups=x.shape[2]).mT
    y = y if bias is None else y + bias
    y = F.silu(y) if activation == "silu" else y
    return y.to(x.dtype), inputs[:, inputs.shape[1] - width + 1 :]

def y_alone(x, weight, bias=None, activation=None, initial_states=None):
    return conv(x, weight, bias, activation, initial_states)[0]

def off_by_one(x, weight, bias=None, activation=None):
    y, states = conv(x.roll(1, 1), weight, bias, activation)
    return y, conv(x, weight, bias, activation)[1]

def wrong_at_odd_lengths(x, weight, bias=None, activation=None):
    y, states = conv(x, weight, bias, activation)
    keep = torch.arange(x.shape[1], device=x.device) < x.shape[1] // 2 * 2
    return y * keep[None, :, None], states

class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, dy):
        return 1.01 * dy

def wrong_gradient(x, weight, bias=None, activation=None):
    return conv(Doubled.apply(x), weight, bias, activation)

def lost_gradient(x, weight, bias=None, activation=None):
    return conv(x, weight if activation else weight.detach(), bias, activation)

def wrong_dtype(x, weight, bias=None, activation=None):
    y, states = conv(x.float(), weight.float(), bias.float(), activation)
    return y, states.to(x.dtype)

def raises(x, weight, bias=None, activation=None, initial_states=None):
    if initial_states is not None:
        raise RuntimeError("shared memory")
    return conv(x, weight, bias, activation)

def only_silu(x, weight, bias=None, activation=None):
    if activation != "silu":
        raise NotImplementedError("no activation but silu")
    return conv(x, weight, bias, activation)

def nothing():
    pass
"""

STEP = """
import torch
import torch.nn.functional as F

def step(state, u, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    dt = dt.float() if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    B, C = ((m if m.dim() == 2 else m.repeat_interleave(len(A) // m.shape[1], 1)).float() for m in (B, C))
    state.copy_(state * torch.exp(dt[..., None] * A) + (dt * u)[..., None] * B)
    y = (state * C).sum(-1)
    y = y if D is None else y + D * u
    return (y if z is None else y * F.silu(z.float())).to(u.dtype)

def without_softplus(state, u, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    return step(state, u, dt, A, B, C, D, z, dt_bias)

def not_in_place(state, u, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    return step(state.clone(), u, dt, A, B, C, D, z, dt_bias, dt_softplus)
"""


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Sequences of 23 steps in place of 203: the reference takes its time step by step."""

    def shortened(dtype):
        cases = small(dtype)
        return [replace(c, shape=replace(c.shape, length=23)) if c.shape.length == 203 else c for c in cases]

    monkeypatch.setattr(verification, "small", shortened)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CONV + STEP)
    return path


def test_a_right_kernel_passes(file, capsys):
    cli.main(["verify", "--kernel", f"{file}:conv", "causal_conv1d"])
    text = capsys.readouterr().out
    assert "24 of 30 cases agree" in text and "outputs and gradients" in text
    assert "the function takes no cu_seqlens" in text and "the function takes no seq_idx" in text


def test_a_right_step_passes(file):
    verdict = verify(load(f"{file}:step"), "selective_scan_step")
    assert verdict.is_right and verdict.passed == verdict.total and not verdict.has_backward


@pytest.mark.parametrize(
    ("op", "kernel", "output"),
    [
        ("causal_conv1d", "off_by_one", "y: off"),
        ("causal_conv1d", "wrong_at_odd_lengths", "y: off"),
        ("causal_conv1d", "wrong_gradient", "gradient of x: off"),
        ("causal_conv1d", "lost_gradient", "gradient of weight: off"),
        ("causal_conv1d", "wrong_dtype", "y: dtype torch.float32, expected torch.bfloat16"),
        ("causal_conv1d", "raises", "raises RuntimeError: shared memory"),
        ("causal_conv1d", "nothing", "FAILED: no case was tested"),
        ("selective_scan_step", "without_softplus", "y: off"),
        ("selective_scan_step", "not_in_place", "state: off"),
    ],
)
def test_a_wrong_kernel_is_found(file, capsys, op, kernel, output):
    with pytest.raises(SystemExit) as e:
        cli.main(["verify", "--kernel", f"{file}:{kernel}", op])
    assert e.value.code == 1
    assert output in capsys.readouterr().out


def test_the_failing_case_is_made_small(file):
    smallest = verify(load(f"{file}:wrong_at_odd_lengths"), "causal_conv1d").smallest
    assert (smallest.shape.batch, smallest.shape.length, smallest.shape.channels) == (1, 1, 1)
    assert not smallest.silu
    smallest = verify(load(f"{file}:without_softplus"), "selective_scan_step").smallest
    assert smallest.dt_softplus and not smallest.D and smallest.shape.channels == 1
    smallest = verify(load(f"{file}:raises"), "causal_conv1d").smallest
    assert smallest.initial_states and smallest.shape.length == 1


def test_the_report_has_what_repeats_the_case(file):
    verdict = verify(load(f"{file}:off_by_one"), "causal_conv1d")
    line = next(line for line in str(verdict).splitlines() if "its tensors" in line)
    made = eval(line.split(": ", 1)[1].removesuffix(".inputs()"), {"Case": Case, "Shape": Shape})
    assert made == verdict.smallest


def test_cases_that_are_not_tested_are_reported(file):
    verdict = verify(load(f"{file}:only_silu"), "causal_conv1d", ("fp32",))
    assert verdict.is_right
    assert verdict.skipped["no activation but silu"] == 1
    verdict = verify(load(f"{file}:y_alone"), "causal_conv1d", ("fp32",))
    assert verdict.is_right and verdict.not_compared == ("final_states",)


def test_a_missing_kernel_is_refused(file):
    for kernel, text in (("absent.py:f", "with a file that exists"), (f"{file}:f", "has no function 'f'; it has")):
        with pytest.raises(SystemExit, match=text):
            cli.main(["verify", "--kernel", kernel, "causal_conv1d"])
    with pytest.raises(SystemExit, match="op must be among"):
        cli.main(["verify", "--kernel", f"{file}:conv", "conv"])


@pytest.mark.parametrize("op", OPS)
def test_the_grid_has_every_option(op):
    cases = grid(op, ("fp32", "bf16"))
    assert {case for case in verification.small("fp32") if case.op == op} <= set(cases)
    assert {case.dtype for case in cases} == {"fp32", "bf16"}


def test_shrinking_ends_at_the_smallest():
    start = Case("ssd", Shape(3, 77, heads=6, groups=2), "bf16", z=True, sequences=0)
    smallest, _ = shrink(start, "", smaller_cases, lambda case: "z" * (case.shape.length >= 5 and case.z))
    assert smallest.shape.length == 5 and smallest.z
    assert smallest.shape.heads == smallest.shape.groups == smallest.shape.d_state == smallest.shape.batch == 1
    assert all(getattr(smallest, k) == v for k, v in SIMPLEST.items() if k != "z")
    grid_case = Case("cross_ssd", Shape(2, 42, height=6, heads=2))
    columns = lambda case: case.shape.length // case.shape.height  # noqa: E731
    smallest, why = shrink(grid_case, "7", smaller_cases, lambda case: str(columns(case)) * (columns(case) >= 3))
    assert why == "3"
    assert (smallest.shape.height, smallest.shape.length) == (1, 3)
