"""Packages: an import goes down, never up or sideways, never to a private name, and never in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW = {
    "ssm_kernels": set(),
    "connectors": {"ssm_kernels"},
    "model": {"ssm_kernels", "connectors"},
    "train": {"ssm_kernels", "connectors", "model"},
    "serve": {"ssm_kernels", "connectors", "model"},
    "vlmamba": {"ssm_kernels", "connectors", "model", "serve", "train"},
    "benchmarks": {"ssm_kernels", "connectors", "model", "serve", "train", "vlmamba"},
}
FILES = [path for package in BELOW for path in sorted((ROOT / package).rglob("*.py"))]


def imported_packages(path: Path) -> set[str]:
    """Other packages that a file imports."""
    packages = {name.split(".")[0] for _, name in imports(path, ast.parse(path.read_text()))}
    return (packages & BELOW.keys()) - {path.relative_to(ROOT).parts[0]}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    package = path.relative_to(ROOT).parts[0]
    assert imported_packages(path) <= BELOW[package]


def test_the_check_sees_an_import_that_goes_up(tmp_path):
    bad = ROOT / "ssm_kernels" / "imagined.py"
    texts = {"from ..model import VLM": {"model"}, "import vlmamba.cli": {"vlmamba"}, "import torch": set()}
    for text, packages in texts.items():
        file = tmp_path / "imagined.py"
        file.write_text(text)
        assert imported_packages_of_text(file, bad) == packages


def imported_packages_of_text(file: Path, pretended: Path) -> set[str]:
    class Pretended(type(file)):
        def relative_to(self, *args):
            return pretended.relative_to(ROOT)

    return imported_packages(Pretended(file))


def imports(path: Path, tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Imports of a file: the statement, and the dotted name of what it imports from the root of the checkout."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    if package[0] not in ("ssm_kernels", "vlmamba"):
        package = ("vlmamba", *package)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, _from_root(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = [*base, *filter(None, [node.module])]
            for alias in node.names:
                yield node, _from_root(".".join([*module, alias.name]))


def _from_root(name: str) -> str:
    """`vlmamba.model` is the folder `model`, `vlmamba.cli` the module `vlmamba/cli.py`."""
    inner = name.removeprefix("vlmamba.")
    return inner if inner.split(".")[0] in BELOW else name


def private_imports(path: Path) -> list[str]:
    """Private modules and names of other packages that a file imports."""
    package = path.relative_to(ROOT).parts[0]
    found = []
    for _, name in imports(path, ast.parse(path.read_text())):
        top, *rest = name.split(".")
        if top in BELOW and top != package and any(part.startswith("_") and part != "__version__" for part in rest):
            found.append(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_private_is_imported_across_packages(path):
    assert not private_imports(path)


def import_graph(package: str) -> dict[str, set[str]]:
    """Modules of a package, and those of the same package that each imports, inside functions too.

    What stands under `TYPE_CHECKING` is for type checkers alone and is left out.
    """
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / package).rglob("*.py")}
    graph = {}
    for module, path in files.items():
        tree = ast.parse(path.read_text())
        unread = {id(n) for t in ast.walk(tree) if _is_type_checking(t) for n in ast.walk(t)}
        names = [name for node, name in imports(path, tree) if id(node) not in unread]
        # A name may be a module, or something that a module defines; `from . import x` names the package.
        found = {next((m for m in (n, f"{n}.__init__", n.rpartition(".")[0]) if m in files), None) for n in names}
        found |= {
            m
            for n in names
            if not {n, f"{n}.__init__"} & set(files) and (m := n.rpartition(".")[0] + ".__init__") in files
        }
        graph[module] = found - {None, module}
    return graph


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Circles of imports: modules of which each can be reached from each other."""
    reached = {start: _reachable(graph, start) for start in graph}
    found = {frozenset({m, *(n for n in reached[m] if m in reached[n])}) for m in graph if m in reached[m]}
    return sorted(map(sorted, found))


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    ahead = list(graph[start])
    while ahead:
        if (module := ahead.pop()) not in seen:
            seen.add(module)
            ahead += graph[module]
    return seen


@pytest.mark.parametrize("package", BELOW)
def test_no_import_goes_in_a_circle(package):
    assert not circles(import_graph(package))


def test_the_check_sees_a_circle():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


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


REFERENCES = sorted((ROOT / "ssm_kernels").glob("*/reference.py"))


@pytest.mark.parametrize("path", REFERENCES, ids=lambda p: p.parent.name)
def test_references_share_no_code_with_what_they_judge(path):
    inside = [name for _, name in imports(path, ast.parse(path.read_text())) if name.startswith("ssm_kernels.")]
    # The bounds of packed sequences and the slots of states are parsed in one place; arguments are types.
    allowed = (
        r"ssm_kernels\._core\.(varlen|slots|state_format_reference)\.\w+|ssm_kernels\.\w+\.(reference|arguments\.\w+)"
    )
    assert all(re.fullmatch(allowed, n) for n in inside), inside


def test_every_op_has_the_same_files():
    beside = {"_core", "_numba", "_triton", "compat", "context_parallel", "integrations", "modules", "testing"}
    folders = [p.parent for p in (ROOT / "ssm_kernels").glob("*/__init__.py")]
    ops = [p for p in folders if p.name not in beside]
    assert {p.name for p in ops} == {"causal_conv1d", "cross_scan", "mamba3", "norm", "selective_scan", "ssd"}
    for op in ops:
        assert (op / "reference.py").exists()
        assert (op / "pytorch.py").exists()
