"""Random calls of the ops, every path against the reference in float64, until time is up.

A trial is a pure function of its seed: options, sizes, layouts in memory, magnitudes and packing. What fails is made
smaller, and printed with the command that repeats it. `agreement` says what is compared, and how infinities are. With
an infinity among the inputs, or a result that is not finite, gradients are not compared: which products of zero and
infinity a gradient is made of is the implementation's own affair.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ssm_kernels.testing import coarsest_dtype, is_interpreted

from .agreement import Expected, brief, disagreement, expected, results, shrink, smaller_cases
from .cases import OPS, SIZES, VARIANTS, Case, Shape

KINDS = ("zeros", "denormal", "small", "large", "huge", "mixed", "infinite")
LAYOUTS = ("transposed", "strided", "expanded")
MUST_BE_FINITE = {
    "selective_scan": ("A",), "cross_selective_scan": ("A",),
    "ssd": ("x", "dt", "A", "B", "C", "dt_bias"), "cross_ssd": ("x", "dt", "A", "B", "C", "dt_bias"),
}  # fmt: skip
"""Arguments that may not be infinite, by what the ops' docstrings say."""


@dataclass(frozen=True)
class Trial:
    """One call: a case, the seed of its values, and how some of its tensors differ from the ordinary."""

    case: Case
    seed: int
    kinds: tuple[tuple[str, str], ...] = ()
    """Tensors by name, and of what magnitude."""
    layouts: tuple[tuple[str, str], ...] = ()

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
        if "cu_seqlens" in tensors:
            # Anywhere, so that some are empty.
            bounds = torch.randint(
                0, self.case.shape.length + 1, (self.case.sequences - 1,), device=device, generator=generator
            )
            ends = tensors["cu_seqlens"][[0, -1]]
            tensors["cu_seqlens"] = torch.cat([ends[:1], bounds.sort().values.to(ends.dtype), ends[1:]])
        return tensors


@dataclass
class Finding:
    trial: Trial
    backend: str
    why: str
    smallest: Trial
    why_smallest: str
    seen: int = 1
    """How many trials failed alike."""

    def report(self) -> dict[str, object]:
        return {"trial": brief(self.trial), "smallest": brief(self.smallest)} | {
            k: v for k, v in asdict(self).items() if k not in ("trial", "smallest")
        }


def draw(seed: int, ops: tuple[str, ...] = OPS) -> Trial:
    """The trial of a seed."""
    r = random.Random(seed)
    op = r.choice(ops)
    most = 12 if is_interpreted() else 80
    wide = 6 if is_interpreted() else 24
    groups = r.choice((1, 1, 1, 2, 3))
    length = r.choice((1, 2, 3, r.randint(1, most), r.randint(1, most), r.randint(1, most)))
    shape = Shape(
        batch=r.randint(1, 3), length=length, channels=groups * r.randint(1, wide), d_state=r.randint(1, wide),
        heads=groups * r.randint(1, 3), headdim=r.randint(1, wide), groups=groups, width=r.randint(1, 5),
    )  # fmt: skip
    if "height" in SIZES[op].split():
        height = r.randint(1, 8)
        shape = replace(shape, height=height, length=height * r.randint(1, max(1, most // height)))
    options = {}
    for variant in r.sample(VARIANTS[op], k=min(len(VARIANTS[op]), r.randint(0, 3))):
        options |= variant
    if options.get("seq_idx"):
        options.pop("sequences", None)
    if "sequences" in options:
        options["sequences"] = r.randint(1, 7)
        shape = replace(shape, batch=1)
    if options.get("constant"):
        shape = replace(shape, groups=1)
    dtype = r.choice(("fp32", "fp32", "fp32", "bf16", "fp16", "fp64"))
    case = Case(op, shape, dtype, chunk_size=r.choice((1, 2, 7, 16, 32, 64)), **options)
    names = list(case.sizes())
    kinds = tuple(
        (n, r.choice([kind for kind in KINDS if kind != "infinite" or n not in MUST_BE_FINITE.get(op, ())]))
        for n in names
        if r.random() < 0.2
    )
    layouts = tuple((n, r.choice(LAYOUTS)) for n in names if r.random() < 0.2)
    return Trial(case, seed, kinds, layouts)


def _of_kind(t: Tensor, name: str, kind: str, generator: torch.Generator) -> Tensor:
    """Values of a magnitude; A stays negative, and dt not below zero where no softplus makes it so."""
    tiny, most = torch.finfo(t.dtype).tiny, torch.finfo(t.dtype).max
    if kind == "zeros":
        return torch.zeros_like(t)
    if kind == "infinite":
        t = t.clone(memory_format=torch.contiguous_format)
        where = torch.randint(0, t.numel(), (1,), device=t.device, generator=generator) if t.numel() else []
        sign = -1 if name == "A" else 1
        t.view(-1)[where] = sign * torch.inf
        return t
    if kind == "mixed":
        exponent = torch.empty(t.shape, device=t.device).uniform_(-4, 4, generator=generator)
        return (t * 10**exponent).clamp(-most, most).to(t.dtype)
    scale = {"denormal": tiny / 64, "small": tiny**0.5, "large": 1e4, "huge": most**0.4}[kind]
    if name == "dt" and kind in ("large", "huge"):
        t = t.abs()  # else softplus makes zeros of it
    return (t.double() * scale).clamp(-most, most).to(t.dtype)


def _laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values (for `expanded`: those of the first row for all) with other strides."""
    if layout == "transposed":
        back = list(reversed(range(t.dim())))
        return t.permute(back).contiguous().permute(back)
    if layout == "strided":
        room = t.new_full((*t.shape, 3), torch.nan)
        room[..., 1] = t
        return room[..., 1]
    return t[:1].expand(t.shape)


def paths(case: Case, device: str) -> tuple[str, ...]:
    """Backends that can run here. The reference in the case's own dtype runs too, as what tells the tolerance."""
    return ("torch", "triton") if is_interpreted() or device != "cpu" else ("torch",)


def wrong(trial: Trial, backend: str, device: str) -> str:
    """What is wrong with a path in a trial.

    Raises:
        ValueError: the reference refuses the call.
    """
    right = _expected(trial, device)
    tensors = trial.inputs(device)
    try:
        actual = results(functools.partial(trial.case.function, backend=backend), tensors, not trial.case.is_step)
    except Exception as e:  # whatever a path raises where the reference does not is a finding
        return f"raises {type(e).__name__}: {e}"
    outputs = {name: t for name, t in actual.items() if not name.startswith("gradient of ")}
    every = [*tensors.values(), *(kept[name] for kept in (right.exact, right.rounded) for name in outputs)]
    if backend == "triton" and not is_interpreted():
        right = replace(right, operands=coarsest_dtype(tensors))
    return disagreement(right, actual if all(t.isfinite().all() for t in every) else outputs)


@functools.lru_cache(maxsize=2)
def _expected(trial: Trial, device: str) -> Expected:
    """Of a trial, for every path."""
    reference = functools.partial(trial.case.function, backend="reference")
    return expected(reference, trial.inputs(device), not trial.case.is_step)


def smaller(trial: Trial) -> Iterator[Trial]:
    """Trials with one thing less that is not ordinary."""
    for field in ("kinds", "layouts"):
        whole = getattr(trial, field)
        for i in range(len(whole)):
            yield replace(trial, **{field: whole[:i] + whole[i + 1 :]})
    for case in smaller_cases(trial.case):
        yield replace(trial, case=case)


def fuzz(
    seed: int,
    minutes: float,
    ops: tuple[str, ...] = OPS,
    device: str = "cpu",
    trials: int | None = None,
    say: Callable[[str], None] = print,
) -> tuple[int, list[Finding]]:
    """Run the trials of `seed`, `seed + 1`, ... for so long, or so many; give their number and what failed."""
    end = time.monotonic() + 60 * minutes
    findings: dict[tuple[str, str, str], Finding] = {}
    n = 0
    while time.monotonic() < end and (trials is None or n < trials):
        trial = draw(seed + n, ops)
        n += 1
        for backend in paths(trial.case, device):
            why = wrong(trial, backend, device)
            if not why:
                continue
            # The same output of the same op, wrong in the same way, is most often the same fault.
            key = (trial.case.op, backend, why.split(" at ")[0][:60])
            if key in findings:
                findings[key].seen += 1
                continue
            smallest = shrink(trial, smaller, functools.partial(_fails, backend=backend, device=device))
            finding = findings[key] = Finding(trial, backend, why, smallest, wrong(smallest, backend, device))
            say(
                f"FAILED {backend}: {trial}\n  {why}\n  smallest: {smallest}\n  {finding.why_smallest}\n"
                f"  {brief(smallest)}\n"
                f"  again: ssm-bench fuzz --seed {trial.seed} --trials 1 --device {device} --op {' '.join(ops)}"
            )
    return n, list(findings.values())


def _fails(trial: Trial, backend: str, device: str) -> bool:
    try:
        return bool(wrong(trial, backend, device))
    except (ValueError, IndexError, RuntimeError):  # not a call that the reference has
        return False
