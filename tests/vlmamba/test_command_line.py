"""Help of the commands: every option has its text, what it takes and its default, and the examples are understood."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import tyro

from vlmamba import cli
from vlmamba.benchmarks import cli as bench_cli
from vlmamba.benchmarks.options import COMMANDS as BENCH_COMMANDS
from vlmamba.commands import COMMANDS as MODEL_COMMANDS
from vlmamba.help import Default, check_options, examples, field_texts, first_sentence, parse
from vlmamba.model.fields import Count
from vlmamba.model.generation.config import GenerationConfig

COMMANDS = {**MODEL_COMMANDS, **BENCH_COMMANDS}


def help_of(name, kind, capsys, monkeypatch, width=80) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        parse(name, kind, ["--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_no_placeholder_and_nothing_of_the_source(name, capsys, monkeypatch):
    text = help_of(name, COMMANDS[name], capsys, monkeypatch, 10_000)
    for placeholder in ("{None", "default: None", "default: )", "default: '')", " STR ", "[[", "{[", "{fixed}"):
        assert placeholder not in text
    assert not re.search(r"\b(type: ignore|noqa|pyright|fmt|pragma)\b", text)
    for line in text.splitlines():
        # An option, what it takes, and a text that is more than a default.
        if option := re.match(r"│ (-\S.*|\S+ *(?:\.\.\.\]?)?)   *(\S.*?) *│$", line):
            assert re.sub(r"\((default: .*|required)\)", "", option[2]).strip(), line


def options(kind):
    texts = field_texts(kind)
    for field, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from options(hint)
        elif field in {f.name for f in dataclasses.fields(kind)}:
            yield field, texts.get(field)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_text_that_is_a_sentence(name):
    for option, text in options(COMMANDS[name]):
        assert text and text.endswith("."), option


@pytest.mark.parametrize(
    ("program", "main", "commands"),
    [("vlmamba", cli.main, MODEL_COMMANDS), ("ssm-bench", bench_cli.main, BENCH_COMMANDS)],
    ids=["vlmamba", "ssm-bench"],
)
def test_every_command_has_examples_that_are_understood(program, main, commands, monkeypatch):
    ran = []
    for kind in commands.values():
        monkeypatch.setattr(kind, "run", lambda self: ran.append(type(self)))
    for name, kind in commands.items():
        own = [words for words in examples(kind) if words[1:2] == [name]]
        assert own and own[0][0] == program
        for words in own:
            main(words[1:])
            assert ran.pop() is kind, words


def test_the_examples_are_in_the_help_and_one_is_a_line(capsys, monkeypatch):
    text = help_of("vlmamba train", MODEL_COMMANDS["train"], capsys, monkeypatch, 200)
    assert "\n$ vlmamba data easy-vqa data\n" in text


def test_the_program_s_help_has_one_sentence_on_each_command(capsys):
    with pytest.raises(SystemExit):
        cli.main([])  # as --help
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for kind in MODEL_COMMANDS.values():
        assert first_sentence(kind) in text
    assert "An interrupted run resumes" not in text  # the second one of `demo`


@dataclass(frozen=True)
class Part:
    """A part."""

    size: Count = 2
    """Its size,
    (in steps)."""

    def __post_init__(self):
        assert type(self) is Part


@dataclass
class Made:
    """Make it."""

    path: tyro.conf.Positional[tuple[str, ...]]
    """Paths."""
    kind: Literal["a", "b", "c", "d", "e", "f", "g"] | None = None  # type: ignore[valid-type]
    """Kind."""
    bare: str = ""  # pragma: a comment, and no text
    rate: Annotated[float | None, Default("the recipe's")] = None
    """Rate."""
    dry: bool = False
    """Dry."""
    keep: bool = True
    """Keep."""
    part: tyro.conf.OmitArgPrefixes[Part] = Part()
    other: Part = Part(3)


def test_help_of_each_kind_of_option(capsys, monkeypatch):
    text = re.sub(r" {2,}", "  ", help_of("made", Made, capsys, monkeypatch, 200))
    for line in (
        "usage: made [-h] [OPTIONS] PATH ...", "PATH ...  Paths.", "--kind KIND  Kind. Choices: a, b, c, d, e, f, g.",
        "--bare BARE", "--rate FLOAT  Rate. (default: the recipe's)", "--dry  Dry.", "part options", "other options",
        "--keep, --no-keep  Keep. (default: on)", "--size INT  Its size, (in steps). (default: 2)",
        "--other.size INT  Its size, (in steps). (default: 3)", "A part.",
    ):  # fmt: skip
        assert line in text, line
    assert "pragma" not in text and "--no-dry" not in text


def test_a_command_is_of_its_own_class_and_its_groups_are_checked():
    command = parse("made", Made, ["x", "y", "--size", "5", "--no-keep", "--dry"])
    assert command == Made(("x", "y"), dry=True, keep=False, part=Part(5))
    with pytest.raises(ValueError, match="^--size must be at least 1, got 0"):
        check_options(parse("made", Made, ["x", "--size", "0"]))
    with pytest.raises(ValueError, match="^--other.size must be at least 1, got 0"):
        check_options(parse("made", Made, ["x", "--other.size", "0"]))


def test_chat_has_no_option_that_it_does_not_use(capsys):
    """It takes no draft model, so it has no number of draft tokens; `generate` has both."""
    assert parse("chat", MODEL_COMMANDS["chat"], ["x", "--top-k", "3"]).sampling == GenerationConfig(top_k=3)
    with pytest.raises(SystemExit, match="^2$"):
        parse("chat", MODEL_COMMANDS["chat"], ["x", "--draft-tokens", "3"])
    assert "--draft-tokens" in capsys.readouterr().err
    command = parse("generate", MODEL_COMMANDS["generate"], ["x", "a", "--draft-tokens", "3"])
    assert command.sampling == GenerationConfig(draft_tokens=3)


@pytest.mark.parametrize(
    "argument, message",
    [("tran", "command 'tran'; did you mean 'train'?"), ("--vers", "option '--vers'; did you mean '--version'?"),
     ("-x", "option '-x'; known are --help, --version")],
)  # fmt: skip
def test_an_unknown_command_or_option_is_one_line_with_what_is_known(argument, message, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        cli.main([argument])
    assert capsys.readouterr().err == f"vlmamba: no {message}\n"


def test_openmp_s_threads_sleep_unless_the_user_wants_otherwise(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    cli.main(["--version"])
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    cli.main(["--version"])
    assert os.environ["OMP_WAIT_POLICY"] == "passive"


@pytest.mark.parametrize("command", BENCH_COMMANDS)
def test_openmp_s_threads_sleep_where_nothing_is_timed(command, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with pytest.raises(SystemExit):
        bench_cli.main([command, "--help"])
    assert ("OMP_WAIT_POLICY" in os.environ) == (command not in bench_cli.TIMING)
    assert set(bench_cli.TIMING) <= set(BENCH_COMMANDS)
