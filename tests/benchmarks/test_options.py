"""Options of `ssm-bench`: values out of range are refused by name, before anything is measured."""

from __future__ import annotations

import dataclasses
import typing
from typing import get_args

import pytest

from vlmamba.benchmarks import cli, options
from vlmamba.commands import COMMANDS as VLMAMBA_COMMANDS
from vlmamba.model.fields import Interval


@pytest.mark.parametrize("commands", [options.COMMANDS, VLMAMBA_COMMANDS], ids=["ssm-bench", "vlmamba"])
def test_every_number_has_its_interval(commands):
    """Finds an option that accepts a negative number, or infinity without a meaning."""
    for name, command in commands.items():
        for field, hint in typing.get_type_hints(command, include_extras=True).items():
            for number, interval in numbers(hint):
                assert interval is not None, (name, field, number)
                assert -1 not in interval, (name, field)
    assert (
        sum(
            len(list(numbers(h)))
            for c in commands.values()
            for h in typing.get_type_hints(c, include_extras=True).values()
        )
        > 5
    )


def numbers(hint, interval=None):
    """The numbers within an annotation, each with its interval."""
    if typing.get_origin(hint) is typing.Annotated:
        inner, *metadata = get_args(hint)
        interval = next((m for m in metadata if isinstance(m, Interval)), interval)
        yield from numbers(inner, interval)
    elif hint in (int, float):
        yield hint, interval
    elif not dataclasses.is_dataclass(hint) and typing.get_origin(hint) is not typing.Literal:
        for inner in get_args(hint):
            yield from numbers(inner, interval)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("fuzz --minutes -1", "--minutes must be positive, got -1.0"),
        ("fuzz --minutes nan", "--minutes must be a finite number, got nan"),
        ("fuzz --trials 0", "--trials must be at least 1, got 0"),
        ("fuzz --seed -1", "--seed must be in"),
        ("gpu-suite --out x --minutes 0", "--minutes must be positive"),
        ("compare a b --alpha 2", r"--alpha must be in \(0, 1\), got 2.0"),
        ("compare a b --threshold nan", "--threshold must be a finite number"),
        ("compile-report --jobs 0", "--jobs must be at least 1"),
        ("sweep ssd --values 64 0", r"--values\[1\] must be at least 1, got 0"),
        ("sweep ssd --budget -3", "--budget must be positive"),
        ("run ssd --calls 0", "--calls must be at least 1"),
        ("integration --batch -1", "--batch must be at least 1"),
    ],
)
def test_nonsense_is_refused_before_anything_runs(arguments, message, capsys):
    with pytest.raises(SystemExit, match=f"ssm-bench: {message}"):
        cli.main(arguments.split())
    assert not capsys.readouterr().out


@pytest.mark.parametrize("content", [b"[" * 100_000, bytes(range(256)), b"null", b"{", b"[1]"], ids=len)
@pytest.mark.parametrize("command", ["compare {0} {0}", "decode --out {0} --context 8 --batch 1 --models ml-mamba"])
def test_a_report_that_is_none_is_refused_by_its_name(command, content, tmp_path):
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match="report.json"):
        cli.main(command.format(path).split())
    assert path.read_bytes() == content


def test_an_unknown_command_is_told_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["fuz", "--minutes", "1"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "ssm-bench: no command 'fuz'; did you mean 'fuzz'?\n"
