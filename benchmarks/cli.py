"""The `ssm-bench` command."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro

from ..model.files import write_whole
from . import compare, compile_report, fuzz, gpu_suite, verify
from .bridge import Bridge
from .cases import DTYPES, OPS, Case, published, shipped
from .inference import Decode, Prefill
from .measure import environment, on
from .report import write_json
from .roofline import DEVICES, cost, floor
from .run import Run, Sweep


@dataclass
class Roofline:
    """Print what each op must move and compute at the published sizes, the least time for it, and what bounds it."""

    op: tyro.conf.Positional[tuple[str, ...]] = OPS
    size: tuple[Literal["130m", "370m", "790m", "1.3b", "2.7b"], ...] = ("2.7b",)
    """Models of Mamba and Mamba-2; the connectors' ops are those of 2.7b."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    device: tuple[Literal["A100", "H100", "H200", "B200", "MI300X", "L40S", "RTX 4090"], ...] = ("H100",)
    out: Path | None = None
    """JSON file to write."""

    def run(self) -> None:
        _check_ops(self.op)
        rows = []
        print(f"{'':<86}{'MB':>9}{'GFLOP':>9}{'Gexp':>8}{'FLOP/B':>8}" + "".join(f"{d:>25}" for d in self.device))
        for case in published(self.dtype, self.size):
            for of in ("fwd",) if case.is_step else ("fwd", "bwd"):
                if case.op not in self.op:
                    continue
                needs = cost(case, of)
                floors = {name: floor(needs, DEVICES[name], DTYPES[self.dtype]) for name in self.device}
                print(
                    f"{f'{case} {of}':<86}{needs.bytes / 1e6:>9.1f}{(needs.matrix + needs.other) / 1e9:>9.2f}"
                    f"{needs.exponentials / 1e9:>8.3f}{needs.intensity:>8.1f}"
                    + "".join(f"{1e6 * f.seconds:>9.1f} us {f.bound:<13}" for f in floors.values())
                )
                times = {name: asdict(f) for name, f in floors.items()}
                rows.append({"case": str(case), "pass": of, "cost": asdict(needs), "floors": times})
        write_json(self.out, {"rows": rows, "devices": {name: asdict(DEVICES[name]) for name in self.device}})


@dataclass
class CompileReport:
    """Compile what the ops would launch, with no GPU; exit status 1 if a kernel spills or asks for too much memory."""

    op: tyro.conf.Positional[tuple[str, ...]] = OPS
    target: tuple[Literal["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"], ...] = ()
    """By default every shipped configuration for sm_80, sm_90, sm_100 and gfx942, and, since their shared memory is
    smaller, the 2.7b models for sm_89 and sm_120."""
    quick: bool = False
    """The 2.7b models in bf16 alone, and, where no target is given, sm_90."""
    jobs: int = len(os.sched_getaffinity(0))
    """Processes."""
    out: Path | None = None
    """JSON file to write; the table goes beside it as .txt."""

    def run(self) -> None:
        _check_ops(self.op)
        largest = published("bf16", ("2.7b",))
        everything = largest if self.quick else shipped()
        targets = self.target or (("sm_90",) if self.quick else ("sm_80", "sm_90", "sm_100", "gfx942"))
        wanted = {target: everything for target in targets}
        if not self.target and not self.quick:
            wanted |= {"sm_89": largest, "sm_120": largest}
        requests = []
        for target, cases in wanted.items():
            requests += compile_report.record([case for case in cases if case.op in self.op], target)
        if without := [op for op in self.op if not Case(op).has_kernels]:
            print(f"no Triton kernels: {', '.join(without)}")
        rows = compile_report.compile_all(requests, self.jobs)
        text = compile_report.table(rows)
        print(text)
        write_json(self.out, {"rows": [asdict(row) for row in rows], **environment()})
        if self.out is not None:
            write_whole(self.out.with_suffix(".txt"), text + "\n")
        if any(row.problem for row in rows):
            sys.exit(1)


@dataclass
class Compare:
    """Hold a later file of `run` or `sweep` against an earlier one; exit status 1 if one is slower, not by chance.

    By Mann and Whitney's test of the single calls' times, with Holm's correction for how many rows there are.
    """

    before: tyro.conf.Positional[Path]
    after: tyro.conf.Positional[Path]
    threshold: float = 0.05
    """Medians that are slower by a smaller share are no regression."""
    alpha: float = 0.01
    """How likely chance may be."""
    relative_to: str | None = None
    """An implementation in both files that did not change: times as multiples of its, free of the machine's drift."""

    def run(self) -> None:
        rows = compare.compare(self.before, self.after, self.relative_to)
        print(compare.table(rows, self.threshold, self.alpha, self.relative_to))
        for line in compare.left_out(self.before, self.after):
            print(line)
        if compare.regressions(rows, self.threshold, self.alpha):
            sys.exit(1)


@dataclass
class Verify:
    """Hold a function of one's own against the reference at every option; exit status 1 if it is wrong.

    It has the op's signature, without `backend`: arguments by name. One that it does not name is not tested, and
    said not to be, as is a case at which it raises NotImplementedError. It gives what the op gives, or y alone.
    Gradients are compared where its results carry them.
    """

    op: tyro.conf.Positional[str]
    kernel: str
    """path.py:function."""
    dtype: tuple[Literal["fp32", "fp64", "bf16", "fp16"], ...] = ("fp32", "bf16")
    device: str = "cpu"

    def run(self) -> None:
        _check_ops((self.op,))
        with on(self.device):
            verdict = verify.verify(verify.load(self.kernel), self.op, self.dtype, self.device)
        print(verdict)
        if not verdict.is_right:
            sys.exit(1)


@dataclass
class Fuzz:
    """Random calls, extreme values among them, of every backend against the reference; exit status 1 if one is wrong.

    Backends: torch, and triton on a GPU or, with TRITON_INTERPRET=1, in its interpreter.
    """

    minutes: float = 1.0
    seed: int | None = None
    """Of the first trial; the next have the numbers that follow. By default another one each time."""
    trials: int | None = None
    """How many at most; 1 repeats the trial of a seed."""
    op: tuple[str, ...] = OPS
    device: str = "cpu"
    out: Path | None = None
    """JSON file to write."""

    def run(self) -> None:
        _check_ops(self.op)
        seed = time.time_ns() % 10**9 if self.seed is None else self.seed
        print(f"seed {seed}")
        with on(self.device):
            n, findings = fuzz.fuzz(seed, self.minutes, self.op, self.device, self.trials)
        for finding in findings:
            print(f"{finding.seen} trials: {finding.backend}, {finding.trial.case.op}, {finding.why}")
        print(f"{n} trials from seed {seed}; {len(findings)} kinds of disagreement")
        found = {"seed": seed, "trials": n, "findings": [finding.report() for finding in findings]}
        write_json(self.out, found | environment(self.device))
        if findings:
            sys.exit(1)


@dataclass
class GPUSuite:
    """On a GPU: is every op right, how fast is it, and beside whom. Ten minutes; exit status 1 if a case is wrong."""

    out: Path
    """Folder of one JSON file a part; a part whose file is there is not run again."""
    device: str = "cuda"
    """Also cuda:1 and so on; cpu runs tiny sizes through the same steps, with TRITON_INTERPRET=1."""
    minutes: float = 10.0
    """What takes longer is left out, and said to be."""
    again: bool = False
    """Run every part, whatever is in the folder."""

    def run(self) -> None:
        with on(self.device):
            if not gpu_suite.run(self.out, self.device, self.minutes, self.again):
                sys.exit(1)


COMMANDS = {
    "run": Run,
    "sweep": Sweep,
    "bridge": Bridge,
    "compile-report": CompileReport,
    "roofline": Roofline,
    "gpu-suite": GPUSuite,
    "compare": Compare,
    "verify": Verify,
    "fuzz": Fuzz,
    "prefill": Prefill,
    "decode": Decode,
}


def _check_ops(ops: tuple[str, ...]) -> None:
    if unknown := [op for op in ops if op not in OPS]:
        raise ValueError(f"op must be among {', '.join(OPS)}; got {', '.join(unknown)}")


def main(arguments: list[str] | None = None) -> None:
    """Run one command; what goes wrong with its input is one line on stderr and exit status 1."""
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="ssm-bench",
        description="Measure the kernels of ssm_kernels beside their peers. Begin with: ssm-bench run selective_scan",
        args=arguments,
    )
    try:
        command.run()
    except (ValueError, OSError, ModuleNotFoundError) as e:
        sys.exit(f"ssm-bench: {e}")


if __name__ == "__main__":
    main()
