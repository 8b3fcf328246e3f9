"""`ssm-bench machine-code`: instructions, bytes and bounds of a call, counted in the compiled kernels with no GPU."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ssm_kernels.testing import is_interpreted

from ..cases import Case, check_ops, published
from ..compile_report import ARCHITECTURES, Request, in_processes
from ..devices import MACHINES, Machine, first_machine
from ..environment import check_triton, environment
from ..files import write_json
from ..options import MachineCode
from .launches import Launch, Recording, record_launches, stub_extensions
from .measure import Code, Figures, compile_code, measure, unit_of
from .report import beside, compare_results, summarize, table, table_of_changes


def run_machine_code(command: MachineCode) -> None:
    """`ssm-bench machine-code`."""
    check_ops(command.op)
    check_triton()
    before = _read(command.compare) if command.compare else None
    results = count(cases_of(command), command.target, command.peer, command.mode, command.device, command.jobs)
    for result in results:
        print(table(result))
    print(beside(results))
    write_json(command.json, {"results": results, **environment()})
    if before is not None:
        changes = compare_results(before, results)
        print(table_of_changes(changes, command.tolerance))
        if any(change.is_worse(command.tolerance) for change in changes):
            sys.exit(1)


def _read(path: Path) -> list[dict[str, Any]]:
    found = json.loads(path.read_text())
    if "results" not in found:
        raise ValueError(f"{path} is not a file of ssm-bench machine-code --json")
    return found["results"]


def cases_of(command: MachineCode) -> list[Case]:
    """The calls of the ops in the layers of the published models."""
    found = []
    for case in published(command.dtype, command.shape):
        if case.op in command.op:
            sizes = {"batch": command.batch, "length": None if case.is_step else command.length}
            if case.op.startswith("cross_") and command.length:
                raise ValueError(f"length must be left out: {case.op} has the {case.shape.length} steps of its grid")
            found.append(replace(case, shape=replace(case.shape, **{k: v for k, v in sizes.items() if v})))
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class _Call:
    """One implementation of a case on a target."""

    case: Case
    target: str
    impl: str
    recording: Recording


def count(
    cases: list[Case],
    targets: tuple[str, ...] = ("sm_90",),
    peers: tuple[str, ...] = (),
    modes: tuple[str, ...] = (),
    devices: tuple[str, ...] = (),
    jobs: int = 1,
) -> list[dict[str, Any]]:
    """Count the machine code of calls.

    Args:
        cases: the calls.
        targets: keys of `ARCHITECTURES`.
        peers: packages whose Triton kernels are counted too, where they are installed.
        modes: passes to count: `fwd`, `train-fwd`, `bwd`, `step`; all by default.
        devices: names of `MACHINES` for the bounds; the first with the target's machine code by default.
        jobs: processes that compile.

    Returns:
        A row for each case, target and implementation, as plain data.

    Raises:
        ValueError: a target without SASS, a device that has other machine code, or Triton's interpreter is on.
    """
    if is_interpreted():
        raise ValueError("the kernels are compiled here, not interpreted: unset TRITON_INTERPRET")
    machines = {target: _machines(target, devices) for target in targets}
    calls = []
    missing: dict[str, str] = {}
    for target in targets:
        for case in cases:
            calls.append(_Call(case, target, "ours", record_launches(case, target)))
            for peer in peers:
                try:
                    calls.append(_Call(case, target, peer, record_launches(case, target, peer)))
                except ImportError as e:
                    missing[peer] = f"no column of {peer}: {e}"
                except ValueError:  # the peer does not have the op
                    pass
    for line in missing.values():
        print(line, file=sys.stderr)
    codes = _compile(calls, modes, jobs)
    return [_result(call, machines[call.target], modes, codes) for call in calls]


def _machines(target: str, devices: tuple[str, ...]) -> dict[str, Machine]:
    if ARCHITECTURES[target].backend != "cuda":
        raise ValueError(
            f"target must be one of NVIDIA's: machine-code reads SASS, and {target} has AMDGCN; "
            "ssm-bench compile-report counts the instructions in its text"
        )
    found = {name: MACHINES[name] for name in devices or first_machine(target)}
    for name, machine in found.items():
        if machine.target != target:
            raise ValueError(f"device {name} runs {machine.target}, and target is {target}")
    return found


def _wanted(call: _Call, modes: tuple[str, ...]) -> list[Launch]:
    launches = call.recording.launches
    if not modes and _codes_and_grids(launches, "train-fwd") == _codes_and_grids(launches, "fwd"):
        return [launch for launch in launches if launch.mode != "train-fwd"]
    return [launch for launch in launches if not modes or launch.mode in modes]


def _codes_and_grids(launches: list[Launch], mode: str) -> list[tuple[str, tuple[int, int, int]]]:
    return [(_key(launch.request), launch.grid) for launch in launches if launch.mode == mode]


def _key(request: Request) -> str:
    return repr(request._replace(case=""))


def _compile(calls: list[_Call], modes: tuple[str, ...], jobs: int) -> dict[str, Code | str]:
    from triton import knobs

    requests = {_key(launch.request): launch.request for call in calls for launch in _wanted(call, modes)}
    if jobs == 1:
        found = [_compile_one(r) for r in tqdm(requests.values(), unit="kernel", disable=None)]
    else:
        found = in_processes(_compile_one, list(requests.values()), jobs, Path(knobs.cache.dir))
    return dict(zip(requests, found, strict=True))


def _compile_one(request: Request) -> Code | str:
    """Machine code, or the reason why there is none, as a configuration of a tuner may exceed a limit."""
    try:
        with stub_extensions():
            code = compile_code(request)
    except Exception as e:  # any failure of the compiler
        return f"{request.name}: {type(e).__name__}: {e}"
    limit = ARCHITECTURES[request.target].shared_block
    if code.shared > limit:
        return f"{request.name}: {code.shared:,} bytes of shared memory, and a block may have {limit:,}"
    return code


def _result(
    call: _Call, machines: dict[str, Machine], modes: tuple[str, ...], codes: dict[str, Code | str]
) -> dict[str, Any]:
    unit = unit_of(call.case)
    launches = _wanted(call, modes)
    passes = {}
    for mode in dict.fromkeys(launch.mode for launch in launches):
        figures = _chosen([launch for launch in launches if launch.mode == mode], codes, next(iter(machines.values())))
        operations = [o for o in call.recording.operations if o.mode == mode]
        passes[mode] = summarize(figures, operations, unit, machines)
    return {
        "case": str(call.case), "target": call.target, "impl": call.impl, "unit": unit.name, "units": unit.count,
        "tokens": unit.tokens, "passes": passes,
    }  # fmt: skip


def _chosen(launches: list[Launch], codes: dict[str, Code | str], machine: Machine) -> list[Figures]:
    """Figures of the launches; of those that a tuner chooses from, the one with the lowest bound."""
    found: list[Figures] = []
    best: dict[int, Figures] = {}
    problems: dict[int, str] = {}
    for launch in launches:
        code = codes[_key(launch.request)]
        if isinstance(code, str):
            if launch.choice is None:
                raise ValueError(code)
            problems[launch.choice] = code
            continue
        figures = measure(launch, code)
        if launch.choice is None:
            found.append(figures)
        elif launch.choice not in best or figures.bound(machine) < best[launch.choice].bound(machine):
            best[launch.choice] = figures
    if lost := problems.keys() - best.keys():
        raise ValueError(f"no configuration compiles: {problems[min(lost)]}")
    return found + list(best.values())
