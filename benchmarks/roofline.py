"""The least time that a call can take: bytes, operations and exponentials over a device's peak rates.

The counts are those that the definition asks of any implementation that saves no more than its inputs for the backward:
each input read once and each output written once, states recomputed in the backward, SSD by the chunked algorithm at
the case's `chunk_size` with complete chunk x chunk tiles, as tensor cores compute them. Traffic that is a choice of
the kernel (checkpoint states, partial sums) is not counted, which understates a kernel's share of the roofline.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .cases import DIRECTIONS, DTYPES, Case, check_ops, published
from .devices import DEVICES, Device, device_named
from .files import write_json
from .machine_code.held import issue_seconds
from .options import Mode, Roofline
from .processor import Rates
from .tables import Row, as_text


def run_roofline(command: Roofline) -> None:
    """`ssm-bench roofline`."""
    check_ops(command.op)
    rows, lines = [], []
    for case in published(command.dtype, command.size):
        if case.op not in command.op:
            continue
        modes: tuple[Mode, ...] = ("fwd",) if case.is_step else ("fwd", "bwd")
        for mode in modes:
            needs = cost(case, mode)
            bounds = {name: least_time(needs, DEVICES[name], DTYPES[command.dtype]) for name in command.device}
            issue = {name: issue_seconds(case, mode, name) for name in command.device}
            cells = [f"{case} {mode}", f"{needs.bytes / 1e6:.1f}", f"{(needs.matrix + needs.other) / 1e9:.2f}"]
            cells += [f"{needs.exponentials / 1e9:.3f}", f"{needs.intensity:.1f}"]
            for name, least in bounds.items():
                cells += [f"{1e6 * least.seconds:.1f}", least.bound, _microseconds(issue[name])]
            lines.append(Row(cells))
            times = {name: asdict(b) | {"issue": issue[name]} for name, b in bounds.items()}
            rows.append({"case": str(case), "pass": mode, "cost": asdict(needs), "floors": times})
    heads = ["case", "MB", "GFLOP", "Gexp", "FLOP/B"]
    for name in command.device:
        heads += [f"{name} us", "bound", "ours issue us"]
    print(as_text(heads, lines, names=(0, *range(6, len(heads), 3))))
    write_json(command.out, {"rows": rows, "devices": {name: asdict(DEVICES[name]) for name in command.device}})


def _microseconds(seconds: float | None) -> str:
    """The time that this project's kernels need to start their instructions: more than the least, or never reached."""
    return "-" if seconds is None else f"{1e6 * seconds:.1f}"


@dataclass(frozen=True)
class Cost:
    """Bytes and operations of a call."""

    read: int
    """Bytes."""
    written: int
    """Bytes."""
    matrix: int = 0
    """Floating-point operations of matrix products; a multiplication and an addition are two."""
    other: int = 0
    """Floating-point operations outside of them."""
    exponentials: int = 0
    """Exponentials, and logarithms, reciprocals and reciprocal roots, which the same unit computes."""

    @property
    def bytes(self) -> int:
        return self.read + self.written

    @property
    def intensity(self) -> float:
        """Floating-point operations per byte."""
        return (self.matrix + self.other) / self.bytes

    def __add__(self, more: Cost) -> Cost:
        return Cost(*(getattr(self, f) + getattr(more, f) for f in self.__dataclass_fields__))


@dataclass(frozen=True)
class LeastTime:
    seconds: float
    bound: Literal["memory", "matrix", "arithmetic", "exponentials"]
    """The unit that takes this time, on a CPU the larger part of it; others could work in parallel."""


def least_time(cost: Cost, device: Device, dtype: torch.dtype) -> LeastTime:
    """The least time of a call on a device, and its bound."""
    if dtype == torch.float64:
        raise ValueError("no roofline is known for float64; dtype must be fp32, bf16 or fp16")
    return max(
        LeastTime(cost.bytes / device.bandwidth, "memory"),
        LeastTime(cost.matrix / device.matrix(dtype), "matrix"),
        LeastTime(cost.other / device.fp32, "arithmetic"),
        LeastTime(cost.exponentials / device.exponentials, "exponentials"),
        key=lambda time: time.seconds,
    )


CHUNKS = tuple(2**n for n in range(9))
"""Chunk sizes of SSD on a CPU, whose kernels choose their own."""


def least_time_here(case: Case, mode: Mode, rates: Rates) -> LeastTime:
    """The least time of a call on cores of this machine, in float32 arithmetic whatever the dtype.

    Exponentials are multiply-adds too: a core takes one after the other, so that their times add. Memory is moved
    meanwhile. SSD's least time is that of the best chunk size.
    """

    def least(case: Case) -> LeastTime:
        needs = cost(case, mode)
        operations = (needs.matrix + needs.other) / rates.operations
        exponentials = needs.exponentials / rates.exponentials
        return max(
            LeastTime(needs.bytes / rates.bandwidth(needs.bytes), "memory"),
            LeastTime(operations + exponentials, "arithmetic" if operations >= exponentials else "exponentials"),
            key=lambda time: time.seconds,
        )

    sizes = CHUNKS if case.folder == "ssd" and not case.is_step else (case.chunk_size,)
    return min((least(replace(case, chunk_size=size)) for size in sizes), key=lambda time: time.seconds)


UNKNOWN = {"floor": None, "bound": None, "share": None}
"""The roofline's entries in a row where the device's rates are not known, and in float64."""


def roofline_share(case: Case, mode: Mode, seconds: float, device: str, rates: Rates | None = None) -> dict[str, Any]:
    """The roofline's entries in a row: the least time, its bound, and the share of the peak that `seconds` reaches.

    Args:
        rates: those of this machine's cores, for a call on the CPU.
    """
    if case.dtype == "fp64":
        return UNKNOWN
    if rates is not None:
        least = least_time_here(case, mode, rates)
    else:
        known = None if device == "cpu" else device_named(torch.cuda.get_device_name(device))
        if known is None:
            return UNKNOWN
        least = least_time(cost(case, mode), known, DTYPES[case.dtype])
    return {"floor": least.seconds, "bound": least.bound, "share": least.seconds / seconds}


def cost(case: Case, mode: Mode) -> Cost:
    """Bytes and operations of a call: forward, backward (gradients of all inputs) or both."""
    if mode == "fwd+bwd":
        return cost(case, "fwd") + cost(case, "bwd")
    if mode == "bwd" and case.is_step:
        raise ValueError(f"{case.op} has no backward")
    inputs = _bytes(*case.inputs("meta").values())
    floats = _bytes(*(t for t in case.inputs("meta").values() if t.is_floating_point()))
    count = {
        "selective_scan": _selective_scan, "selective_scan_step": _selective_scan,
        "ssd": _ssd, "ssd_step": _ssd_step, "mamba3": _mamba3, "mamba3_step": _mamba3_step,
        "causal_conv1d": _conv, "causal_conv1d_step": _conv,
        "rms_norm": _norm, "add_rms_norm": _norm,
        "cross_scan": _permute, "cross_merge": _permute,
        "cross_causal_conv1d": _along_directions, "cross_selective_scan": _along_directions,
        "cross_ssd": _along_directions,
    }[case.op]  # fmt: skip
    matrix, other, exponentials = count(case, mode)
    outputs = _outputs(case)
    if mode == "fwd":
        return Cost(inputs, outputs, matrix, other, exponentials)
    # A permutation's gradient needs no input.
    again = 0 if case.op in ("cross_scan", "cross_merge") else inputs
    return Cost(again + _gradients_in(case), floats, matrix, other, exponentials)


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _outputs(case: Case) -> int:
    """Bytes of the results: y, and the final states, or the state that a step updates."""
    sizes, width = case.sizes(), DTYPES[case.dtype].itemsize
    wide = max(width, 4)
    rows = case.sequences or case.shape.batch
    s = case.shape
    if case.is_step:
        inputs = case.inputs("meta")
        states = _bytes(*(inputs[name] for name in case.state_names))
        return states + math.prod(sizes["u" if "u" in sizes else "x"]) * width
    y = _gradients_in(case)
    if case.op == "selective_scan":
        return y + rows * s.channels * s.d_state * wide
    if case.op == "ssd":
        return y + rows * s.heads * s.headdim * s.d_state * wide
    if case.op == "mamba3":
        inputs = replace(case, initial_states=True).inputs("meta")
        return y + _bytes(*(t for name, t in inputs.items() if name.startswith("initial_states.")))
    if case.op == "causal_conv1d":
        return y + rows * (s.width - 1) * s.channels * width
    return y


def _gradients_in(case: Case) -> int:
    """Bytes of the upstream gradients: of y and, in the residual add, of the sum; none of final states."""
    sizes, width = case.sizes(), DTYPES[case.dtype].itemsize
    main = math.prod(next(iter(sizes.values()))) * width
    stream = main // width * max(width, 4)  # the residual's
    return {
        "cross_scan": DIRECTIONS * main, "cross_merge": main // DIRECTIONS, "cross_causal_conv1d": DIRECTIONS * main,
        "add_rms_norm": main + stream,
    }.get(case.op, main)  # fmt: skip


def _selective_scan(case: Case, mode: Mode) -> tuple[int, int, int]:
    """Matrix operations, other operations and exponentials of B * L * D channel steps of N states.

    Forward, a state: dt A, exp; (dt u) B; h = a h + ..., y += C h, a multiply-add each: 6 and one exponential.
    Backward, a state: the recurrence again (4 and one exponential); g += C dy, dC += h dy, dB += g (dt u),
    s += B g, dA += p dt, q += A p, a multiply-add each, and a g, p = (a g) h: 14.
    """
    s = case.shape
    # B * L * D channel steps
    steps = s.batch * (1 if case.is_step else s.length) * s.channels
    states = steps * s.d_state
    if mode == "fwd":
        # dt u; D u; silu(z) is an exponential, a reciprocal and 3 operations with its product with y.
        scalar, exponentials = 1 + 2 * case.D + 3 * case.z, 2 * case.z
    else:
        # dt u; du = dt s + D dy, dD += u dy; ddt = u s + q. The gate: y again (2 a state and D u), its gradient.
        scalar, exponentials = 4 + 4 * case.D + (2 * s.d_state + 2 * case.D + 8) * case.z, 2 * case.z
    step, unit = _step_size(case, mode)
    per_state = 6 if mode == "fwd" else 18
    return 0, per_state * states + (scalar + step) * steps, states + (exponentials + unit) * steps


def _step_size(case: Case, mode: Mode) -> tuple[int, int]:
    """Operations and exponentials of dt: the bias, softplus (exp, log; in the backward a reciprocal), `dt_limit`."""
    operations = case.dt_bias + 2 * case.dt_softplus + 2 * case.dt_limit
    if mode == "fwd":
        return operations, 2 * case.dt_softplus
    return operations + case.dt_bias + 2 * case.dt_softplus, 3 * case.dt_softplus


def _ssd(case: Case, mode: Mode) -> tuple[int, int, int]:
    """Operations by chunks of q steps; a product of (m, k) and (k, n) is 2 m k n operations.

    Forward: C B^T a group; (C B^T masked) x, C S and S += B^T x a head.
    Backward: C B^T, its gradient times B and times C a group; dy x^T and (C B^T masked)^T dy a head, and, of N P q
    each, the states again, dS += C^T dy, dC += dy S^T, dx += B dS and dB += x dS^T.
    Exponentials: the lower triangle of decays, and two a step for the state, a head.
    """
    s = case.shape
    matrix = other = exponentials = 0
    for q, times in _chunks(case):
        square, rectangle, triangle = q * q, q * s.d_state * s.headdim, q * (q + 1) // 2
        products_a_group, squares_a_head, rectangles_a_head = (1, 1, 2) if mode == "fwd" else (3, 2, 5)
        matrix += times * s.groups * products_a_group * 2 * square * s.d_state
        matrix += times * s.heads * (squares_a_head * 2 * square * s.headdim + rectangles_a_head * 2 * rectangle)
        # Masked, the decay's difference, times decay and dt (and, backward, the same of the gradient and of ddt's sum).
        other += times * s.heads * triangle * (3 if mode == "fwd" else 7)
        # The state's decay, and the rows of C S and x that it and dt scale.
        states = s.d_state * s.headdim
        other += times * s.heads * ((1 if mode == "fwd" else 2) * states + (2 if mode == "fwd" else 5) * q * s.headdim)
        exponentials += times * s.heads * (triangle + 2 * q)
    steps = s.batch * s.length * s.heads
    step, unit = _step_size(case, mode)
    gate = (3 if mode == "fwd" else 10) * case.z
    other += steps * s.headdim * ((2 if mode == "fwd" else 4) * case.D + gate) + steps * (step + 1)
    return matrix, other, exponentials + steps * (unit + 2 * s.headdim * case.z)


def _chunks(case: Case) -> list[tuple[int, int]]:
    """Lengths of chunks, each with the number of chunks of that length."""
    s, q = case.shape, case.chunk_size
    if case.sequences:
        # On average: the bounds are known from their values alone.
        return [(q, max(1, s.length // q))]
    full, rest = divmod(s.length, q)
    return [(steps, s.batch * times) for steps, times in ((q, full), (rest, 1)) if steps and times]


def _ssd_step(case: Case, mode: Mode) -> tuple[int, int, int]:
    """A state: decay h + (dt x) B, a multiply-add and a product, and y += C h: 5; a head: exp(dt A)."""
    s = case.shape
    heads = s.batch * s.heads
    step, unit = _step_size(case, mode)
    scalar = 1 + 2 * case.D + 3 * case.z
    other = heads * (s.headdim * (5 * s.d_state + scalar) + step + 1)
    return 0, other, heads * (1 + unit + 2 * s.headdim * case.z)


def _mamba3(case: Case, mode: Mode) -> tuple[int, int, int]:
    """SSD of R steps a step, whose B and C belong to heads, and what Mamba-3 computes beside it.

    The own outputs of a step: R x R products of C and B, and as many rows of x.
    """
    s = case.shape
    line = replace(s, length=s.length * s.rank, groups=s.heads)
    scan = replace(case, op="ssd", shape=line, D=False, z=False, dt_softplus=False)
    matrix, other, exponentials = _ssd(scan, mode)
    own = s.rank * s.rank * (2 * s.d_state + 2 * s.headdim + 1) * (1 if mode == "fwd" else 3)
    beside, unit = _beside_mamba3(case, mode)
    heads = s.batch * s.length * s.heads
    return matrix, other + heads * own + beside, exponentials + unit


def _beside_mamba3(case: Case, mode: Mode) -> tuple[int, int]:
    """Operations and exponentials of the rotation, the trapezoid, the projections of ranks, D and the gate.

    Forward, a head: dt times an angle and the sum of angles, a cosine and a sine of it; B and C of each rank with their
    bias and rotated, 6 a pair; the trapezoid, a sigmoid and 4. A step: the angle's tanh, and its product with pi.
    Backward: all of these again; B and C rotated back (6) and the gradient of the angle (4).
    """
    s = case.shape
    steps = s.batch * (1 if case.is_step else s.length)
    heads, pairs, is_mimo, is_forward = steps * s.heads, s.d_state // 4, s.rank > 1, mode == "fwd"
    a_matrix = s.d_state + 6 * pairs if is_forward else 2 * s.d_state + 16 * pairs
    # The inputs and outputs of the ranks, a product and a multiply-add; the gradient of both factors, and x again.
    projections = (3 if is_forward else 9) * is_mimo
    gate = ((3 if is_forward else 10) + (1 if is_forward else 3) * is_mimo) * case.z
    a_channel = projections + (2 if is_forward else 4) * case.D + gate
    a_head = 2 * s.rank * a_matrix + s.rank * s.headdim * a_channel
    a_head += 2 * pairs + 4 if is_forward else 6 * pairs + 12
    exponentials = heads * (2 * pairs + 2 + 2 * s.rank * s.headdim * case.z) + steps * pairs
    return heads * a_head + steps * pairs * (1 if is_forward else 4), exponentials


def _mamba3_step(case: Case, mode: Mode) -> tuple[int, int, int]:
    """A state: the decay, and a multiply-add for the last input, for this one and for y, of each rank."""
    s = case.shape
    heads = s.batch * s.heads
    beside, exponentials = _beside_mamba3(case, mode)
    # exp(dt A); both inputs times their weights.
    a_head = s.headdim * (s.d_state * (1 + 6 * s.rank) + 2 * s.rank) + 1
    return 0, heads * a_head + beside, exponentials + heads


def _conv(case: Case, mode: Mode) -> tuple[int, int, int]:
    """K multiply-adds; SiLU: an exponential, a reciprocal, 2. Backward: dx, dweight, and the sums again for SiLU."""
    s = case.shape
    elements = s.batch * (1 if case.is_step else s.length) * s.channels
    if mode == "fwd":
        return 0, elements * (2 * s.width + 1 + 2 * case.silu), elements * 2 * case.silu
    again = (2 * s.width + 1 + 5) * case.silu
    return 0, elements * (4 * s.width + 1 + again), elements * 2 * case.silu


def _norm(case: Case, mode: Mode) -> tuple[int, int, int]:
    """Forward: a sum of squares (2), the root's factor and the weight. The gate: 3 and two exponentials.

    Backward: u, the sum of g u, dv, g w and dweight: 9; the gate again, its derivative, and their products: 9.
    """
    s = case.shape
    elements = s.batch * s.length * s.channels
    roots = s.batch * s.length * (s.groups if case.op == "rms_norm" else 1)
    if mode == "fwd":
        other = elements * (4 + 3 * case.z + (case.op == "add_rms_norm"))
    else:
        other = elements * (9 + 9 * case.z + (case.op == "add_rms_norm"))
    return 0, other, roots + elements * 2 * case.z


def _permute(case: Case, mode: Mode) -> tuple[int, int, int]:
    """The merge, or the scan's backward, adds the directions."""
    s = case.shape
    adds = DIRECTIONS - 1 if (case.op == "cross_merge") == (mode == "fwd") else 0
    return 0, adds * s.batch * s.length * s.channels, 0


def _along_directions(case: Case, mode: Mode) -> tuple[int, int, int]:
    """The op on a sequence in every direction; results, or gradients of a shared input, are added."""
    s = case.shape
    wide = replace(s, channels=DIRECTIONS * s.channels, heads=DIRECTIONS * s.heads, groups=DIRECTIONS * s.groups)
    op, count = {
        "cross_causal_conv1d": ("causal_conv1d", _conv),
        "cross_selective_scan": ("selective_scan", _selective_scan),
        "cross_ssd": ("ssd", _ssd),
    }[case.op]
    matrix, other, exponentials = count(replace(case, op=op, shape=wide), mode)
    adds = {"cross_causal_conv1d": mode == "bwd", "cross_selective_scan": True, "cross_ssd": False}[case.op]
    return matrix, other + adds * (DIRECTIONS - 1) * s.batch * s.length * s.channels, exponentials
