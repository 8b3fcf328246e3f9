"""`ssm-bench compile-report`: registers, spills and instructions of every kernel that the ops launch, with no GPU.

No kernel is listed here. The ops are called, forward and backward, on cases with tensors on the meta device; Triton's
own launcher specializes each kernel, and a hook stops it before it compiles. Equal requests are compiled once, in other
processes.
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
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary
from tqdm import tqdm

from ssm_kernels.testing import BODIES, Target, fake_target, is_interpreted

from ..model.files import write_atomic
from ..train.signals import processes_hidden_from_ctrl_c
from . import tables
from .cases import Case, check_ops, published, shipped
from .environment import check_triton, environment
from .files import write_json
from .machine_code.sass import dump, resources
from .options import CompileReport


def run_compile_report(command: CompileReport) -> None:
    """`ssm-bench compile-report`."""
    check_ops(command.op)
    check_triton()
    largest = published("bf16", ("2.7b",))
    default = largest if command.quick else shipped()
    targets = command.target or (("sm_90",) if command.quick else ("sm_80", "sm_90", "sm_100", "gfx942"))
    wanted = dict.fromkeys(targets, default)
    if not command.target and not command.quick:
        wanted |= {target: largest for target in ARCHITECTURES if target not in wanted}
    requests = []
    for target, cases in wanted.items():
        requests += record([case for case in cases if case.op in command.op], target)
    rows = compile_all(requests, command.jobs)
    text = table(rows)
    print(text)
    write_json(command.out, {"rows": [asdict(row) for row in rows], **environment()})
    if command.out is not None:
        write_atomic(command.out.with_suffix(".txt"), text + "\n")
    if any(row.problem for row in rows):
        sys.exit(1)


@dataclass(frozen=True)
class Architecture:
    """Resources of a multiprocessor, and the limits of a block."""

    backend: str
    arch: int | str
    num_sms: int
    """Multiprocessors of the card in the comment; launches size their grids by it."""
    shared_block: int
    """Largest shared memory (LDS) of a block in bytes."""
    shared: int
    """Shared memory (LDS) of a multiprocessor in bytes."""
    warps: int
    """Most resident warps."""
    blocks: int
    """Most resident blocks."""

    @property
    def is_rdna(self) -> bool:
        """AMD's GPUs for graphics: gfx11 and gfx12."""
        return str(self.arch).startswith(("gfx11", "gfx12"))

    @property
    def warp_size(self) -> int:
        return 32 if self.backend == "cuda" or self.is_rdna else 64


# Limits: CUDA C++ programming guide, "Technical Specifications per Compute Capability", and NVIDIA's libcu++,
# `arch_traits.h`, which agree; ROCm, "GPU hardware specifications" (compute units, LDS, registers), and HIP, "Hardware
# features" (warps and blocks of CDNA 2, CDNA 3 and RDNA 3, which CDNA 4 and RDNA 4 are taken to share). LDS of RDNA is
# 128 KB for two compute units. Multiprocessors: the vendors' whitepapers; of B300 all that the chip has ("Inside NVIDIA
# Blackwell Ultra", NVIDIA Technical Blog), which a card may not.
ARCHITECTURES: dict[str, Architecture] = {
    "sm_80": Architecture("cuda", 80, 108, 163 << 10, 164 << 10, 64, 32),  # A100
    "sm_86": Architecture("cuda", 86, 82, 99 << 10, 100 << 10, 48, 16),  # RTX 3090
    "sm_89": Architecture("cuda", 89, 128, 99 << 10, 100 << 10, 48, 24),  # RTX 4090
    "sm_90": Architecture("cuda", 90, 132, 227 << 10, 228 << 10, 64, 32),  # H100
    "sm_100": Architecture("cuda", 100, 148, 227 << 10, 228 << 10, 64, 32),  # B200
    "sm_103": Architecture("cuda", 103, 160, 227 << 10, 228 << 10, 64, 32),  # B300
    "sm_120": Architecture("cuda", 120, 170, 99 << 10, 100 << 10, 48, 24),  # RTX 5090
    "sm_121": Architecture("cuda", 121, 48, 99 << 10, 100 << 10, 48, 24),  # GB10
    "gfx90a": Architecture("hip", "gfx90a", 110, 64 << 10, 64 << 10, 32, 32),  # one of two dies of an MI250X
    "gfx942": Architecture("hip", "gfx942", 304, 64 << 10, 64 << 10, 32, 32),  # MI300X
    "gfx950": Architecture("hip", "gfx950", 256, 160 << 10, 160 << 10, 32, 32),  # MI355X
    "gfx1100": Architecture("hip", "gfx1100", 96, 64 << 10, 64 << 10, 32, 32),  # RX 7900 XTX
    "gfx1201": Architecture("hip", "gfx1201", 64, 64 << 10, 64 << 10, 32, 32),  # RX 9070 XT
}


class Request(NamedTuple):
    """One compilation, as Triton's launcher specialized it for the arguments of a launch."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, Any]
    target: str
    case: str
    """The first case that launches it."""

    @property
    def name(self) -> str:
        parts = self.module.split(".")
        return f"{parts[1]}.{self.kernel}" if len(parts) > 2 else self.kernel


@dataclass
class Row:
    """Result of one compilation."""

    kernel: str
    target: str
    case: str
    warps: int
    registers: int = 0
    spills: int = 0
    """Bytes of stack per thread, or, on AMD, registers that were spilled."""
    shared: int = 0
    """Bytes per block."""
    matrix: dict[str, int] = field(default_factory=dict)
    """Tensor-core instructions by name."""
    exponentials: int = 0
    shuffles: int = 0
    instructions: int = 0
    occupancy: float = 0.0
    """Share of the warps that a multiprocessor can hold, by registers, shared memory and blocks."""
    seconds: float = 0.0
    """Processor time of the compiler."""
    problem: str | None = None


def record(cases: Iterable[Case], target: str) -> list[Request]:
    """Record the compilations that the cases ask for on a GPU, forward and backward, each once.

    Raises:
        ValueError: Triton's interpreter is on, so that there is nothing to compile.
    """
    if is_interpreted():
        raise ValueError("the kernels are compiled here, not interpreted: unset TRITON_INTERPRET")
    architecture = ARCHITECTURES[target]
    found: dict[str, Request] = {}
    for case in cases:
        with intercepted(architecture, functools.partial(_keep_request, found, target, str(case))):
            for _ in passes(case, case.inputs("meta")):
                pass
    return list(found.values())


def _keep_request(found: dict[str, Request], target: str, case: str, *, fn: Any, compile: Any, **_: Any) -> bool:
    """Triton's hook before it compiles: keep the request, and return that there is no need to compile."""
    key, request = request_of(fn, compile, target, case)
    found.setdefault(key, request)
    return True


def request_of(fn: Any, compile: Any, target: str, case: str) -> tuple[str, Request]:
    """A compilation from the arguments of Triton's hook before it compiles, with a key that equal ones share."""
    described = json.loads(compile["specialization_data"])
    described.pop("key", None)
    request = Request(
        fn.module, fn.name, compile["signature"], compile["constants"], compile["configs"][0], described["options"],
        target, case,
    )  # fmt: skip
    return json.dumps(described), request


def passes(
    case: Case, inputs: dict[str, Tensor], call: Callable[[dict[str, Tensor]], tuple[Tensor, ...]] | None = None
) -> Iterator[str]:
    """Call an op as in inference and as in training, and yield the name of each pass once it has run.

    Args:
        case: the call.
        inputs: its inputs, on the meta device.
        call: takes the inputs and returns the results, y first; this project's Triton kernels by default.

    Yields:
        `fwd`, then `train-fwd` and `bwd`; `step` alone for a decoding step.
    """
    call = call or functools.partial(_call_triton, case)
    with torch.no_grad():
        call(inputs)
    yield "step" if case.is_step else "fwd"
    if not case.is_step:
        outputs = call(inputs)
        yield "train-fwd"
        # With initial states the final ones take a gradient too, as when a training step passes a state on.
        used = outputs if case.initial_states or case.op == "add_rms_norm" else outputs[:1]
        wanted = [t for t in inputs.values() if t.requires_grad]
        torch.autograd.grad(used, wanted, [torch.empty_like(t) for t in used], allow_unused=True)
        yield "bwd"


def _call_triton(case: Case, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Call the op as the models do; a step updates its state in place."""
    out = case.run(inputs, "triton")
    return out if isinstance(out, tuple) else (out,)


@contextlib.contextmanager
def intercepted(architecture: Architecture, hook: Callable[..., bool]) -> Iterator[None]:
    """Let launches on meta tensors compile and run nothing; `hook` gets each compilation that they ask for."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    target = GPUTarget(architecture.backend, architecture.arch, architecture.warp_size)
    # `driver.active` and `reset_active` would look for a GPU, so its attributes are saved and restored.
    active, before = vars(driver).copy(), knobs.runtime.jit_cache_hook
    fake: Any = _Driver(target)
    driver.set_active(fake)
    knobs.runtime.jit_cache_hook = hook
    try:
        with fake_target(Target((architecture.backend, architecture.arch), architecture.num_sms)), _RunBodies():
            yield
    finally:
        vars(driver).update(active)
        knobs.runtime.jit_cache_hook = before


class _Driver:
    """The part of a Triton driver that the launcher calls before it compiles."""

    def __init__(self, target: Any):
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # key of the launcher's caches

    def get_current_stream(self, device: object) -> int:
        return 0


class _RunBodies(TorchDispatchMode):
    """Runs the bodies of the ops on meta tensors, where the dispatcher would take their fakes.

    Small tensors are computed on the CPU too: `value_of` gives the tables of segments that a kernel would read.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in BODIES:
            with self:  # for the operations of the body
                return BODIES[func](*args, **kwargs)
        out = func(*args, **kwargs)
        if all(t.is_meta and t.numel() <= MOST_VALUES for t in _tensors(out)):
            self._compute_values(func, args, kwargs, out)
        return out

    def _compute_values(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        known = [_values.get(t) for t in _tensors((args, kwargs)) if t.is_meta]
        if not _tensors(out) or any(value is None for value in known):
            return
        args, kwargs = tree_map(lambda x: _values[x] if isinstance(x, Tensor) and x.is_meta else x, (args, kwargs))
        args, kwargs = tree_map(lambda x: "cpu" if isinstance(x, torch.device) else x, (args, kwargs))
        for tensor, value in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
            _values[tensor] = value


MOST_VALUES = 1 << 16
"""Most elements of a meta tensor that has values."""
_values: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def value_of(tensor: Tensor) -> Tensor | None:
    """Values of a small meta tensor that was computed while launches were intercepted; None of others."""
    return _values.get(tensor)


def compile_all(requests: list[Request], jobs: int, cache: Path | None = None) -> list[Row]:
    """Compile in `jobs` processes, into Triton's cache at `cache` or, by default, a temporary one."""
    # The kernels that take longest come first, so that no process is left alone with one at the end.
    longest_first = sorted(requests, key=lambda r: not r.name.startswith("selective_scan"))
    with tempfile.TemporaryDirectory() as scratch:
        return in_processes(compile_one, longest_first, jobs, cache or Path(scratch))


Input = TypeVar("Input")
Result = TypeVar("Result")


def in_processes(function: Callable[[Input], Result], inputs: list[Input], jobs: int, cache: Path) -> list[Result]:
    """Apply a function that compiles, in `jobs` processes with one cache of Triton, with a progress bar.

    Args:
        function: of a module, so that another process finds it.
        inputs: its inputs.
        jobs: number of processes.
        cache: folder of Triton's cache.

    Returns:
        Its results, in the order of the inputs.
    """
    context, earlier = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    with concurrent.futures.ProcessPoolExecutor(jobs, context, _start_worker, (str(cache),)) as pool:
        try:
            with processes_hidden_from_ctrl_c():
                futures = [pool.submit(function, each) for each in inputs]
            for _ in tqdm(concurrent.futures.as_completed(futures), total=len(futures), unit="kernel", disable=None):
                pass
            return [f.result() for f in futures]
        except BaseException:
            # Else the pool would go on with all that is queued before it ends.
            for process in set(multiprocessing.active_children()) - earlier:
                process.terminate()
            raise


def _start_worker(cache: str) -> None:
    from triton import knobs

    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # ends when the parent is killed
    torch.set_num_threads(1)
    knobs.cache.dir = cache
    warnings.filterwarnings("ignore")


def compile_request(request: Request) -> Any:
    """Compile a request as the launcher would.

    Args:
        request: the compilation.

    Returns:
        Triton's compiled kernel, with its intermediate forms in `asm`.

    Raises:
        Exception: any failure of the compiler.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    architecture = ARCHITECTURES[request.target]
    kernel = getattr(importlib.import_module(request.module), request.kernel)
    while not isinstance(kernel, JITFunction):  # below an autotuner or heuristics
        kernel = kernel.fn
    source = ASTSource(kernel, request.signature, request.constants, request.attributes)
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in request.options.items()}
    target = GPUTarget(architecture.backend, architecture.arch, architecture.warp_size)
    return triton.compile(source, target=target, options=options)


def compile_one(request: Request) -> Row:
    """Compile a request, and read the row from the machine code."""
    architecture = ARCHITECTURES[request.target]
    row = Row(request.name, request.target, request.case, int(request.options["num_warps"]))
    start = _processor_time()
    try:
        compiled = compile_request(request)
        row.seconds = _processor_time() - start
    except Exception as e:  # any failure of the compiler is a row
        row.problem = f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"
        return row
    # The compiler does not check the limits of the target: a launch would.
    row.shared = compiled.metadata.shared
    if architecture.backend == "cuda":
        _read_cubin(row, compiled.asm["cubin"])
    else:
        _read_amdgcn(row, compiled.asm["amdgcn"])
    blocks = resident_blocks(architecture, row.warps, row.registers, row.shared)
    row.occupancy = blocks * row.warps / architecture.warps
    problems = [f"{row.spills} spilled"] if row.spills else []
    if row.shared > architecture.shared_block:
        problems.append(f"{row.shared:,} bytes of shared memory, and a block may have {architecture.shared_block:,}")
    # Tensor memory: 512 columns a multiprocessor (PTX ISA, tcgen05).
    if (columns := getattr(compiled.metadata, "tmem_size", None) or 0) > 512:
        problems.append(f"{columns} columns of tensor memory, and there are 512")
    row.problem = "; ".join(problems) or None
    return row


def _processor_time() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _read_cubin(row: Row, cubin: bytes) -> None:
    usage, sass = dump(cubin, "--dump-resource-usage", "-sass")
    row.registers, stack = resources(usage)
    names = collections.Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass))
    names.pop("NOP", None)
    # A stack that no instruction reads or writes holds no spill: on Blackwell some kernels reserve one.
    row.spills = stack if _count(names, r"LDL|STL") else 0
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
    row.matrix = _matrix(names, r"v_mfma|v_wmma")


def _count(names: collections.Counter[str], pattern: str) -> int:
    return sum(times for name, times in names.items() if re.match(pattern, name))


def _matrix(names: collections.Counter[str], pattern: str) -> dict[str, int]:
    """Tensor-core instructions by the part of their name that matches."""
    found: collections.Counter[str] = collections.Counter()
    for name, times in names.items():
        if match := re.match(pattern, name):
            found[match[0]] += times
    return dict(found)


def resident_blocks(architecture: Architecture, warps: int, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at once, by registers, shared memory, warps and blocks.

    Registers are allocated in units of 256 per warp of 65,536 (NVIDIA), of 8 per lane of 512 for each of four SIMDs
    (AMD CDNA), or of 24 of 1,536 for each of two (RDNA).

    Args:
        architecture: the limits.
        warps: warps of a block.
        registers: registers of a thread.
        shared: bytes of shared memory of a block.

    Returns:
        The number of blocks; 0 where not even one fits.
    """
    blocks = min(architecture.blocks, architecture.warps // warps)
    if architecture.backend == "cuda":
        blocks = min(blocks, 65536 // (-(-max(registers, 1) * 32 // 256) * 256 * warps))
        return min(blocks, architecture.shared // (shared + 1024))  # 1 KB of each block is reserved by the system
    simds, available, unit = (2, 1536, 24) if architecture.is_rdna else (4, 512, 8)
    waves = simds * min(architecture.warps // simds, available // (-(-max(registers, 1) // unit) * unit))
    blocks = min(blocks, waves // warps)
    return min(blocks, architecture.shared // shared) if shared else blocks


def table(rows: list[Row]) -> str:
    """All rows as text, those with a problem again at the end."""
    heads = (
        "target",
        "kernel",
        "warps",
        "regs",
        "spills",
        "shared",
        "matrix",
        "exp",
        "shfl",
        "instr",
        "occup.",
        "case",
    )
    cells = []
    for r in sorted(rows, key=lambda r: (r.target, r.kernel, r.case)):
        matrix = " ".join(f"{times} {name}" for name, times in r.matrix.items())
        numbers = (r.warps, r.registers, r.spills, r.shared, matrix, r.exponentials, r.shuffles, r.instructions)
        cells.append(tables.Row((r.target, r.kernel, *map(str, numbers), f"{r.occupancy:.0%}", r.case)))
    lines = [tables.as_text(heads, cells, names=(0, 1, 11))]
    failed = [r for r in rows if r.problem]
    lines += [f"FAILED {r.target} {r.kernel}: {r.problem} ({r.case})" for r in failed]
    seconds = sum(r.seconds for r in rows)
    lines.append(f"{len(rows)} kernels compiled in {seconds:.0f} s of processor time, {len(failed)} with a problem")
    return "\n".join(lines)
