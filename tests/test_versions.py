"""The page on installing shows the last results of `make versions`, and its bounds are among the rows."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("versions", ROOT / "tests" / "versions.py")
versions = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(versions)


def test_the_page_shows_the_results():
    results = json.loads(versions.RESULTS.read_text()) if versions.RESULTS.exists() else {}
    assert versions.BEGIN + versions.table(results) + versions.END in versions.PAGE.read_text()


def test_the_lowest_versions_that_are_allowed_are_in_a_row():
    project = (ROOT / "pyproject.toml").read_text()
    torch = re.search(r'"torch>=([\d.]+)"', project)[1]
    python = re.search(r'requires-python = ">=([\d.]+)"', project)[1]
    assert any((row.python, row.torch.removesuffix(".0")) == (python, torch) for row in versions.ROWS)


def test_parts_that_did_not_run_are_reported():
    row = versions.ROWS[0]
    lines = versions.table({row.name: {"versions": {"python": "3.10.1"}, "parts": {"ops": "9 passed"}, "date": "d"}})
    first, second = lines.splitlines()[2:4]
    assert first.startswith("| 3.10.1 | 2.9.0 |") and first.count("not run") == len(versions.PARTS) - 1
    assert second.count("not run") == len(versions.PARTS)
