"""The README's examples run, and its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from vlmamba.benchmarks import cli as bench_cli
from vlmamba.model import PRESETS, VISION_ENCODERS
from vlmamba.model.formats.language import PUBLISHED
from vlmamba.train import cli

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0] for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()
]


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_run_and_print_what_they_say(code, tmp_path, monkeypatch, capsys):
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
    for span in re.findall(r"`([^`\n]+)`", README):
        start, _, rest = span.partition("{")
        middle, _, end = rest.partition("}")
        named |= {start + choice + end for choice in middle.split(",")}
    assert set(PUBLISHED) | set(VISION_ENCODERS) | set(PRESETS) <= named


def test_make_targets_exist():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    targets = [c.split()[1] for c in COMMANDS if c.startswith("make ")]
    assert targets
    for target in targets:
        assert f"\n{target}:" in makefile
