"""`ssm-bench run` and `sweep`: implementations of an op side by side, at one or more settings of its sizes."""

from __future__ import annotations

import dataclasses
import functools
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from ssm_kernels import resolve_backend

from . import errors, report
from .cases import DTYPES, Shape
from .measure import SLOW, environment, first_call, on, peak_memory, time_together, timing
from .options import Mode, Run, Sweep
from .roofline import reached
from .workloads import BLOCKS, Workload, build, case_of, named_shape, sizes_of


def run_run(command: Run) -> None:
    """`ssm-bench run`."""
    settings = [
        Setting(name, _sized(command, named_shape(command.op, name)), command.chunk_size)
        for name in dict.fromkeys(command.shape)
    ]
    modes = command.mode or (("fwd",) if command.op.endswith("_step") else ("fwd", "fwd+bwd"))
    with on(command.device):
        _measure(command, settings, modes)


def run_sweep(command: Sweep) -> None:
    """`ssm-bench sweep`."""
    swept = {
        "length": command.lengths,
        "batch": command.batches,
        "d_state": command.d_states,
        "chunk_size": command.chunk_sizes,
    }
    given = {name: sorted(values) for name, values in swept.items() if values}
    if len(given) > 1:
        raise ValueError(f"sweep goes over one size at a time; got {', '.join(given)}")
    over, values = next(iter(given.items()), ("length", [2**i for i in range(10, 17)]))
    _check_reads(command.op, over)
    base = _sized(command, named_shape(command.op, command.shape))
    settings = []
    for value in values:
        is_chunk = over == "chunk_size"
        shape = base if is_chunk else replace(base, **{over: value})
        settings.append(Setting(f"{over} {value:,}", shape, value if is_chunk else command.chunk_size, value))
    modes = command.mode or (("fwd",) if command.op.endswith("_step") else ("fwd+bwd",))
    with on(command.device):
        _measure(command, settings, modes, over, command.patience)


@dataclass(frozen=True)
class Setting:
    """The sizes that implementations are measured at together."""

    name: str
    shape: Shape
    chunk_size: int | None = None
    value: int | None = None
    """Of the size that is swept."""

    @property
    def options(self) -> dict[str, int]:
        return {} if self.chunk_size is None else {"chunk_size": self.chunk_size}


def _sized(command: Run | Sweep, shape: Shape) -> Shape:
    """The shape with the sizes that were given."""
    given = {f.name: getattr(command, f.name) for f in dataclasses.fields(Shape)}
    given = {name: size for name, size in given.items() if size is not None}
    for name in (*given, *(("chunk_size",) if command.chunk_size is not None else ())):
        _check_reads(command.op, name)
    return replace(shape, **given)


def _check_reads(op: str, size: str) -> None:
    known = sizes_of(op) + (("chunk_size",) if op == "ssd" else ())
    if size not in known:
        raise ValueError(f"{op} has no {size}; its sizes are {', '.join(known)}")


def _measure(
    command: Run | Sweep,
    settings: Sequence[Setting],
    modes: Sequence[Mode],
    over: str | None = None,
    patience: float | None = None,
) -> None:
    """Measure, print and write; exit status 1 if a result is wrong.

    Raises:
        ValueError: a setting cannot be, or nothing can run.
    """
    for setting in settings:
        _check(command.op, setting, modes)
    result = {"command": command_line(command), "op": command.op, "dtype": command.dtype, "over": over, "cases": []}
    impatient: dict[tuple[str, str], str] = {}
    for setting in settings:
        case = _measure_one(command, setting, modes, impatient)
        result["cases"].append(case)
        print(report.table(result, case), flush=True)
        for row in case["rows"]:
            seconds = row.get("time", {}).get("median", 0)
            if patience is not None and seconds > patience:
                why = f"left out: {seconds:.1f} s a call at {setting.name}, beyond --patience {patience:g}"
                impatient[row["impl"], row["mode"]] = why
    rows = [row for case in result["cases"] for row in case["rows"]]
    if all("missing" in row for row in rows):
        raise ValueError("; ".join(dict.fromkeys(row["missing"] for row in rows)))
    result |= {"ours": what_auto_takes(command.device), **environment(command.device)}
    if command.out is not None:
        report.write_all(result, command.out)
    if wrong := list(dict.fromkeys(f"{row['impl']} {row['mode']}" for row in rows if not row.get("is_right", True))):
        sys.exit(f"ssm-bench: wrong: {', '.join(wrong)}; further from float64 than its rounding allows")


def _check(op: str, setting: Setting, modes: Sequence[Mode]) -> None:
    length, height = setting.shape.length, setting.shape.height
    if "height" in sizes_of(op) and length % height:
        raise ValueError(f"height must divide length, the area of the grid; got height {height} and length {length}")
    if op in ("ssd", "cross_ssd") and setting.shape.heads % setting.shape.groups:
        raise ValueError(f"groups must divide heads; got {setting.shape.groups} groups and {setting.shape.heads} heads")
    if op == "mamba2_block" and setting.shape.channels % setting.shape.headdim:
        sizes = f"headdim {setting.shape.headdim} and channels {setting.shape.channels}"
        raise ValueError(f"headdim must divide channels; got {sizes}")
    if op.endswith("_step") and set(modes) != {"fwd"}:
        raise ValueError(f"{op} has no backward: mode must be fwd; got {', '.join(modes)}")


def _measure_one(
    command: Run | Sweep, setting: Setting, modes: Sequence[Mode], left_out: dict[tuple[str, str], str]
) -> dict:
    """A row for each mode and implementation, with what they were held against."""
    op, shape, device, dtype = command.op, setting.shape, command.device, DTYPES[command.dtype]
    rows = {(mode, impl): {"impl": impl, "mode": mode} for mode in modes for impl in command.impl}
    for (mode, impl), row in rows.items():
        if (impl, mode) in left_out:
            row["missing"] = left_out[impl, mode]
    case: dict = {
        "name": setting.name, "value": setting.value, **setting.options,
        "shape": {size: getattr(shape, size) for size in sizes_of(op)},
    }  # fmt: skip
    truth = None
    if "error" in command.metric and not all("missing" in row for row in rows.values()):
        truth = errors.truth(op, shape, dtype, device, gradients=set(modes) != {"fwd"})
        case |= {"truth": truth.by, "allowed_error": truth.allowed, "allowed_gradient_error": truth.allowed_gradient}
    case_run = case_of(op, shape, dtype, **setting.options)
    make = functools.cache(lambda impl: build(op, impl, shape, dtype, device=device, **setting.options))
    for mode in modes:
        wanted = {impl: rows[mode, impl] for impl in command.impl if "missing" not in rows[mode, impl]}
        seconds: dict[str, float] = {}
        for impl, row in wanted.items():
            try:
                result, seconds[impl] = first_call(make(impl), mode)
            except (ImportError, ValueError, RuntimeError) as e:
                row["missing"] = (str(e).splitlines() or [type(e).__name__])[0]
                continue
            if truth is not None:
                row |= truth.judge(result)
            del result
        if "time" in command.metric:
            made = {impl: make(impl) for impl in seconds}
            for impl, times in measured_times(made, seconds, mode, device, command.calls).items():
                wanted[impl]["time"] = times
                unknown = {"floor": None, "bound": None, "share": None}
                wanted[impl] |= unknown if op in BLOCKS else reached(case_run, mode, times["median"], device)
        if "memory" in command.metric:
            for impl in seconds:
                try:
                    peak = peak_memory(op, impl, shape, mode, dtype, device, **setting.options)
                    wanted[impl]["peak_memory"] = peak
                except RuntimeError as e:  # what else was measured is not lost
                    print(f"{setting.name}, {impl} {mode}: no peak memory: {e}")
    return case | {"rows": list(rows.values())}


def measured_times(
    workloads: dict[str, Workload], first: dict[str, float], mode: Mode, device: str, calls: int
) -> dict[str, dict]:
    """Times of those that are fast, in turn; a slow one's only call was its first. On a GPU a first call compiles."""
    slow = {impl: timing([t]) for impl, t in first.items() if t > SLOW and device == "cpu"}
    fast = {impl: workload for impl, workload in workloads.items() if impl not in slow}
    found = (time_together(fast, mode, calls) if fast else {}) | slow
    return {impl: asdict(times) for impl, times in found.items()}


def what_auto_takes(device: str) -> str:
    """The backend that `ours` is there: all ops have kernels, or none can run."""
    return resolve_backend("auto", torch.device(device), "ssd")


def command_line(command: object) -> str:
    """What gives the figures again: what differs from the defaults, without where it was written."""
    words = ["ssm-bench", type(command).__name__.lower()]
    for i, field in enumerate(dataclasses.fields(command)):
        value = getattr(command, field.name)
        if field.name == "out" or value == field.default:
            continue
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{field.name.replace('_', '-')}"] * (i > 0) + [*map(str, values)]  # the first is positional
    return shlex.join(words)
