"""The roofline's counts equal arithmetic written out by hand, and the operations executed on small shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ssm_kernels.ssd import pytorch
from vlmamba.benchmarks import cli
from vlmamba.benchmarks.cases import OPS, Case, Shape, published, small
from vlmamba.benchmarks.compile_report import ARCHITECTURES
from vlmamba.benchmarks.devices import DEVICES, MACHINES, device_named
from vlmamba.benchmarks.roofline import Cost, cost, least_time

SMALL = Shape(batch=2, length=32, channels=6, d_state=8, heads=4, headdim=8, groups=2)


class Executed(TorchDispatchMode):
    """Counts the elements that some operations compute."""

    def __init__(self, *names: str):
        super().__init__()
        self.names, self.count = names, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += out.numel() if func.overloadpacket.__name__ in self.names else 0
        return out


def test_selective_scan_by_hand():
    """Batch 8, length 2048, 5120 channels of 16 states, bf16, with D and z."""
    case = Case("selective_scan", Shape(8, 2048, 5120, 16), "bf16", z=True, dt_softplus=False)
    steps = 8 * 2048 * 5120
    forward = cost(case, "fwd")
    # u, dt, z of two bytes; B and C; A and D in float32.
    assert forward.read == 3 * 2 * steps + 2 * 2 * 8 * 2048 * 16 + 4 * 5120 * 16 + 4 * 5120
    assert forward.written == 2 * steps + 4 * 8 * 5120 * 16  # y and the final states
    # A state: dt A; (dt u) B; a h + that; C h summed. A channel: dt u; D u added; sigmoid's sum, times z, times y.
    assert forward.other == steps * (16 * (1 + 1 + 2 + 2) + 1 + 2 + 3)
    assert forward.exponentials == steps * (16 + 2)
    assert forward.matrix == 0
    backward = cost(case, "bwd")
    assert backward.read == forward.read + 2 * steps  # dy
    assert backward.written == forward.read  # a gradient of each input
    assert backward.exponentials == forward.exponentials
    both = cost(case, "fwd+bwd")
    assert both == forward + backward
    assert least_time(both, DEVICES["H100"], torch.bfloat16).bound == "exponentials"


def test_ssd_by_hand():
    """One head a group, one chunk of 64: every product of the chunked algorithm is written out."""
    q, p, n = 64, 32, 128
    case = Case("ssd", Shape(1, q, heads=1, headdim=p, d_state=n), "bf16", D=False, dt_softplus=False)
    scores, own, read_state, write_state = 2 * q * q * n, 2 * q * q * p, 2 * q * n * p, 2 * q * n * p
    assert cost(case, "fwd").matrix == scores + own + read_state + write_state
    dmix, dx = 2 * q * q * p, 2 * q * q * p
    dB_and_dC = 2 * (2 * q * q * n) + 2 * (2 * q * n * p)
    states_dstates_and_dx_of_state = 3 * (2 * q * n * p)
    assert cost(case, "bwd").matrix == scores + dmix + dx + dB_and_dC + states_dstates_and_dx_of_state
    assert cost(case, "fwd").exponentials == q * (q + 1) // 2 + 2 * q
    assert cost(case, "fwd").read == 2 * (q * p + q + 2 * q * n) + 4
    assert cost(case, "fwd").written == 2 * q * p + 4 * p * n


def test_convolution_norm_and_merge_by_hand():
    conv = cost(Case("causal_conv1d", Shape(2, 100, 6, width=4), "fp32"), "fwd")
    assert conv == Cost(4 * (1200 + 6 * 4 + 6), 4 * (1200 + 2 * 3 * 6), 0, 1200 * (8 + 1 + 2), 2 * 1200)
    norm = cost(Case("rms_norm", Shape(2, 100, 6), "fp32"), "fwd")
    assert norm == Cost(4 * (1200 + 6), 4 * 1200, 0, 4 * 1200, 200)
    added = cost(Case("add_rms_norm", Shape(2, 100, 6), "bf16"), "fwd")
    assert (added.read, added.written) == (2 * 1200 + 2 * 6 + 4 * 1200, 2 * 1200 + 4 * 1200)
    merge = cost(Case("cross_merge", Shape(2, 100, 6, height=10), "fp32"), "fwd")
    assert merge == Cost(4 * 4 * 1200, 4 * 1200, 0, 3 * 1200, 0)
    assert cost(Case("cross_merge", Shape(2, 100, 6, height=10)), "bwd") == Cost(4 * 1200, 4 * 4 * 1200)


def test_ops_along_directions_read_what_they_share_once():
    """Four directions over a grid of 10 by 10, 6 channels of 8 states, float32, without D."""
    case = Case("cross_selective_scan", Shape(2, 100, 6, 8, height=10), D=False, dt_softplus=False)
    found = cost(case, "fwd")
    elements = 2 * 100 * 6
    assert found.read == 4 * (elements + 4 * elements + 4 * 6 * 8 + 2 * (2 * 100 * 4 * 8))  # u, dt, A, B and C
    assert found.written == 4 * elements
    assert found.exponentials == 4 * elements * 8
    assert found.other == 4 * elements * (6 * 8 + 1) + 3 * elements
    grid = Case("cross_ssd", Shape(2, 64, heads=2, headdim=8, d_state=16, height=8), dt_softplus=False)
    line = Case("ssd", Shape(2, 64, heads=8, headdim=8, d_state=16, groups=4), dt_softplus=False)
    for of in ("fwd", "bwd"):
        assert cost(grid, of).matrix == cost(line, of).matrix
        assert cost(grid, of).read == cost(line, of).read


def test_a_step_by_hand():
    """Batch 1, 80 heads of 64, 128 states: the state in float32 is read and written, and is nearly all of it."""
    state = 4 * 80 * 64 * 128
    found = cost(Case("ssd_step", Shape(1, heads=80, d_state=128), "bf16", dt_bias=True), "fwd")
    rest = 2 * (80 * 64 + 80 + 2 * 128) + 3 * 4 * 80  # x, dt, B, C; A, D, dt_bias
    assert (found.read, found.written) == (state + rest, state + 2 * 80 * 64)
    with pytest.raises(ValueError, match="no backward"):
        cost(Case("ssd_step"), "bwd")


def test_mamba3_by_hand():
    """One head, one step a chunk: SSD of the ranks, and the rotation, trapezoid and gate around it."""
    shape = Shape(1, 4, heads=1, headdim=32, d_state=16, rank=2)
    case = Case("mamba3", shape, "bf16", z=True, chunk_size=2)
    scan = Case("ssd", replace(shape, length=8), D=False, dt_softplus=False, chunk_size=2)
    found, of_scan = cost(case, "fwd"), cost(scan, "fwd")
    assert found.matrix == of_scan.matrix
    own = 2 * 2 * (2 * 16 + 1 + 2 * 32)  # C B^T of a step's ranks, weighed, times x
    rotated = 2 * 2 * (16 + 4 * 6)  # B and C of two ranks: the bias, and 4 pairs turned
    angles, trapezoid = 4 * 2, 4
    channels = 2 * 32 * (1 + 2 + 2 + 1 + 3)  # x and y of a rank, D, the gate's projection and the gate
    assert found.other == of_scan.other + 4 * (own + rotated + angles + trapezoid + channels + 4)
    assert found.exponentials == of_scan.exponentials + 4 * (2 * 4 + 2 + 2 * 64 + 4)
    step = cost(replace(case, op="mamba3_step"), "fwd")
    state = 32 * 16 * (1 + 2 * (2 + 2 + 2))
    assert step.other == state + 2 * 2 * 32 + 1 + rotated + angles + trapezoid + channels + 4
    assert step.written == 4 * (4 + 32 * 16 + 2 * 16 + 32) + 2 * 32


def test_matrix_operations_are_those_that_the_chunked_algorithm_executes():
    case = Case("ssd", SMALL, chunk_size=8, D=False)
    t = case.inputs()
    arguments = [t[name].detach() for name in ("x", "dt", "A", "B", "C")]
    with FlopCounterMode(display=False) as forward:
        y, final, checkpoints = pytorch._forward(*arguments, None, None, None, None, 8)
    # One more product, of the state at each end, is the price of how that path keeps its states.
    assert cost(case, "fwd").matrix == forward.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        pytorch._backward(*arguments, None, None, None, None, 8, checkpoints, y, final)
    # That path multiplies C with the states once more than it must.
    again = 2 * 32 * 2 * 8 * (2 * 2 * 8)
    assert cost(case, "bwd").matrix == backward.get_total_flops() - again


def test_exponentials_are_those_that_the_definition_executes():
    case = Case("selective_scan", SMALL, dt_softplus=False)
    with Executed("exp") as reference, torch.no_grad():
        case.call(case.inputs(), "reference")
    assert cost(case, "fwd").exponentials == reference.count == 2 * 32 * 6 * 8


@pytest.mark.parametrize("case", [c for c in small("fp32") if not c.sequences], ids=str)
def test_bytes_are_those_of_the_arguments_and_results(case):
    inputs = case.inputs()
    states = {name: inputs[name].clone() for name in case.state_names}
    outputs = [*tree_leaves(case.run(inputs | states, "torch")), *states.values()]
    found = cost(case, "fwd")
    assert found.read == sum(t.numel() * t.element_size() for t in inputs.values())
    assert found.written == sum(t.numel() * t.element_size() for t in outputs)


def test_every_op_has_a_least_time_on_every_device():
    assert {c.op for c in published()} == set(OPS)
    for case in published("bf16") + published("fp32"):
        needs = cost(case, "fwd")
        assert all(least_time(needs, device, torch.bfloat16).seconds > 0 for device in DEVICES.values())


def test_what_bounds_a_call():
    seconds = least_time(Cost(3_350_000, 0), DEVICES["H100"], torch.float32)
    assert (seconds.bound, seconds.seconds) == ("memory", pytest.approx(1e-6))
    assert least_time(Cost(1, 0, matrix=10**12), DEVICES["A100"], torch.bfloat16).seconds == pytest.approx(1 / 312)
    assert least_time(Cost(1, 0, matrix=10**12), DEVICES["A100"], torch.float32).seconds == pytest.approx(3 / 156)
    with pytest.raises(ValueError, match="float64"):
        least_time(Cost(1, 0), DEVICES["A100"], torch.float64)


def test_devices_are_found_by_what_a_driver_calls_them():
    assert device_named("NVIDIA H100 80GB HBM3") is DEVICES["H100"]
    assert device_named("NVIDIA GeForce RTX 4090") is DEVICES["RTX 4090"]
    assert device_named("AMD EPYC") is None


def test_the_command_prints_a_line_for_each_op_and_pass(tmp_path, capsys):
    out = tmp_path / "roofline.json"
    cli.main(["roofline", "--size", "130m", "--device", "H100", "MI300X", "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("ssd bf16") for line in lines) == 2
    assert any("exponentials" in line for line in lines)
    assert out.exists()


def test_more_work_costs_more():
    case = Case("ssd", SMALL, chunk_size=8)
    longer = replace(case, shape=replace(SMALL, length=40))
    for field in ("read", "written", "matrix", "other", "exponentials"):
        for of in ("fwd", "bwd"):
            assert getattr(cost(longer, of), field) > getattr(cost(case, of), field)


@pytest.mark.parametrize("name", sorted(DEVICES.keys() & MACHINES.keys()))
def test_both_tables_of_devices_agree(name):
    """The peaks imply a clock that the assumed one is below, and the rate of the exponential unit at it."""
    device, machine = DEVICES[name], MACHINES[name]
    assert machine.bandwidth == device.bandwidth and machine.num_sms == ARCHITECTURES[machine.target].num_sms
    lanes = 4 * 32 * machine.num_sms  # if every instruction took a clock
    boost = device.fp32 * machine.clocks["FP32"] / (2 * lanes)
    assert 0.85 * boost < machine.clock < boost
    assert device.exponentials == pytest.approx(lanes / machine.clocks["MUFU"] * boost)
