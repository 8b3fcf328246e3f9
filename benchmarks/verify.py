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

import collections
import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

import ssm_kernels

from .cases import SIZES, Case, arguments, check_ops, small
from .correctness import disagreement, expected, results
from .environment import current_device
from .options import Verify
from .ptx import emulated
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
    total: int
    """Number of cases."""
    passed: int = 0
    skipped: collections.Counter[str] = field(default_factory=collections.Counter)
    """Number of cases by the reason why they were not tested."""
    has_backward: bool = False
    """Gradients were compared, since results carried them."""
    not_compared: tuple[str, ...] = ()
    """Results that the function does not return."""
    failed: Case | None = None
    why: str = ""
    smallest: Case | None = None
    """The smallest case found that fails."""
    why_smallest: str = ""

    def __str__(self) -> str:
        what = "outputs and gradients" if self.has_backward else "outputs; no result carries a gradient: no backward"
        lines = [f"{self.op}: {self.passed} of {self.total} cases agree with the reference ({what})"]
        lines += [f"not tested, {n} cases: {reason}" for reason, n in self.skipped.items()]
        lines += [f"not returned, not compared: {name}" for name in self.not_compared]
        if self.smallest is not None:
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
        if "height" in SIZES[op]:
            shapes = [replace(plain.shape, length=h * w, height=h) for h, w in ((1, 1), (1, 8), (8, 1), (4, 4), (3, 5))]
        elif "length" in SIZES[op]:
            shapes = [replace(plain.shape, length=n) for n in LENGTHS]
        else:
            shapes = [replace(plain.shape, batch=n) for n in (1, 5)]
        found += [replace(plain, shape=shape) for shape in shapes]
    return found


@dataclass
class Candidate:
    """A function under test."""

    function: Callable
    device: str
    target: str | None
    """GPU whose compiled kernels are emulated; None runs the function directly."""
    has_backward: bool = False
    """Results carried gradients."""
    num_results: int | None = None
    """Number of the op's results that it returned; None before a call."""

    def wrong(self, case: Case) -> str:
        """Describe the failure of a case; empty if it passes.

        Raises:
            NotImplementedError: the function does not have the case.
            ValueError: the op does not have it.
        """
        tensors = case.inputs(self.device)
        options = self.options(case, tensors)
        names, carries = case.result_names, False

        def call(**t: Tensor) -> tuple:
            nonlocal carries
            out = self.call(case, t, options)
            carries = any(isinstance(r, Tensor) and r.requires_grad for r in out)
            self.num_results = min(len(out), len(names))
            return _named(out, names[: self.num_results])

        report = None
        try:
            with contextlib.nullcontext() if self.target is None else emulated(self.target) as report:
                found = results(call, tensors, not case.is_step)
        except NotImplementedError:
            raise
        except Exception as e:  # any failure is reported
            # Raises where the op refuses the case as well: the function is right to.
            case.call(case.inputs(self.device), "reference")
            return f"raises {type(e).__name__}: {e}"
        if report is not None and report.findings:
            return "; ".join(report.findings)
        self.has_backward |= carries
        # Gradients that no result carries came out as zeros.
        if not carries:
            found = {name: found[name] for name in names[: self.num_results]}

        def reference(**t: Tensor) -> tuple:
            out = case.function(backend="reference", **t)
            return _named(out if isinstance(out, tuple) else (out,), names[: self.num_results])

        return disagreement(
            expected(reference, tensors, carries, self.target is not None or self.device != "cpu"), found
        )

    def options(self, case: Case, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Options that differ from the op's defaults; no result depends on `chunk_size`, which may be left out.

        Raises:
            NotImplementedError: the function takes no argument of that name.
        """
        parameters = inspect.signature(getattr(ssm_kernels, case.op)).parameters
        options = {k: v for k, v in case.options.items() if v != parameters[k].default}
        takes = inspect.signature(self.function).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            if "chunk_size" not in takes:
                options.pop("chunk_size", None)
            if unknown := [name for name in (*arguments(tensors), *options) if name not in takes]:
                raise NotImplementedError(f"the function takes no {', '.join(unknown)}")
        return options

    def call(self, case: Case, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> tuple:
        """Results of the function; a step updates a copy of its state, which is its last result."""
        states = {name: tensors[name].clone() for name in case.state_names}
        out = self.function(**arguments({**tensors, **states}), **options)
        if case.op == "mamba3" and isinstance(out, tuple) and len(out) == 2:
            out = (out[0], *out[1])
        if case.is_step or case.is_mamba3 and isinstance(out, tuple):
            out = case.named(out, states)
        return out if isinstance(out, tuple) else (out,)


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
    candidate, verdict = Candidate(function, device, target), Verdict(op, len(cases))
    for case in cases:
        try:
            verdict.why = candidate.wrong(case)
        except NotImplementedError as e:
            verdict.skipped[str(e)] += 1
            continue
        if verdict.why:
            verdict.failed = case
            verdict.smallest, verdict.why_smallest = shrink(case, verdict.why, smaller_cases, candidate.wrong)
            break
        verdict.passed += 1
    verdict.has_backward = candidate.has_backward
    verdict.not_compared = cases[0].result_names[candidate.num_results :] if candidate.num_results else ()
    return verdict


def _named(out: tuple, names: tuple[str, ...]) -> tuple:
    return collections.namedtuple("Returned", names)(*out[: len(names)])
