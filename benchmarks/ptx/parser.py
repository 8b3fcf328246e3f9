"""Parser of PTX: instructions in basic blocks, registers, labels and source lines ("Syntax")."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePath


class Unsupported(NotImplementedError):
    """The emulator has no such instruction, operand or type."""


@dataclass(frozen=True)
class Instruction:
    """One instruction ("Instruction Statements")."""

    opcode: str
    """With its modifiers: `ld.global.v4.b32`."""
    operands: tuple[str, ...]
    guard: str | None
    """Predicate that executes it, `%p1` or `!%p1`; None executes it always."""
    line: int
    """Line of the PTX text, from 1."""
    source: str
    """Line of the Python source, `forward.py:42`; empty where the compiler records none (".loc")."""

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.opcode.split("."))

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        place = f" ({self.source})" if self.source else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)} at PTX line {self.line}{place}"


@dataclass
class Kernel:
    """An entry function ("Kernel Function Declarations")."""

    name: str
    target: str
    """Target architecture, `sm_90a` (".target")."""
    threads: int | None
    """Threads of a block, where the text requires a number (".reqntid")."""
    parameters: list[tuple[str, str]]
    """Name and type, in order."""
    registers: dict[str, str] = field(default_factory=dict)
    """Type by name; `%r` stands for all of `%r<n>` ("Parameterized Variable Names")."""
    blocks: list[list[Instruction]] = field(default_factory=list)
    """Basic blocks in order: a label starts one, and a branch, return or barrier ends one."""
    labels: dict[str, int] = field(default_factory=dict)
    """Index of the block that a label starts."""

    def register_type(self, name: str) -> str | None:
        """The declared type of a register; None if the name is not a register's."""
        if name in self.registers:
            return self.registers[name]
        return self.registers.get(name.rstrip("0123456789")) if name.startswith("%") else None


ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", re.DOTALL)
STATEMENT = re.compile(r"(?:@(!?%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
SOURCE_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')
LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
BRANCH = re.compile(r"\bbra(?:\.uni)?\s+([$\w]+)")
ENDS_A_BLOCK = ("bra", "ret", "exit", "bar", "barrier")


def parse(text: str) -> Kernel:
    """Parse the one kernel of a PTX module, as Triton emits them.

    Raises:
        Unsupported: the text has no entry function, or a statement of unknown form.
    """
    entry = ENTRY.search(text)
    if entry is None:
        raise Unsupported("the PTX has no .entry function")
    parameters = []
    for declaration in filter(None, (p.strip() for p in entry[2].split(","))):
        words = declaration.split()  # .param .u64 .ptr .global .align 1 name
        parameters.append((words[-1], words[1].removeprefix(".")))
    target = re.search(r"\.target\s+(\w+)", text)
    threads = re.search(r"\.reqntid\s+(\d+)", entry[3])
    kernel = Kernel(entry[1], target[1] if target else "", int(threads[1]) if threads else None, parameters)
    files = {int(m[1]): PurePath(m[2]).name for m in SOURCE_FILE.finditer(text)}
    _Body(kernel, files).read(text, entry.end())
    return kernel


class _Body:
    """The statements between the braces of a kernel."""

    def __init__(self, kernel: Kernel, files: dict[int, str]):
        self.kernel, self.files, self.source = kernel, files, ""
        self.scopes: list[dict[str, str]] = []  # registers and labels of inline assembly, and their unique names
        self.n_scopes = 0
        self.targets: set[str] = set()
        kernel.blocks.append([])

    def read(self, text: str, start: int) -> None:
        self.targets = set(BRANCH.findall(text))
        line, pending = text.count("\n", 0, start) + 1, ""
        for raw in text[start:].splitlines():
            code = raw.split("//", 1)[0].strip()
            if code.startswith(".loc"):
                self._locate(code)
            elif code and not code.startswith((".file", ".section", ".pragma")):
                pending = self._statements(f"{pending} {code}".strip(), line)
                if pending is None:  # the closing brace of the kernel
                    return
            line += 1

    def _locate(self, code: str) -> None:
        found = LOCATION.match(code)
        if found and int(found[2]):
            self.source = f"{self.files.get(int(found[1]), '?')}:{found[2]}"

    def _statements(self, code: str, line: int) -> str | None:
        """Consume complete statements; return the rest of the text, or None at the kernel's end."""
        while code:
            label = re.match(r"([$\w]+):(?!:)\s*", code)
            if label:
                self._label(label[1])
                code = code[label.end() :]
            elif code[0] == "{":
                self.scopes.append({})
                self.n_scopes += 1
                code = code[1:].lstrip()
            elif code[0] == "}":
                if not self.scopes:
                    return None
                self.scopes.pop()
                code = code[1:].lstrip(" ;")
            elif ";" in code:
                statement, code = (part.strip() for part in code.split(";", 1))
                self._statement(statement, line)
            else:
                return code
        return code

    def _label(self, name: str) -> None:
        if name not in self.targets:  # a label for debuggers
            return
        if self.scopes:  # known from here on: branches go back to it
            name = self._declare_in_scope(name)
        if self.kernel.blocks[-1]:
            self.kernel.blocks.append([])
        self.kernel.labels[name] = len(self.kernel.blocks) - 1

    def _declare_in_scope(self, name: str) -> str:
        """Give a name of the innermost scope a unique one."""
        self.scopes[-1][name] = f"{name}_{self.n_scopes}"
        return self.scopes[-1][name]

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            return self._declare(text)
        if not text or text.startswith("."):
            return None
        for scope in reversed(self.scopes):
            for name, unique in scope.items():
                text = re.sub(rf"(?<![\w%$]){re.escape(name)}(?![\w$])", unique, text)
        found = STATEMENT.match(text)
        if found is None:
            raise Unsupported(f"statement {text!r} at PTX line {line}")
        self.kernel.blocks[-1].append(Instruction(found[2], _operands(found[3]), found[1], line, self.source))
        if found[2].split(".")[0] in ENDS_A_BLOCK:
            self.kernel.blocks.append([])
        return None

    def _declare(self, text: str) -> None:
        _, kind, names = text.split(None, 2)
        for name in (n.strip() for n in names.split(",")):
            name = name.split("<")[0]  # %r<12>: %r0 to %r11
            if self.scopes and not name.startswith("%"):
                name = self._declare_in_scope(name)
            self.kernel.registers[name] = kind.removeprefix(".")


def _operands(text: str) -> tuple[str, ...]:
    """Split at commas outside brackets."""
    found, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and not depth:
            found.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return (*found, last) if last else tuple(found)


def many(operand: str) -> list[str]:
    """Registers of a vector operand, or the one that it is."""
    return [r.strip() for r in operand[1:-1].split(",")] if operand.startswith("{") else [operand]
