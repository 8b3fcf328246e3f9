"""What a machine with a GPU is to be asked, in one command: is it right, how fast is it, and beside whom.

Five parts, each in a JSON file of its own: `compile` (all kernels, in all cores, into Triton's own cache),
`correctness` (against the reference, and at realistic sizes against the torch backend in float64), `times` (beside the
roofline), `peers` (other libraries, where installed) and `tuning`. A part whose file is there is not run again.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import pkgutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ssm_kernels.testing import assert_agrees, capability, is_interpreted

from ..model.files import write_whole
from ..model.text_files import read_json
from . import cases, compile_report
from .cases import Case, by_length, connector, layer, published, tiny
from .measure import environment, once, time_together
from .options import Mode
from .peers import CALLS, PACKAGES
from .roofline import cost, reached
from .workloads import Workload, of_case

CALLS_TIMED = 30
PATIENCE = 0.2
"""Seconds beyond which a call is timed three times, not thirty."""
MAX_SETS = 64


@dataclass
class Run:
    """Where the suite runs, and how long a part may yet take."""

    device: str
    deadline: float = float("inf")
    left_out: list[str] = field(default_factory=list)
    """Cases that there was no time for."""
    """Ops that were asked for and have no Triton kernels."""

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
    """Run what has no file yet, print what it says, and tell whether every case was right.

    Raises:
        ValueError: there is no such device, or the interpreter is on where there should be none, or the other way.
    """
    if device == "cpu" and not is_interpreted():
        raise ValueError("gpu-suite needs a GPU; on a CPU it runs tiny sizes, with TRITON_INTERPRET=1")
    if device != "cpu" and is_interpreted():
        raise ValueError(f"TRITON_INTERPRET=1 would interpret the kernels on a CPU, not run them on {device}: unset it")
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    is_right = True
    for part, (do, share) in PARTS.items():
        path = out / f"{part}.json"
        if again or not path.exists():
            here = Run(device, time.monotonic() + (end - time.monotonic()) * share)
            begin = time.monotonic()
            rows = do(here)
            report = {"part": part, "rows": rows, "seconds": time.monotonic() - begin, "interpreted": here.is_tiny}
            report |= {"left_out": here.left_out}
            _write(path, report | environment(device))
        report = read_json(path)
        where = report["device"] + " in Triton's interpreter, which says nothing of speed" * report["interpreted"]
        print(f"\n{part}: {report['seconds']:.0f} s on {where}, commit {report['commit']}, {path}")
        print(TABLES.get(part, _table)(report["rows"]))
        if report["left_out"]:
            print(f"no time for {len(report['left_out'])} more")
        is_right = is_right and not (part == "correctness" and any(row["error"] for row in report["rows"]))
    return is_right


def _write(path: Path, report: dict) -> None:
    # An interruption leaves no half of a file, which would pass for a part that was run.
    write_whole(path, json.dumps(report, indent=2) + "\n")


def _attempt(row: dict, do: Callable[[], object], device: str) -> dict:
    """The row with what `do` adds to it, and the error if it fails; the suite goes on."""
    row["error"] = None
    try:
        row |= do() or {}
    except Exception as e:  # whatever goes wrong with one case is what the report is for
        row["error"] = f"{type(e).__name__}: {e}"
    if device != "cpu" and row["error"]:
        torch.cuda.synchronize(device)  # raises where the device is lost: nothing more would run in this process
        torch.cuda.empty_cache()
    return row


# --- the parts --------------------------------------------------------------------------------------------------


def compile_kernels(here: Run) -> list[dict]:
    """Compile in all cores what the other parts launch, where Triton will look for it."""
    if here.is_tiny:
        return []
    backend, arch = capability(torch.device(here.device))
    target = f"sm_{arch}" if backend == "cuda" else str(arch)
    if target not in compile_report.ARCHITECTURES:
        return []  # each kernel is then compiled where it first runs
    wanted = [c for c in itertools.chain(_correctness_cases(here), _timed_cases(here)) if not c.seq_idx]
    requests = compile_report.record(wanted, target)
    cache = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    rows = compile_report.compile_all(requests, os.cpu_count() or 1, Path(cache))
    return [asdict(row) | {"error": row.problem} for row in rows]


def correctness(here: Run) -> list[dict]:
    """Outputs and gradients of every op over dtypes and options."""
    rows = []
    for case in here.within_time(_correctness_cases(here)):
        row = {"case": str(case), "oracle": _oracle(case)}
        rows.append(_attempt(row, functools.partial(check, case, here.device), here.device))
    return rows


def check(case: Case, device: str) -> None:
    """Hold a case's kernels against the reference, or the torch backend where that would take too long.

    Raises:
        AssertionError: they disagree.
    """
    inputs = case.inputs(device)
    assert_agrees(case.function, inputs, backend="triton", gradients=not case.is_step, oracle=_oracle(case))


def _oracle(case: Case) -> str:
    return "reference" if case.is_step or case.shape.length <= 256 else "torch"


def times(here: Run) -> list[dict]:
    """Seconds of the kernels and of the torch backend, and the share of the roofline that they reach."""
    return _timed(here, _timed_cases(here), lambda case: ("triton", "torch"))


def peers(here: Run) -> list[dict]:
    """Seconds of the kernels and of each peer that has the op; one that is not installed has that as its error."""
    wanted = tiny() if here.is_tiny else layer("mamba", "2.7b") + layer("mamba2", "2.7b") + by_length()[1:]
    return _timed(here, wanted, lambda case: ("triton", *(name for name in PACKAGES if case.op in CALLS[name])))


def tuning(here: Run) -> list[dict]:
    """Seconds with each value of the constants that an op's kernels offer for tuning, as a dict `TUNABLE` of tuples."""
    rows = []
    for case in here.within_time(tiny() if here.is_tiny else published("bf16", ("2.7b",))):
        package = importlib.import_module(f"ssm_kernels.{case.folder}.triton")
        for file in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            kernels = importlib.import_module(file.name)
            for constant, values in getattr(kernels, "TUNABLE", {}).items():
                shipped = getattr(kernels, constant)
                for value in values:
                    setattr(kernels, constant, value)
                    for row in _timed(here, [case], lambda case: ("triton",)):
                        rows.append(row | {"constant": constant, "value": value, "shipped": value == shipped})
                setattr(kernels, constant, shipped)
    return rows


def _correctness_cases(here: Run) -> list[Case]:
    return tiny() if here.is_tiny else cases.correctness()


def _timed_cases(here: Run) -> list[Case]:
    return tiny() if here.is_tiny else published("bf16", ("130m", "2.7b")) + by_length() + connector("fp32")


def _timed(here: Run, wanted: Iterable[Case], implementations: Callable[[Case], Iterable[str]]) -> list[dict]:
    rows = []
    for case in here.within_time(wanted):
        for mode in ("fwd",) if case.is_step else ("fwd", "fwd+bwd"):
            rows += _timed_case(here, case, mode, implementations(case))
    return rows


def _timed_case(here: Run, case: Case, mode: Mode, implementations: Iterable[str]) -> list[dict]:
    """A row for each implementation: times, how far its result is from the first one's, share of the roofline."""
    sets: dict[str, list[Workload]] = {}
    results: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def prepare(name: str) -> dict:
        made = [of_case(case, name, here.device, seed) for seed in range(_sets(case, here.device))]
        results[name] = once(made[0], "fwd").double()
        first = time_together({name: made[0]}, mode, 1)[name].median
        sets[name], calls[name] = made, 2 if here.is_tiny else 3 if first > PATIENCE else CALLS_TIMED
        expected = next(iter(results.values()))
        return {"difference": ((results[name] - expected).abs().max() / expected.abs().max()).item()}

    rows = {name: {"case": str(case), "mode": mode, "impl": name} for name in implementations}
    for name, row in rows.items():
        _attempt(row, functools.partial(prepare, name), here.device)
    results.clear()
    for times_called in set(calls.values()):  # in turn, but for those that take long
        together = {name: made for name, made in sets.items() if calls[name] == times_called}
        try:
            timings = time_together(together, mode, times_called)
        except RuntimeError as e:  # as all sets of inputs together may not fit
            for name in together:
                rows[name]["error"] = f"{type(e).__name__}: {e}"
            continue
        for name, timing in timings.items():
            rows[name] |= asdict(timing) | reached(case, mode, timing.median, here.device)
    return list(rows.values())


def _sets(case: Case, device: str) -> int:
    """How many sets of inputs fill the last cache twice."""
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MAX_SETS, max(2, -(-2 * cache // cost(case, "fwd").bytes)))


PARTS: dict[str, tuple[Callable[[Run], list[dict]], float]] = {
    "compile": (compile_kernels, 0.25),
    "correctness": (correctness, 0.5),
    "times": (times, 0.5),
    "peers": (peers, 0.7),
    "tuning": (tuning, 1.0),
}
"""The parts in order, and the share that each may take of the time that is left when it begins."""


def _table(rows: list[dict]) -> str:
    """Times with their quartiles and share of the roofline, or what went wrong."""
    lines = [f"{'us':>10}{'quartiles':>22}{'roofline':>10}{'differs':>10}  {'impl':<14}{'mode':<9}case"]
    for row in rows:
        label = f"  {row['impl']:<14}{row['mode']:<9}{row['case']}"
        if "constant" in row:
            label += f"  {row['constant']}={row['value']}" + " (shipped)" * row["shipped"]
        if row["error"]:
            lines.append(f"{row['error'].splitlines()[0][:52]:<52}{label}")
            continue
        spread = f"{1e6 * row['low']:.1f} to {1e6 * row['high']:.1f}"
        share = "" if row["share"] is None else f"{row['share']:.0%}"
        lines.append(f"{1e6 * row['median']:>10.1f}{spread:>22}{share:>10}{row['difference']:>10.0e}{label}")
    return "\n".join(lines)


def _failures(rows: list[dict]) -> str:
    """How many were right, and each that was not."""
    failed = [row for row in rows if row["error"]]
    lines = [f"FAILED {row['case']}: {row['error'].splitlines()[0]}" for row in failed]
    return "\n".join([*lines, f"{len(rows) - len(failed)} of {len(rows)} without an error"])


TABLES = {"compile": _failures, "correctness": _failures}
