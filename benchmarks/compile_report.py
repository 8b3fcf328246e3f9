"""What the compiler makes of every kernel that the ops would launch, with no GPU: registers, spills, instructions.

There is no list of kernels here. The ops are called, forward and backward, on the cases of the table with tensors on
the meta device; Triton's own launcher works out what it would compile, and stops there. Equal requests are compiled
once, in other processes.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from ssm_kernels.testing import BODIES, Target, fake_target, is_interpreted

from .cases import Case


@dataclass(frozen=True)
class Architecture:
    """What a multiprocessor has, and a block may have of it."""

    backend: str
    arch: int | str
    num_sms: int
    """Of the card that is named; launches spread their programs over so many."""
    shared_block: int
    """Bytes of shared memory (LDS)."""
    shared: int
    warps: int
    blocks: int

    @property
    def warp(self) -> int:
        return 32 if self.backend == "cuda" else 64


# Limits: CUDA C++ programming guide, "Technical Specifications per Compute Capability"; AMD CDNA 3 ISA reference and
# HIP's table of hardware features for gfx942. Processors: the vendors' data sheets.
ARCHITECTURES: dict[str, Architecture] = {
    "sm_80": Architecture("cuda", 80, 108, 163 << 10, 164 << 10, 64, 32),  # A100
    "sm_86": Architecture("cuda", 86, 82, 99 << 10, 100 << 10, 48, 16),  # RTX 3090
    "sm_89": Architecture("cuda", 89, 128, 99 << 10, 100 << 10, 48, 24),  # RTX 4090
    "sm_90": Architecture("cuda", 90, 132, 227 << 10, 228 << 10, 64, 32),  # H100
    "sm_100": Architecture("cuda", 100, 148, 227 << 10, 228 << 10, 64, 32),  # B200
    "sm_120": Architecture("cuda", 120, 170, 99 << 10, 100 << 10, 48, 24),  # RTX 5090
    "gfx942": Architecture("hip", "gfx942", 304, 64 << 10, 64 << 10, 32, 32),  # MI300X
}


class Request(NamedTuple):
    """One compilation: what Triton's launcher found in the arguments of a launch."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], object]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, object]
    target: str
    case: str
    """The first case that launches it."""

    @property
    def name(self) -> str:
        parts = self.module.split(".")
        return f"{parts[1]}.{self.kernel}" if len(parts) > 2 else self.kernel


@dataclass
class Row:
    """What came of one compilation."""

    kernel: str
    target: str
    case: str
    warps: int
    registers: int = 0
    spills: int = 0
    """Bytes of stack a thread, or, on AMD, registers that were spilled."""
    shared: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    """Instructions by name."""
    exponentials: int = 0
    shuffles: int = 0
    instructions: int = 0
    occupancy: float = 0.0
    """Share of the warps that a multiprocessor can hold, by registers, shared memory and blocks."""
    seconds: float = 0.0
    """Of processor time that the compiler took."""
    problem: str | None = None


def record(cases: Iterable[Case], target: str) -> list[Request]:
    """What the cases would launch on such a GPU, forward and backward, each once.

    Raises:
        ValueError: Triton's interpreter is on, so that there is nothing to compile.
    """
    if is_interpreted():
        raise ValueError("the kernels are compiled here, not interpreted: unset TRITON_INTERPRET")
    architecture = ARCHITECTURES[target]
    found: dict[str, Request] = {}
    for case in cases:
        with _launches(architecture, functools.partial(_keep, found, target, str(case))):
            _call(case)
    return list(found.values())


def _keep(found: dict[str, Request], target: str, case: str, *, fn, compile, **_) -> bool:
    """Triton's hook before it compiles: remember what for, and say that it need not."""
    described = json.loads(compile["specialization_data"])
    described.pop("key", None)
    found.setdefault(
        json.dumps(described),
        Request(
            fn.module,
            fn.name,
            compile["signature"],
            compile["constants"],
            compile["configs"][0],
            described["options"],
            target,
            case,
        ),  # fmt: skip
    )
    return True


def _call(case: Case) -> None:
    inputs = case.inputs("meta")
    with torch.no_grad():
        case.call(inputs, "triton")
    if not case.is_step:
        outputs = case.call(inputs, "triton")
        # With initial states the final ones are used too, as when a state is carried through a training step.
        used = outputs if case.initial_states or case.op == "add_rms_norm" else outputs[:1]
        wanted = [t for t in inputs.values() if t.requires_grad]
        torch.autograd.grad(used, wanted, [torch.empty_like(t) for t in used], allow_unused=True)


@contextlib.contextmanager
def _launches(architecture: Architecture, hook: Callable[..., bool]) -> Iterator[None]:
    """Inside, launches on meta tensors compile and run nothing; `hook` gets what would be compiled."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    target = GPUTarget(architecture.backend, architecture.arch, architecture.warp)
    # Not by the driver's own properties and reset: they look for a GPU.
    active, before = vars(driver).copy(), knobs.runtime.jit_cache_hook
    driver.set_active(_Driver(target))
    knobs.runtime.jit_cache_hook = hook
    try:
        with fake_target(Target((architecture.backend, architecture.arch), architecture.num_sms)), _RunBodies():
            yield
    finally:
        vars(driver).update(active)
        knobs.runtime.jit_cache_hook = before


class _Driver:
    """A driver as far as Triton's launcher asks one before it compiles."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # the launcher keeps what it knows of a device under this key

    def get_current_stream(self, device) -> int:
        return 0


class _RunBodies(TorchDispatchMode):
    """Runs the ops themselves on meta tensors, where the dispatcher would take their fakes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return BODIES.get(func, func)(*args, **(kwargs or {}))


def compile_all(requests: list[Request], jobs: int, cache: Path | None = None) -> list[Row]:
    """Compile in `jobs` processes, into a cache of Triton's where one is given."""
    with tempfile.TemporaryDirectory() as scratch:
        context = multiprocessing.get_context("spawn")
        begin = {"initializer": _begin, "initargs": (str(cache or scratch),)}
        with concurrent.futures.ProcessPoolExecutor(jobs, context, **begin) as pool:
            # What takes the compiler longest comes first, so that no process is left with it at the end.
            longest_first = sorted(requests, key=lambda r: not r.name.startswith("selective_scan"))
            futures = [pool.submit(compile_one, request) for request in longest_first]
            for _ in tqdm(concurrent.futures.as_completed(futures), total=len(futures), unit="kernel", disable=None):
                pass
            return [f.result() for f in futures]


def _begin(cache: str) -> None:
    from triton import knobs

    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # ends when the parent is killed
    torch.set_num_threads(1)
    knobs.cache.dir = cache
    warnings.filterwarnings("ignore")


def compile_one(request: Request) -> Row:
    """Compile, and read from what comes out what the report tells."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    architecture = ARCHITECTURES[request.target]
    row = Row(request.name, request.target, request.case, int(request.options["num_warps"]))
    kernel = getattr(importlib.import_module(request.module), request.kernel)
    source = ASTSource(kernel, request.signature, request.constants, request.attributes)
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in request.options.items()}
    begin = _processor_time()
    try:
        target = GPUTarget(architecture.backend, architecture.arch, architecture.warp)
        compiled = triton.compile(source, target=target, options=options)
        row.seconds = _processor_time() - begin
    except Exception as e:  # whatever stops the compiler is what the report is for
        row.problem = f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"
        return row
    row.shared = compiled.metadata.shared
    if architecture.backend == "cuda":
        _read_cubin(row, compiled.asm["cubin"])
    else:
        _read_amdgcn(row, compiled.asm["amdgcn"])
    row.occupancy = _occupancy(row, architecture)
    problems = [f"{row.spills} spilled"] if row.spills else []
    if row.shared > architecture.shared_block:
        problems.append(f"{row.shared:,} bytes of shared memory, and a block has {architecture.shared_block:,}")
    # Tensor memory: 512 columns a multiprocessor (PTX ISA, tcgen05).
    if (columns := getattr(compiled.metadata, "tmem_size", None) or 0) > 512:
        problems.append(f"{columns} columns of tensor memory, and there are 512")
    row.problem = "; ".join(problems) or None
    return row


def _processor_time() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _read_cubin(row: Row, cubin: bytes) -> None:
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tools / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    row.registers = int(re.search(r"REG:(\d+)", usage)[1])
    names = collections.Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass))
    names.pop("NOP", None)
    # A stack that no instruction reads or writes holds no spill: on Blackwell some kernels reserve one.
    row.spills = int(re.search(r"STACK:(\d+)", usage)[1]) if _count(names, r"LDL|STL") else 0
    row.instructions = names.total()
    row.exponentials = _count(names, r"MUFU\.EX2")
    row.shuffles = _count(names, r"SHFL")
    row.matrix = _matrix(names, r"HGMMA|HMMA|DMMA|UTC\w*MMA")


def _read_amdgcn(row: Row, assembly: str) -> None:
    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    row.registers = metadata("vgpr_count")
    row.spills = metadata("vgpr_spill_count")  # a scalar register spills to a lane of a vector one, not to memory
    names = collections.Counter(re.findall(r"^\t([a-z][a-z0-9_]*)(?=\s)", assembly, re.MULTILINE))
    row.instructions = names.total()
    row.exponentials = _count(names, r"v_exp_")
    row.shuffles = _count(names, r"ds_bpermute|ds_permute|ds_swizzle|v_permlane|\w+_dpp")
    row.matrix = _matrix(names, r"v_mfma")


def _count(names: collections.Counter, pattern: str) -> int:
    return sum(times for name, times in names.items() if re.match(pattern, name))


def _matrix(names: collections.Counter, pattern: str) -> dict[str, int]:
    """Instructions by the part of their name that says what unit runs them."""
    found: collections.Counter = collections.Counter()
    for name, times in names.items():
        if match := re.match(pattern, name):
            found[match[0]] += times
    return dict(found)


def _occupancy(row: Row, a: Architecture) -> float:
    """Registers come in 256 a warp of 65,536 (NVIDIA), or in 8 a lane of 512 for each of four SIMDs (AMD)."""
    blocks = min(a.blocks, a.warps // row.warps)
    if a.backend == "cuda":
        blocks = min(blocks, 65536 // (-(-row.registers * 32 // 256) * 256 * row.warps))
        blocks = min(blocks, a.shared // (row.shared + 1024))  # the system keeps 1 KB a block
        return blocks * row.warps / a.warps
    waves = 4 * min(a.warps // 4, 512 // (-(-max(row.registers, 1) // 8) * 8))
    if row.shared:
        waves = min(waves, a.shared // row.shared * row.warps)
    return min(waves, blocks * row.warps) / a.warps


def table(rows: list[Row]) -> str:
    lines = [
        f"{'target':<8}{'kernel':<34}{'warps':>6}{'regs':>6}{'spills':>8}{'shared':>9}{'matrix':>14}{'exp':>6}"
        f"{'shfl':>6}{'instr':>8}{'occup.':>8}  case"
    ]
    for r in sorted(rows, key=lambda r: (r.target, r.kernel, r.case)):
        matrix = " ".join(f"{times} {name}" for name, times in r.matrix.items())
        lines.append(
            f"{r.target:<8}{r.kernel:<34}{r.warps:>6}{r.registers:>6}{r.spills:>8}{r.shared:>9}{matrix:>14}"
            f"{r.exponentials:>6}{r.shuffles:>6}{r.instructions:>8}{r.occupancy:>8.0%}  {r.case}"
        )
    failed = [r for r in rows if r.problem]
    lines += [f"FAILED {r.target} {r.kernel}: {r.problem} ({r.case})" for r in failed]
    seconds = sum(r.seconds for r in rows)
    lines.append(f"{len(rows)} kernels compiled in {seconds:.0f} s of processor time, {len(failed)} with a problem")
    return "\n".join(lines)
