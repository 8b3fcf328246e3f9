"""Examples of the README run; commands and links of the README and of the pages lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from vlmamba import cli
from vlmamba.benchmarks import cli as bench_cli
from vlmamba.model import PRESETS, VISION_ENCODERS
from vlmamba.model.formats.language import PUBLISHED

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)  # those of the pages are doctests
COMMANDS = list(
    dict.fromkeys(
        line.split("  #")[0].strip()
        for text in [README, *PAGES.values()]
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    )
)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_run_and_print_their_results(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    for shape in re.findall(r"print\(.*\)  # \((.*)\)$", code, re.MULTILINE):
        assert f"torch.Size([{shape}])" in printed


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(("vlmamba", "ssm-bench"))])
def test_commands_are_understood(command, monkeypatch):
    """Each is parsed by the real command line; running it is another test's matter."""
    name, *arguments = shlex.split(command)
    module = cli if name == "vlmamba" else bench_cli
    ran = []
    for kind in module.COMMANDS.values():
        monkeypatch.setattr(kind, "run", lambda self: ran.append(self))
    module.main(arguments)
    assert len(ran) == 1


def test_every_published_name_is_in_the_table():
    named = set()
    for span in re.findall(r"`([^`\n]+)`", PAGES["models.md"]):
        start, _, rest = span.partition("{")
        middle, _, end = rest.partition("}")
        named |= {start + choice + end for choice in middle.split(",")}
    assert set(PUBLISHED) | set(VISION_ENCODERS) | set(PRESETS) <= named


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = [c.split()[1] for c in COMMANDS if c.startswith("make ")]
    assert targets
    for target in targets:
        assert f"\n{target}:" in makefile


def test_links_to_files_and_headings_lead_somewhere():
    for name, text in {"README.md": README, **{f"docs/{n}": t for n, t in PAGES.items()}}.items():
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            path, _, heading = link.partition("#")
            target = (ROOT / name).parent / path if path else ROOT / name
            assert target.exists(), f"{name}: {link}"
            if heading and target.suffix == ".md":
                titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^a-z0-9 -]", "", t.lower()).replace(" ", "-") for t in titles}
                assert heading in anchors, f"{name}: {link}"


def test_the_readme_stays_a_first_page():
    assert len(README.splitlines()) <= 150
    assert not any("{include} ../README" in text for text in PAGES.values())
