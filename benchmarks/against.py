"""`ssm-bench against`: the ops of this checkout beside those of another one, such as an earlier commit.

Both run the same inputs with one thread, in processes that take turns, so that a drift of the machine affects both
alike. Both keep the memory that they freed: otherwise it is the sizes of arrays freed earlier that decide whether the
system has to clear new memory for a result, which can take longer than the op. Only the public call of an op is used:
the other checkout needs no benchmarks that this version could read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import ssm_kernels

from ..train.programs import run_program
from . import against_worker, op_report
from .cases import DTYPES, Case
from .environment import command_line, environment
from .options import Against, Mode
from .roofline import UNKNOWN
from .shapes import SIZES
from .timing import summarize
from .workloads import named_case, named_shape

HERE = Path(ssm_kernels.__file__).parent.parent
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""Settings of glibc: results of up to 32 MiB, its limit, are taken from memory that was freed before."""


def run_against(command: Against) -> None:
    """`ssm-bench against`."""
    if not (command.checkout / "ssm_kernels").is_dir():
        raise ValueError(f"{command.checkout} is no checkout of this project: it has no folder ssm_kernels")
    sides = {"ours": (HERE, "auto"), "theirs": (command.checkout.resolve(), command.backend)}
    cases = {
        (op, shape): named_case(op, named_shape(op, shape), DTYPES["fp32"])
        for op in dict.fromkeys(command.op)
        for shape in dict.fromkeys(command.shape)
    }
    samples: dict[str, dict[str, Any]] = {side: {} for side in sides}
    for i in range(command.rounds):
        for side, (checkout, backend) in sides.items():
            print(f"round {i + 1} of {command.rounds}: {checkout}", file=sys.stderr, flush=True)
            for name, found in _time(checkout, _calls(cases, backend)).items():
                before = samples[side].get(name, [])
                samples[side][name] = found if isinstance(found, str) else [*before, *found]
    result = {"op": "against", "dtype": "fp32", "over": None, "command": command_line(command), "ours": "auto"}
    result |= {"cases": [_case(op, shape, case, samples) for (op, shape), case in cases.items()], **environment()}
    for case in result["cases"]:
        print(op_report.text(result, case))
    if command.out is not None:
        op_report.write_all(result, command.out)


def _modes(case: Case) -> tuple[Mode, ...]:
    return ("fwd",) if case.is_step else ("fwd", "fwd+bwd")


def _calls(cases: dict[tuple[str, str], Case], backend: str) -> dict[str, dict[str, Any]]:
    """The calls as the worker reads them, by op, shape and mode."""
    return {
        f"{op} {shape} {mode}": {
            "op": op, "inputs": case.inputs(), "options": case.options, "backend": backend, "backward": mode != "fwd"
        }
        for (op, shape), case in cases.items()
        for mode in _modes(case)
    }  # fmt: skip


def _time(checkout: Path, calls: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Samples of each call in a process of a checkout; a text where a call failed."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "calls.pt", Path(folder) / "seconds.json"
        torch.save(calls, files[0])
        words = [sys.executable, against_worker.__file__, str(checkout), *map(str, files)]
        pipe = subprocess.PIPE
        done = run_program(words, stdout=pipe, stderr=pipe, env=os.environ | KEEP_MEMORY)
        if done.returncode:
            raise ValueError(f"{checkout} cannot be timed: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
        return json.loads(files[1].read_text())


def _case(op: str, shape: str, case: Case, samples: dict[str, dict[str, Any]]) -> dict[str, Any]:
    rows = []
    for mode in _modes(case):
        for side, of_side in samples.items():
            found, row = of_side[f"{op} {shape} {mode}"], {"impl": side, "mode": mode}
            if isinstance(found, str):
                rows.append(row | {"missing": found.splitlines()[0]})
                continue
            seconds, processor = zip(*found, strict=True)
            rows.append(row | {"time": asdict(summarize(seconds, processor)), **UNKNOWN})
    sizes = {size: getattr(case.shape, size) for size in SIZES[op]}
    return {"op": op, "name": shape, "value": None, "threads": 1, "shape": sizes, "rows": rows}
