"""`ssm-bench gpu-suite`: correctness, times and peers of every op on a GPU, in one command.

Four parts, each in a JSON file of its own: `compile` (all kernels, on all cores, into Triton's own cache),
`correctness` (against the reference, and at realistic sizes against the torch backend in float64), `times` (beside the
roofline) and `peers` (other libraries, where installed). A part whose file exists is not run again.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ssm_kernels.testing import assert_agrees, capability, is_interpreted

from ..model.text_files import read_json
from . import cases, compile_report
from .cases import Case, by_length, connector, layer, published, tiny
from .environment import current_device, environment
from .files import write_json
from .options import GPUSuite, Mode
from .peers import CALLS, PACKAGES
from .roofline import cost, roofline_share
from .timing import run_once, time_together
from .workloads import Workload, build_case

Row = dict[str, Any]
CALLS_TIMED = 30
PATIENCE = 0.2
"""Seconds beyond which a call is timed three times, not thirty."""
MAX_SETS = 64
"""Most sets of inputs of a case."""


def run_gpu_suite(command: GPUSuite) -> None:
    """`ssm-bench gpu-suite`."""
    with current_device(command.device):
        if not run(command.out, command.device, command.minutes, command.again):
            sys.exit(1)


@dataclass
class Run:
    """The device of a part, and its deadline."""

    device: str
    deadline: float = float("inf")
    left_out: list[str] = field(default_factory=list)
    """Cases for which there was no time."""

    @property
    def is_tiny(self) -> bool:
        return self.device == "cpu"

    def within_time(self, wanted: Iterable[Case]) -> Iterator[Case]:
        """The cases, until time is up."""
        for case in tqdm(list(wanted), unit="case", disable=None, leave=False):
            if time.monotonic() > self.deadline:
                self.left_out.append(str(case))
            else:
                yield case


def run(out: Path, device: str, minutes: float, again: bool) -> bool:
    """Run the parts that have no file yet, print all, and return whether every case was right.

    Raises:
        ValueError: there is no such device, or the interpreter is on for a GPU, or off for a CPU.
    """
    if device == "cpu" and not is_interpreted():
        raise ValueError("gpu-suite needs a GPU; on a CPU it runs tiny sizes, with TRITON_INTERPRET=1")
    if device != "cpu" and is_interpreted():
        raise ValueError(f"TRITON_INTERPRET=1 would interpret the kernels on a CPU, not run them on {device}: unset it")
    end = time.monotonic() + 60 * minutes
    is_right = True
    for part, (do, share) in PARTS.items():
        path = out / f"{part}.json"
        if again or not path.exists():
            here = Run(device, time.monotonic() + (end - time.monotonic()) * share)
            start = time.monotonic()
            report: Row = {"part": part, "rows": do(here)}
            report |= {"seconds": time.monotonic() - start, "interpreted": here.is_tiny, "left_out": here.left_out}
            write_json(path, report | environment(device), quietly=True)
        report = read_json(path)
        where = report["device"] + " in Triton's interpreter, whose times mean nothing" * report["interpreted"]
        print(f"\n{part}: {report['seconds']:.0f} s on {where}, commit {report['commit']}, {path}")
        print(TABLES.get(part, _table)(report["rows"]))
        if report["left_out"]:
            print(f"no time for {len(report['left_out'])} more")
        is_right = is_right and not (part == "correctness" and any(row["error"] for row in report["rows"]))
    return is_right


def _attempt(row: Row, do: Callable[[], Row | None], device: str) -> Row:
    """Update the row with the result of `do`, or with its error if it fails; the suite goes on."""
    row["error"] = None
    try:
        row |= do() or {}
    except Exception as e:  # any failure of a case is a row
        row["error"] = f"{type(e).__name__}: {e}"
    if device != "cpu" and row["error"]:
        torch.cuda.synchronize(device)  # raises where the device is lost: nothing more would run in this process
        torch.cuda.empty_cache()
    return row


# --- the parts --------------------------------------------------------------------------------------------------


def compile_kernels(here: Run) -> list[Row]:
    """Compile on all cores the kernels that the other parts launch, into Triton's own cache."""
    if here.is_tiny:
        return []
    backend, arch = capability(torch.device(here.device))
    target = f"sm_{arch}" if backend == "cuda" else str(arch)
    if target not in compile_report.ARCHITECTURES:
        return []  # each kernel is compiled when it first runs
    wanted = [c for c in itertools.chain(_correctness_cases(here), _timed_cases(here)) if not c.seq_idx]
    requests = compile_report.record(wanted, target)
    cache = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    rows = compile_report.compile_all(requests, os.cpu_count() or 1, Path(cache))
    return [asdict(row) | {"error": row.problem} for row in rows]


def correctness(here: Run) -> list[Row]:
    """Outputs and gradients of every op over dtypes and options."""
    rows = []
    for case in here.within_time(_correctness_cases(here)):
        row = {"case": str(case), "oracle": _oracle(case)}
        rows.append(_attempt(row, functools.partial(check, case, here.device), here.device))
    return rows


def check(case: Case, device: str) -> None:
    """Compare a case's kernels with the reference, or with the torch backend where that would take too long.

    Raises:
        AssertionError: they disagree.
    """
    inputs = case.inputs(device)
    assert_agrees(case.function, inputs, backend="triton", gradients=not case.is_step, oracle=_oracle(case))


def _oracle(case: Case) -> str:
    return "reference" if case.is_step or case.shape.length <= 256 else "torch"


def times(here: Run) -> list[Row]:
    """Seconds of the kernels and of the torch backend, and their share of the roofline."""
    return _timed(here, _timed_cases(here), lambda case: ("triton", "torch"))


def peers(here: Run) -> list[Row]:
    """Seconds of the kernels and of each peer that has the op; one that is not installed has that as its error."""
    wanted = tiny() if here.is_tiny else layer("mamba", "2.7b") + layer("mamba2", "2.7b") + by_length()[1:]
    return _timed(here, wanted, lambda case: ("triton", *(name for name in PACKAGES if case.op in CALLS[name])))


def _correctness_cases(here: Run) -> list[Case]:
    return tiny() if here.is_tiny else cases.correctness()


def _timed_cases(here: Run) -> list[Case]:
    return tiny() if here.is_tiny else published("bf16", ("130m", "2.7b")) + by_length() + connector("fp32")


def _timed(here: Run, wanted: Iterable[Case], implementations: Callable[[Case], Iterable[str]]) -> list[Row]:
    rows = []
    for case in here.within_time(wanted):
        modes: tuple[Mode, ...] = ("fwd",) if case.is_step else ("fwd", "fwd+bwd")
        for mode in modes:
            rows += _timed_case(here, case, mode, implementations(case))
    return rows


def _timed_case(here: Run, case: Case, mode: Mode, implementations: Iterable[str]) -> list[Row]:
    """A row for each implementation: times, difference of its result from the first one's, share of the roofline."""
    sets: dict[str, list[Workload]] = {}
    results: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def prepare(name: str) -> Row:
        made = [build_case(case, name, here.device, seed) for seed in range(_num_sets(case, here.device))]
        results[name] = run_once(made[0], "fwd").double()
        first = time_together({name: made[0]}, mode, 1)[name].median
        sets[name], calls[name] = made, 2 if here.is_tiny else 3 if first > PATIENCE else CALLS_TIMED
        expected = next(iter(results.values()))
        return {"difference": ((results[name] - expected).abs().max() / expected.abs().max()).item()}

    rows: dict[str, Row] = {name: {"case": str(case), "mode": mode, "impl": name} for name in implementations}
    for name, row in rows.items():
        _attempt(row, functools.partial(prepare, name), here.device)
    results.clear()
    for times_called in set(calls.values()):  # slow implementations do not take turns with fast ones
        together = {name: made for name, made in sets.items() if calls[name] == times_called}
        try:
            timings = time_together(together, mode, times_called)
        except RuntimeError as e:  # all sets of inputs together may not fit
            for name in together:
                rows[name]["error"] = f"{type(e).__name__}: {e}"
            continue
        for name, timing in timings.items():
            rows[name] |= asdict(timing) | roofline_share(case, mode, timing.median, here.device)
    return list(rows.values())


def _num_sets(case: Case, device: str) -> int:
    """Number of sets of inputs that fill the L2 cache twice."""
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MAX_SETS, max(2, -(-2 * cache // cost(case, "fwd").bytes)))


PARTS: dict[str, tuple[Callable[[Run], list[Row]], float]] = {
    "compile": (compile_kernels, 0.25),
    "correctness": (correctness, 0.5),
    "times": (times, 0.5),
    "peers": (peers, 1.0),
}
"""The parts in order, each with its share of the time left when it starts."""


def _table(rows: list[Row]) -> str:
    """Times with their quartiles and share of the roofline, or the error."""
    lines = [f"{'us':>10}{'quartiles':>22}{'roofline':>10}{'differs':>10}  {'impl':<14}{'mode':<9}case"]
    for row in rows:
        label = f"  {row['impl']:<14}{row['mode']:<9}{row['case']}"
        if row["error"]:
            lines.append(f"{row['error'].splitlines()[0][:52]:<52}{label}")
            continue
        spread = f"{1e6 * row['low']:.1f} to {1e6 * row['high']:.1f}"
        share = "" if row["share"] is None else f"{row['share']:.0%}"
        lines.append(f"{1e6 * row['median']:>10.1f}{spread:>22}{share:>10}{row['difference']:>10.0e}{label}")
    return "\n".join(lines)


def _failures(rows: list[Row]) -> str:
    """Each row with an error, and the number of those without."""
    failed = [row for row in rows if row["error"]]
    lines = [f"FAILED {row['case']}: {row['error'].splitlines()[0]}" for row in failed]
    return "\n".join([*lines, f"{len(rows) - len(failed)} of {len(rows)} without an error"])


TABLES = {"compile": _failures, "correctness": _failures}
