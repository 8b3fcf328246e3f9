"""The documentation builds without a warning, its examples run and print what they say, and it has every op."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ssm_kernels

pytest.importorskip("sphinx")
DOCS = Path(__file__).parent.parent / "docs"


def build(kind: str, out: Path) -> str:
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", kind, "-d", str(out / "cache"), str(DOCS), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("html")
    build("html", out)
    return out


def test_every_published_op_has_its_contract_on_a_page(pages):
    text = "".join(page.read_text() for page in pages.rglob("*.html"))
    for name in ssm_kernels.__all__:
        if name[0].islower():
            assert f'id="ssm_kernels.{name}"' in text or f'id="ssm_kernels.context_parallel.{name}"' in text, name


def test_pages_ask_for_nothing_from_elsewhere(pages):
    for page in pages.rglob("*.html"):
        loads = re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text())
        assert not loads, f"{page.name} loads {loads}"


def test_examples_run_and_print_their_results(tmp_path):
    build("doctest", tmp_path)
    counts = re.findall(r"(\d+) tests?\n +(\d+) failures? in tests", (tmp_path / "output.txt").read_text())
    assert int(counts[-1][0]) > 80 and counts[-1][1] == "0"
