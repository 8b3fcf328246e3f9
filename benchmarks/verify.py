"""`ssm-bench verify`: a user's function compared with the reference over the complete grid of options.

    ssm-bench verify --kernel mine.py:my_scan selective_scan
    ssm-bench verify --kernel mine.py:my_scan selective_scan --ptx sm_90

The function has the op's signature without `backend`: it takes tensors and options by name, in the shapes, dtypes and
strides of the op's docstring, and returns what the op returns, or y alone. A step updates its state in place. An
argument that it does not name is reported as not tested; so is a case at which it raises NotImplementedError.
`chunk_size` may be left out, as no result depends on it.

With `--ptx` its Triton kernels are compiled for that GPU and emulated on CPU tensors; findings of the emulator's
checks, such as a missing barrier, are failures too.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import sys
import typing
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ssm_kernels

from .cases import SIZES, Case, StepOutput, check_ops, small
from .correctness import disagreement, expected, results
from .environment import current_device
from .options import Verify
from .ptx import Report, emulated
from .shrink import brief, shrink, smaller_cases

LENGTHS = (1, 2, 3, 16, 64, 65, 129)
"""Lengths beside those of `cases.small`, which are odd."""


def run_verify(command: Verify) -> None:
    """`ssm-bench verify`."""
    check_ops((command.op,))
    if command.ptx is not None and command.device != "cpu":
        raise ValueError(f"ptx emulates a GPU on CPU tensors: device must be cpu, got {command.device!r}")
    with current_device(command.device):
        function = load(command.kernel)
        verdict = verify(function, command.op, command.dtype, command.device, command.ptx)
    print(verdict)
    if not verdict.is_right:
        sys.exit(1)


@dataclass
class Verdict:
    """Result of a verification, as text by `str`."""

    op: str
    has_backward: bool
    passed: int = 0
    total: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of cases by the reason why they were not tested."""
    not_compared: tuple[str, ...] = ()
    """Results that the function does not return."""
    failed: Case | None = None
    why: str = ""
    smallest: Case | None = None
    why_smallest: str = ""

    def __str__(self) -> str:
        what = "outputs and gradients" if self.has_backward else "outputs; no result carries a gradient: no backward"
        lines = [f"{self.op}: {self.passed} of {self.total} cases agree with the reference ({what})"]
        lines += [f"not tested, {n} cases: {reason}" for reason, n in self.skipped.items()]
        lines += [f"not returned, not compared: {name}" for name in self.not_compared]
        if self.failed is not None and self.smallest is not None:
            lines += ["", f"FAILED {self.failed}", f"  {self.why}"]
            lines += ["the smallest case found that fails:", f"  {self.smallest}", f"  {self.why_smallest}"]
            lines += [f"  its tensors: {brief(self.smallest)}.inputs()", f"  its options: {self.smallest.options}"]
        elif not self.passed:
            lines.append("FAILED: no case was tested")
        return "\n".join(lines)

    @property
    def is_right(self) -> bool:
        return self.failed is None and self.passed > 0


def load(kernel: str) -> Callable:
    """Import the function that `path.py:function` names.

    Raises:
        ValueError: no such file or function.
    """
    path, colon, name = kernel.rpartition(":")
    if not colon or not Path(path).is_file():
        raise ValueError(f"kernel must be path.py:function with a file that exists; got {kernel!r}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"kernel must be in a Python file; got {path!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        found = ", ".join(n for n, f in vars(module).items() if inspect.isfunction(f)) or "no function"
        raise ValueError(f"kernel: {path} has no function {name!r}; it has {found}")
    return function


def grid(op: str, dtypes: tuple[str, ...]) -> list[Case]:
    """Cases of an op: every option, and more lengths, in each dtype."""
    found = []
    for dtype in dtypes:
        options = [case for case in small(dtype) if case.op == op]
        found += options
        plain = options[0]
        if "height" in SIZES[op].split():
            shapes = [replace(plain.shape, length=h * w, height=h) for h, w in ((1, 1), (1, 8), (8, 1), (4, 4), (3, 5))]
        elif "length" in SIZES[op].split():
            shapes = [replace(plain.shape, length=n) for n in LENGTHS]
        else:
            shapes = [replace(plain.shape, batch=n) for n in (1, 5)]
        found += [replace(plain, shape=shape) for shape in shapes]
    return found


@dataclass(frozen=True)
class Candidate:
    """A function under test, and its abilities."""

    function: Callable
    takes: frozenset[str] | None
    """Names of its arguments; None where it takes any."""
    has_backward: bool = False
    num_results: int | None = None
    """Number of the op's results that it returns; None for all."""
    target: str | None = None
    """GPU whose compiled kernels are emulated; None runs the function directly."""

    def call(self, case: Case, tensors: Mapping[str, Tensor]) -> object:
        arguments = _arguments(case, tensors)
        if "chunk_size" in case.options and (self.takes is None or "chunk_size" in self.takes):
            arguments["chunk_size"] = case.chunk_size
        if not case.is_step:
            return self.function(**arguments)
        state = tensors["state"].clone()
        return StepOutput(self.function(**arguments | {"state": state}), state)

    def reason_not_to_test(self, case: Case) -> str:
        takes = self.takes
        unknown = [] if takes is None else [n for n in _arguments(case, case.inputs("meta")) if n not in takes]
        return f"the function takes no {', '.join(unknown)}" if unknown else ""

    def wrong(self, case: Case, device: str) -> str:
        """Describe the failure of a case; empty if it passes. Raises NotImplementedError as the function does."""
        names = _result_names(case)[: self.num_results]

        def compared(out: object) -> tuple:
            returned = out if isinstance(out, tuple) else (out,)
            if len(returned) < len(names):
                raise TypeError(f"returns {len(returned)} results, expected {', '.join(names)}")
            return namedtuple("Returned", names)(*returned[: len(names)])

        tensors = case.inputs(device)
        report = None
        try:
            with self.running() as report:
                actual = results(lambda **t: compared(self.call(case, t)), tensors, self.has_backward)
        except NotImplementedError:
            raise
        except Exception as e:  # any failure is reported
            return f"raises {type(e).__name__}: {e}"
        if report is not None and report.findings:
            return "; ".join(report.findings)
        is_compiled = report is not None or device != "cpu"
        reference = functools.partial(case.function, backend="reference")
        right = expected(lambda **t: compared(reference(**t)), tensors, self.has_backward, is_compiled)
        return disagreement(right, actual)

    def running(self) -> contextlib.AbstractContextManager[Report | None]:
        """The context in which the function runs: the emulator, or none."""
        return contextlib.nullcontext() if self.target is None else emulated(self.target)

    def fails(self, case: Case, device: str) -> bool:
        try:
            _run_reference(case, device)
            return not self.reason_not_to_test(case) and bool(self.wrong(case, device))
        except (ValueError, NotImplementedError):  # the op, or the function, does not have the case
            return False


def verify(
    function: Callable,
    op: str,
    dtypes: tuple[str, ...] = ("fp32", "bf16"),
    device: str = "cpu",
    target: str | None = None,
) -> Verdict:
    """Compare a function with the reference until it fails, then shrink the failing case.

    Args:
        target: compile its Triton kernels for this GPU (`sm_90`) and emulate them on CPU tensors.
    """
    cases = grid(op, dtypes)
    candidate = _probe(function, cases, device, target)
    names = _result_names(cases[0])
    missing = names[candidate.num_results :] if candidate.num_results else ()
    verdict = Verdict(op, candidate.has_backward, total=len(cases), not_compared=missing)
    for case in cases:
        reason, why = candidate.reason_not_to_test(case), ""
        if not reason:
            try:
                why = candidate.wrong(case, device)
            except NotImplementedError as e:
                reason = f"NotImplementedError: {e}"
        if reason:
            verdict.skipped[reason] = verdict.skipped.get(reason, 0) + 1
        elif why:
            verdict.failed, verdict.why = case, why
            verdict.smallest = shrink(case, smaller_cases, lambda c: candidate.fails(c, device))
            verdict.why_smallest = candidate.wrong(verdict.smallest, device)
            break
        else:
            verdict.passed += 1
    return verdict


def _probe(function: Callable, cases: list[Case], device: str, target: str | None) -> Candidate:
    """Find out, by the first case that it takes, whether its results carry gradients, and their number."""
    parameters = inspect.signature(function).parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    takes = None if takes_any else frozenset(p.name for p in parameters)
    candidate = Candidate(function, takes, target=target)
    for case in cases:
        if candidate.reason_not_to_test(case):
            continue
        try:
            with candidate.running():
                out = candidate.call(case, case.inputs(device))
        except NotImplementedError:
            continue
        except Exception:  # it fails again where that is reported
            break
        returned = out if isinstance(out, tuple) else (out,)
        carries = any(isinstance(t, Tensor) and t.requires_grad for t in returned)
        return replace(candidate, has_backward=carries and not case.is_step, num_results=len(returned))
    return candidate


def _arguments(case: Case, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors, and options that differ from the op's defaults, without `chunk_size`: no result depends on it."""
    parameters = inspect.signature(getattr(ssm_kernels, case.op)).parameters
    options = {k: v for k, v in case.options.items() if v != parameters[k].default and k != "chunk_size"}
    return {**tensors, **options}


def _result_names(case: Case) -> tuple[str, ...]:
    """Names of the op's results."""
    if case.is_step:
        return StepOutput._fields
    kind = typing.get_type_hints(getattr(ssm_kernels, case.op))["return"]
    return getattr(kind, "_fields", ("y",))


def _run_reference(case: Case, device: str) -> None:
    with torch.no_grad():
        case.call(case.inputs(device), "reference")
