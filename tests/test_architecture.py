"""The floors: an import goes down, never up or sideways."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW = {
    "ssm_kernels": set(),
    "connectors": {"ssm_kernels"},
    "model": {"ssm_kernels", "connectors"},
    "train": {"ssm_kernels", "connectors", "model"},
    "benchmarks": {"ssm_kernels", "connectors", "model", "train"},
}
FILES = [path for floor in BELOW for path in sorted((ROOT / floor).rglob("*.py"))]


def imported_floors(path: Path) -> set[str]:
    """Other floors that a file imports."""
    floors = set()
    depth = len(path.relative_to(ROOT).parts) - 1
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.ImportFrom) and node.level > depth:
            names = ["vlmamba." + (node.module or "")]
        for name in names:
            parts = name.split(".")
            if parts[0] == "vlmamba" and len(parts) > 1:
                floors.add(parts[1])
            elif parts[0] in BELOW:
                floors.add(parts[0])
    return floors - {path.relative_to(ROOT).parts[0]}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    floor = path.relative_to(ROOT).parts[0]
    assert imported_floors(path) <= BELOW[floor]


def test_the_check_sees_an_import_that_goes_up(tmp_path):
    bad = ROOT / "ssm_kernels" / "imagined.py"
    texts = {"from ..model import VLM": {"model"}, "import vlmamba.train.cli": {"train"}, "import torch": set()}
    for text, floors in texts.items():
        file = tmp_path / "imagined.py"
        file.write_text(text)
        assert imported_floors_of_text(file, bad) == floors


def imported_floors_of_text(file: Path, pretended: Path) -> set[str]:
    class Pretended(type(file)):
        def relative_to(self, *args):
            return pretended.relative_to(ROOT)

    return imported_floors(Pretended(file))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_left_to_do_without_saying_where(path):
    for i, line in enumerate(path.read_text().splitlines(), 1):
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", line), f"{path}:{i}"


def unions_in_isinstance(text: str) -> list[int]:
    """The lines where `isinstance` is asked for a union, `A | B`."""
    calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    return [n.lineno for n in calls if n.func.id == "isinstance" and isinstance(n.args[1], ast.BinOp)]


@pytest.mark.parametrize("path", sorted((ROOT / "ssm_kernels").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_ops_ask_for_tuples_of_types(path):
    """`torch.compile` of torch 2.9 refuses `isinstance(x, A | B)`, and the ops compile to one graph."""
    assert not unions_in_isinstance(path.read_text()), "write `isinstance(x, (A, B))`"


def test_the_check_sees_a_union():
    assert unions_in_isinstance("a = 1\nisinstance(a, (int, str))\nisinstance(a, int | str)\n") == [3]


def test_every_op_has_the_same_rooms():
    beside = {"_core", "_triton", "compat", "integrations", "testing"}
    folders = [p.parent for p in (ROOT / "ssm_kernels").glob("*/__init__.py")]
    ops = [p for p in folders if p.name not in beside]
    assert {p.name for p in ops} == {"causal_conv1d", "cross_scan", "norm", "selective_scan", "ssd"}
    for op in ops:
        assert (op / "reference.py").exists()
        assert (op / "pytorch.py").exists()
