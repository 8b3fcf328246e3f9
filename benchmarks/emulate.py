"""`ssm-bench emulate`: compiled kernels of the ops, run in the PTX emulator and compared with the reference.

A case is one call, forward and, except for a decoding step, backward. It passes if outputs and gradients agree with the
step-by-step reference in float64 by `ssm_kernels.testing`, and the emulator's checks have no finding.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

from ssm_kernels.testing import assert_agrees

from .accuracy import relative_error
from .cases import Case, check_ops, emulated
from .environment import environment
from .files import write_json
from .options import Emulate
from .ptx import Fault, Unsupported
from .ptx import emulated as emulator


def run_emulate(command: Emulate) -> None:
    """`ssm-bench emulate`."""
    check_ops(command.op)
    wanted = list(_cases(command))
    rows = []
    for target, case in tqdm(wanted, unit="case", file=sys.stderr):
        rows.append(run_case(case, target))
        tqdm.write(str(rows[-1]))
    totals: collections.Counter[str] = collections.Counter()
    for row in rows:
        totals.update(row.instructions)
    print(f"{sum(row.is_right for row in rows)} of {len(rows)} cases right; instructions of all warps by kind:")
    print(", ".join(f"{kind} {n:,}" for kind, n in totals.most_common(16)))
    write_json(command.out, {"rows": [asdict(row) for row in rows], **environment()})
    if not all(row.is_right for row in rows):
        sys.exit(1)


def _cases(command: Emulate) -> Iterator[tuple[str, Case]]:
    for target in command.target:
        for dtype in command.dtype:
            seen: set[str] = set()
            for case in emulated(dtype, command.tiles):
                if case.op in command.op and not (command.plain and case.op in seen):
                    seen.add(case.op)
                    yield target, case


@dataclass(frozen=True)
class Row:
    """Result of one case."""

    case: str
    target: str
    launches: int
    instructions: dict[str, int]
    """Instructions executed in all launches, by kind, counted in warps."""
    findings: dict[str, int]
    error: float | None
    """Largest difference of an output from the reference in float64, relative to the largest value."""
    wrong: str
    """Description of the failure; empty if there is none."""
    seconds: float
    """Processor time of the emulator."""

    @property
    def is_right(self) -> bool:
        return not self.wrong and not self.findings

    def __str__(self) -> str:
        counts = {
            kind: self.instructions.get(kind, 0) for kind in ("mma", "wgmma.mma_async", "tcgen05.mma", "bar", "shfl")
        }
        shown = ", ".join(f"{kind} {n:,}" for kind, n in counts.items() if n)
        error = "" if self.error is None else f", error {self.error:.1e}"
        lines = [
            f"{'right' if self.is_right else 'WRONG'} {self.target} {self.case}: {self.launches} launches{error}, "
            f"{sum(self.instructions.values()):,} instructions ({shown}), {self.seconds:.1f} s"
        ]
        lines += [f"    {self.wrong}"] if self.wrong else []
        return "\n".join(lines + [f"    {what}, {n} times" for what, n in self.findings.items()])


def run_case(case: Case, target: str) -> Row:
    """Emulate one case, and compare it with the reference."""
    inputs = case.inputs()
    wrong = ""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.empty fills with NaN, which shows elements that are not written
    try:
        with emulator(target) as report:
            try:
                assert_agrees(case.function, inputs, backend="triton", gradients=not case.is_step)
            except (AssertionError, Fault, Unsupported) as e:
                wrong = f"{type(e).__name__}: {e}"
            launches = list(report.launches)
            error = None if wrong else _error(case, inputs)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    instructions: collections.Counter[str] = collections.Counter()
    for launch in launches:
        instructions.update(launch.instructions)
    if not launches and not wrong:
        wrong = "no kernel was launched"
    seconds = sum(launch.seconds for launch in launches)
    return Row(str(case), target, len(launches), dict(instructions), dict(report.findings), error, wrong, seconds)


def _error(case: Case, inputs: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        exact = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
        pairs = zip(case.call(inputs, "triton"), case.call(exact, "reference"), strict=True)
        return max(relative_error(got, want) for got, want in pairs)
