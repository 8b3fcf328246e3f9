"""SASS, NVIDIA's machine code: instructions, their operands, basic blocks and loops, read from a cubin.

The text is that of `cuobjdump -sass`, a tool in Triton's wheel. NVIDIA documents the names of the instructions alone
("CUDA Binary Utilities", instruction set reference); operands follow one pattern, destinations first.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?)(U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
CONSTANT = re.compile(r"c\[0x0\]\[(?:(U?R\w+)\+)?(-?0x[0-9a-f]+)\]")
"""A word of the constant bank that has the arguments of a launch: a register, if any, and an offset from it."""
_NAME = re.compile(r"[-!~|]*(UR\d+|R\d+|URZ|RZ|UP\d|P\d|UPT|PT)(?![\w])")


@dataclass(frozen=True)
class Instruction:
    """One instruction. Registers are named as in the text, a wide one by each of its 32-bit parts."""

    address: int
    name: str
    """Mnemonic with its modifiers, such as `IMAD.WIDE.U32`."""
    operands: tuple[str, ...]
    guard: str | None = None
    """Predicate under which it executes."""
    negated: bool = False
    """Whether it executes where the guard is false."""

    @property
    def base(self) -> str:
        return self.name.split(".")[0]

    @property
    def parts(self) -> tuple[str, ...]:
        """Modifiers of the name."""
        return tuple(self.name.split(".")[1:])

    @property
    def is_branch(self) -> bool:
        """Whether it may go elsewhere; a far branch is written as a call that keeps no address to return to."""
        return self.base == "BRA" or self.name.startswith("CALL.REL.NOINC")

    @functools.cached_property
    def target(self) -> int | None:
        """Address that a branch goes to; None for other instructions."""
        if not self.is_branch:
            return None
        found = re.search(r"0x([0-9a-f]+)$", self.operands[-1])
        if found is None:
            raise ValueError(f"branch to an address that is not in its text: {self}")
        return int(found[1], 16)

    @functools.cached_property
    def written(self) -> frozenset[str]:
        """Registers and predicates that it writes."""
        return frozenset(_written(self))

    @functools.cached_property
    def read(self) -> frozenset[str]:
        """Registers and predicates that it reads, with its guard."""
        names = set(_read(self))
        if self.guard is not None:
            names.add(self.guard)
        return frozenset(names - {"PT", "UPT", "RZ", "URZ"})

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{self.address:#06x} {guard}{self.name} {', '.join(self.operands)}"


_NO_RESULT = frozenset(
    "BRA BRX JMP EXIT RET CALL BSSY BSYNC BREAK NOP BAR DEPBAR LDGDEPBAR LDGSTS MEMBAR FENCE CCTL ERRBAR WARPSYNC "
    "WARPGROUP STG STS STL ST STSM STT RED REDG RPCMOV KILL BPT YIELD NANOSLEEP UTMALDG UTMASTG UCGABAR_ARV "
    "UCGABAR_WAIT ACQBULK UTCBAR UTCHMMA UTCQMMA STTM PREEXIT UBLKCP CGAERRBAR".split()
)
_TWO_PREDICATES = frozenset("ISETP UISETP FSETP DSETP HSETP2 PLOP3 UPLOP3 PSETP".split())
_PREDICATE_THEN_REGISTER = frozenset("LOP3 ULOP3 SHFL ATOM ATOMG ATOMS MATCH LOP REDUX UTCATOMSWS".split())


def _num_results(instruction: Instruction) -> int:
    """Number of leading operands that are written."""
    base, operands = instruction.base, instruction.operands
    if base in _NO_RESULT or not operands or (base == "SYNCS" and not is_predicate(operands[0])):
        return 0
    if base in _TWO_PREDICATES:
        return 2
    if is_predicate(operands[0]):
        return 2 if base in _PREDICATE_THEN_REGISTER else 1
    count = 1
    # Carries: predicates between the result and the first source.
    while count < len(operands) - 1 and is_predicate(operands[count]) and base not in ("SEL", "USEL", "FSEL", "P2R"):
        count += 1
    return count


def is_predicate(operand: str) -> bool:
    """Whether an operand is a predicate register."""
    return re.fullmatch(r"!?U?P[0-9T]", operand) is not None


def num_registers(instruction: Instruction) -> int:
    """Number of 32-bit registers in its result."""
    base, parts = instruction.base, instruction.parts
    if base in ("HGMMA", "IGMMA", "QGMMA"):
        shape = re.search(r"x(\d+)x", instruction.name)
        return int(shape[1]) // (2 if "F32" in parts or base == "IGMMA" else 4) if shape else 64
    if base in ("HMMA", "IMMA", "QMMA"):
        return 4
    if base in ("DMMA", "LDSM", "LDTM"):
        found = re.search(r"\.x?(\d+)$", instruction.name)
        return int(found[1]) if found and base != "DMMA" else 1 if base == "LDSM" else 4
    if "128" in parts:
        return 4
    if "64" in parts or base in ("DADD", "DMUL", "DFMA", "FADD2", "FMUL2", "FFMA2"):
        return 2
    if base in ("IMAD", "UIMAD") and "WIDE" in parts:
        return 2
    if base == "CS2R":
        return 1 if "32" in parts else 2
    if base in ("F2F", "I2F", "F2I", "MUFU") and ({"F64", "S64", "U64"} & set(parts[:1])):
        return 2
    return 1


def _written(instruction: Instruction) -> Iterator[str]:
    if instruction.base == "R2P":
        yield from (f"P{i}" for i in range(7))
        return
    wide = num_registers(instruction)
    for operand in instruction.operands[: _num_results(instruction)]:
        found = _NAME.fullmatch(operand.split(".")[0])
        if found is None or found[1] in ("RZ", "URZ", "PT", "UPT"):
            continue
        name = found[1]
        yield from [name] if is_predicate(name) else parts_of(name, wide)


def parts_of(name: str, count: int) -> list[str]:
    """Names of the 32-bit registers of a wide one."""
    prefix, number = re.fullmatch(r"(U?R)(\d+)", name).groups()  # type: ignore[union-attr]
    return [f"{prefix}{int(number) + i}" for i in range(count)]


def loaded_words(instruction: Instruction) -> list[tuple[str, str | None, int]]:
    """Registers that a load of constants writes, each with the register, if any, and offset that its word is at."""
    found = CONSTANT.fullmatch(instruction.operands[1])
    if found is None or not instruction.written:
        return []
    names = parts_of(instruction.operands[0], num_registers(instruction))
    return [(name, found[1], int(found[2], 16) + 4 * k) for k, name in enumerate(names)]


def _read(instruction: Instruction) -> Iterator[str]:
    if instruction.base in ("P2R", "R2P"):
        yield from (f"P{i}" for i in range(7))
    sources = instruction.operands[_num_results(instruction) :]
    while sources and is_predicate(sources[-1]):
        yield sources[-1].lstrip("!")
        sources = sources[:-1]
    for i, operand in enumerate(sources):
        is_wide = _is_wide(instruction, i == len(sources) - 1)
        for found in re.finditer(r"(UR|R|UP|P)(\d+)((?:\.\w+)*)", operand):
            kind, number = found[1], found[2]
            yield kind + number
            if "P" not in kind and (is_wide or ".64" in found[3] or (kind == "UR" and "[" in operand)):
                yield f"{kind}{int(number) + 1}"


def _is_wide(instruction: Instruction, is_last: bool) -> bool:
    """Whether a source, or the last one, is a pair of registers by the name of the instruction alone."""
    parts = instruction.parts
    if instruction.base in ("IMAD", "UIMAD"):  # the addend of IMAD.WIDE and IMAD.HI has 64 bits
        return is_last and ("WIDE" in parts or "HI" in parts)
    return "64" in parts and instruction.base in ("IADD", "IADD3", "UIADD3", "MOV", "UMOV", "SEL")


@dataclass(frozen=True)
class Block:
    """A basic block: instructions that execute one after another."""

    start: int
    """Index of its first instruction."""
    end: int
    """Index after its last instruction."""
    successors: tuple[int, ...]
    """Blocks that may follow, where the last instruction does not branch first."""


@dataclass(frozen=True)
class Loop:
    """A natural loop: the blocks from which its header is reached again without leaving it."""

    header: int
    blocks: frozenset[int]


class Program:
    """Instructions of a kernel, divided in basic blocks."""

    def __init__(self, instructions: list[Instruction]):
        self.instructions = instructions
        index = {instruction.address: i for i, instruction in enumerate(instructions)}
        starts = {0}
        for i, instruction in enumerate(instructions):
            if instruction.target is not None:
                if instruction.target not in index:
                    raise ValueError(f"branch to an address that holds no instruction: {instruction}")
                starts.add(index[instruction.target])
            if _ends_block(instruction) and i + 1 < len(instructions):
                starts.add(i + 1)
        bounds = sorted(starts)
        number = {start: n for n, start in enumerate(bounds)}
        self.blocks: list[Block] = []
        for n, start in enumerate(bounds):
            end = bounds[n + 1] if n + 1 < len(bounds) else len(instructions)
            last = instructions[end - 1]
            after = []
            # BRA.U has its condition among the operands.
            conditions = [o for o in (last.guard, *last.operands) if o is not None and is_predicate(o)]
            if not _ends_block(last) or conditions:
                after += [n + 1] if n + 1 < len(bounds) else []
            if last.target is not None:
                after.append(number[index[last.target]])
            self.blocks.append(Block(start, end, tuple(dict.fromkeys(after))))
        self.block_at = {instructions[b.start].address: n for n, b in enumerate(self.blocks)}

    def of(self, block: int) -> list[Instruction]:
        """Instructions of a block."""
        return self.instructions[self.blocks[block].start : self.blocks[block].end]

    @functools.cached_property
    def reachable(self) -> frozenset[int]:
        """Blocks that can execute; the padding after the last instruction cannot."""
        found, waiting = {0}, [0]
        while waiting:
            for after in self.blocks[waiting.pop()].successors:
                if after not in found:
                    found.add(after)
                    waiting.append(after)
        return frozenset(found)

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """Loops by the address of their headers; those with a common header are one."""
        before: dict[int, set[int]] = {n: set() for n in self.reachable}
        for n in self.reachable:
            for after in self.blocks[n].successors:
                before[after].add(n)
        found: dict[int, set[int]] = {}
        for n in sorted(self.reachable):
            for header in self.blocks[n].successors:
                # Machine code of structured loops: an edge to an earlier address closes a loop.
                if header <= n:
                    body, waiting = found.setdefault(header, {header}), [n]
                    while waiting:
                        block = waiting.pop()
                        if block not in body and block >= header:
                            body.add(block)
                            waiting += before[block]
        return [Loop(header, frozenset(blocks)) for header, blocks in sorted(found.items())]


def _ends_block(instruction: Instruction) -> bool:
    return instruction.is_branch or instruction.base in ("EXIT", "RET", "BRX", "JMP")


def parse(text: str) -> Program:
    """Parse the text of one kernel.

    Args:
        text: output of `cuobjdump -sass`, or lines such as `/*0040*/ @!P0 BRA 0x10 ;`.

    Returns:
        The program; NOPs, which align loops, are left out unless a branch goes to one.

    Raises:
        ValueError: there is no instruction, or a branch whose target is unknown.
    """
    instructions = []
    for found in _LINE.finditer(text):
        operands = tuple(o.strip().replace(".reuse", "") for o in _split(found[5]))
        instructions.append(Instruction(int(found[1], 16), found[4], operands, found[3], found[2] == "!"))
    targets = {i.target for i in instructions}
    instructions = [i for i in instructions if i.base != "NOP" or i.address in targets]
    if not instructions:
        raise ValueError("the text holds no instruction of SASS")
    return Program(instructions)


def _split(operands: str) -> list[str]:
    """Operands at the commas outside of brackets."""
    found, depth, start = [], 0, 0
    for i, character in enumerate(operands):
        depth += (character in "[({") - (character in "])}")
        if character == "," and depth == 0:
            found.append(operands[start:i])
            start = i + 1
    rest = operands[start:].strip()
    return [*found, rest] if rest else found


@dataclass(frozen=True)
class Cubin:
    """A kernel as machine code, with the resources that it takes."""

    program: Program
    registers: int
    """A thread."""
    stack: int
    """Bytes a thread."""
    parameters: tuple[tuple[int, int], ...]
    """Offset in constant bank 0 and bytes of each parameter."""


def dump(cubin: bytes, *options: str) -> list[str]:
    """Output of `cuobjdump`, a tool in Triton's wheel, with each of the options."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return [
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in options
        ]


def resources(usage: str) -> tuple[int, int]:
    """Registers and bytes of stack a thread, from the output of `cuobjdump --dump-resource-usage`."""
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK"))
    return registers, stack


def disassemble(cubin: bytes) -> Cubin:
    """Read a cubin.

    Raises:
        ValueError: the disassembler's output is not understood.
    """
    usage, sass, elf = dump(cubin, "--dump-resource-usage", "-sass", "-elf")
    return Cubin(parse(sass), *resources(usage), _parameters(elf))


def _parameters(elf: str) -> tuple[tuple[int, int], ...]:
    """Layout of the parameters, from the attributes of `.nv.info`."""
    bank = re.search(r"EIATTR_PARAM_CBANK.*?Value:\s+0x[0-9a-f]+\s+0x([0-9a-f]+)", elf, re.DOTALL)
    found = re.findall(r"Ordinal : 0x([0-9a-f]+)\s+Offset\s+: 0x([0-9a-f]+)\s+Size\s+: 0x([0-9a-f]+)", elf)
    if not found:
        return ()
    if bank is None:
        raise ValueError("the cubin does not say where in constant bank 0 its parameters start")
    start = int(bank[1], 16) & 0xFFFF  # size in the upper half
    layout = sorted((int(ordinal, 16), start + int(offset, 16), int(size, 16)) for ordinal, offset, size in found)
    return tuple((offset, size) for _, offset, size in layout)
