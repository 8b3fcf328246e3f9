"""`ssm-bench run` and `sweep`: implementations of an op side by side."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from . import report
from .cases import DTYPES, Shape
from .measure import Mode, Timing, allowed_error, environment, error, on, peak_memory, time_together
from .report import write_json
from .roofline import cost, device_named, floor
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
        write_json(self.out, result)
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
        write_json(self.out, result | {"dtype": self.dtype} | environment(self.device))
        self.out.with_suffix(".png").write_bytes(report.against(result))
        _exit_if_wrong(errors, allowed)


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
