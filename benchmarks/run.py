"""`ssm-bench run` and `sweep`: implementations of an op side by side, at one or more settings of its sizes."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ssm_kernels import resolve_backend

from . import accuracy, op_report
from .cases import DTYPES, Shape
from .environment import command_line, current_device, environment
from .memory import peak_memory
from .options import Mode, Run, SizeOptions, Sweep
from .roofline import UNKNOWN, roofline_share
from .timing import first_call, time_rows
from .workloads import BLOCKS, build, named_case, named_shape, sizes_of


def run_run(command: Run) -> None:
    """`ssm-bench run`."""
    settings = [
        Setting(name, _sized(command, command.op, named_shape(command.op, name)), command.chunk_size)
        for name in dict.fromkeys(command.shape)
    ]
    modes = command.mode or (("fwd",) if command.op.endswith("_step") else ("fwd", "fwd+bwd"))
    with current_device(command.device):
        _measure(command, settings, modes)


def run_sweep(command: Sweep) -> None:
    """`ssm-bench sweep`."""
    swept = {
        "length": command.lengths, "batch": command.batches, "d_state": command.d_states,
        "chunk_size": command.chunk_sizes,
    }  # fmt: skip
    given = {name: sorted(values) for name, values in swept.items() if values}
    if len(given) > 1:
        raise ValueError(f"sweep goes over one size at a time; got {', '.join(given)}")
    over, values = next(iter(given.items()), ("length", [2**i for i in range(10, 17)]))
    _check_has_size(command.op, over)
    base = _sized(command, command.op, named_shape(command.op, command.shape))
    settings = []
    for value in values:
        is_chunk = over == "chunk_size"
        shape = base if is_chunk else replace(base, **{over: value})
        settings.append(Setting(f"{over} {value:,}", shape, value if is_chunk else command.chunk_size, value))
    modes = command.mode or (("fwd",) if command.op.endswith("_step") else ("fwd+bwd",))
    with current_device(command.device):
        _measure(command, settings, modes, over, command.patience)


def finish(command: Any, result: dict[str, Any], out: Path | None) -> list[tuple[str, dict]]:
    """Add the environment to a result, write it, and return its rows that are wrong, with the name of their case."""
    # All ops have kernels, or none can run.
    ours = resolve_backend("auto", torch.device(command.device), "ssd")
    result = {"command": command_line(command), **result, "ours": ours, **environment(command.device)}
    if out is not None:
        op_report.write_all(result, out)
    rows = [(case["name"], row) for case in result["cases"] for row in case["rows"]]
    return [(name, row) for name, row in rows if not row.get("is_right", True)]


@dataclass(frozen=True)
class Setting:
    """Sizes at which implementations are measured together."""

    name: str
    shape: Shape
    chunk_size: int | None = None
    value: int | None = None
    """Value of the size that is swept."""

    @property
    def options(self) -> dict[str, int]:
        return {} if self.chunk_size is None else {"chunk_size": self.chunk_size}


def _sized(sizes: SizeOptions, op: str, shape: Shape) -> Shape:
    """The shape with the sizes that the options set."""
    given = {f.name: getattr(sizes, f.name) for f in dataclasses.fields(SizeOptions)}
    given = {name: size for name, size in given.items() if size is not None}
    for name in given:
        _check_has_size(op, name)
    given.pop("chunk_size", None)
    return replace(shape, **given)


def _check_has_size(op: str, size: str) -> None:
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
        ValueError: a setting is not valid, or nothing can run.
    """
    for setting in settings:
        _check(command.op, setting, modes)
    result: dict[str, Any] = {"op": command.op, "dtype": command.dtype, "over": over, "cases": []}
    skipped: dict[tuple[str, str], str] = {}  # reasons by implementation and mode
    for setting in settings:
        case = _measure_setting(command, setting, modes, skipped)
        result["cases"].append(case)
        print(op_report.table(result, case), flush=True)
        for row in case["rows"]:
            seconds = row.get("time", {}).get("median", 0)
            if patience is not None and seconds > patience:
                why = f"left out: {seconds:.1f} s a call at {setting.name}, beyond --patience {patience:g}"
                skipped[row["impl"], row["mode"]] = why
    rows = [row for case in result["cases"] for row in case["rows"]]
    if all("missing" in row for row in rows):
        raise ValueError("; ".join(dict.fromkeys(row["missing"] for row in rows)))
    if wrong := list(dict.fromkeys(f"{row['impl']} {row['mode']}" for _, row in finish(command, result, command.out))):
        sys.exit(f"ssm-bench: wrong: {', '.join(wrong)}; further from float64 than its rounding allows")


def _check(op: str, setting: Setting, modes: Sequence[Mode]) -> None:
    s = setting.shape
    if "height" in sizes_of(op) and s.length % s.height:
        raise ValueError(
            f"height must divide length, the area of the grid; got height {s.height} and length {s.length}"
        )
    if op in ("ssd", "cross_ssd") and s.heads % s.groups:
        raise ValueError(f"groups must divide heads; got {s.groups} groups and {s.heads} heads")
    if op == "mamba2_block" and s.channels % s.headdim:
        raise ValueError(f"headdim must divide channels; got headdim {s.headdim} and channels {s.channels}")
    if op.endswith("_step") and set(modes) != {"fwd"}:
        raise ValueError(f"{op} has no backward: mode must be fwd; got {', '.join(modes)}")


def _measure_setting(
    command: Run | Sweep, setting: Setting, modes: Sequence[Mode], skipped: dict[tuple[str, str], str]
) -> dict[str, Any]:
    """A row for each mode and implementation, and the errors allowed."""
    op, shape, device, dtype = command.op, setting.shape, command.device, DTYPES[command.dtype]
    rows: dict[tuple[Mode, str], dict[str, Any]] = {
        (mode, impl): {"impl": impl, "mode": mode} for mode in modes for impl in command.impl
    }
    for (mode, impl), row in rows.items():
        if (impl, mode) in skipped:
            row["missing"] = skipped[impl, mode]
    case: dict[str, Any] = {
        "name": setting.name, "value": setting.value, **setting.options,
        "shape": {size: getattr(shape, size) for size in sizes_of(op)},
    }  # fmt: skip
    truth = None
    if "error" in command.metric and not all("missing" in row for row in rows.values()):
        truth = accuracy.ground_truth(op, shape, dtype, device, gradients=set(modes) != {"fwd"})
        case |= {"truth": truth.by, "allowed_error": truth.allowed, "allowed_gradient_error": truth.allowed_gradient}
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
            for impl, times in time_rows(made, seconds, mode, device, command.calls).items():
                share = UNKNOWN
                if op not in BLOCKS:
                    called = named_case(op, shape, dtype, **setting.options)
                    share = roofline_share(called, mode, times["median"], device)
                wanted[impl] |= {"time": times, **share}
        if "memory" in command.metric:
            for impl in seconds:
                try:
                    peak = peak_memory(op, impl, shape, mode, dtype, device, **setting.options)
                    wanted[impl]["peak_memory"] = peak
                except (RuntimeError, MemoryError) as e:  # the other measurements are not lost
                    print(f"{setting.name}, {impl} {mode}: no peak memory: {e}")
    return case | {"rows": list(rows.values())}
