"""Someone's own function held against the reference over the whole grid of options.

    ssm-bench verify --kernel mine.py:my_scan selective_scan
    ssm-bench verify --kernel mine.py:my_scan selective_scan --ptx sm_90

The function has the op's own signature (without `backend`): tensors and options by name, in the shapes, dtypes and
strides of its docstring, and gives what the op gives, or y alone. A step updates its state in place. An argument that
it does not name is not tested, and said not to be; so is a case at which it raises NotImplementedError.
`chunk_size` may be left out, as no result depends on it.

With `--ptx` its Triton kernels are compiled for that GPU and emulated on CPU tensors; what the emulator's checks see,
such as a missing barrier, is a failure too.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import typing
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

import ssm_kernels

from .agreement import brief, disagreement, expected, results, shrink, smaller_cases
from .cases import SIZES, Case, StepOutput, small
from .ptx import Report, emulated

LENGTHS = (1, 2, 3, 16, 64, 65, 129)
"""Besides those of `cases.small`, which are odd."""


@dataclass
class Verdict:
    op: str
    has_backward: bool
    passed: int = 0
    total: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    """Why, and how many cases."""
    not_compared: tuple[str, ...] = ()
    """Results that the function does not give."""
    failed: Case | None = None
    why: str = ""
    smallest: Case | None = None
    why_smallest: str = ""

    def __str__(self) -> str:
        what = "outputs and gradients" if self.has_backward else "outputs; no result carries a gradient: no backward"
        lines = [f"{self.op}: {self.passed} of {self.total} cases agree with the reference ({what})"]
        lines += [f"not tested, {n} cases: {reason}" for reason, n in self.left_out.items()]
        lines += [f"not given, not compared: {name}" for name in self.not_compared]
        if self.failed is not None:
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
    """The function that `path.py:function` names.

    Raises:
        ValueError: no such file or function.
    """
    path, colon, name = kernel.rpartition(":")
    if not colon or not Path(path).is_file():
        raise ValueError(f"kernel must be path.py:function with a file that is there; got {kernel!r}")
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
    """The op at every option, and at more lengths, in each dtype."""
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
    """A function to be judged, and what it is able to do."""

    function: Callable
    takes: frozenset[str] | None
    """Names of its arguments; None where it takes any."""
    has_backward: bool = False
    gives: int | None = None
    """How many of the op's results; None for all."""
    target: str | None = None
    """GPU whose compiled kernels are emulated; None runs the function as it is."""

    def call(self, case: Case, tensors: Mapping[str, Tensor]) -> object:
        arguments = _arguments(case, tensors)
        if "chunk_size" in case.options and (self.takes is None or "chunk_size" in self.takes):
            arguments["chunk_size"] = case.chunk_size
        if not case.is_step:
            return self.function(**arguments)
        state = tensors["state"].clone()
        return StepOutput(self.function(**arguments | {"state": state}), state)

    def reason_not_to_test(self, case: Case) -> str:
        unknown = (
            [] if self.takes is None else [n for n in _arguments(case, case.inputs("meta")) if n not in self.takes]
        )
        return f"the function takes no {', '.join(unknown)}" if unknown else ""

    def wrong(self, case: Case, device: str) -> str:
        """What is wrong in a case; raises NotImplementedError as the function does."""

        names = _results(case)[: self.gives]

        def part(out: object) -> tuple:
            given = out if isinstance(out, tuple) else (out,)
            if len(given) < len(names):
                raise TypeError(f"gives {len(given)} results, expected {', '.join(names)}")
            return namedtuple("Given", names)(*given[: len(names)])

        tensors = case.inputs(device)
        report = None
        try:
            with self.running() as report:
                actual = results(lambda **t: part(self.call(case, t)), tensors, self.has_backward)
        except NotImplementedError:
            raise
        except Exception as e:  # whatever it raises is what the report is for
            return f"raises {type(e).__name__}: {e}"
        if report is not None and report.findings:
            return "; ".join(report.findings)
        is_compiled = report is not None or device != "cpu"
        reference = functools.partial(case.function, backend="reference")
        right = expected(lambda **t: part(reference(**t)), tensors, self.has_backward, is_compiled)
        return disagreement(right, actual)

    def running(self) -> contextlib.AbstractContextManager[Report | None]:
        """Where the function runs: in the emulator, or as it is."""
        return contextlib.nullcontext() if self.target is None else emulated(self.target)

    def fails(self, case: Case, device: str) -> bool:
        try:
            _run_reference(case, device)
            return not self.reason_not_to_test(case) and bool(self.wrong(case, device))
        except (ValueError, NotImplementedError):  # a case that the op, or the function, does not have
            return False


def verify(
    function: Callable,
    op: str,
    dtypes: tuple[str, ...] = ("fp32", "bf16"),
    device: str = "cpu",
    target: str | None = None,
) -> Verdict:
    """Compare a function with the reference, until it fails; the failing case is then made smaller.

    Args:
        target: compile its Triton kernels for this GPU (`sm_90`) and emulate them on CPU tensors.
    """
    cases = grid(op, dtypes)
    candidate = _probe(function, cases, device, target)
    names = _results(cases[0])
    missing = names[candidate.gives :] if candidate.gives else ()
    verdict = Verdict(op, candidate.has_backward, total=len(cases), not_compared=missing)
    for case in cases:
        reason = candidate.reason_not_to_test(case)
        if not reason:
            try:
                why = candidate.wrong(case, device)
            except NotImplementedError as e:
                reason = f"NotImplementedError: {e}"
        if reason:
            verdict.left_out[reason] = verdict.left_out.get(reason, 0) + 1
        elif why:
            verdict.failed, verdict.why = case, why
            verdict.smallest = shrink(case, smaller_cases, lambda c: candidate.fails(c, device))
            verdict.why_smallest = candidate.wrong(verdict.smallest, device)
            break
        else:
            verdict.passed += 1
    return verdict


def _probe(function: Callable, cases: list[Case], device: str, target: str | None) -> Candidate:
    """Whether its results carry gradients, and how many it gives, told by the first case that it takes."""
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
        given = out if isinstance(out, tuple) else (out,)
        carries = any(isinstance(t, Tensor) and t.requires_grad for t in given)
        return replace(candidate, has_backward=carries and not case.is_step, gives=len(given))
    return candidate


def _arguments(case: Case, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """Tensors, and options that are not at the op's default; `chunk_size` says nothing of the result."""
    parameters = inspect.signature(getattr(ssm_kernels, case.op)).parameters
    options = {k: v for k, v in case.options.items() if v != parameters[k].default and k != "chunk_size"}
    return {**tensors, **options}


def _results(case: Case) -> tuple[str, ...]:
    """Names of what the op gives."""
    if case.is_step:
        return StepOutput._fields
    kind = typing.get_type_hints(getattr(ssm_kernels, case.op))["return"]
    return getattr(kind, "_fields", ("y",))


def _run_reference(case: Case, device: str) -> None:
    with torch.no_grad():
        case.call(case.inputs(device), "reference")
