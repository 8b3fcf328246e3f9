"""Control flow of a kernel, executed: how often each basic block runs in a program of a launch.

Loop bounds and branches of these kernels depend on program ids, arguments and small tables of integers, never on data.
So the part of the machine code that computes branch conditions, its slice, is executed for one thread, and the rest is
only counted. A value that is not an integer of the slice (a float, a load from shared memory) is unknown, `None`.
"""

from __future__ import annotations

import collections
import functools
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .sass import CONSTANT, Instruction, Program, is_predicate, loaded_words, num_registers

MASK = 0xFFFFFFFF
MAX_BLOCKS = 1 << 22
"""Blocks that one thread may run before its loops count as endless."""

Registers = dict[str, "int | bool | None"]
Compute = Callable[..., "Registers | None"]
"""Registers, and memory for a load, to the registers that an instruction writes."""
ReadMemory = Callable[[int, int], int | None]
"""Address and bytes to the integer that is there, or None."""
Step = Callable[[Registers], None]
Source = Callable[[Registers], int | None]


@dataclass(frozen=True)
class Thread:
    """Values that tell a thread apart, and what it reads."""

    block: tuple[int, int, int]
    """Program ids."""
    thread: int
    constants: Mapping[int, int]
    """32-bit words of constant bank 0 by their offset."""
    read: ReadMemory


def count_blocks(program: Program, thread: Thread) -> collections.Counter[int]:
    """Count the times that a thread enters each basic block.

    Args:
        program: the machine code.
        thread: the thread, its arguments and the memory that it reads.

    Returns:
        Block numbers with their counts.

    Raises:
        ValueError: a loop whose end depends on an unknown value, or that does not end.
    """
    code = _compiled(program)
    counts: collections.Counter[int] = collections.Counter()
    registers: Registers = {
        f"SR_CTAID.{axis}": value for axis, value in zip("XYZ", thread.block, strict=True)
    }  # fmt: skip
    registers |= {"SR_TID.X": thread.thread, "SR_LANEID": thread.thread % 32, "SR_CgaCtaId": 0, "SRZ": 0}
    registers |= {f"c{offset}": value for offset, value in thread.constants.items()}
    memory = thread.read
    block = 0
    for _ in range(MAX_BLOCKS):
        counts[block] += 1
        steps, branch = code[block]
        for step in steps:
            if type(step) is tuple:  # a load: it alone needs the memory
                step[0](registers, memory)
            else:
                step(registers)
        after = branch(registers)
        if after is None:
            return counts
        block = after
    raise ValueError(f"no end after {MAX_BLOCKS:,} blocks")


@functools.lru_cache(maxsize=64)
def _compiled(program: Program):
    needed = slice_of_branches(program)
    code = []
    for n in range(len(program.blocks)):
        steps = [_compile(i) for i in program.of(n) if i.address in needed]
        code.append((steps, _compile_branch(program, n)))
    return code


@functools.lru_cache(maxsize=64)
def slice_of_branches(program: Program) -> frozenset[int]:
    """Addresses of the instructions on which a branch or an exit depends."""
    needed_at_start: dict[int, frozenset[str]] = {n: frozenset() for n in program.reachable}
    found: set[int] = set()
    changed = True
    while changed:
        changed = False
        for n in sorted(program.reachable, reverse=True):
            needed = set[str]().union(*(needed_at_start[after] for after in program.blocks[n].successors))
            for instruction in reversed(program.of(n)):
                if instruction.is_branch or instruction.base == "EXIT":
                    needed |= instruction.read
                elif needed & instruction.written:
                    found.add(instruction.address)
                    if instruction.guard is None:
                        needed -= instruction.written
                    needed |= instruction.read
            if needed != needed_at_start[n]:
                needed_at_start[n] = frozenset(needed)
                changed = True
    return frozenset(found)


def depends_on_thread(program: Program) -> bool:
    """Whether branches depend on the number of a thread, so that warps may differ."""
    needed = slice_of_branches(program)
    return any(
        "SR_TID" in o or "SR_LANEID" in o for i in program.instructions if i.address in needed for o in i.operands
    )


def _compile_branch(program: Program, n: int) -> Callable[[Registers], int | None]:
    """The block after a block, None at the end of the program."""
    block = program.blocks[n]
    last = program.instructions[block.end - 1]
    following = n + 1
    if last.base == "EXIT":
        condition = _condition(last)
        return lambda r: None if condition(r) else following
    if last.base in ("RET", "BRX", "JMP"):
        return _refuse(last)
    if not last.is_branch:
        return lambda r: following
    if last.parts[:1] == ("DIV",):  # taken where lanes diverge
        return lambda r: following
    assert last.target is not None
    target, condition = program.block_at[last.target], _condition(last)
    is_back = target <= n

    def branch(r: Registers) -> int:
        taken = condition(r)
        if taken is None and is_back:
            raise ValueError(f"the end of a loop depends on a value that is unknown: {last}")
        # An unknown condition guards work that is skipped for some data: counted.
        return target if taken else following

    return branch


def _refuse(instruction: Instruction) -> Callable[[Registers], None]:
    def refuse(r: Registers) -> None:
        raise ValueError(f"the target of a jump is not in its text: {instruction}")

    return refuse


def _condition(instruction: Instruction) -> Callable[[Registers], bool | None]:
    """The conjunction of an instruction's guard and its predicate operands."""
    names = [f"{'!' * instruction.negated}{instruction.guard}"] if instruction.guard else []
    if instruction.is_branch:
        names += [o for o in instruction.operands if is_predicate(o)]
    sources = [_predicate(name) for name in names]

    def condition(r: Registers) -> bool | None:
        values = [source(r) for source in sources]
        return False if False in values else None if None in values else True

    return condition


def _predicate(name: str) -> Callable[[Registers], bool | None]:
    negated, name = name.startswith("!"), name.lstrip("!")
    if name in ("PT", "UPT"):
        return lambda r: not negated

    def read(r: Registers) -> bool | None:
        value = r.get(name)
        return None if value is None else bool(value) != negated

    return read


def _source(operand: str, wide: bool = False) -> Source:
    """An operand as an unsigned number of 32 bits, or of 64 from a pair of registers."""
    sign = re.match(r"[-~|!]*", operand)[0]  # type: ignore[index]
    text = operand[len(sign) :].rstrip("|")
    number = _number(text)
    if number is not None:
        value = (-number if "-" in sign else ~number if "~" in sign else number) & (MASK << 32 | MASK if wide else MASK)
        return lambda r: value
    text = text.removesuffix(".64").removesuffix(".U32")
    if text in ("RZ", "URZ", "SRZ"):
        plain: Source = lambda r: 0  # noqa: E731
    elif found := re.fullmatch(CONSTANT, text):
        plain = _constant(found[1], int(found[2], 16), wide)
    elif found := re.fullmatch(r"(U?R)(\d+)", text):
        low_name, high_name = text, f"{found[1]}{int(found[2]) + 1}"
        # A register that holds nothing yet is 0: flags are set in one bit by bit.
        if wide:
            plain = lambda r: _join(r.get(low_name, 0), r.get(high_name, 0))  # noqa: E731
        else:
            plain = lambda r: r.get(low_name, 0)  # noqa: E731
    elif text.startswith("SR"):
        plain = lambda r: r.get(text)  # noqa: E731
    else:  # a part of a register, a float, another constant bank
        return lambda r: None
    mask = MASK << 32 | MASK if wide else MASK
    if "|" in sign:
        magnitude = plain
        plain = lambda r: None if (v := magnitude(r)) is None else abs(_signed(v))  # noqa: E731
    if "-" in sign:
        # Not reduced: the carry of a subtraction is that of adding the complement and one.
        return lambda r: None if (v := plain(r)) is None else (~v & mask) + 1
    if "~" in sign:
        return lambda r: None if (v := plain(r)) is None else ~v & mask
    return plain


def _constant(base: str | None, offset: int, wide: bool) -> Source:
    """A word of constant bank 0, or two, at an offset from a register."""

    def read(r: Registers) -> int | None:
        index = 0 if base in (None, "RZ", "URZ") else r.get(base)
        if index is None:
            return None
        low = r.get(f"c{index + offset}")
        return low if not wide else _join(low, r.get(f"c{index + offset + 4}"))

    return read


def _number(text: str) -> int | None:
    return int(text, 0) if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", text) else None


def _join(low: int | None, high: int | None) -> int | None:
    return None if low is None or high is None else high << 32 | low


def _signed(value: int, bits: int = 32) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> bits - 1 else value


def _compile(instruction: Instruction):
    """The instruction as a function of the registers, or, for a load, of registers and memory in a tuple."""
    guard = _condition(instruction) if instruction.guard else None
    written = sorted(instruction.written)
    compute = _semantics(instruction)

    def step(r: Registers, *memory: ReadMemory) -> None:
        executes = True if guard is None else guard(r)
        if executes is False:
            return
        results = compute(r, *memory) if compute is not None and executes else None
        for name in written:
            r[name] = None
        if results is not None:
            r.update(results)

    return (step,) if instruction.base == "LDG" else step


def _names(instruction: Instruction) -> list[str]:
    """Names of the results, in the order of the operands."""
    return [o.split(".")[0] for o in instruction.operands]


def _semantics(i: Instruction) -> Compute | None:
    """The results of an instruction by register, or None for an instruction whose results are unknown."""
    base = i.base[1:] if i.base in _UNIFORM else i.base
    make = _SEMANTICS.get(base)
    return None if make is None else make(i)


def _put(name: str, value: int, count: int = 1) -> Registers:
    """Assign a number to the registers from `name` on."""
    if name in ("RZ", "URZ"):
        return {}
    found = re.fullmatch(r"(U?R)(\d+)", name)
    if found is None:
        return {}
    return {f"{found[1]}{int(found[2]) + k}": value >> 32 * k & MASK for k in range(count)}


def _of_integers(i: Instruction, sources: list[str], function: Callable[..., int | None], wide: bool = False):
    """A result that is a function of integer sources."""
    name, count = _names(i)[0], num_registers(i)
    reads = [_source(s, wide) for s in sources]

    def compute(r: Registers):
        values = [read(r) for read in reads]
        if None in values:
            return None
        value = function(*values)
        return None if value is None else _put(name, value, count)

    return compute


def _move(i: Instruction):
    return _of_integers(i, [i.operands[-1] if i.base != "MOV" else i.operands[1]], lambda a: a)


def _move_to_uniform(i: Instruction):
    name = next(o for o in i.operands if o.startswith("UR"))
    read = _source(i.operands[-1])
    return lambda r: None if (v := read(r)) is None else _put(name, v & MASK)


def _clear(i: Instruction):
    return (lambda r: _put(i.operands[0], 0, num_registers(i))) if i.operands[1] == "SRZ" else None


def _load_constant(i: Instruction):
    if {"U8", "S8", "U16", "S16"} & set(i.parts):
        return None
    words = [(name, _constant(base, offset, wide=False)) for name, base, offset in loaded_words(i)]
    return lambda r: {name: word(r) for name, word in words}


def _imad(i: Instruction):
    a, b, c = i.operands[-3:] if not is_predicate(i.operands[-1]) else i.operands[-4:-1]
    is_signed = "U32" not in i.parts or {"MOV", "SHL", "IADD"} & set(i.parts)
    if {"WIDE", "HI"} & set(i.parts):
        reads, read_c = [_source(a), _source(b)], _source(c, wide=True)
        shift, count, name = (32 if "HI" in i.parts else 0), num_registers(i), _names(i)[0]
        sign = _signed if is_signed else (lambda v: v & MASK)

        def wide(r: Registers):
            x, y, z = (*(read(r) for read in reads), read_c(r))
            if x is None or y is None or z is None:
                return None
            return _put(name, (sign(x) * sign(y) + z) % (1 << 64) >> shift, count)

        return wide
    if "X" in i.parts:
        carry = _predicate(i.operands[-1])
        plain = _of_integers(i, [a, b, c], lambda x, y, z: x * y + z)

        def with_carry(r: Registers) -> Registers | None:
            results, more = plain(r), carry(r)
            if results is None or more is None:
                return None
            return {name: int(value or 0) + more & MASK for name, value in results.items()}

        return with_carry
    return _of_integers(i, [a, b, c], lambda x, y, z: x * y + z)


def _add(i: Instruction):
    """IADD3 and its kin: up to three numbers and carries, with carries out."""
    operands = list(i.operands)
    outs = [operands.pop(0)]
    while is_predicate(operands[0]):
        outs.append(operands.pop(0))
    carries_in = []
    while is_predicate(operands[-1]):
        carries_in.append(_predicate(operands.pop()))
    wide = "64" in i.parts
    reads = [_source(o, wide) for o in operands]
    bits, count = (64, 2) if wide else (32, 1)

    def compute(r: Registers):
        values = [read(r) for read in reads] + [read(r) for read in carries_in]
        if None in values:
            return None
        total = sum(int(v) for v in values if v is not None)
        results = _put(outs[0], total & (1 << bits) - 1, count)
        for k, name in enumerate(outs[1:], 1):
            if name not in ("PT", "UPT"):
                results[name] = total >> bits >= k
        return results

    return compute


def _lea(i: Instruction):
    operands = list(i.operands)
    outs = [operands.pop(0)]
    while is_predicate(operands[0]):
        outs.append(operands.pop(0))
    carry = _predicate(operands.pop()) if is_predicate(operands[-1]) else None
    shift = _number(operands.pop())
    if shift is None:
        return None
    high = "HI" in i.parts
    reads = [_source(o) for o in operands]

    def compute(r: Registers):
        values = [read(r) for read in reads]
        more = 0 if carry is None else carry(r)
        if None in values or more is None:
            return None
        a, b = values[0], values[1]
        assert a is not None and b is not None
        if high:
            upper = (MASK if a >> 31 & 1 else 0) if "SX32" in i.parts else values[2] if len(values) > 2 else 0
            term = ((upper or 0) << 32 | (a & MASK)) << shift >> 32 & MASK
        else:
            term = a << shift & MASK
        total = term + b + int(more)
        results = _put(outs[0], total & MASK)
        for name in outs[1:]:
            if name not in ("PT", "UPT"):
                results[name] = total >> 32 >= 1
        return results

    return compute


def _lop3(i: Instruction):
    operands = list(i.operands)
    flag = operands.pop(0) if is_predicate(operands[0]) else None
    name, a, b, c, table = operands[:5]
    reads, bits = [_source(o) for o in (a, b, c)], int(table, 0)

    def compute(r: Registers):
        values = [read(r) for read in reads]
        if bits == 0xC0 and 0 in values[:2]:  # a & b
            value = 0
        elif None in values:
            return None
        else:
            x, y, z = (v & MASK for v in values if v is not None)
            value = 0
            for k in range(8):
                if bits >> k & 1:
                    value |= (x if k & 4 else ~x) & (y if k & 2 else ~y) & (z if k & 1 else ~z)
            value &= MASK
        results = _put(name, value)
        if flag is not None and flag not in ("PT", "UPT"):
            results[flag] = value != 0
        return results

    return compute


def _plop3(i: Instruction):
    first, second, a, b, c, table, other = i.operands[:7]
    reads = [_predicate(o) for o in (a, b, c)]
    tables = [(name, int(t, 0)) for name, t in ((first, table), (second, other)) if name not in ("PT", "UPT")]

    def compute(r: Registers):
        values = [read(r) for read in reads]
        results: Registers = {}
        for name, bits in tables:
            # Unknown inputs matter only where the table depends on them.
            outcomes = {
                bits >> k & 1
                for k in range(8)
                if all(v is None or v == bool(k >> shift & 1) for v, shift in zip(values, (2, 1, 0), strict=True))
            }
            results[name] = bool(outcomes.pop()) if len(outcomes) == 1 else None
        return results

    return compute


def _shift(i: Instruction):
    right, high = "R" in i.parts, "HI" in i.parts
    is_signed = bool({"S32", "S64"} & set(i.parts))
    wraps = "W" in i.parts

    def function(low: int, count: int, upper: int) -> int:
        count &= MASK
        count = count & 31 if wraps else min(count, 63)
        value = upper << 32 | low
        if is_signed:
            value = _signed(value, 64)
        value = value >> count if right else value << count
        return (value >> 32 if high else value) & MASK

    return _of_integers(i, list(i.operands[1:4]), function)


def _sign_extend(i: Instruction):
    def function(value: int, bits: int) -> int:
        field = value & (1 << bits) - 1
        return field if "U32" in i.parts or not bits else _signed(field, bits) & MASK

    return _of_integers(i, list(i.operands[1:3]), function)


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b, "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b, "GE": lambda a, b: a >= b,
}  # fmt: skip
_COMBINE: dict[str, Callable[[bool, bool], bool]] = {
    "AND": lambda a, b: a and b, "OR": lambda a, b: a or b, "XOR": lambda a, b: a != b,
}  # fmt: skip


def _compare(i: Instruction):
    relation = _COMPARE.get(i.parts[0])
    combine = next((_COMBINE[p] for p in i.parts if p in _COMBINE), None)
    if relation is None or combine is None:
        return None
    extended, is_unsigned = "EX" in i.parts, "U32" in i.parts
    first, second = i.operands[:2]
    reads = [_source(o) for o in i.operands[2:4]]
    others = [_predicate(o) for o in i.operands[4:]]

    def compute(r: Registers) -> Registers:
        a, b = (read(r) for read in reads)
        others_ = [read(r) for read in others]
        if a is None or b is None:
            return {n: None for n in (first, second)}
        x, y = (a & MASK, b & MASK) if is_unsigned else (_signed(a), _signed(b))
        found: bool | None = relation(x, y)
        if extended and x == y:  # the lower halves decide
            found = others_[1]
        if found is None or others_[0] is None:
            return {n: None for n in (first, second)}
        results: Registers = {first: combine(found, others_[0]), second: combine(not found, others_[0])}
        return {n: v for n, v in results.items() if n not in ("PT", "UPT")}

    return compute


def _vote(i: Instruction) -> Compute | None:
    """A predicate that any or all lanes have, taken to be that of one lane."""
    if len(i.operands) != 2 or not is_predicate(i.operands[0]):
        return None
    read = _predicate(i.operands[1])
    return lambda r: {i.operands[0]: read(r)}


def _succeed(i: Instruction) -> Compute | None:
    """A wait, an allocation or an election, which succeeds at once: what it waits for is not counted."""
    name = i.operands[0]
    return (lambda r: {name: True}) if is_predicate(name) else None


def _select(i: Instruction):
    name = _names(i)[0]
    reads, chosen = [_source(o) for o in i.operands[1:3]], _predicate(i.operands[3])

    def compute(r: Registers):
        which = chosen(r)
        if which is None:
            return None
        value = reads[0](r) if which else reads[1](r)
        return None if value is None else _put(name, value & MASK)

    return compute


def _min_max(i: Instruction):
    chosen, adds = _predicate(i.operands[-1]), i.base.endswith("VIADDMNMX")
    sign = (lambda v: v & MASK) if "U32" in i.parts else _signed
    plain = [_source(o) for o in i.operands[1:-1] if not is_predicate(o)]
    name = _names(i)[0]

    def compute(r: Registers):
        values, is_min = [read(r) for read in plain], chosen(r)
        if None in values or is_min is None:
            return None
        numbers = [sign(v) for v in values if v is not None]
        if adds:
            numbers = [sign(numbers[0] + numbers[1]), numbers[2]]
        return _put(name, (min if is_min else max)(numbers) & MASK)

    return compute


def _permute(i: Instruction):
    def function(a: int, selector: int, c: int) -> int:
        parts = [(c << 32 | a) >> 8 * k & 0xFF for k in range(8)]
        value = 0
        for k in range(4):
            nibble = selector >> 4 * k & 0xF
            byte = parts[nibble & 7]
            value |= ((0xFF if byte >> 7 else 0) if nibble & 8 else byte) << 8 * k
        return value

    return _of_integers(i, list(i.operands[1:4]), function)


def _load(i: Instruction):
    bracket = re.search(r"\[(U?R\w+)(\.64)?(?:\.U32)?(?:\+(UR\w+))?(?:\+?(-?0x[0-9a-f]+))?\]$", i.operands[-1])
    if bracket is None:
        return None
    base = _source(bracket[1], wide=True)
    more = _source(bracket[3], wide=True) if bracket[3] else None
    offset, name = int(bracket[4] or "0", 16), _names(i)[0]
    size = next((n for p, n in (("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2)) if p in i.parts), None)
    count = num_registers(i)
    is_signed = bool({"S8", "S16"} & set(i.parts))

    def compute(r: Registers, memory: ReadMemory):
        start = base(r)
        extra = more(r) if more else 0
        if start is None or extra is None:
            return None
        value = memory((start + extra + offset) % (1 << 64), size or 4 * count)
        if value is None:
            return None
        return _put(name, _signed(value, 8 * size) & MASK if is_signed and size else value, count)

    return compute


def _half_constant(i: Instruction):
    """HFMA2 of -0 times 0 plus two halves: a constant that the other unit makes."""
    if [o.lstrip("-") for o in i.operands[1:3]] != ["RZ", "RZ"] or len(i.operands) != 5:
        return None
    try:
        high, low = (int(np.float16(float(o.replace("INF", "inf"))).view(np.uint16)) for o in i.operands[3:5])
    except ValueError:
        return None
    return lambda r: _put(i.operands[0], high << 16 | low)


def _float_bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def _from_bits(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits & MASK))[0]


def _to_float(i: Instruction):
    """I2F, as integer division by an argument takes it."""
    sign = (lambda v: v & MASK) if "U32" in i.parts else _signed
    return None if "F64" in i.parts else _of_integers(i, [i.operands[1]], lambda a: _float_bits(float(sign(a))))


def _reciprocal(i: Instruction):
    if i.parts[:1] != ("RCP",):
        return None
    return _of_integers(i, [i.operands[1]], lambda a: _float_bits(1 / f) if (f := _from_bits(a)) else None)


def _to_integer(i: Instruction):
    if not {"TRUNC"} & set(i.parts) or {"F64", "S64", "U64"} & set(i.parts):
        return None
    return _of_integers(i, [i.operands[1]], lambda a: int(_from_bits(a)) & MASK)


def _pack_predicates(i: Instruction):
    if i.parts or len(i.operands) != 4:
        return None
    name, mask, old = i.operands[0], int(i.operands[3], 0), _source(i.operands[2])

    def compute(r: Registers):
        before = old(r)
        bits = [r.get(f"P{k}") if mask >> k & 1 else False for k in range(7)]
        if before is None or None in bits:
            return None
        return _put(name, before & ~mask & MASK | sum(bool(b) << k for k, b in enumerate(bits)))

    return compute


def _unpack_predicates(i: Instruction):
    read, mask = _source(i.operands[1]), int(i.operands[2], 0)

    def compute(r: Registers):
        value = read(r)
        kept = {f"P{k}": r.get(f"P{k}") for k in range(7) if not mask >> k & 1}
        return kept | {f"P{k}": None if value is None else bool(value >> k & 1) for k in range(7) if mask >> k & 1}

    return None if i.parts else compute


_UNIFORM = frozenset(
    "UMOV UIMAD UIADD3 UIADD UVIADD ULEA ULOP3 UPLOP3 USHF UISETP USEL USGXT UPRMT ULDC UVIMNMX UIMNMX".split()
)
"""Names of the uniform datapath that are those of the vector one after a U."""
_SEMANTICS: dict[str, Callable[[Instruction], Compute | None]] = {
    "MOV": _move, "R2UR": _move_to_uniform, "S2R": _move, "S2UR": _move, "CS2R": _clear, "LDC": _load_constant,
    "LDCU": _load_constant, "IMAD": _imad, "IADD3": _add, "IADD": _add, "VIADD": _add, "LEA": _lea, "LOP3": _lop3,
    "PLOP3": _plop3, "SHF": _shift, "SGXT": _sign_extend, "ISETP": _compare, "SEL": _select, "FSEL": _select,
    "IMNMX": _min_max, "VIMNMX": _min_max, "VIADDMNMX": _min_max, "PRMT": _permute, "LDG": _load,
    "HFMA2": _half_constant, "I2F": _to_float, "MUFU": _reciprocal, "F2I": _to_integer,
    "IABS": lambda i: _of_integers(i, [i.operands[1]], lambda a: abs(_signed(a))),
    "SYNCS": _succeed, "UTCATOMSWS": _succeed, "ELECT": _succeed, "VOTE": _vote, "VOTEU": _vote,
    "P2R": _pack_predicates, "R2P": _unpack_predicates,
}  # fmt: skip
