"""House style that a program can check: docstrings, first words, names of tests, and the share of comments."""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import ssm_kernels
import ssm_kernels.compat.mamba_ssm
import ssm_kernels.modules
import vlmamba.connectors
import vlmamba.model

ROOT = Path(__file__).parent.parent
LIBRARY = ("ssm_kernels", "connectors", "model", "train")
PACKAGES = (*LIBRARY, "serve", "vlmamba", "benchmarks")
FILES = [path for package in (*PACKAGES, "tests") for path in sorted((ROOT / package).rglob("*.py"))]
BANNED = ("What", "Of", "Where", "How", "As")
"""A docstring starts with a verb or with the noun that names the thing."""
COMMENTED = 0.04
"""Share of the lines of each package of the library that are comments, or have the shape of a result."""
SHAPE = re.compile(r"#\s*(?:[\w*, ]+: )?(?:[A-Za-z_]\w*(?:, \w+)* )?\(.*\)")
EXPORTING = (ssm_kernels, ssm_kernels.modules, ssm_kernels.compat.mamba_ssm, vlmamba.connectors, vlmamba.model)


def docstrings(text: str) -> Iterator[tuple[int, str]]:
    """Docstrings of modules, classes, functions and attributes, with their lines."""
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and isinstance(
            body, list
        ):
            for statement in body:
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    if isinstance(statement.value.value, str):
                        yield statement.lineno, statement.value.value


def banned_starts(text: str) -> list[int]:
    """Lines of the docstrings that start with a banned word."""
    return [line for line, doc in docstrings(text) if re.match(rf"\s*(?:{'|'.join(BANNED)})\b", doc)]


def comment_share(texts: list[str]) -> float:
    """Share of lines that are a comment, or end in one that states a shape."""
    commented = lines = 0
    for text in texts:
        lines += len(text.splitlines())
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                is_full_line = not token.line[: token.start[1]].strip()
                is_remark = not re.match(r"#\s*(fmt:|type:|pyright:|noqa)", token.string)
                commented += (is_full_line and is_remark) or bool(SHAPE.match(token.string))
    return commented / lines


def functions(module) -> Iterator[tuple[str, object]]:
    """Exported functions, and public methods of exported classes that the classes define themselves."""
    for name in getattr(module, "__all__", []):
        thing = getattr(module, name)
        if inspect.isfunction(thing):
            yield f"{module.__name__}.{name}", thing
        elif inspect.isclass(thing) and not issubclass(thing, tuple):
            for method, value in vars(thing).items():
                value = inspect.unwrap(getattr(value, "__func__", value))
                if not method.startswith("_") and inspect.isfunction(value):
                    yield f"{module.__name__}.{name}.{method}", value


def missing_sections(function) -> list[str]:
    """Sections that the docstring of a function lacks: Args if it takes arguments, Returns if it returns a value."""
    doc = inspect.getdoc(function) or ""
    tree = ast.parse(_source(function)).body[0]
    assert isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef))
    takes = [n for n in inspect.signature(function).parameters if n not in ("self", "cls") and not n.startswith("_")]
    returns = any(isinstance(n, ast.Return) and n.value is not None for n in _own_nodes(tree))
    yields = any(isinstance(n, (ast.Yield, ast.YieldFrom)) for n in _own_nodes(tree))
    missing = ["a docstring"] if not doc else []
    if takes and "Args:" not in doc:
        missing.append("Args")
    if (returns or yields) and not re.search(r"Returns:|Yields:", doc) and not re.match(r"(Return|Yield)s?\b", doc):
        missing.append("Returns")
    return missing


def _source(function) -> str:
    lines = inspect.getsource(function).splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[indent:] for line in lines)


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a function, leaving out functions inside it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            yield from _own_nodes(node)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings_start_with_a_verb_or_a_noun(path):
    assert not banned_starts(path.read_text()), f"lines {banned_starts(path.read_text())} start with one of {BANNED}"


def test_the_check_sees_a_banned_first_word():
    assert banned_starts('"""Sizes."""\nx = 1\n"""Of the sizes, the first."""\n') == [3]


UNCLEAR = re.compile(r"^test_what_|_(told|said|routes?|pieces?|begins?|learns|goes_on)(_|$)")
"""Words of test names that leave a reader to decipher them."""
TESTS = [path for path in FILES if path.name.startswith("test_") and path.parent.name not in ("benchmarks", "gpu")]


def unclear_tests(text: str) -> list[str]:
    """Names of tests that do not say in plain words which behavior they hold."""
    functions = [node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    return [name for name in functions if name.startswith("test_") and UNCLEAR.search(name)]


@pytest.mark.parametrize("path", TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_of_tests_are_in_plain_words(path):
    assert not unclear_tests(path.read_text())


def test_the_check_sees_an_unclear_name():
    assert unclear_tests("def test_it_is_said():\n    pass\n") == ["test_it_is_said"]


REPLACED = re.compile(r"\b([Pp]ieces?|the host waits for|[Ss]tands? (at|between|beside)|lies? one after|must lie)\b")
"""Words for which the glossary has others: segment, chunk; host-device synchronization; is, holds; concatenated; be."""
TEXTS = [path for path in FILES if "tests" not in path.parts] + [
    path
    for part in ("docs/**/*.md", "examples/*.*", "README.md")
    for path in sorted(ROOT.glob(part))
    if "_build" not in path.parts
]


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_words_are_those_of_the_glossary(path):
    # In the base64 of a picture any letters may follow each other.
    text = re.sub(r'"image/png": "[^"]*"', "", path.read_text())
    found = [line for line in text.splitlines() if REPLACED.search(line)]
    assert not found


@pytest.mark.parametrize("name, function", [pair for module in EXPORTING for pair in functions(module)])
def test_public_functions_state_arguments_and_results(name, function):
    assert not missing_sections(function), f"{name} lacks {', '.join(missing_sections(function))}"


def test_the_check_sees_missing_sections():
    def scan(u):
        """Scan."""
        return u

    assert missing_sections(scan) == ["Args", "Returns"]


@pytest.mark.parametrize("package", LIBRARY)
def test_shapes_and_reasons_are_commented(package):
    texts = [path.read_text() for path in FILES if path.relative_to(ROOT).parts[0] == package]
    assert comment_share(texts) >= COMMENTED


def test_the_share_counts_shapes_and_leaves_out_directives():
    text = "# why\nx = f(x)  # (B, L, D)\ny = g(x)  # noqa: E501\n# fmt: off\nz = 1  # a remark\n"
    assert comment_share([text]) == 2 / 5
