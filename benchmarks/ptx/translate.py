"""Translation of PTX to Python source: one function per kernel, a variable per register, a line or two per instruction.

Registers hold raw bits as unsigned integers, or floats where they are declared so; each instruction reads them in its
own type ("Type Conversion", "Operand Size Exceeding Instruction-Type Size").
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import asynchronous, matrix, values
from .machine import END, Code
from .memory import Fault
from .parser import Instruction, Kernel, Unsupported, many
from .values import BOOL, F2, F4, F8, TYPES, U2, U4, U8

SPECIAL = {
    "%tid.x": "tid", "%tid.y": "zero", "%tid.z": "zero", "%ntid.x": "ntid", "%laneid": "laneid", "%warpid": "warpid",
    "%ctaid.x": "cta[0]", "%ctaid.y": "cta[1]", "%ctaid.z": "cta[2]", "%nctaid.x": "grid[0]", "%nctaid.y": "grid[1]",
    "%nctaid.z": "grid[2]", "%clusterid.x": "cta[0]", "%cluster_ctarank": "zero", "%cluster_ctaid.x": "zero",
}  # fmt: skip
"""Expressions of the "Special Registers"."""
DYNAMIC_SHARED = "global_smem"
"""Triton's name of the block's shared memory."""
NO_EFFECT = ("nanosleep", "prefetch", "griddepcontrol", "setmaxnreg", "discard", "applypriority", "membar", "fence")
"""Hints, and fences between programs: the emulator's memory is sequentially consistent."""
SYMBOL = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
COMPARE = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
    "equ": "==", "neu": "!=", "ltu": "<", "leu": "<=", "gtu": ">", "geu": ">=",
}  # fmt: skip
UNARY = {
    "ex2": "np.exp2", "lg2": "np.log2", "sqrt": "np.sqrt", "sin": "np.sin", "cos": "np.cos", "tanh": "np.tanh",
    "neg": "-", "abs": "np.abs",
}  # fmt: skip
HALF_TYPES = ("bf16", "bf16x2", "f16", "f16x2")
NUMBER = re.compile(r"-?(0x[0-9a-fA-F]+|\d+)U?")
ADDRESS = re.compile(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?(?:0x)?[0-9a-fA-F]+))?\s*\]")


def kind_of(instruction: Instruction) -> str:
    """The name under which an instruction is counted: its opcode, and its state space if it has one."""
    parts = instruction.parts
    space = next((p.split("::")[0] for p in parts if p.split("::")[0] in ("global", "shared", "param")), None)
    if parts[0] == "cp":
        return ".".join(parts[:3]) if parts[2].endswith(("group", "all")) else "cp.async"
    if parts[0] in ("wgmma", "tcgen05", "mbarrier"):
        return ".".join(parts[:2])
    return f"{parts[0]}.{space}" if space else parts[0]


def smallest_shared_access(kernel: Kernel) -> int:
    """Bytes of the smallest access to shared memory, at least 2: matrix instructions read values of 16 bits."""
    sizes = [
        TYPES[i.parts[-1]].itemsize
        for block in kernel.blocks
        for i in block
        if i.parts[0] in ("ld", "st") and any(p.startswith("shared") for p in i.parts)
    ]
    return min([2, *sizes])


def translate(
    kernel: Kernel, threads: int, per_thread: bool
) -> tuple[Code, list[collections.Counter[str]], np.ndarray]:
    """Compile a kernel to a Python function.

    Args:
        threads: threads of a block.
        per_thread: give each thread a program counter, for blocks whose threads diverge.

    Returns:
        The function, the instructions of each basic block by kind, and the array in which it counts the runs of each
        block.

    Raises:
        Unsupported: an instruction that the emulator does not have; the message names it, with its line.
    """
    translator = Translator(kernel, threads, per_thread)
    source = translator.source()
    runs = np.zeros(len(kernel.blocks), np.int64)
    space: dict[str, Any] = {**vars(values), "np": np, "Fault": Fault, "END": END, "L": kernel.labels, "runs": runs}
    space |= translator.constants | {"I": translator.instructions}
    exec(compile(source, f"<ptx {kernel.name}>", "exec"), space)
    return space["run"], [collections.Counter(map(kind_of, block)) for block in kernel.blocks], runs


class Translator:
    def __init__(self, kernel: Kernel, threads: int, per_thread: bool):
        self.kernel, self.threads, self.per_thread = kernel, threads, per_thread
        self.constants: dict[str, Any] = {}
        self.constant_names: dict[tuple[object, str], str] = {}
        self.instructions: list[Instruction] = []
        self.used: dict[str, np.dtype] = {}  # variables of registers
        self.lines: list[str] = []
        self.accumulators = _accumulators(kernel)

    # ---- the function ------------------------------------------------------------------------------------------

    def source(self) -> str:
        bodies = []
        for number, block in enumerate(self.kernel.blocks):
            self.lines = []
            for instruction in block:
                self._instruction(instruction, number)
            bodies.append(self.lines)
        return "\n".join([*self._head(), *self._dispatch(bodies, 0, len(bodies), 2)])

    def _head(self) -> list[str]:
        lines = [
            "def run(block, parameters, cta, grid):",
            "  T, W = block.threads, block.warps",
            "  tid = np.arange(T, dtype=U4); zero = np.zeros(T, U4); ntid = np.full(T, T, U4)",
            "  laneid = tid % np.uint32(32); warpid = tid // np.uint32(32)",
            "  cta, grid = ([np.full(T, n, U4) for n in three] for three in (cta, grid))",
        ]
        # Registers that were never written hold values that show in results.
        for kind in set(self.used.values()):
            names = [name for name, k in self.used.items() if k == kind]
            poison = (
                "np.zeros(T, bool)" if kind == BOOL else f"np.full(T * {kind.itemsize}, 0xFE, U1).view({code(kind)})"
            )
            lines.append(f"  poison = {poison}")
            lines += [f"  {' = '.join(names[i : i + 200])} = poison" for i in range(0, len(names), 200)]
        if self.per_thread:
            lines += ["  P = block.counters", "  while True:", "    step = block.schedule()"]
            return [*lines, "    if step is None: return", "    pc, act = step"]
        return [*lines, "  pc = 0", "  while True:"]

    def _dispatch(self, bodies: list[list[str]], low: int, high: int, depth: int) -> list[str]:
        """A binary search for the block `pc`."""
        pad = "  " * depth
        if high - low > 1:
            middle = (low + high) // 2
            below = self._dispatch(bodies, low, middle, depth + 1)
            return [f"{pad}if pc < {middle}:", *below, f"{pad}else:", *self._dispatch(bodies, middle, high, depth + 1)]
        last = low == len(bodies) - 1
        if self.per_thread:
            start, after = f"runs[{low}] += len(np.unique(block.warp[act]))", "END" if last else str(low + 1)
            end = f"P[act] = {after}; continue"
        else:
            start, end = f"runs[{low}] += W", "return" if last else f"pc = {low + 1}; continue"
        return [pad + line for line in (start, *bodies[low], end)]

    # ---- operands ----------------------------------------------------------------------------------------------

    def emit(self, line: str) -> None:
        self.lines.append(line)

    def register(self, name: str) -> tuple[str, np.dtype] | None:
        kind = self.kernel.register_type(name)
        if kind is None:
            return None
        variable = "r_" + re.sub(r"\W", "_", name)
        self.used[variable] = TYPES[kind]
        return variable, TYPES[kind]

    def constant(self, value: Any, kind: np.dtype) -> str:
        key = (value.hex() if isinstance(value, float) else value, kind.str)
        if key not in self.constant_names:
            self.constant_names[key] = name = f"k{len(self.constant_names)}"
            if kind.kind in "ui":
                raw = np.dtype(f"u{kind.itemsize}")
                self.constants[name] = np.array([int(value) & (1 << 8 * kind.itemsize) - 1], raw).view(kind)[0]
            else:
                self.constants[name] = kind.type(value)
        return self.constant_names[key]

    def read(self, operand: str, kind: np.dtype) -> str:
        """An expression for an operand's value in a type ("Instruction Operands")."""
        register = self.register(operand)
        if register is not None:
            name, raw = register
            if operand in self.accumulators and self.is_checked:
                self.emit(f"if block.products: block.check_settled({name}, {self.at})")
            if raw == kind:
                return name
            if raw.itemsize == kind.itemsize:
                return f"{name}.view({code(kind)})"
            return f"{name}.astype(np.dtype('u{kind.itemsize}')).view({code(kind)})"
        if operand.startswith(("0f", "0F")):
            return self._float_bits(int(operand[2:], 16), F4, kind)
        if operand.startswith(("0d", "0D")):
            return self._float_bits(int(operand[2:], 16), F8, kind)
        if operand in SPECIAL:
            return SPECIAL[operand] if kind == U4 else f"{SPECIAL[operand]}.astype({code(kind)})"
        if NUMBER.fullmatch(operand):
            return self.constant(int(operand.rstrip("U"), 0), kind)
        if operand == DYNAMIC_SHARED:
            return self.constant(0, kind)
        if operand in ("true", "false"):
            return self.constant(operand == "true", kind)
        raise Unsupported(f"operand {operand}")

    def _float_bits(self, bits: int, source: np.dtype, kind: np.dtype) -> str:
        if kind.kind != "f":
            return self.constant(bits, kind)
        value = np.array([bits], f"u{source.itemsize}").view(source)[0]
        key = (bits, f"bits of {kind.str}")
        if key not in self.constant_names:
            self.constant_names[key] = name = f"k{len(self.constant_names)}"
            self.constants[name] = kind.type(value)
        return self.constant_names[key]

    def write(self, operand: str, expression: str, kind: np.dtype, guard: str | None) -> None:
        """Assign an expression of that type to a register, where the guard holds."""
        if operand == "_":
            return
        register = self.register(operand)
        if register is None:
            raise Unsupported(f"destination {operand}")
        name, raw = register
        if raw != kind:
            same = raw.itemsize == kind.itemsize
            change = f".view({code(raw)})" if same else f".astype(np.dtype('u{raw.itemsize}')).view({code(raw)})"
            expression = f"({expression}){change}"
        self.emit(f"{name} = np.where({guard}, {expression}, {name})" if guard else f"{name} = {expression}")

    def address(self, operand: str, kind: np.dtype) -> str:
        found = ADDRESS.fullmatch(operand)
        if found is None:
            raise Unsupported(f"address {operand}")
        base = self.read(found[1], kind)
        offset = int(found[2], 0) if found[2] else 0
        return f"({base} + {self.constant(offset, kind)})" if offset else base

    def tuple(self, operands: Sequence[str], kind: np.dtype) -> str:
        return "(" + "".join(f"{self.read(o, kind)}, " for o in operands) + ")"

    # ---- instructions ------------------------------------------------------------------------------------------

    def _instruction(self, i: Instruction, block: int) -> None:
        """Translate one instruction; raises `Unsupported` with its text where the emulator does not have it."""
        self.at = f"I[{len(self.instructions)}]"
        self.instructions.append(i)
        self.is_checked = i.parts[0] not in ("mov", "wgmma")
        guard = None
        if i.guard:
            predicate = self.read(i.guard.lstrip("!"), BOOL)
            guard = f"(~{predicate})" if i.guard.startswith("!") else predicate
        try:
            if i.parts[0] in ("bra", "ret", "exit", "bar", "barrier"):
                self._control(i, guard, block)
                return
            if self.per_thread:
                guard = f"(act & {guard})" if guard else "act"
                if i.parts[0] in ("mma", "wgmma", "ldmatrix", "stmatrix") or i.opcode.startswith("cp.async.wait"):
                    self.emit(f"if not (act | (P == END)).all(): raise Fault(f'a part of the block at {{{self.at}}}')")
            handler = HANDLERS.get(i.parts[0])
            if handler is None:
                raise Unsupported(i.parts[0])
            handler(self, i, guard)
        except (Unsupported, KeyError, ValueError, IndexError, StopIteration) as e:
            raise Unsupported(f"the emulator does not have: {i} ({e})") from e

    def _control(self, i: Instruction, guard: str | None, block: int) -> None:
        """Section "Control Flow Instructions": bra, ret, exit."""
        base = i.parts[0]
        if base in ("bar", "barrier"):
            return self._barrier(i, guard, block)
        if base == "bra" and i.operands[0] not in self.kernel.labels:
            raise Unsupported(f"label {i.operands[0]}")
        target = repr(i.operands[0]) if base == "bra" else ""
        if self.per_thread:
            self.emit(f"g = act & {guard}" if guard else "g = act")
            self.emit(f"P[act & ~g] = {block + 1}; P[g] = {f'L[{target}]' if target else 'END'}; continue")
        else:
            go = f"pc = L[{target}]; continue" if target else "return"
            self.emit(f"if block.branches({guard}, {self.at}): {go}" if guard else go)
        return None

    def _barrier(self, i: Instruction, guard: str | None, block: int) -> None:
        """Section "Parallel Synchronization and Communication Instructions: bar, barrier"."""
        parts = [p for p in i.parts[1:] if p not in ("cta", "aligned")]
        if parts == ["warp", "sync"]:
            return  # the threads of a warp run in lockstep
        if parts != ["sync"] or guard:
            raise Unsupported("only bar.sync without a guard")
        operands = [int(o, 0) for o in i.operands]
        count = operands[1] if len(operands) > 1 else None
        if self.per_thread:
            self.emit(f"P[act] = {block + 1}")
            self.emit(f"block.barrier({operands[0]}, {count}, act, {self.at}); continue")
        else:
            self.emit(f"block.barrier({operands[0]}, {count}, None, {self.at})")

    def _memory(self, i: Instruction, guard: str | None) -> None:
        """Section "Data Movement and Conversion Instructions: ld, st"."""
        parts, kind = i.parts, TYPES[i.parts[-1]]
        raw = np.dtype(f"u{kind.itemsize}")
        # A signed value is sign-extended to a wider register ("Operand Size Exceeding Instruction-Type Size").
        loaded = kind if kind.kind == "i" else raw
        if "param" in parts:
            self.emit(f"v = np.full(T, parameters[{i.operands[1].strip('[] ')!r}])")
            return self.write(i.operands[0], f"v.view({code(loaded)})", loaded, guard)
        space = self._space(i)
        is_load = parts[0] == "ld"
        value, memory = i.operands[:2] if is_load else i.operands[1::-1]
        address = self.address(memory, U4 if space == "shared" else U8)
        registers = many(value)
        if is_load:
            self.emit(f"v = block.load({space!r}, {address}, {guard}, {raw.itemsize}, {len(registers)}, {self.at})")
            for n, register in enumerate(registers):
                self.write(register, f"v[{n}].view({code(loaded)})", loaded, guard)
        else:
            self.emit(f"block.store({space!r}, {address}, {guard}, {self.tuple(registers, raw)}, {self.at})")
        return None

    def _space(self, i: Instruction) -> str:
        """The state space of an access ("State Spaces")."""
        if any(p in ("shared", "shared::cta") for p in i.parts):
            return "shared"
        if "global" in i.parts:
            return "global"
        raise Unsupported("its state space")

    def _atomic(self, i: Instruction, guard: str | None) -> None:
        """Section "Parallel Synchronization and Communication Instructions: atom, red"."""
        operation = next(p for p in i.parts[1:] if p in ("add", "min", "max", "exch", "and", "or", "xor"))
        kind = TYPES[i.parts[-1]]
        if self._space(i) != "global" or i.parts[-1] in HALF_TYPES:
            raise Unsupported("only atomics of 32 and 64 bits in global memory")
        memory, operand = i.operands[-2:]
        to = i.operands[0] if i.parts[0] == "atom" else "_"
        address, operand = self.address(memory, U8), self.read(operand, kind)
        self.emit(f"v = block.atomic({operation!r}, {code(kind)}, {address}, {guard}, {operand}, {self.at})")
        self.write(to, "v", kind, guard)

    def _copy(self, i: Instruction, guard: str | None) -> None:
        """Section "Data Movement and Conversion Instructions: Non-bulk copy": cp.async."""
        if i.parts[1] != "async" or "bulk" in i.parts:
            raise Unsupported("only cp.async of threads")
        kind = i.parts[2]
        if kind == "commit_group":
            return self.emit("block.commit_copies()")
        if kind == "wait_group":
            return self.emit(f"block.wait_for_copies({int(i.operands[0], 0)}, {self.at})")
        if kind == "wait_all":
            return self.emit(f"block.commit_copies(); block.wait_for_copies(0, {self.at})")
        if kind not in ("ca", "cg"):
            raise Unsupported("its completion mechanism")
        to, source = self.address(i.operands[0], U4), self.address(i.operands[1], U8)
        _, _, size, *source_size = i.operands
        n = self.read(source_size[0], U4) if source_size else None
        self.emit(f"block.copy_async({to}, {source}, {guard}, {int(size, 0)}, {n}, {self.at})")
        return None

    def _fence(self, i: Instruction, guard: str | None) -> None:
        """Section "Parallel Synchronization and Communication Instructions: membar / fence"."""
        if "proxy" in i.parts:
            self.emit(f"block.fence_proxy({guard}, {self.at})")

    def _nothing(self, i: Instruction, guard: str | None) -> None:
        """An instruction without effect in the emulator."""
        pass

    def _trap(self, i: Instruction, guard: str | None) -> None:
        """Section "Miscellaneous Instructions: trap"."""
        condition = f"np.any({guard})" if guard else "True"
        self.emit(f"if {condition}: raise Fault(f'trap: {{{self.at}}}')")

    def _move(self, i: Instruction, guard: str | None) -> None:
        """Section "Data Movement and Conversion Instructions: mov, cvta"; packs and unpacks vectors."""
        to, source = i.operands
        kind = TYPES[i.parts[-1]]
        raw = kind if kind == BOOL else np.dtype(f"u{kind.itemsize}")
        if to.startswith("{"):
            registers = many(to)
            part = np.dtype(f"u{raw.itemsize // len(registers)}")
            self.emit(f"v = np.ascontiguousarray(np.broadcast_to({self.read(source, raw)}, T)).view({code(part)})")
            for n, register in enumerate(registers):
                self.write(register, f"v[{n}::{len(registers)}]", part, guard)
        elif source.startswith("{"):
            registers = many(source)
            part = np.dtype(f"u{raw.itemsize // len(registers)}")
            shifted = [
                f"({self.read(r, part)}.astype({code(raw)}) << {self.constant(8 * part.itemsize * n, raw)})"
                for n, r in enumerate(registers)
            ]
            self.write(to, " | ".join(shifted), raw, guard)
        else:
            self.write(to, self.read(source, raw), raw, guard)

    def _shuffle(self, i: Instruction, guard: str | None) -> None:
        """Section "Data Movement and Conversion Instructions: shfl.sync"."""
        value, b, c = (self.read(o, U4) for o in i.operands[1:4])
        self.emit(f"v, w = block.shuffle({i.parts[2]!r}, {value}, {b}, {c})")
        to, *in_range = i.operands[0].split("|")
        self.write(to, "v", U4, guard)
        for predicate in in_range:
            self.write(predicate, "w", BOOL, guard)

    def _vote(self, i: Instruction, guard: str | None) -> None:
        """Section "Parallel Synchronization and Communication Instructions: vote.sync"."""
        predicate = i.operands[1]
        value = f"(~{self.read(predicate[1:], BOOL)})" if predicate.startswith("!") else self.read(predicate, BOOL)
        kind = U4 if i.parts[2] == "ballot" else BOOL
        self.write(i.operands[0], f"block.vote({i.parts[2]!r}, {value})", kind, guard)

    def _reduce(self, i: Instruction, guard: str | None) -> None:
        """Section "Parallel Synchronization and Communication Instructions: redux.sync"."""
        kind, operation = TYPES[i.parts[-1]], i.parts[2]
        names = {"add": "add", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}
        if operation in ("min", "max"):
            # The result is a number if there is one, unless `.NaN` is given.
            name = f"f{operation}" if kind == F4 and "NaN" not in i.parts else f"{operation}imum"
        else:
            name = names[operation]
        value = self.read(i.operands[1], kind)
        value = f"np.abs({value})" if "abs" in i.parts else value
        self.write(i.operands[0], f"block.reduce(np.{name}, {value})", kind, guard)

    def _elect(self, i: Instruction, guard: str | None) -> None:
        """Section "Parallel Synchronization and Communication Instructions: elect.sync"; lane 0 is elected."""
        _, predicate = i.operands[0].split("|")
        self.write(predicate, "(laneid == np.uint32(0))", BOOL, guard)

    def _ldmatrix(self, i: Instruction, guard: str | None) -> None:
        """Section "Warp-level matrix load instruction: ldmatrix"."""
        registers = many(i.operands[0])
        address = self.address(i.operands[1], U4)
        self.emit(f"v = block.load_matrix({address}, {len(registers)}, {'trans' in i.parts}, {self.at})")
        for n, register in enumerate(registers):
            self.write(register, f"v[{n}]", U4, guard)

    def _stmatrix(self, i: Instruction, guard: str | None) -> None:
        """Section "Warp-level matrix store instruction: stmatrix"."""
        address, registers = self.address(i.operands[0], U4), self.tuple(many(i.operands[1]), U4)
        self.emit(f"block.store_matrix({address}, {registers}, {'trans' in i.parts}, {self.at})")

    def _mma(self, i: Instruction, guard: str | None) -> None:
        """Section "Multiply-and-Accumulate Instruction: mma"."""
        if i.parts[1] != "sync" or "sp" in i.parts:
            raise Unsupported("only mma.sync of dense matrices")
        kinds = i.parts[-4:]
        raw = U8 if kinds[0] == "f64" else U4
        to, a, b, c = map(many, i.operands[:4])
        operands = ", ".join(self.tuple(registers, raw) for registers in (a, b, c))
        self.constants["mma"] = matrix.mma
        self.emit(f"v = mma({i.parts[3]!r}, {kinds!r}, {operands}, W)")
        for n, register in enumerate(to):
            self.write(register, f"v[{n}]", raw, guard)

    def _wgmma(self, i: Instruction, guard: str | None) -> None:
        """Section "Asynchronous Warpgroup Level Matrix Instructions": wgmma."""
        what = i.parts[1]
        if what == "fence":
            return self.emit("block.fence_wgmma()")
        if what == "commit_group":
            return self.emit("block.commit_wgmma()")
        if what == "wait_group":
            self.emit(f"block.wait_for_wgmma({int(i.operands[0], 0)}, {self.at})")
            names = [register[0] for r in sorted(self.accumulators) if (register := self.register(r))]
            self.emit("if block.finished:")
            for name in names:
                self.emit(f"  {name} = block.settled({name})")
            return self.emit("  block.finished.clear()")
        if what != "mma_async" or "sp" in i.parts or i.parts[-3] != "f32" or i.parts[-2] not in ("bf16", "f16", "tf32"):
            raise Unsupported("only dense wgmma of bf16, f16 and tf32 to f32")
        to, a_operand, b_operand, scale_d, *immediate = i.operands
        registers = many(to)
        numbers = [int(n, 0) for n in immediate]
        if a_operand.startswith("{"):
            a = self.tuple(many(a_operand), U4)  # registers of the A fragment
        else:
            a = f"np.asarray({self.read(a_operand, U8)})"  # a matrix descriptor
        # imm-scale-a, imm-scale-b, then imm-trans-a (if A is in shared memory) and imm-trans-b.
        signs, transposed = tuple(numbers[:2]), [bool(n) for n in numbers[2:]]
        k_major = tuple(not t for t in ([False] * (2 - len(transposed)) + transposed))
        is_number = NUMBER.fullmatch(scale_d)
        scale = self.constant(bool(int(scale_d, 0)), BOOL) if is_number else self.read(scale_d, BOOL)
        self.emit(
            f"v = block.wgmma({i.parts[4]!r}, {i.parts[-3:]!r}, {self.tuple(registers, U4)}, {a}, "
            f"{self.read(b_operand, U8)}, {scale}, {signs}, {k_major}, {self.at})"
        )
        for n, register in enumerate(registers):
            self.write(register, f"v[{n}]", U4, guard)
        return None

    def _compare(self, i: Instruction, guard: str | None) -> None:
        """Section "Comparison and Selection Instructions: setp"."""
        how, kind = i.parts[1], i.parts[-1]
        x, y = (self._number(o, kind, i) for o in i.operands[1:3])
        is_float = kind in ("f16", "bf16", "f32", "f64")
        unordered = f"(np.isnan({x}) | np.isnan({y}))"
        if how in ("nan", "num"):
            test = unordered if how == "nan" else f"(~{unordered})"
        else:
            test = f"({x} {COMPARE[how]} {y})"
            if is_float and how == "ne":
                test = f"({test} & ~{unordered})"
            elif is_float and how.endswith("u"):
                test = f"({test} | {unordered})"
        combine = next((p for p in i.parts[2:-1] if p in ("and", "or", "xor")), None)
        combined = ""
        if combine:
            last = i.operands[3]
            other = f"(~{self.read(last[1:], BOOL)})" if last.startswith("!") else self.read(last, BOOL)
            combined = f" {SYMBOL[combine]} {other}"
        to, *negated = i.operands[0].split("|")
        self.emit(f"v = np.broadcast_to({test}, T)")
        for register, value in ((to, "v"), *((n, "~v") for n in negated)):
            self.write(register, value + combined, BOOL, guard)

    def _select(self, i: Instruction, guard: str | None) -> None:
        """Section "Comparison and Selection Instructions: selp"."""
        kind = TYPES[i.parts[-1]]
        a, b = (self.read(o, kind) for o in i.operands[1:3])
        self.write(i.operands[0], f"np.where({self.read(i.operands[3], BOOL)}, {a}, {b})", kind, guard)

    def _bitwise(self, i: Instruction, guard: str | None) -> None:
        """Section "Logic and Shift Instructions: and, or, xor, not"."""
        kind = TYPES[i.parts[-1]]
        a = self.read(i.operands[1], kind)
        if i.parts[0] == "not":
            expression = f"~{a}"
        else:
            expression = f"{a} {SYMBOL[i.parts[0]]} {self.read(i.operands[2], kind)}"
        self.write(i.operands[0], expression, kind, guard)

    def _shift(self, i: Instruction, guard: str | None) -> None:
        """Section "Logic and Shift Instructions: shl, shr"."""
        kind = TYPES[i.parts[-1]]
        name = "shift_left" if i.parts[0] == "shl" else "shift_right"
        a, n = self.read(i.operands[1], kind), self.read(i.operands[2], U4)
        self.write(i.operands[0], f"{name}({a}, {n})", kind, guard)

    def _bits(self, i: Instruction, guard: str | None) -> None:
        """Bit manipulation: bfe, bfi, clz, popc ("Integer Arithmetic Instructions"), lop3, shf, prmt."""
        kind, base = TYPES[i.parts[-1]], i.parts[0]
        of = [kind, kind if base == "bfi" else U4, U4, U4]
        if base == "lop3":
            a, b, c = (self.read(o, U4) for o in i.operands[1:4])
            return self.write(i.operands[0], f"lookup3({a}, {b}, {c}, {int(i.operands[4], 0)})", U4, guard)
        if base == "shf":
            a, b, n = (self.read(o, U4) for o in i.operands[1:4])
            options = f"{'l' in i.parts}, {'wrap' in i.parts}"
            return self.write(i.operands[0], f"funnel_shift({a}, {b}, {n}, {options})", U4, guard)
        name = {"bfe": "extract_bits", "bfi": "insert_bits", "prmt": "permute_bytes", "clz": "leading_zeros",
                "popc": "count_ones"}[base]  # fmt: skip
        arguments = ", ".join(self.read(o, k) for o, k in zip(i.operands[1:], of, strict=False))
        if base in ("clz", "popc"):
            arguments = f"np.broadcast_to({arguments}, T)"
        return self.write(i.operands[0], f"{name}({arguments})", U4 if base in ("clz", "popc") else kind, guard)

    def _number(self, operand: str, kind: str, i: Instruction) -> str:
        """An operand as a number to compute with: 16-bit floats widened, subnormals flushed where asked for."""
        if kind == "bf16":
            return f"from_bf16({self.read(operand, U2)})"
        if kind == "f16":
            return f"{self.read(operand, F2)}.astype(F4)"
        value = self.read(operand, TYPES[kind])
        return f"flush_subnormal({value})" if kind == "f32" and "ftz" in i.parts else value

    def _arithmetic(self, i: Instruction, guard: str | None) -> None:
        """Sections "Integer Arithmetic Instructions" and "Floating-Point Instructions"."""
        base, kind_name = i.parts[0], i.parts[-1]
        if i.parts[-2] == "f32" and kind_name in ("bf16", "f16"):
            return self._mixed(i, guard)
        if kind_name in (*HALF_TYPES, "f32x2"):
            return self._packed(i, guard)
        kind = TYPES[kind_name]
        if "wide" in i.parts or "hi" in i.parts:
            return self._long_product(i, kind, guard)
        operands = [self._number(o, kind_name, i) for o in i.operands[1:]]
        expression = _expression(base, operands, kind, i)
        if kind == F4 and "ftz" in i.parts:
            expression = f"flush_subnormal({expression})"
        if "sat" in i.parts and kind.kind == "f":
            expression = f"np.clip({expression}, 0, 1)"
        return self.write(i.operands[0], expression, kind, guard)

    def _long_product(self, i: Instruction, kind: np.dtype, guard: str | None) -> None:
        a, b = (self.read(o, kind) for o in i.operands[1:3])
        if "hi" in i.parts:
            expression, of = f"multiply_high({a}, {b})", kind
        else:
            of = np.dtype(f"{kind.kind}{2 * kind.itemsize}")
            expression = f"{a}.astype({code(of)}) * {b}.astype({code(of)})"
        if i.parts[0] == "mad":
            expression = f"{expression} + {self.read(i.operands[3], of)}"
        self.write(i.operands[0], expression, of, guard)

    def _mixed(self, i: Instruction, guard: str | None) -> None:
        """Section "Mixed Precision Floating-Point Instructions": add, sub, fma, whose last operand is float32."""
        if i.parts[0] not in ("add", "sub", "fma") or "sat" in i.parts:
            raise Unsupported("mixed precision")
        *narrow, last = i.operands[1:]
        operands = [self._number(o, i.parts[-1], i) for o in narrow] + [self.read(last, F4)]
        self.write(i.operands[0], _expression(i.parts[0], operands, F4, i), F4, guard)

    def _packed(self, i: Instruction, guard: str | None) -> None:
        """16-bit floats, alone or two in a register, and two float32 in one: computed in float32 and rounded."""
        kind = i.parts[-1]
        single = kind.removesuffix("x2")
        register, lane = (U8, 32) if kind == "f32x2" else (U4, 16) if kind.endswith("x2") else (U2, 16)
        part = np.dtype(f"u{lane // 8}")
        widen = {"bf16": "from_bf16({})", "f16": "from_f16({})", "f32": "{}.view(F4)"}[single]
        narrow = {"bf16": "to_bf16({})", "f16": "to_f16({})", "f32": "np.asarray({}, F4).view(U4)"}[single]
        halves = []
        for half in range(2 if kind.endswith("x2") else 1):
            operands = []
            for o in i.operands[1:]:
                bits = self.read(o, register)
                if kind.endswith("x2"):
                    bits = f"({bits} >> {self.constant(lane * half, register)}).astype({code(part)})"
                operands.append(widen.format(bits))
            halves.append(narrow.format(_expression(i.parts[0], operands, F4, i)))
        if len(halves) == 1:
            return self.write(i.operands[0], halves[0], U2, guard)
        low, high = (f"{half}.astype({code(register)})" for half in halves)
        return self.write(i.operands[0], f"{low} | ({high} << {self.constant(lane, register)})", register, guard)

    def _convert(self, i: Instruction, guard: str | None) -> None:
        """Section "Data Movement and Conversion Instructions: cvt"."""
        to, source = i.parts[-2:]
        how = i.parts[1:-2]
        if "relu" in how or "satfinite" in how or "sat" in how:
            raise Unsupported("saturation")
        if to in ("bf16x2", "f16x2"):
            narrow = "to_bf16" if to == "bf16x2" else "to_f16"
            high, low = (f"{narrow}({self.read(o, F4)}).astype(U4)" for o in i.operands[1:3])
            return self.write(i.operands[0], f"({high} << np.uint32(16)) | {low}", U4, guard)
        if to == "tf32":
            expression = f"to_tf32({self.read(i.operands[1], F4)}, {'rna' in how})"
            return self.write(i.operands[0], expression, U4, guard)
        value = self._number(i.operands[1], source, i) if source != "f16" else self.read(i.operands[1], F2)
        rounding = next((h for h in how if h in values.ROUND), None)
        floats = ("f16", "bf16", "f32", "f64")
        kind = TYPES[to]
        if to == "bf16":
            return self.write(i.operands[0], f"to_bf16({value}.astype(F4))", U2, guard)
        if source in floats and to in floats:
            if rounding:
                value = f"ROUND[{rounding!r}]({value})"
            return self.write(i.operands[0], f"{value}.astype({code(kind)})", kind, guard)
        if source in floats:
            return self.write(i.operands[0], f"to_integer({value}, {code(kind)}, {rounding!r})", kind, guard)
        return self.write(i.operands[0], f"{value}.astype({code(kind)})", kind, guard)


def _expression(base: str, operands: Sequence[str], kind: np.dtype, i: Instruction) -> str:
    """Arithmetic on numbers of one type."""
    is_float = kind.kind == "f"
    if base in ("add", "sub", "mul"):
        return f"({operands[0]} {SYMBOL[base]} {operands[1]})"
    if base in ("fma", "mad"):
        a, b, c = operands
        return f"fma({a}, {b}, {c})" if is_float else f"({a} * {b} + {c})"
    if base in ("div", "rem"):
        name = "divide" if base == "div" else "remainder"
        return f"({operands[0]} / {operands[1]})" if is_float else f"{name}({operands[0]}, {operands[1]})"
    if base in ("min", "max"):
        # The result is the operand that is a number, unless `.NaN` is given ("min", "max").
        name = f"np.f{base}" if is_float and "NaN" not in i.parts else f"np.{base}imum"
        return f"{name}({operands[0]}, {operands[1]})"
    if base in ("rcp", "rsqrt"):
        root = f"np.sqrt({operands[0]}.astype(F8))" if base == "rsqrt" else f"{operands[0]}.astype(F8)"
        return f"(1 / {root}).astype({code(kind)})"
    if base == "copysign":
        return f"np.copysign({operands[1]}, {operands[0]})"
    return f"{UNARY[base]}({operands[0]})"


Handler = Callable[[Translator, Instruction, "str | None"], None]
HANDLERS: dict[str, Handler] = {
    "ld": Translator._memory, "st": Translator._memory, "atom": Translator._atomic, "red": Translator._atomic,
    "cp": Translator._copy, "mov": Translator._move, "cvta": Translator._move, "shfl": Translator._shuffle,
    "vote": Translator._vote, "elect": Translator._elect, "redux": Translator._reduce, "ldmatrix": Translator._ldmatrix,
    "stmatrix": Translator._stmatrix, "mma": Translator._mma, "wgmma": Translator._wgmma,
    "setp": Translator._compare, "selp": Translator._select, "cvt": Translator._convert, "trap": Translator._trap,
    **dict.fromkeys(("and", "or", "xor", "not"), Translator._bitwise),
    **dict.fromkeys(("shl", "shr"), Translator._shift),
    **dict.fromkeys(("bfe", "bfi", "prmt", "clz", "popc", "lop3", "shf"), Translator._bits),
    **dict.fromkeys(
        ("add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "rcp", "rsqrt", "copysign", *UNARY),
        Translator._arithmetic,
    ),
    **dict.fromkeys(NO_EFFECT, Translator._nothing),
    "fence": Translator._fence, "mbarrier": asynchronous.mbarrier, "tcgen05": asynchronous.tcgen05,
}  # fmt: skip


def _accumulators(kernel: Kernel) -> set[str]:
    """Registers that may hold accumulators of a wgmma: its destinations, and the registers they are moved to."""
    moves: list[tuple[str, str]] = []
    found: set[str] = set()
    for block in kernel.blocks:
        for i in block:
            if i.opcode.startswith("wgmma.mma_async"):
                found |= set(many(i.operands[0]))
            elif i.parts[0] == "mov" and i.operands[1].startswith("%"):
                moves.append((i.operands[1], i.operands[0]))
    while more := {to for source, to in moves if source in found} - found:
        found |= more
    return found


def code(kind: np.dtype) -> str:
    """The name of a type in the generated source."""
    return "BOOL" if kind == BOOL else f"{kind.kind.upper()}{kind.itemsize}"
