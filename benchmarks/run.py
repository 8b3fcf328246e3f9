"""`ssm-bench run` and `sweep`: implementations of an op side by side, at one or more settings of its sizes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch

from ssm_kernels import resolve_backend

from . import accuracy, op_report
from .cases import DTYPES
from .environment import command_line, current_device, environment
from .memory import peak_memory
from .options import Integration, Measurement, Mode, Run, SizeName, Sweep
from .roofline import UNKNOWN, roofline_share
from .shapes import BLOCKS, SIZES, Shape
from .timing import first_call, time_rows
from .workloads import build, named_case, named_shape

LENGTHS = tuple(2**i for i in range(10, 17))


def run_run(command: Run) -> None:
    """`ssm-bench run`."""
    op, sizes = command.op, _given_sizes(command)
    _measure(command, [_setting(op, name, name, sizes) for name in dict.fromkeys(command.shape)], ("fwd", "fwd+bwd"))


def run_sweep(command: Sweep) -> None:
    """`ssm-bench sweep`."""
    op, over, sizes = command.op, command.over, _given_sizes(command)
    if over != "length" and not command.values:
        raise ValueError(f"values must name at least one {over}; got none")
    values = sorted(command.values or LENGTHS)
    settings = [_setting(op, f"{over} {n:,}", command.shape, sizes | {over: n}, n) for n in values]
    _measure(command, settings, ("fwd+bwd",), over, command.patience)


def finish(command: Measurement | Integration, result: dict[str, Any]) -> list[tuple[str, dict]]:
    """Add the environment to a result, write it, and return its rows that are wrong, with the name of their case."""
    # All ops have kernels, or none can run.
    ours = resolve_backend("auto", torch.device(command.device), "ssd")
    result = {"command": command_line(command), **result, "ours": ours, **environment(command.device)}
    if command.out is not None:
        op_report.write_all(result, command.out)
    rows = [(case["name"], row) for case in result["cases"] for row in case["rows"]]
    return [(name, row) for name, row in rows if not row.get("is_right", True)]


@dataclass(frozen=True)
class Setting:
    """Sizes at which implementations are measured together."""

    name: str
    shape: Shape
    options: dict[str, int]
    """The chunk size, if it was given."""
    value: int | None
    """Value of the size that is swept."""


def _given_sizes(command: Measurement) -> dict[str, int]:
    sizes = {name: getattr(command, name) for name in get_args(SizeName)}
    return {name: size for name, size in sizes.items() if size is not None}


def _setting(op: str, name: str, shape_name: str, sizes: Mapping[str, int], value: int | None = None) -> Setting:
    """The sizes of a named shape, with those that are given in place of its own.

    Raises:
        ValueError: the op has no such size, or sizes do not divide.
    """
    known = SIZES[op] + (("chunk_size",) if op == "ssd" else ())
    if unknown := next((size for size in sizes if size not in known), None):
        raise ValueError(f"{op} has no {unknown}; its sizes are {', '.join(known)}")
    own = {size: n for size, n in sizes.items() if size != "chunk_size"}
    s = replace(named_shape(op, shape_name), **own)
    if "height" in known and s.length % s.height:
        raise ValueError(
            f"height must divide length, the area of the grid; got height {s.height} and length {s.length}"
        )
    if op in ("ssd", "cross_ssd") and s.heads % s.groups:
        raise ValueError(f"groups must divide heads; got {s.groups} groups and {s.heads} heads")
    if op == "mamba2_block" and s.channels % s.headdim:
        raise ValueError(f"headdim must divide channels; got headdim {s.headdim} and channels {s.channels}")
    return Setting(name, s, {size: n for size, n in sizes.items() if size not in own}, value)


def _measure(
    command: Measurement,
    settings: Sequence[Setting],
    modes: Sequence[Mode],
    over: str | None = None,
    patience: float = float("inf"),
) -> None:
    """Measure, print and write; exit status 1 if a result is wrong.

    Args:
        modes: by default, but for a decoding step.
        over: the size that is swept.
        patience: seconds of a call beyond which an implementation is left out at the next settings.

    Raises:
        ValueError: nothing can run, or a decoding step is to run a backward.
    """
    is_step = command.op.endswith("_step")
    modes = command.mode or (("fwd",) if is_step else modes)
    if is_step and set(modes) != {"fwd"}:
        raise ValueError(f"{command.op} has no backward: mode must be fwd; got {', '.join(modes)}")
    result: dict[str, Any] = {"op": command.op, "dtype": command.dtype, "over": over, "cases": []}
    skipped: dict[tuple[str, str], dict[str, str]] = {}  # reasons by mode and implementation
    with current_device(command.device):
        for setting in settings:
            case = _measure_setting(command, setting, modes, skipped)
            result["cases"].append(case)
            print(op_report.text(result, case), flush=True)
            for row in case["rows"]:
                if (seconds := row.get("time", {}).get("median", 0)) > patience:
                    why = f"left out: {seconds:.1f} s a call at {setting.name}, beyond --patience {patience:g}"
                    skipped[row["mode"], row["impl"]] = {"missing": why}
        rows = [row for case in result["cases"] for row in case["rows"]]
        if all("missing" in row for row in rows):
            raise ValueError("; ".join(dict.fromkeys(row["missing"] for row in rows)))
        wrong = dict.fromkeys(f"{row['impl']} {row['mode']}" for _, row in finish(command, result))
    if wrong:
        sys.exit(f"ssm-bench: wrong: {', '.join(wrong)}; further from float64 than its rounding allows")


def _measure_setting(
    command: Measurement, setting: Setting, modes: Sequence[Mode], skipped: dict[tuple[str, str], dict[str, str]]
) -> dict[str, Any]:
    """A row for each mode and implementation, and the errors allowed."""
    op, shape, device, dtype = command.op, setting.shape, command.device, DTYPES[command.dtype]
    rows: dict[tuple[Mode, str], dict[str, Any]] = {
        (mode, impl): {"impl": impl, "mode": mode} | skipped.get((mode, impl), {})
        for mode in modes
        for impl in command.impl
    }
    case: dict[str, Any] = {
        "name": setting.name, "value": setting.value, **setting.options,
        "shape": {size: getattr(shape, size) for size in SIZES[op]},
    }  # fmt: skip
    truth = None
    if "error" in command.metric and not all("missing" in row for row in rows.values()):
        truth = accuracy.ground_truth(op, shape, dtype, device, gradients=set(modes) != {"fwd"})
        case |= {"truth": truth.by, "allowed_error": truth.allowed, "allowed_gradient_error": truth.allowed_gradient}
    # Built once a setting: all modes run on the same inputs and weights.
    make = functools.cache(lambda impl: build(op, impl, shape, dtype, device=device, **setting.options))
    for mode in modes:
        seconds: dict[str, float] = {}
        for impl in command.impl:
            row = rows[mode, impl]
            if "missing" in row:
                continue
            try:
                result, seconds[impl] = first_call(make(impl), mode)
            except (ImportError, ValueError, RuntimeError) as e:
                row["missing"] = (str(e).splitlines() or [type(e).__name__])[0]
                continue
            if truth is not None:
                row |= truth.judge(result)
            del result  # its memory is free for the next one
        if "time" in command.metric:
            made = {impl: make(impl) for impl in seconds}
            for impl, times in time_rows(made, seconds, mode, device, command.calls).items():
                share = UNKNOWN
                if op not in BLOCKS:
                    called = named_case(op, shape, dtype, **setting.options)
                    share = roofline_share(called, mode, times["median"], device)
                rows[mode, impl] |= {"time": times, **share}
        if "memory" in command.metric:
            for impl in seconds:
                try:
                    peak = peak_memory(op, impl, shape, mode, dtype, device, **setting.options)
                    rows[mode, impl]["peak_memory"] = peak
                except (RuntimeError, MemoryError) as e:  # the other measurements are not lost
                    print(f"{setting.name}, {impl} {mode}: no peak memory: {e}")
    return case | {"rows": list(rows.values())}
