"""Every code block of the README and the pages runs, is checked as far as it can be, or says why it does not run.

Python blocks run by themselves, those with prompts as doctests (`test_docs.py`). A block that does not run has a
comment before it, `<!-- not run: the reason -->`. Commands are parsed by the real command line.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import ssm_kernels.compat
from vlmamba import cli
from vlmamba.benchmarks import cli as bench_cli
from vlmamba.benchmarks.options import COMMANDS as BENCH_COMMANDS
from vlmamba.commands import COMMANDS as MODEL_COMMANDS

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BY_SPHINX = ("{doctest}", "{eval-rst}", "{toctree}", "{include}", "{literalinclude}")
"""Kinds that Sphinx runs, or fills from files that have tests of their own."""
NO_CODE = ("text", "diff")
PROGRAMS = ("vlmamba", "ssm-bench", "make", "pip", "python", "torchrun", "pytest", "git", "lm_eval", "lmms-eval", ".")
"""Programs that a page may call; `VARIABLE=value` may precede one."""


class Block(NamedTuple):
    """A fenced block."""

    place: str
    kind: str
    text: str
    reason: str
    """Why it is not run, if it says so."""


def blocks(path: Path, text: str) -> list[Block]:
    """The fenced blocks of a page."""
    found = re.finditer(
        r"(?:<!-- not run: ([^\n]+?) -->\n+)?^(`{3,})([^\n`]*)\n(.*?)^\2$", text, re.DOTALL | re.MULTILINE
    )
    name = path.relative_to(ROOT)
    return [
        Block(f"{name}:{text[: m.start(2)].count(chr(10)) + 1}", m[3].split(" ")[0], m[4], m[1] or "") for m in found
    ]


BLOCKS = [block for path in FILES if "_build" not in path.parts for block in blocks(path, path.read_text())]
PYTHON = [b for b in BLOCKS if b.kind == "python" and not b.reason]
COMMANDS = {
    line.split("  #")[0].strip(): block.place
    for block in BLOCKS
    if block.kind == "sh"
    for line in block.text.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
}


def without_environment(command: str) -> list[str]:
    """Words of a command, less settings such as `OMP_NUM_THREADS=1` before it."""
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    return words


OURS = [c for c in COMMANDS if without_environment(c)[0] in ("vlmamba", "ssm-bench")]


def place(block: Block) -> str:
    return block.place


@pytest.mark.parametrize("block", BLOCKS, ids=place)
def test_a_block_is_of_a_kind_that_is_checked(block):
    kinds = (*BY_SPHINX, *NO_CODE, "python", "sh", "json", "")
    assert block.kind in kinds, f"{block.place}: nothing runs or checks {block.kind!r}"
    if block.kind == "":
        # A transcript, a tree: nothing that looks as if it were to be run.
        assert not re.search(r"^(import |from \w+ import|>>> |\$ )", block.text, re.MULTILINE), block.place


@pytest.mark.parametrize(
    "block", [pytest.param(b, marks=[pytest.mark.ptx] * ("@triton.jit" in b.text)) for b in PYTHON], ids=place
)
def test_a_python_block_runs(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    # A file, since Triton reads the source of a kernel.
    (tmp_path / "block.py").write_text(block.text)
    try:
        names = runpy.run_path(str(tmp_path / "block.py"))
        for name, value in names.items():
            if name.startswith("test_"):
                value()
    finally:
        ssm_kernels.compat.uninstall()
    printed = capsys.readouterr().out
    for shape in re.findall(r"print\(.*\)  # \((.*)\)$", block.text, re.MULTILINE):
        assert f"torch.Size([{shape}])" in printed


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.kind == "json"], ids=place)
def test_a_json_block_is_valid(block):
    try:
        json.loads(block.text)
    except json.JSONDecodeError:  # JSON Lines
        assert all(json.loads(line) for line in block.text.splitlines())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_starts_a_known_program(command):
    assert without_environment(command)[0] in PROGRAMS, f"{COMMANDS[command]}: {command}"


@pytest.mark.parametrize("command", OURS)
def test_a_command_is_understood(command, monkeypatch):
    """Each is parsed by the real command line; running it is another test's matter."""
    name, *arguments = without_environment(command)
    main, commands = (cli.main, MODEL_COMMANDS) if name == "vlmamba" else (bench_cli.main, BENCH_COMMANDS)
    ran = []
    for kind in commands.values():
        monkeypatch.setattr(kind, "run", lambda self: ran.append(self))
    if arguments == ["--help"]:
        with pytest.raises(SystemExit, match="^0$"):
            main(arguments)
        return
    main(arguments)
    assert len(ran) == 1


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = [c.split()[1] for c in COMMANDS if c.startswith("make ")]
    assert targets
    for target in targets:
        assert f"\n{target}:" in makefile


def test_the_search_finds_blocks_and_their_reasons():
    text = "a\n```python\n1 / 0\n```\n\n<!-- not run: it needs a server -->\n```sh\nrun\n```\n"
    first, second = blocks(ROOT / "a.md", text)
    assert (first.place, first.kind, first.text, first.reason) == ("a.md:2", "python", "1 / 0\n", "")
    assert (second.place, second.kind, second.reason) == ("a.md:7", "sh", "it needs a server")


def test_a_block_that_fails_is_noticed(tmp_path, monkeypatch, capsys):
    for text, error in (("1 / 0\n", ZeroDivisionError), ("def test_it():\n    assert False\n", AssertionError)):
        with pytest.raises(error):
            test_a_python_block_runs(Block("a.md:1", "python", text, ""), tmp_path, monkeypatch, capsys)
    with pytest.raises(AssertionError, match="nothing runs or checks 'rust'"):
        test_a_block_is_of_a_kind_that_is_checked(Block("a.md:1", "rust", "", ""))
    with pytest.raises(json.JSONDecodeError):
        test_a_json_block_is_valid(Block("a.md:1", "json", "{'a': 1}\n", ""))
