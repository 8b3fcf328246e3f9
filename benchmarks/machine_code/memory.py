"""Bytes that a kernel asks from memory and gives to it, by the argument that the address comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .sass import CONSTANT, Instruction, Program, loaded_words, num_registers, parts_of

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

    Raises:
        ValueError: an access that derives its address from no parameter.
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
    for address, parameters in found.items():
        if not parameters:
            raise ValueError(f"the argument that the access at {address:#06x} goes to is not known")
    return found


def _step(state: Origins, instruction: Instruction, pointers: Mapping[int, int]) -> None:
    if instruction.base == "STL":  # a register that is spilled, which may hold an address
        origins = {slot: state.get(name, frozenset()) for slot, name in _spilled(instruction, *instruction.operands)}
    else:
        origins = _origins_of_results(state, instruction, pointers)
    for name in origins.keys() | instruction.written:
        if "P" in name:
            continue
        found = origins.get(name, frozenset())
        if instruction.guard is not None:
            state[name] = state.get(name, frozenset()) | found
        elif found:
            state[name] = found
        else:
            state.pop(name, None)


def _spilled(instruction: Instruction, place: str, register: str) -> list[tuple[str, str]]:
    """32-bit words of the stack that an access reads or writes, each with its register."""
    offset = re.fullmatch(r"\[R1(?:\+(-?0x[0-9a-f]+))?\]", place)
    if offset is None or register == "RZ":
        return []
    names = parts_of(register, num_registers(instruction))
    return [(f"stack {int(offset[1] or '0', 16) + 4 * k}", name) for k, name in enumerate(names)]


def _origins_of_results(state: Origins, instruction: Instruction, pointers: Mapping[int, int]) -> Origins:
    if instruction.base in ("LDG", "LDS", "LDSM", "SHFL"):
        return {}
    if instruction.base == "LDL":
        register, place = instruction.operands
        return {name: state.get(slot, frozenset()) for slot, name in _spilled(instruction, place, register)}
    if instruction.base in ("LDC", "LDCU", "ULDC"):
        # A register has one word: of four that are loaded together, the last two may hold another pointer.
        words = [(name, offset) for name, base, offset in loaded_words(instruction) if base is None]
        return {name: frozenset({pointers[offset]}) for name, offset in words if offset in pointers}
    # Predicates are left out: a carry belongs to the pair whose lower half is followed.
    registers = [name for name in instruction.read if "P" not in name]
    origins = frozenset[int]().union(*(state.get(name, ()) for name in registers))
    for operand in instruction.operands:
        for constant in re.finditer(CONSTANT, operand):
            if constant[1] is not None:  # a word that is not known
                continue
            first = int(constant[2], 16)
            words = (first, first + 4) if "64" in instruction.parts else (first,)
            origins |= {pointers[word] for word in words if word in pointers}
    return dict.fromkeys(instruction.written, origins)


def _address_registers(instruction: Instruction) -> list[str]:
    operands = [o for o in instruction.operands if "[" in o]
    # The shared-memory side of LDGSTS comes first.
    inner = re.findall(r"\[([^\[\]]*)\]", operands[-1])[-1]
    return [kind + number for kind, number in re.findall(r"(UR|R)(\d+)", inner)]
