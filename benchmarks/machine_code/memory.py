"""Bytes that a kernel asks from memory and gives to it, by the argument that the address comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .sass import Instruction, Program

Origins = dict[str, frozenset[int]]
"""For a register, the parameters whose address its value may be derived from."""


def global_bytes(instruction: Instruction) -> int:
    """Bytes a thread that an access to global memory moves; 0 for other instructions."""
    if instruction.base not in ("LDG", "STG", "LDGSTS", "RED", "REDG", "ATOMG"):
        return 0
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((sizes[p] for p in instruction.parts if p in sizes), 4)


def is_write(instruction: Instruction) -> bool:
    """Whether an access to global memory writes it."""
    return instruction.base in ("STG", "RED", "REDG", "ATOMG")


def origins_of_addresses(program: Program, pointers: Mapping[int, int]) -> dict[int, frozenset[int]]:
    """Find the parameter that each access to global memory derives its address from.

    Args:
        program: the machine code.
        pointers: parameter by the offset of its 32-bit words in constant bank 0.

    Returns:
        Parameters by the address of the instruction; more than one where they cannot be told apart.
    """
    at_start: dict[int, Origins] = {0: {}}
    waiting, found = [0], {}
    while waiting:
        n = waiting.pop()
        state = dict(at_start[n])
        for instruction in program.of(n):
            if global_bytes(instruction):
                names = _address_registers(instruction)
                found[instruction.address] = frozenset[int]().union(*(state.get(name, ()) for name in names))
            _step(state, instruction, pointers)
        for after in program.blocks[n].successors:
            known = at_start.get(after)
            merged = dict(state) if known is None else {
                name: known.get(name, frozenset()) | state.get(name, frozenset()) for name in known.keys() | state
            }  # fmt: skip
            if merged != known:
                at_start[after] = merged
                waiting.append(after)
    return found


def _step(state: Origins, instruction: Instruction, pointers: Mapping[int, int]) -> None:
    if not instruction.written:
        return
    origins: frozenset[int] = frozenset()
    if instruction.base not in ("LDG", "LDS", "LDL", "LDSM", "SHFL"):
        # Predicates are left out: a carry belongs to the pair whose lower half is followed.
        registers = [name for name in instruction.read if "P" not in name]
        origins = origins.union(*(state.get(name, ()) for name in registers))
        for operand in instruction.operands:
            for offset in re.findall(r"c\[0x0\]\[(0x[0-9a-f]+)\]", operand):
                first = int(offset, 16)
                words = (first, first + 4) if "64" in instruction.parts else (first,)
                origins |= {pointers[word] for word in words if word in pointers}
    for name in instruction.written:
        if "P" in name:
            continue
        if instruction.guard is not None:
            state[name] = state.get(name, frozenset()) | origins
        elif origins:
            state[name] = origins
        else:
            state.pop(name, None)


def _address_registers(instruction: Instruction) -> list[str]:
    operands = [o for o in instruction.operands if "[" in o]
    # The shared-memory side of LDGSTS comes first.
    inner = re.findall(r"\[([^\[\]]*)\]", operands[-1])[-1]
    return [kind + number for kind, number in re.findall(r"(UR|R)(\d+)", inner)]
