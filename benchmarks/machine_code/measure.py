"""Figures of a launch: instructions by pipe, bytes by tensor, resident blocks and bounds."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..cases import DIRECTIONS, Case
from ..compile_report import ARCHITECTURES, Request, compile_request, resident_blocks
from ..devices import Machine
from .control import Thread, count_blocks, depends_on_thread
from .launches import Launch, Pointer
from .memory import global_bytes, is_write, origins_of_addresses
from .pipes import PIPES, is_wait, pipe_of, tensor_clocks
from .sass import Cubin, Program, disassemble

SAMPLES = 64
"""Programs of a launch that are executed; the others are taken to be like them."""


@dataclass(frozen=True)
class Code:
    """One compilation: machine code and what the launch must provide for it."""

    cubin: Cubin
    shared: int
    """Bytes of shared memory of a block."""
    warps: int
    """Warps of a block."""
    duplication: float
    """Largest number of times that the warps of a block compute each element of a matrix product."""


def compile_code(request: Request) -> Code:
    """Compile a request and read its machine code.

    Raises:
        ValueError: the target is not one of NVIDIA's.
    """
    architecture = ARCHITECTURES[request.target]
    if architecture.backend != "cuda":
        raise ValueError(
            f"target must be one of NVIDIA's: machine-code reads SASS, and {request.target} has AMDGCN; "
            "ssm-bench compile-report counts the instructions in its text"
        )
    compiled = compile_request(request)
    metadata = compiled.metadata
    return Code(
        disassemble(compiled.asm["cubin"]), metadata.shared, metadata.num_warps, duplication(compiled.asm["ttgir"])
    )


def duplication(ttgir: str) -> float:
    """Largest ratio of the tile that all warps of a block cover in a matrix product to the product's own size.

    Args:
        ttgir: Triton's GPU dialect, in which layouts name `warpsPerCTA` and `instrShape`.

    Returns:
        1 where no work is done twice or there is no product.
    """
    layouts = re.findall(r"^(#\w+) = #ttg\.nvidia_mma<\{(.*)\}>", ttgir, re.MULTILINE)
    tiles = {}
    for name, text in layouts:
        warps, shape = (
            [int(n) for n in found[1].split(",")] if (found := re.search(rf"{key} = \[([\d, ]+)\]", text)) else []
            for key in ("warpsPerCTA", "instrShape")
        )
        if len(warps) == 2 and len(shape) >= 2:
            rows, columns = shape[:2]
            tiles[name] = warps[0] * rows, warps[1] * columns
    most = 1.0
    for rows, columns, name in re.findall(r"_dot.* -> tensor<(\d+)x(\d+)x\w+, (#\w+)>", ttgir):
        if name in tiles:
            most = max(most, max(1, tiles[name][0] / int(rows)) * max(1, tiles[name][1] / int(columns)))
    return most


@dataclass(frozen=True)
class Unit:
    """The unit that instructions are counted in."""

    name: str
    count: int
    """Units of a call."""
    tokens: int
    """Steps of a call, over all sequences."""


def unit_of(case: Case) -> Unit:
    """The unit of an op: a token and head of SSD, 32 channels of a token, an element, of the others."""
    s = case.shape
    tokens = s.batch * (1 if case.is_step else s.length)
    directions = DIRECTIONS if case.op.startswith("cross_") else 1
    if case.folder == "ssd":
        return Unit("token-head", tokens * s.heads * directions, tokens)
    return Unit("32 token-channels", max(1, tokens * s.channels * directions // 32), tokens)


@dataclass
class Figures:
    """Figures of one launch."""

    kernel: str
    mode: str
    grid: tuple[int, int, int]
    warps: int
    registers: int
    shared: int
    duplication: float
    blocks: int
    """Resident blocks of a multiprocessor."""
    programs: int
    pipes: dict[str, float]
    """Warp-instructions of the launch by pipe."""
    tensor_clocks: float
    """Clocks of one multiprocessor's tensor cores for the launch."""
    turn: dict[str, float]
    """Barriers, shuffles, waits and all instructions of one turn of the loop that executes most, or of a program."""
    trips: float
    """Mean number of turns of that loop in a program; 0 without a loop."""
    read: dict[str, float] = field(default_factory=dict)
    """Bytes requested by tensor."""
    written: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each tensor."""
    configuration: str = ""

    @property
    def instructions(self) -> float:
        """Warp-instructions of the launch."""
        return sum(self.pipes.values())

    @property
    def spills(self) -> float:
        """Warp-instructions that access the stack."""
        return self.pipes["LDL"] + self.pipes["STL"]

    def rounds(self, num_sms: int) -> float:
        """Grid over resident blocks; what is left of it above an integer fills the last round."""
        return self.programs / max(1, self.blocks * num_sms)

    def last_round(self, num_sms: int) -> float:
        """Share of the device that the last round of blocks fills."""
        resident = max(1, self.blocks * num_sms)
        return (self.programs - 1) % resident / resident + 1 / resident

    def traffic(self, machine: Machine) -> dict[str, tuple[float, float]]:
        """Bytes read from and written to device memory, by tensor.

        A tensor is moved once a launch, however many programs ask for it: they do at about the same time. A tensor
        that is written and read again, scratch, is moved at each access if the part of the resident programs exceeds
        the second-level cache.
        """
        share = min(1.0, 1 / self.rounds(machine.num_sms))
        found = {}
        for name, size in self.sizes.items():
            read, written = self.read.get(name, 0.0), self.written.get(name, 0.0)
            if not (read and written and size * share > machine.l2):
                read, written = min(read, size), min(written, size)
            found[name] = read, written
        return found

    def bounds(self, machine: Machine) -> dict[str, float]:
        """Least seconds by issue, device memory and each pipe."""
        bytes_ = sum(read + written for read, written in self.traffic(machine).values())
        sm_clocks = machine.num_sms * machine.clock
        named = {"MUFU": "exponentials", "FP32": "fp32", "ALU": "integers", "IMAD": "multiplies"}
        found = {"issue": self.instructions / machine.slots, "memory": bytes_ / machine.bandwidth}
        found |= {name: self.pipes[pipe] * machine.clocks[pipe] / machine.slots for pipe, name in named.items()}
        # At least one wavefront an access of global, shared and local memory, one a clock.
        accesses = sum(self.pipes[p] for p in ("LDG", "STG", "LDS", "STS", "LDL", "STL", "SHFL"))
        return found | {"accesses": accesses / sm_clocks, "tensor": self.tensor_clocks / sm_clocks}

    def bound(self, machine: Machine) -> tuple[float, str]:
        """The largest bound in seconds, and its name."""
        return max((seconds, name) for name, seconds in self.bounds(machine).items())


def measure(launch: Launch, code: Code) -> Figures:
    """Execute the control flow of a sample of programs, and count.

    Args:
        launch: the launch.
        code: its machine code.

    Returns:
        Figures of the whole launch.

    Raises:
        ValueError: a loop whose end is not known from the launch's arguments, or an access whose tensor is not.
    """
    program = code.cubin.program
    programs = launch.grid[0] * launch.grid[1] * launch.grid[2]
    try:
        counts, origins = _count_warps(launch, code), _origins(launch, code)
    except ValueError as e:
        raise ValueError(f"{launch.request.name}: {e}") from e
    scale = programs / min(programs, SAMPLES)
    pipes = dict.fromkeys(PIPES, 0.0)
    tensor = 0.0
    for block, times in counts.items():
        for instruction in program.of(block):
            pipes[pipe_of(instruction)] += times * scale
            tensor += tensor_clocks(instruction) * times * scale
    trips, turn = _main_turn(program, counts, min(programs, SAMPLES) * code.warps)
    architecture = ARCHITECTURES[launch.request.target]
    figures = Figures(
        launch.request.name, launch.mode, launch.grid, code.warps, code.cubin.registers, code.shared, code.duplication,
        resident_blocks(architecture, code.warps, code.cubin.registers, code.shared), programs, pipes, tensor,
        turn, trips, configuration=launch.configuration,
    )  # fmt: skip
    _add_bytes(figures, launch, program, origins, counts, scale)
    return figures


def _count_warps(launch: Launch, code: Code) -> collections.Counter[int]:
    """Executions of each basic block, summed over the warps of a sample of programs."""
    programs = launch.grid[0] * launch.grid[1] * launch.grid[2]
    constants, read = _arguments(launch, code)
    counts: collections.Counter[int] = collections.Counter()
    number = min(programs, SAMPLES)
    # Steps of the golden ratio: spread over the grid, and in step with none of its dimensions.
    spread = [int(programs * ((k + 0.5) * 0.6180339887498949 % 1)) for k in range(number)]
    # Warps take different branches only by the number of a thread.
    warps = range(code.warps) if depends_on_thread(code.cubin.program) else range(1)
    for index in range(programs) if programs == number else spread:
        x, y = index % launch.grid[0], index // launch.grid[0] % launch.grid[1]
        block = (x, y, index // (launch.grid[0] * launch.grid[1]))
        for warp in warps:
            found = count_blocks(code.cubin.program, Thread(block, 32 * warp, constants, read))
            for b, times in found.items():
                counts[b] += times * code.warps // len(warps)
    return counts


def _base(ordinal: int) -> int:
    """Address that a tensor argument is taken to have; no two tensors are near each other."""
    return ordinal + 1 << 40


def _arguments(launch: Launch, code: Code):
    """Constant bank and memory of a launch: its arguments, with addresses that tell tensors apart."""
    constants = _sizes_of_launch(launch, code)
    memories: dict[int, bytes] = {}
    for ordinal, ((offset, size), (_, value)) in enumerate(
        zip(code.cubin.parameters, launch.parameters, strict=False)  # scratch of the launch comes last
    ):
        number = _base(ordinal) if isinstance(value, Pointer) else value
        if isinstance(value, Pointer) and value.data is not None:
            memories[ordinal] = value.data
        if isinstance(number, int):
            number %= 1 << 8 * size
            for word in range(0, size, 4):
                constants[offset + word] = number >> 8 * word & 0xFFFFFFFF

    def read(address: int, size: int) -> int | None:
        ordinal = (address >> 40) - 1
        data, at = memories.get(ordinal), address - _base(ordinal)
        if data is None or at < 0 or at + size > len(data):
            return None
        return int.from_bytes(data[at : at + size], "little")

    return constants, read


def _sizes_of_launch(launch: Launch, code: Code) -> dict[int, int]:
    """The words before the parameters in constant bank 0 that hold the sizes of a block and of the grid."""
    is_blackwell = min((offset for offset, _ in code.cubin.parameters), default=0) >= 0x380
    block, grid = (0x360, 0x370) if is_blackwell else (0x0, 0xC)
    sizes = {block: 32 * code.warps, block + 4: 1, block + 8: 1}
    return sizes | {grid + 4 * axis: size for axis, size in enumerate(launch.grid)}


def _main_turn(program: Program, counts: Mapping[int, int], warps: int) -> tuple[float, dict[str, float]]:
    """Trips a program of the loop in which most instructions execute, and what one turn of it executes."""

    def executed(blocks: frozenset[int]) -> int:
        return sum(counts.get(b, 0) * len(program.of(b)) for b in blocks)

    inner = [
        loop
        for loop in program.loops
        if counts.get(loop.header) and not any(other.blocks < loop.blocks for other in program.loops)
    ]
    main = max(inner, key=lambda loop: executed(loop.blocks), default=None)
    if main is not None and executed(main.blocks) * 4 < executed(program.reachable):
        main = None  # a loop beside the work
    blocks, turns = (program.reachable, warps) if main is None else (main.blocks, counts[main.header])
    turn: dict[str, float] = {"instructions": 0.0, "barriers": 0.0, "shuffles": 0.0, "waits": 0.0}
    for block in blocks:
        share = counts.get(block, 0) / turns
        for instruction in program.of(block):
            pipe = pipe_of(instruction)
            turn["instructions"] += share
            turn["barriers"] += share * (pipe == "BAR")
            turn["shuffles"] += share * (pipe == "SHFL")
            turn["waits"] += share * is_wait(instruction)
    return (0.0 if main is None else turns / warps), turn


def _origins(launch: Launch, code: Code) -> dict[int, frozenset[int]]:
    """Parameters that each access to global memory may belong to, by its address."""
    pointers = {}
    for ordinal, ((offset, _), (_, value)) in enumerate(zip(code.cubin.parameters, launch.parameters, strict=False)):
        if isinstance(value, Pointer):
            pointers |= {offset: ordinal, offset + 4: ordinal}
    return origins_of_addresses(code.cubin.program, pointers)


def _add_bytes(
    figures: Figures,
    launch: Launch,
    program: Program,
    origins: Mapping[int, frozenset[int]],
    counts: Mapping[int, int],
    scale: float,
) -> None:
    for block, times in counts.items():
        for instruction in program.of(block):
            size = global_bytes(instruction)
            if not size:
                continue
            for ordinal in origins[instruction.address]:
                name, value = launch.parameters[ordinal]
                assert isinstance(value, Pointer)
                figures.sizes[name] = value.size
                side = figures.written if is_write(instruction) else figures.read
                side[name] = side.get(name, 0.0) + 32 * size * times * scale / len(origins[instruction.address])
