"""`ssm-bench run` and `sweep`: implementations of ops side by side, at one or more settings of their sizes."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch

from . import accuracy, op_report
from .cases import DTYPES
from .environment import backends, command_line, current_device, environment
from .memory import peak_memory
from .options import Integration, Measurement, Mode, Run, SizeName, Sweep
from .other_work import NOTICED, OtherWork
from .peers import PACKAGES, check_installed, peers_of
from .processor import Rates, measure_rates
from .roofline import UNKNOWN, roofline_share
from .shapes import BLOCKS, SIZES, Shape
from .timing import Reading, Result, first_call, predict_excess, time_rows
from .workloads import Workload, build, named_case, named_shape

LENGTHS = tuple(2**i for i in range(10, 17))


def run_run(command: Run) -> None:
    """`ssm-bench run`."""
    sizes = _given_sizes(command)
    names = dict.fromkeys(command.shape)
    settings = [_setting(op, name, name, sizes) for op in dict.fromkeys(command.op) for name in names]
    _measure(command, settings, ("fwd", "fwd+bwd"))


def run_sweep(command: Sweep) -> None:
    """`ssm-bench sweep`."""
    op, over, sizes = command.op, command.over, _given_sizes(command)
    if over != "length" and not command.values:
        raise ValueError(f"values must name at least one {over}; got none")
    values = sorted(command.values or LENGTHS)
    settings = [_setting(op, f"{over} {n:,}", command.shape, sizes | {over: n}, n) for n in values]
    _measure(command, settings, ("fwd+bwd",), over)


def finish(command: Measurement | Integration, result: dict[str, Any]) -> list[tuple[str, dict]]:
    """Add the environment to a result, write it, and return its rows that are wrong, with the name of their case."""
    # All ops have kernels, or none can run. `auto` would log a slower choice for an op that was not measured.
    ours = backends(command.device, "ssd")[-1]
    result = {"command": command_line(command), **result, "ours": ours, **environment(command.device)}
    if command.out is not None:
        op_report.write_all(result, command.out)
    rows = [(case["name"], row) for case in result["cases"] for row in case["rows"]]
    return [(name, row) for name, row in rows if not row.get("is_right", True)]


@dataclass(frozen=True)
class Setting:
    """Sizes at which implementations of an op are measured together."""

    op: str
    name: str
    shape: Shape
    options: dict[str, int]
    """The chunk size, if it was given."""
    value: int | None
    """Value of the size that is swept."""
    threads: int = 1

    @property
    def is_step(self) -> bool:
        return self.op.endswith("_step")

    def __str__(self) -> str:
        return f"{self.op} {self.name}"


def _given_sizes(command: Measurement) -> dict[str, int]:
    sizes = {name: getattr(command, name) for name in get_args(SizeName)}
    return {name: size for name, size in sizes.items() if size is not None}


def _setting(op: str, name: str, shape_name: str, sizes: Mapping[str, int], value: int | None = None) -> Setting:
    """The sizes of a named shape, with those that are given in place of its own.

    Raises:
        ValueError: the op has no such size, or sizes do not divide.
    """
    known = SIZES[op] + (("chunk_size",) if op in ("ssd", "mamba3") else ())
    if unknown := next((size for size in sizes if size not in known), None):
        raise ValueError(f"{op} has no {unknown}; its sizes are {', '.join(known)}")
    own = {size: n for size, n in sizes.items() if size != "chunk_size"}
    s = replace(named_shape(op, shape_name), **own)
    if "height" in known and s.length % s.height:
        raise ValueError(
            f"height must divide length, the area of the grid; got height {s.height} and length {s.length}"
        )
    if op in ("ssd", "cross_ssd", "mamba3", "mamba3_step") and s.heads % s.groups:
        raise ValueError(f"groups must divide heads; got {s.groups} groups and {s.heads} heads")
    if op == "mamba2_block" and s.channels % s.headdim:
        raise ValueError(f"headdim must divide channels; got headdim {s.headdim} and channels {s.channels}")
    return Setting(op, name, s, {size: n for size, n in sizes.items() if size not in own}, value)


def _measure(command: Measurement, settings: Sequence[Setting], modes: Sequence[Mode], over: str | None = None) -> None:
    """Measure, print and write; exit status 1 if a result is wrong.

    Args:
        modes: by default, but for a decoding step.
        over: the size that is swept.

    Raises:
        ValueError: nothing can run, or a decoding step is to run a backward.
    """
    for s in settings:
        if s.is_step and set(command.mode or ("fwd",)) != {"fwd"}:
            raise ValueError(f"{s.op} has no backward: mode must be fwd; got {', '.join(command.mode)}")
    threads = list(dict.fromkeys(command.threads)) or [torch.get_num_threads()]
    if command.device != "cpu" and command.threads:
        raise ValueError(f"threads are of a CPU; device is {command.device}")
    result: dict[str, Any] = {"op": ", ".join(dict.fromkeys(s.op for s in settings)), "dtype": command.dtype}
    result |= {"over": over, "cases": []}
    with current_device(command.device):
        if command.device == "cpu" and "time" in command.metric:
            cores = {n: measure_rates(n) for n in dict.fromkeys([1, *threads, os.cpu_count() or 1])}
            result["limits"] = {str(n): str(rates) for n, rates in cores.items()}
            print("\n".join(result["limits"].values()), flush=True)
        for setting in settings:
            for n in threads:
                here = replace(setting, threads=n)
                with _torch_threads(n if command.device == "cpu" else None):
                    case = _measure_setting(command, here, command.mode or (("fwd",) if here.is_step else modes))
                case |= _scaling(result["cases"], case) if n != threads[0] else {}
                result["cases"].append(case)
                print(op_report.text(result, case), flush=True)
        rows = [row for case in result["cases"] for row in case["rows"]]
        if all("missing" in row for row in rows):
            raise ValueError("; ".join(dict.fromkeys(row["missing"] for row in rows)))
        wrong = dict.fromkeys(f"{row['impl']} {row['mode']}" for _, row in finish(command, result))
    if wrong:
        sys.exit(f"ssm-bench: wrong: {', '.join(wrong)}; further from float64 than its rounding allows")


@contextlib.contextmanager
def _torch_threads(n: int | None) -> Iterator[None]:
    """Let PyTorch and this project's kernels use n threads inside a `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _scaling(cases: Sequence[dict[str, Any]], case: dict[str, Any]) -> dict[str, Any]:
    """A case's rows, with how much faster each is than with the first number of threads."""
    first = next(c for c in cases if (c["op"], c["name"], c["value"]) == (case["op"], case["name"], case["value"]))
    times = {(row["impl"], row["mode"]): row["time"]["median"] for row in first["rows"] if "time" in row}
    for row in case["rows"]:
        if "time" in row and (before := times.get((row["impl"], row["mode"]))):
            row["scaling"] = before / row["time"]["median"]
    return {"first_threads": first["threads"]}


def _implementations(command: Measurement, setting: Setting) -> list[str]:
    """Those that are asked for or, by default, ours, PyTorch's and the peers that are installed.

    With further numbers of threads, peers are left out.
    """
    found: list[str] = list(command.impl)
    if not found:
        peers = ("transformers",) if setting.op in BLOCKS else peers_of(setting.op, command.device)
        found = ["ours", "torch"]
        for name in peers:
            try:
                check_installed(name, setting.op)
                found.append(name)
            except ModuleNotFoundError as e:
                _say_once(f"not compared: {e}")
    is_first = setting.threads == (command.threads or (setting.threads,))[0]
    return found if is_first else [name for name in found if name not in PACKAGES]


@functools.cache
def _say_once(text: str) -> None:
    _say(text)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _measure_setting(command: Measurement, setting: Setting, modes: Sequence[Mode]) -> dict[str, Any]:
    """A row for each mode and implementation, and the errors allowed."""
    op, shape, device, dtype = setting.op, setting.shape, command.device, DTYPES[command.dtype]
    implementations = _implementations(command, setting)
    rows: dict[tuple[Mode, str], dict[str, Any]] = {
        (mode, impl): {"impl": impl, "mode": mode} for mode in modes for impl in implementations
    }
    case: dict[str, Any] = {
        "op": op, "name": setting.name, "value": setting.value, "threads": setting.threads, **setting.options,
        "shape": {size: getattr(shape, size) for size in SIZES[op]},
    }  # fmt: skip
    # Built once a setting: all modes run on the same inputs and weights.
    make = functools.cache(lambda impl: build(op, impl, shape, dtype, device=device, **setting.options))
    truth = None
    for mode in modes:
        first: dict[str, Reading] = {}
        for impl in implementations:
            row = rows[mode, impl]
            try:
                if why := _too_long(command, setting, impl, mode):
                    row["missing"] = why
                    continue
                result, first[impl] = _call_first(command, impl, make(impl), mode)
            except (ImportError, ValueError, RuntimeError) as e:
                row["missing"] = (str(e).splitlines() or [type(e).__name__])[0]
                continue
            finally:
                if "missing" in row:
                    _say(f"{setting} {mode} {impl}: {row['missing']}")
            _say(f"{setting} {mode} {impl}: {1e3 * first[impl].seconds:,.1f} ms, once")
            if "error" in command.metric:
                if truth is None:
                    gradients = set(modes) != {"fwd"}
                    truth = accuracy.ground_truth(op, shape, dtype, device, gradients=gradients)
                    case |= {"truth": truth.by, "allowed_error": truth.allowed}
                    case |= {"allowed_gradient_error": truth.allowed_gradient}
                row |= truth.judge(result)
            del result  # its memory is free for the next one
        if "time" in command.metric and first:
            with OtherWork() as other:
                times = time_rows(
                    {impl: make(impl) for impl in first}, first, mode, device, command.calls, command.budget
                )
            for impl, time in times.items():
                rows[mode, impl] |= {"time": time, "other_cores": other.cores, **_share(command, setting, mode, time)}
            if other.cores is not None and other.cores >= NOTICED:
                _say(
                    f"{setting} {mode}: other work took {other.cores:.1f} of {os.cpu_count()} cores: only processor "
                    "times mean something, and those of shared caches and memory not much"
                )
        if "memory" in command.metric:
            for impl in first:
                try:
                    peak = peak_memory(op, impl, shape, mode, dtype, device, **setting.options)
                    rows[mode, impl]["peak_memory"] = peak
                except (RuntimeError, MemoryError) as e:  # the other measurements are not lost
                    _say(f"{setting} {mode} {impl}: no peak memory: {e}")
    return case | {"rows": list(rows.values())}


def _too_long(command: Measurement, setting: Setting, impl: str, mode: Mode) -> str | None:
    """The reason to leave a row out because a call would exceed the budget; shorter calls predict it."""
    if "length" not in SIZES[setting.op]:
        return None
    dtype = DTYPES[command.dtype]

    def call_at(length: int) -> float:
        shape = replace(setting.shape, length=length, height=1)
        workload = build(setting.op, impl, shape, dtype, device=command.device, **setting.options)
        return first_call(workload, mode)[1].seconds

    seconds = predict_excess(call_at, setting.shape.length, command.budget)
    if seconds is None:
        return None
    call = "a call with its compilation" if impl == "compiled" else "a call"
    return f"left out: {call} takes {seconds:.0f} s or more, beyond --budget {command.budget:g}"


def _call_first(command: Measurement, impl: str, workload: Workload, mode: Mode) -> tuple[Result, Reading]:
    """The result of a call, and the times of one that compiles nothing if that could be long."""
    result, reading = first_call(workload, mode)
    may_compile = impl not in (*PACKAGES, "reference")
    if may_compile and command.device == "cpu" and reading.seconds * command.calls > command.budget:
        reading = min(reading, first_call(workload, mode)[1])
    return result, reading


def _share(command: Measurement, setting: Setting, mode: Mode, time: Mapping[str, Any]) -> dict[str, Any]:
    """The roofline's entries in a row."""
    if setting.op in BLOCKS:
        return UNKNOWN
    case = named_case(setting.op, setting.shape, DTYPES[command.dtype], **setting.options)
    rates: Rates | None = measure_rates(setting.threads) if command.device == "cpu" else None
    return roofline_share(case, mode, op_report.decisive(time, setting.threads), command.device, rates)
