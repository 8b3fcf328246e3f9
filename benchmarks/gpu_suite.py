"""`ssm-bench gpu-suite`: correctness of every op on a GPU, times beside peers, and a choice of tiles, in one command.

The parts, in order: `compile` (all kernels, on all cores, into Triton's own cache), `correctness` (against the
reference, and at realistic sizes against the torch backend in float64), `peers` (the ops of a 2.7b model beside other
libraries, where installed), `tiles` (values of the constants that machine code leaves open) and `times` (other sizes,
beside the torch backend and the roofline).

All rows go to one JSON file, which is written after every case. A run that ended early, by its time, by a kill or by a
case that took the device down, goes on after the last case when it is started again.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ssm_kernels.testing import assert_agrees, capability, is_interpreted

from ..model.text_files import read_json
from . import cases, compile_report, tables
from .cases import Case, by_length, connector, layer, published, tiny
from .environment import current_device, environment
from .files import write_json
from .options import GPUSuite, Mode
from .peers import peers_of
from .roofline import cost, roofline_share
from .tiles import CHOICES, Choice
from .timing import run_once, time_together
from .workloads import Workload, build_case

Row = dict[str, Any]
Jobs = Mapping[str, Callable[[], list[Row]]]
"""Jobs of a part, by name; each returns the rows of one case."""
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


class Results:
    """The file of the suite: rows by part and job, facts of the machine, and the job that is running.

    Args:
        path: the file; rows that it has are kept.
        device: the device that the rows are of.
        again: drop the rows that the file has.

    Raises:
        ValueError: the file is of another device or commit.
    """

    def __init__(self, path: Path, device: str, again: bool):
        self.path = path
        here = environment(device)
        self.data: dict[str, Any] = {"parts": {}, "running": None, "interpreted": device == "cpu", **here}
        if path.exists() and not again:
            self.data = read_json(path)
            for fact in ("device", "commit"):
                if self.data[fact] != here[fact]:
                    found, now = self.data[fact], here[fact]
                    raise ValueError(f"{path} is of {fact} {found}, and this is {now}: give another --out, or --again")
            if self.data["running"]:
                part, job = self.data["running"]
                self.add(part, job, [{"case": job, "error": "the process ended while this ran"}])

    def rows(self, part: str) -> list[Row]:
        return [row for rows in self.part(part)["jobs"].values() for row in rows]

    def part(self, part: str) -> dict[str, Any]:
        return self.data["parts"].setdefault(part, {"jobs": {}, "seconds": 0.0, "left_out": []})

    def start(self, part: str, job: str) -> None:
        """Note the job that is running, for the next process if this one ends in it."""
        self.data["running"] = [part, job]
        self.write()

    def forget(self) -> None:
        """Note that no job is running: the one that was will be run again."""
        self.data["running"] = None
        self.write()

    def add(self, part: str, job: str, rows: list[Row]) -> None:
        self.part(part)["jobs"][job] = rows
        self.data["running"] = None
        self.write()

    def write(self) -> None:
        write_json(self.path, self.data, quietly=True)


@dataclass
class Run:
    """The device of the suite, and the deadline of a part."""

    device: str
    deadline: float = float("inf")
    left_out: list[str] = field(default_factory=list)
    """Jobs for which there was no time."""

    @property
    def is_tiny(self) -> bool:
        return self.device == "cpu"

    def do(self, jobs: Jobs, part: str, results: Results) -> None:
        """Do the jobs that have no rows yet, until time is up."""
        left = {name: job for name, job in jobs.items() if name not in results.part(part)["jobs"]}
        for name, job in tqdm(left.items(), unit="case", disable=None, leave=False):
            if time.monotonic() > self.deadline:
                self.left_out.append(name)
                continue
            results.start(part, name)
            try:
                rows = job()
            except Exception as e:  # the device is lost: nothing more would run in this process
                results.add(part, name, [{"case": name, "error": f"{type(e).__name__}: {e}"}])
                raise
            except BaseException:  # Ctrl-C or SIGTERM
                results.forget()
                raise
            results.add(part, name, rows)


def run(out: Path, device: str, minutes: float, again: bool) -> bool:
    """Run the jobs that have no rows yet, print all rows, and return whether every case was right.

    Raises:
        ValueError: there is no such device, the interpreter is on for a GPU, or off for a CPU, or the file is of
            another device or commit.
    """
    if device == "cpu" and not is_interpreted():
        raise ValueError("gpu-suite needs a GPU; on a CPU it runs tiny sizes, with TRITON_INTERPRET=1")
    if device != "cpu" and is_interpreted():
        raise ValueError(f"TRITON_INTERPRET=1 would interpret the kernels on a CPU, not run them on {device}: unset it")
    end = time.monotonic() + 60 * minutes
    results = Results(out, device, again)
    where = results.data["device"] + " in Triton's interpreter, whose times mean nothing" * (device == "cpu")
    print(f"{where}, commit {results.data['commit']}, {out}")
    for part, (jobs, share) in PARTS.items():
        start = time.monotonic()
        here = Run(device, start + (end - start) * share)
        try:
            here.do(jobs(here), part, results)
        finally:
            report = results.part(part)
            report["seconds"] += time.monotonic() - start
            report["left_out"] = here.left_out
            results.write()
        print(f"\n{part}: {report['seconds']:.0f} s")
        print(TABLES.get(part, _table)(results.rows(part)))
        if here.left_out:
            print(f"no time for {len(here.left_out)} more; the same command goes on with them")
    return not any(row["error"] for row in results.rows("correctness"))


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


def compile_kernels(here: Run) -> Jobs:
    """Compile on all cores the kernels that the other parts launch, into Triton's own cache."""
    if here.is_tiny:
        return {}
    backend, arch = capability(torch.device(here.device))
    target = f"sm_{arch}" if backend == "cuda" else str(arch)
    if target not in compile_report.ARCHITECTURES:
        return {}  # each kernel is compiled when it first runs
    wanted = [c for c in itertools.chain(_correctness_cases(here), _timed_cases(here)) if not c.seq_idx]
    requests = compile_report.record(wanted, target)
    jobs, cache = os.cpu_count() or 1, os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"

    def compile_some(first: int) -> list[Row]:
        rows = compile_report.compile_all(requests[first : first + 16 * jobs], jobs, Path(cache))
        return [asdict(row) | {"error": row.problem} for row in rows]

    firsts = range(0, len(requests), 16 * jobs)
    return {f"kernels from {first} on": functools.partial(compile_some, first) for first in firsts}


def correctness(here: Run) -> Jobs:
    """Outputs and gradients of every op over dtypes and options."""

    def compare(case: Case) -> list[Row]:
        row = {"case": str(case), "oracle": _oracle(case)}
        return [_attempt(row, functools.partial(check, case, here.device), here.device)]

    return {str(case): functools.partial(compare, case) for case in _correctness_cases(here)}


def check(case: Case, device: str) -> None:
    """Compare a case's kernels with the reference, or with the torch backend where that would take too long.

    Raises:
        AssertionError: they disagree.
    """
    inputs = case.inputs(device)
    assert_agrees(case.function, inputs, backend="triton", gradients=not case.is_step, oracle=_oracle(case))


def _oracle(case: Case) -> str:
    return "reference" if case.is_step or case.shape.length <= 256 else "torch"


def peers(here: Run) -> Jobs:
    """Seconds of the kernels and of each peer that has the op; one that is not installed has that as its error."""
    wanted = tiny() if here.is_tiny else _layers() + by_length()[1:]
    return _timed(here, wanted, lambda case: ("triton", *peers_of(case.op, "cuda")))


def tiles(here: Run) -> Jobs:
    """Seconds of the kernels with each value of the constants that machine code leaves open."""
    by_op = {case.op: case for case in (tiny() if here.is_tiny else connector() + _layers())}
    return {str(choice): functools.partial(_time_values, here, by_op[choice.op], choice) for choice in CHOICES}


def times(here: Run) -> Jobs:
    """Seconds of the kernels and of the torch backend, and their share of the roofline."""
    return _timed(here, _timed_cases(here), lambda case: ("triton", "torch"))


def _layers() -> list[Case]:
    return [case for family in ("mamba", "mamba2", "mamba3") for case in layer(family, "2.7b")]


def _correctness_cases(here: Run) -> list[Case]:
    return tiny() if here.is_tiny else cases.correctness()


def _timed_cases(here: Run) -> list[Case]:
    return tiny() if here.is_tiny else published("bf16", ("130m", "2.7b")) + by_length() + connector("fp32")


def _timed(here: Run, wanted: Iterable[Case], implementations: Callable[[Case], Iterable[str]]) -> Jobs:
    modes: dict[bool, tuple[Mode, ...]] = {True: ("fwd",), False: ("fwd", "fwd+bwd")}
    return {
        f"{case} {mode}": functools.partial(_timed_case, here, case, mode, implementations(case))
        for case in wanted
        for mode in modes[case.is_step]
    }


def _time_values(here: Run, case: Case, choice: Choice) -> list[Row]:
    """A row for each value; the result is compared with that of the value that is shipped."""
    rows = []
    workload = build_case(case, "triton", here.device)
    expected = run_once(workload, choice.mode).double()

    def time_value(value: int) -> Row:
        with choice.set_to(value):
            difference = (run_once(workload, choice.mode) - expected).abs().max() / expected.abs().max()
            timing = time_together({"triton": workload}, choice.mode, 2 if here.is_tiny else CALLS_TIMED)["triton"]
        share = roofline_share(case, choice.mode, timing.median, here.device)
        return {"difference": difference.item(), **asdict(timing), **share}

    for value in choice.values:
        shipped = " (shipped)" * (value == choice.shipped)
        row = {"case": str(case), "mode": choice.mode, "impl": f"{choice.constant} {value}{shipped}"}
        rows.append(_attempt(row, functools.partial(time_value, value), here.device))
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


PARTS: dict[str, tuple[Callable[[Run], Jobs], float]] = {
    "compile": (compile_kernels, 0.25),
    "correctness": (correctness, 0.5),
    "peers": (peers, 0.5),
    "tiles": (tiles, 0.5),
    "times": (times, 1.0),
}
"""The parts in order, each with its share of the time left when it starts."""


def _table(rows: list[Row]) -> str:
    """Times with their quartiles and share of the roofline, or the error."""
    lines = []
    for row in rows:
        names = [row.get("impl", ""), row.get("mode", ""), row["case"]]
        if row["error"]:
            lines.append(tables.Row(names, row["error"].splitlines()[0]))
            continue
        share = "" if row["share"] is None else f"{row['share']:.0%}"
        time = f"{1e6 * row['median']:.1f}", f"{1e6 * row['low']:.1f} to {1e6 * row['high']:.1f}"
        lines.append(tables.Row([*names, *time, share, f"{row['difference']:.0e}"]))
    heads = ("impl", "mode", "case", "us", "quartiles", "roofline", "differs")
    return tables.as_text(heads, lines, names=(0, 1, 2))


def _failures(rows: list[Row]) -> str:
    """Each row with an error, and the number of those without."""
    failed = [row for row in rows if row["error"]]
    lines = [f"FAILED {row['case']}: {row['error'].splitlines()[0]}" for row in failed]
    return "\n".join([*lines, f"{len(rows) - len(failed)} of {len(rows)} without an error"])


TABLES = {"compile": _failures, "correctness": _failures}
