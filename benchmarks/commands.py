"""The shorter commands of `ssm-bench`; `run`, `bridge` and `inference` have those that measure."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict

from ..model.files import write_whole
from . import compare, compile_report, fuzz, gpu_suite, verify
from .cases import DTYPES, published, shipped
from .measure import environment, on
from .options import OPS, Compare, CompileReport, Fuzz, GPUSuite, Roofline, Verify
from .report import write_json
from .roofline import DEVICES, cost, floor


def run_roofline(command: Roofline) -> None:
    """`ssm-bench roofline`."""
    check_ops(command.op)
    rows = []
    print(f"{'':<86}{'MB':>9}{'GFLOP':>9}{'Gexp':>8}{'FLOP/B':>8}" + "".join(f"{d:>25}" for d in command.device))
    for case in published(command.dtype, command.size):
        for of in ("fwd",) if case.is_step else ("fwd", "bwd"):
            if case.op not in command.op:
                continue
            needs = cost(case, of)
            floors = {name: floor(needs, DEVICES[name], DTYPES[command.dtype]) for name in command.device}
            print(
                f"{f'{case} {of}':<86}{needs.bytes / 1e6:>9.1f}{(needs.matrix + needs.other) / 1e9:>9.2f}"
                f"{needs.exponentials / 1e9:>8.3f}{needs.intensity:>8.1f}"
                + "".join(f"{1e6 * f.seconds:>9.1f} us {f.bound:<13}" for f in floors.values())
            )
            times = {name: asdict(f) for name, f in floors.items()}
            rows.append({"case": str(case), "pass": of, "cost": asdict(needs), "floors": times})
    write_json(command.out, {"rows": rows, "devices": {name: asdict(DEVICES[name]) for name in command.device}})


def run_compile_report(command: CompileReport) -> None:
    """`ssm-bench compile-report`."""
    check_ops(command.op)
    largest = published("bf16", ("2.7b",))
    everything = largest if command.quick else shipped()
    targets = command.target or (("sm_90",) if command.quick else ("sm_80", "sm_90", "sm_100", "gfx942"))
    wanted = {target: everything for target in targets}
    if not command.target and not command.quick:
        wanted |= {"sm_89": largest, "sm_120": largest}
    requests = []
    for target, cases in wanted.items():
        requests += compile_report.record([case for case in cases if case.op in command.op], target)
    rows = compile_report.compile_all(requests, command.jobs)
    text = compile_report.table(rows)
    print(text)
    write_json(command.out, {"rows": [asdict(row) for row in rows], **environment()})
    if command.out is not None:
        write_whole(command.out.with_suffix(".txt"), text + "\n")
    if any(row.problem for row in rows):
        sys.exit(1)


def run_compare(command: Compare) -> None:
    """`ssm-bench compare`."""
    rows = compare.compare(command.before, command.after, command.relative_to)
    print(compare.table(rows, command.threshold, command.alpha, command.relative_to))
    for line in compare.left_out(command.before, command.after):
        print(line)
    if compare.regressions(rows, command.threshold, command.alpha):
        sys.exit(1)


def run_verify(command: Verify) -> None:
    """`ssm-bench verify`."""
    check_ops((command.op,))
    if command.ptx is not None and command.device != "cpu":
        raise ValueError(f"ptx emulates a GPU on CPU tensors: device must be cpu, got {command.device!r}")
    with on(command.device):
        function = verify.load(command.kernel)
        verdict = verify.verify(function, command.op, command.dtype, command.device, command.ptx)
    print(verdict)
    if not verdict.is_right:
        sys.exit(1)


def run_fuzz(command: Fuzz) -> None:
    """`ssm-bench fuzz`."""
    check_ops(command.op)
    seed = time.time_ns() % 10**9 if command.seed is None else command.seed
    print(f"seed {seed}")
    with on(command.device):
        n, findings = fuzz.fuzz(seed, command.minutes, command.op, command.device, command.trials)
    for finding in findings:
        print(f"{finding.seen} trials: {finding.backend}, {finding.trial.case.op}, {finding.why}")
    print(f"{n} trials from seed {seed}; {len(findings)} kinds of disagreement")
    found = {"seed": seed, "trials": n, "findings": [finding.report() for finding in findings]}
    write_json(command.out, found | environment(command.device))
    if findings:
        sys.exit(1)


def run_gpu_suite(command: GPUSuite) -> None:
    """`ssm-bench gpu-suite`."""
    with on(command.device):
        if not gpu_suite.run(command.out, command.device, command.minutes, command.again):
            sys.exit(1)


def check_ops(ops: tuple[str, ...]) -> None:
    if unknown := [op for op in ops if op not in OPS]:
        raise ValueError(f"op must be among {', '.join(OPS)}; got {', '.join(unknown)}")
