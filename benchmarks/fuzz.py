"""`ssm-bench fuzz`: random calls of the ops, every backend compared with the reference in float64, until time is up.

A trial is a pure function of its seed: options, sizes, strides, magnitudes, signs and packing. A failing trial is
shrunk, and printed with the command that repeats it. `correctness` describes the comparison. With an infinity among the
inputs, or a result that is not finite, gradients are not compared: they may be products of zero and infinity, which
depend on the implementation.
"""

from __future__ import annotations

import functools
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ssm_kernels import Backend
from ssm_kernels.testing import coarsest_dtype, is_interpreted

from .cases import OPS, SIZES, VARIANTS, Case, Shape, check_ops
from .correctness import Expected, disagreement, expected, results
from .environment import backends, current_device, environment
from .files import write_json
from .options import Fuzz
from .shrink import brief, shrink, smaller_cases

KINDS = ("zeros", "sparse", "denormal", "small", "large", "huge", "outlier", "mixed", "infinite", "negated", "signs")
LAYOUTS = ("transposed", "strided", "expanded")
MUST_BE_FINITE = {
    "selective_scan": ("A",), "cross_selective_scan": ("A",),
    "ssd": ("x", "dt", "A", "B", "C", "dt_bias"),
    "mamba3": ("x", "dt", "A", "B", "C", "B_bias", "C_bias", "mimo_x", "mimo_o", "initial_states.angles",
               "initial_states.ssm", "initial_states.B"),
    "mamba3_step": ("dt", "states.angles", "states.ssm", "states.B"),
    "cross_ssd": ("x", "dt", "A", "B", "C", "dt_bias"),
}  # fmt: skip
"""Arguments that may not be infinite, by the ops' docstrings, or whose infinities a definition spreads: Mamba-3's
reference turns the state, which the fast path does not."""
SIGNED = {"mamba3": ("dt", "A"), "mamba3_step": ("dt", "A"), "ssd": ("A",), "cross_ssd": ("A",)}
"""Arguments that keep their sign. Mamba-3 refuses others, and the growing decays of a chunk of SSD may multiply to
infinity, as its docstring says."""
ORDINARY = {"mamba3": ("large", "huge", "outlier", "mixed")}
"""Magnitudes that an op is not drawn with.

The gradient of an angle is the sum of those by the rotations of B and of C, which cancel but for what the state passes
on: it has the roundings of both.
"""


def run_fuzz(command: Fuzz) -> None:
    """`ssm-bench fuzz`."""
    check_ops(command.op)
    seed = time.time_ns() % 10**9 if command.seed is None else command.seed
    print(f"seed {seed}")
    end, n = time.monotonic() + 60 * command.minutes, 0
    findings: dict[tuple[str, str, str], Finding] = {}
    with current_device(command.device):
        while time.monotonic() < end and (command.trials is None or n < command.trials):
            trial = draw(seed + n, command.op)
            n += 1
            for backend in backends(command.device, trial.case.op):
                if why := wrong(trial, backend, command.device):
                    _record(findings, trial, backend, why, command)
    for finding in findings.values():
        print(f"{finding.seen} trials: {finding.backend}, {finding.trial.case.op}, {finding.why}")
    print(f"{n} trials from seed {seed}; {len(findings)} kinds of disagreement")
    found = {"seed": seed, "trials": n, "findings": [finding.report() for finding in findings.values()]}
    write_json(command.out, found | environment(command.device))
    if findings:
        sys.exit(1)


def _record(
    findings: dict[tuple[str, str, str], Finding], trial: Trial, backend: Backend, why: str, command: Fuzz
) -> None:
    """Shrink a failing trial and print it, or count it with an earlier one that failed in the same way."""
    # The same output of the same op, wrong in the same way, most often has the same cause.
    key = (trial.case.op, backend, why.split(" at ")[0][:60])
    if key in findings:
        findings[key].seen += 1
        return
    device = command.device
    smallest, why_smallest = shrink(trial, why, smaller, lambda t: wrong(t, backend, device))
    findings[key] = Finding(trial, backend, why, smallest, why_smallest)
    print(
        f"FAILED {backend}: {trial}\n  {why}\n  smallest: {smallest}\n  {why_smallest}\n  {brief(smallest)}\n"
        f"  again: ssm-bench fuzz --seed {trial.seed} --trials 1 --device {device} --op {' '.join(command.op)}"
    )


@dataclass(frozen=True)
class Trial:
    """One call: a case, the seed of its values, and the tensors with unusual values or strides."""

    case: Case
    seed: int
    kinds: tuple[tuple[str, str], ...] = ()
    """Names of tensors, each with one of `KINDS`."""
    layouts: tuple[tuple[str, str], ...] = ()
    """Names of tensors, each with one of `LAYOUTS`."""

    def __str__(self) -> str:
        tensors = [f"{name} {kind}" for name, kind in self.kinds + self.layouts]
        return f"{self.case}, {', '.join(tensors) or 'ordinary values'}"

    def inputs(self, device: str) -> dict[str, Tensor]:
        tensors = self.case.inputs(device, self.seed)
        generator = torch.Generator(device).manual_seed(self.seed + 1)
        with torch.no_grad():
            for name, kind in self.kinds:
                if name in tensors:
                    tensors[name] = _of_kind(tensors[name], name, kind, generator)
            for name, layout in self.layouts:
                if name in tensors:
                    tensors[name] = _laid_out(tensors[name], layout)
        # Bounds anywhere, so that some sequences are empty.
        if "cu_seqlens" in tensors:
            size = (self.case.sequences - 1,)
            bounds = torch.randint(self.case.shape.length + 1, size, device=device, generator=generator)
            ends = tensors["cu_seqlens"][[0, -1]]
            tensors["cu_seqlens"] = torch.cat([ends[:1], bounds.sort().values.to(ends.dtype), ends[1:]])
        return tensors


@dataclass
class Finding:
    """A failing trial and the smallest one found that fails."""

    trial: Trial
    backend: str
    why: str
    smallest: Trial
    why_smallest: str
    seen: int = 1
    """Number of trials that failed in the same way."""

    def report(self) -> dict[str, Any]:
        """The finding for a JSON file, with trials as expressions that make them."""
        return asdict(self) | {"trial": brief(self.trial), "smallest": brief(self.smallest)}


def draw(seed: int, ops: tuple[str, ...] = OPS) -> Trial:
    """Draw the trial of a seed."""
    r = random.Random(seed)
    op = r.choice(ops)
    max_length, max_width = (12, 6) if is_interpreted() else (80, 24)
    groups = r.choice((1, 1, 1, 2, 3))
    # Very short sequences are drawn often: shorter than a chunk, or than the convolution's window.
    length = r.choice((1, 2, 3, r.randint(1, max_length), r.randint(1, max_length), r.randint(1, max_length)))
    shape = Shape(
        batch=r.randint(1, 3), length=length, channels=groups * r.randint(1, max_width),
        d_state=r.randint(1, max_width), heads=groups * r.randint(1, 3), headdim=r.randint(1, max_width),
        groups=groups, width=r.randint(1, 5),
    )  # fmt: skip
    if "rank" in SIZES[op] and r.random() < 0.5:
        # The ranks multiply the steps of SSD; MIMO turns pairs of halves.
        shape = replace(shape, rank=r.randint(2, 4), d_state=2 * shape.d_state)
    if "height" in SIZES[op]:
        height = r.randint(1, 8)
        shape = replace(shape, height=height, length=height * r.randint(1, max(1, max_length // height)))
    options: dict[str, Any] = {}
    for variant in r.sample(VARIANTS[op], k=min(len(VARIANTS[op]), r.randint(0, 3))):
        options |= variant
    # Packing is by cu_seqlens or by seq_idx, and cu_seqlens packs one row.
    if options.get("seq_idx"):
        options.pop("sequences", None)
    if "sequences" in options:
        options["sequences"] = r.randint(1, 7)
        shape = replace(shape, batch=1)
    # B and C of (D, N), constant in time, have no groups.
    if options.get("constant"):
        shape = replace(shape, groups=1)
    dtype = r.choice(("fp32", "fp32", "fp32", "bf16", "fp16", "fp64"))
    case = Case(op, shape, dtype, chunk_size=r.choice((1, 2, 7, 16, 32, 64)), **options)
    names = list(case.sizes())
    kinds = tuple((n, r.choice(_kinds_of(op, n))) for n in names if r.random() < 0.2)
    layouts = tuple((n, r.choice(LAYOUTS)) for n in names if r.random() < 0.2)
    return Trial(case, seed, kinds, layouts)


def _kinds_of(op: str, name: str) -> list[str]:
    """Kinds of values that an argument of an op is drawn with."""
    left_out = set(ORDINARY.get(op, ()))
    if name in MUST_BE_FINITE.get(op, ()):
        left_out.add("infinite")
    if name in SIGNED.get(op, ()):
        left_out |= {"negated", "signs"}
    return [kind for kind in KINDS if kind not in left_out]


def _of_kind(t: Tensor, name: str, kind: str, generator: torch.Generator) -> Tensor:
    """Values of a kind. A large dt is positive; `negated` makes decays grow, of A or dt, and `signs` some of them."""
    tiny, largest = torch.finfo(t.dtype).tiny, torch.finfo(t.dtype).max
    if kind == "zeros":
        return torch.zeros_like(t)
    if kind in ("infinite", "outlier"):
        t = t.clone(memory_format=torch.contiguous_format)
        if t.numel():
            where = torch.randint(0, t.numel(), (1,), device=t.device, generator=generator)
            t.view(-1)[where] = (-1 if name == "A" else 1) * (torch.inf if kind == "infinite" else 1e4)
        return t
    if kind == "negated":
        return -t
    if kind in ("sparse", "signs"):
        chosen = torch.randint(2, t.shape, device=t.device, generator=generator).bool()
        return torch.where(chosen, t, torch.zeros_like(t) if kind == "sparse" else -t)
    if kind == "mixed":
        exponent = torch.empty(t.shape, device=t.device).uniform_(-4, 4, generator=generator)
        return (t * 10**exponent).clamp(-largest, largest).to(t.dtype)
    scale = {"denormal": tiny / 64, "small": tiny**0.5, "large": 1e4, "huge": largest**0.4}[kind]
    if name == "dt" and kind in ("large", "huge"):
        t = t.abs()  # softplus of large negative values is 0
    return (t.double() * scale).clamp(-largest, largest).to(t.dtype)


def _laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values with other strides; `expanded` repeats the first row."""
    if layout == "transposed":
        reversed_dims = list(reversed(range(t.dim())))
        return t.permute(reversed_dims).contiguous().permute(reversed_dims)
    if layout == "strided":
        # NaN beside each element shows a read that ignores the stride.
        buffer = t.new_full((*t.shape, 3), torch.nan)
        buffer[..., 1] = t
        return buffer[..., 1]
    return t[:1].expand(t.shape)


def wrong(trial: Trial, backend: Backend, device: str) -> str:
    """Describe the failure of a backend in a trial; empty if it passes.

    Raises:
        ValueError: the reference refuses the call.
    """
    right = _expected(trial, device)
    tensors = trial.inputs(device)
    try:
        actual = results(functools.partial(trial.case.function, backend=backend), tensors, not trial.case.is_step)
    except Exception as e:  # any error where the reference has none is a finding
        return f"raises {type(e).__name__}: {e}"
    outputs = {name: t for name, t in actual.items() if not name.startswith("gradient of ")}
    # With anything that is not finite, gradients depend on the implementation: the outputs alone are compared.
    of_reference = [of[name] for of in (right.exact, right.rounded) for name in outputs]
    if not all(t.isfinite().all() for t in [*tensors.values(), *of_reference]):
        actual = outputs
    if backend == "triton" and not is_interpreted():
        right = replace(right, operands=coarsest_dtype(tensors))
    return disagreement(right, actual)


@functools.lru_cache(maxsize=2)
def _expected(trial: Trial, device: str) -> Expected:
    """Results of the reference in a trial, computed once for all backends."""
    reference = functools.partial(trial.case.function, backend="reference")
    return expected(reference, trial.inputs(device), not trial.case.is_step)


def smaller(trial: Trial) -> Iterator[Trial]:
    """Trials with one unusual tensor less, or a smaller case."""
    for field in ("kinds", "layouts"):
        unusual = getattr(trial, field)
        for i in range(len(unusual)):
            yield replace(trial, **{field: unusual[:i] + unusual[i + 1 :]})
    for case in smaller_cases(trial.case):
        yield replace(trial, case=case)
