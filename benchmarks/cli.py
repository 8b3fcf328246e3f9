"""The `ssm-bench` command."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from . import compare, compile_report, fuzz, gpu_suite, report, verify
from .cases import DTYPES, OPS, Case, Shape, published, shipped
from .measure import Mode, Timing, allowed_error, environment, error, on, peak_memory, time_together
from .roofline import DEVICES, cost, device_named, floor
from .workloads import Workload, build, case_of, default_shape, exact, named_shape

Op = Literal["selective_scan", "ssd", "causal_conv1d", "mamba_block", "mamba2_block"]
Impl = Literal["triton", "torch", "reference", "mamba_ssm", "causal_conv1d", "fla", "transformers"]


@dataclass
class Run:
    """Measure implementations of an op side by side: time, error, and peak memory of the process."""

    op: tyro.conf.Positional[Op]
    impl: tuple[Impl, ...] = ()
    """By default transformers, which is what that library runs where no kernels are installed, beside ours: triton
    on a GPU and torch elsewhere. triton on a CPU runs in its interpreter, with TRITON_INTERPRET=1."""
    mode: tuple[Mode, ...] = ("fwd", "fwd+bwd")
    metric: tuple[Literal["time", "memory", "error"], ...] = ("time", "memory", "error")
    dtype: Literal["fp32", "fp64", "bf16", "fp16"] = "fp32"
    device: str = "cpu"
    """cuda, or one of several such as cuda:1."""
    shape: Literal["default", "130m", "370m", "790m", "1.3b", "2.7b", "vision", "long"] = "default"
    """A published model's layer at batch 8 and length 2,048; vision: 2.7b on an image's 729 patches; long: 130m over
    65,536 steps."""
    batch: int | None = None
    """Sizes; those not given are the shape's."""
    length: int | None = None
    channels: int | None = None
    d_state: int | None = None
    heads: int | None = None
    headdim: int | None = None
    calls: int = 15
    """Timed calls an implementation; one that takes more than five seconds is called once."""
    out: Path | None = None
    """JSON file to write; beside it go a table as .csv, a plot as .png, and all of it in one .html."""

    def run(self) -> None:
        with on(self.device):
            self._run()

    def _run(self) -> None:
        sizes = ("batch", "length", "channels", "d_state", "heads", "headdim")
        base = named_shape(self.op, self.shape)
        shape = replace(base, **{s: getattr(self, s) for s in sizes if getattr(self, s) is not None})
        dtype = DTYPES[self.dtype]
        wanted = self.impl or (_fastest(self.device), "transformers")
        workloads, missing, errors, allowed = _prepare(
            self.op, wanted, shape, dtype, self.device, "error" in self.metric
        )
        rows: list[dict[str, object]] = []
        for mode in self.mode:
            timings = time_together(workloads, mode, self.calls) if "time" in self.metric and workloads else {}
            for impl in (*workloads, *missing):
                row: dict[str, object] = {"impl": impl, "mode": mode}
                rows.append(row)
                if impl in missing:
                    row["missing"] = missing[impl]
                    continue
                if impl in timings:
                    row |= {"time": asdict(timings[impl])}
                    row |= _against_roofline(self.op, shape, self.dtype, mode, timings[impl].median, self.device)
                if "memory" in self.metric:
                    row["peak_memory"] = peak_memory(self.op, impl, shape, mode, dtype, self.device)
                if impl in errors:
                    row |= {"error": errors[impl], "allowed_error": allowed, "is_right": errors[impl] <= allowed}
        print(f"{self.op}, {self.dtype}, {shape}")
        print(table(rows))
        case = {"op": self.op, "dtype": self.dtype, "shape": asdict(shape)}
        result = {**case, "rows": rows, **environment(self.device)}
        _write(self.out, result)
        if self.out is not None:
            report.to_csv(result, self.out.with_suffix(".csv"))
            picture = None
            if "time" in self.metric:
                try:
                    picture = report.bars(result)
                    self.out.with_suffix(".png").write_bytes(picture)
                except ModuleNotFoundError as e:
                    print(f"no plot: {e}")
            report.to_html(result, picture, self.out.with_suffix(".html"))
        _exit_if_wrong(errors, allowed)


@dataclass
class Sweep:
    """Time an op against its length (a scan's time grows in proportion), or another size, and plot it.

    At the first size, results are held against the reference in float64; exit status 1 if one is wrong.
    """

    op: tyro.conf.Positional[Op]
    impl: tuple[Impl, ...] = ()
    """By default triton on a GPU, torch elsewhere."""
    mode: Mode = "fwd+bwd"
    dtype: Literal["fp32", "fp64", "bf16", "fp16"] = "fp32"
    device: str = "cpu"
    batch: int = 1
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    batches: tuple[int, ...] = ()
    """In place of lengths, as those below; the length is then the first of `lengths`."""
    d_states: tuple[int, ...] = ()
    chunk_sizes: tuple[int, ...] = ()
    """Of SSD."""
    calls: int = 3
    out: Path = Path("sweep.json")
    """JSON file to write; the plot goes beside it as PNG."""

    def run(self) -> None:
        with on(self.device):
            self._run()

    def _run(self) -> None:
        others = {"batch": self.batches, "d_state": self.d_states, "chunk_size": self.chunk_sizes}
        given = {name: values for name, values in others.items() if values}
        if len(given) > 1:
            raise ValueError(f"sweep goes over one size at a time; got {', '.join(given)}")
        over, values = next(iter(given.items()), ("length", self.lengths))
        if over == "chunk_size" and self.op != "ssd":
            raise ValueError(f"chunk_sizes are those of ssd; got {self.op}")
        dtype = DTYPES[self.dtype]
        base = replace(default_shape(self.op), batch=self.batch, length=self.lengths[0])
        impls: tuple[str, ...] = self.impl or (_fastest(self.device),)
        seconds: dict[str, list[float]] = {}
        missing: dict[str, str] = {}
        errors: dict[str, float] = {}
        allowed, floors = 0.0, []
        for value in values:
            chunk = {"chunk_size": value} if over == "chunk_size" else {}
            shape = base if chunk else replace(base, **{over: value})
            floors.append(_against_roofline(self.op, shape, self.dtype, self.mode, 1.0, self.device, **chunk)["floor"])
            workloads, refused, found, bound = _prepare(self.op, impls, shape, dtype, self.device, not seconds, **chunk)
            if not seconds:
                missing, errors, allowed = refused, found, bound
                seconds = {impl: [] for impl in workloads}
                impls = tuple(workloads)
                for impl, why in missing.items():
                    print(f"{impl:<12} {why}")
            for impl, timing in time_together(workloads, self.mode, self.calls).items():
                seconds[impl].append(timing.median)
                print(
                    f"{impl:<12} {over} {value:>7,}  {timing.median:8.3f} s  "
                    f"{1e6 * timing.median / shape.length:7.2f} us a step"
                )
        shape = {"batch": self.batch, "length": self.lengths[0]}
        result = {"op": self.op, "mode": self.mode, **shape, "over": over, "values": values, "seconds": seconds}
        result |= {"missing": missing, "errors_at_the_first": errors, "floors": floors if all(floors) else None}
        _write(self.out, result | {"dtype": self.dtype} | environment(self.device))
        self.out.with_suffix(".png").write_bytes(report.against(result))
        _exit_if_wrong(errors, allowed)


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
        _write(self.out, {"rows": rows, "devices": {name: asdict(DEVICES[name]) for name in self.device}})


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
        _write(self.out, {"rows": [asdict(row) for row in rows], **environment()})
        if self.out is not None:
            self.out.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
        if any(row.problem for row in rows):
            sys.exit(1)


@dataclass
class Compare:
    """Hold a later file of `run` against an earlier one; exit status 1 if something became slower, not by chance.

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
    finite: bool = False
    """No infinities among the inputs."""
    device: str = "cpu"
    out: Path | None = None
    """JSON file to write."""

    def run(self) -> None:
        _check_ops(self.op)
        seed = time.time_ns() % 10**9 if self.seed is None else self.seed
        print(f"seed {seed}")
        with on(self.device):
            n, findings = fuzz.fuzz(seed, self.minutes, self.op, self.device, self.trials, self.finite)
        for finding in findings:
            print(f"{finding.seen} trials: {finding.backend}, {finding.trial.case.op}, {finding.why}")
        print(f"{n} trials from seed {seed}; {len(findings)} kinds of disagreement")
        found = {"seed": seed, "trials": n, "findings": [finding.report() for finding in findings]}
        _write(self.out, found | environment(self.device))
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
    "compile-report": CompileReport,
    "roofline": Roofline,
    "gpu-suite": GPUSuite,
    "compare": Compare,
    "verify": Verify,
    "fuzz": Fuzz,
}


def _check_ops(ops: tuple[str, ...]) -> None:
    if unknown := [op for op in ops if op not in OPS]:
        raise ValueError(f"op must be among {', '.join(OPS)}; got {', '.join(unknown)}")


def _fastest(device: str) -> Impl:
    return "torch" if device == "cpu" else "triton"


def table(rows: list[dict]) -> str:
    """Rows as lines of text; ratios are against the first implementation."""
    first = {row["mode"]: row for row in reversed(rows) if row["impl"] == rows[0]["impl"]}
    lines = [f"{'':<22}{'ms':>12}{'quartiles':>22}{'times':>9}{'roofline':>9}{'peak MiB':>10}{'error':>10}"]
    for row in rows:
        line = f"{row['impl']:<13}{row['mode']:<9}"
        if "missing" in row:
            lines.append(f"{line}    {row['missing']}")
            continue
        if "time" in row:
            t = Timing(**row["time"])
            spread = f"{1e3 * t.low:.1f} to {1e3 * t.high:.1f}"
            ratio = t.median / first[row["mode"]]["time"]["median"]
            line += f"{1e3 * t.median:>12.1f}{spread:>22}{ratio:>9.1f}"
            line += f"{row['share']:>9.0%}" if row["share"] is not None else f"{'unknown':>9}"
        if "peak_memory" in row:
            line += f"{row['peak_memory'] / 2**20:>10.1f}"
        if "error" in row:
            line += f"{row['error']:>10.1e}" + "  WRONG" * (not row["is_right"])
        lines.append(line)
    return "\n".join(lines)


def _write(path: Path | None, result: dict) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {path}")


def _prepare(
    op: str, impls: tuple[str, ...], shape: Shape, dtype: torch.dtype, device: str, with_errors: bool, **options: object
) -> tuple[dict[str, Workload], dict[str, str], dict[str, float], float]:
    """What can run here, why the rest cannot, errors by implementation, and how large they may be.

    Raises:
        ValueError: nothing can run.
    """
    workloads, missing, errors = {}, {}, {}
    want, allowed = None, 0.0
    if with_errors:
        want = exact(op, shape, dtype, device=device)
        reference = build(op, "reference", shape, dtype, device=device)
        allowed = allowed_error(error(op, reference, shape, dtype, device, want), dtype)
    for impl in impls:
        try:
            workload = build(op, impl, shape, dtype, device=device, **options)
            if want is not None:
                errors[impl] = error(op, workload, shape, dtype, device, want)
            workloads[impl] = workload
        except (ModuleNotFoundError, ValueError, RuntimeError) as e:
            missing[impl] = str(e).splitlines()[0]
    if not workloads:
        raise ValueError("; ".join(missing.values()))
    return workloads, missing, errors, allowed


def _exit_if_wrong(errors: dict[str, float], allowed: float) -> None:
    if wrong := [impl for impl, off in errors.items() if off > allowed]:
        sys.exit(f"ssm-bench: wrong: {', '.join(wrong)}; more than {allowed:.1e} off the reference in float64")


def _against_roofline(
    op: str, shape: Shape, dtype: str, mode: str, seconds: float, device: str, **options: object
) -> dict:
    """The least time, what bounds it and the share of it that was reached, where the device's figures are known."""
    case = case_of(op, shape, DTYPES[dtype], **options)
    known = None if device == "cpu" else device_named(torch.cuda.get_device_name(device))
    if case is None or known is None or dtype == "fp64":
        return {"floor": None, "bound": None, "share": None}
    least = floor(cost(case, mode), known, DTYPES[dtype])
    return {"floor": least.seconds, "bound": least.bound, "share": least.seconds / seconds}


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
