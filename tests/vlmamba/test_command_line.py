"""Help of the commands."""

from __future__ import annotations

import pytest

from vlmamba import cli
from vlmamba.benchmarks import cli as bench_cli
from vlmamba.command_line import first_sentence, parse

COMMANDS = {**cli.COMMANDS, **bench_cli.COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_no_placeholder(name, capsys):
    with pytest.raises(SystemExit):
        parse(name, COMMANDS[name], ["--help"])
    text = capsys.readouterr().out
    for placeholder in ("{None", "default: None", " STR "):
        assert placeholder not in text


def test_the_program_s_help_has_one_sentence_on_each_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for kind in cli.COMMANDS.values():
        assert first_sentence(kind) in text
    assert "An interrupted run resumes" not in text  # the second one of `demo`
