"""Help of commands, from their dataclasses: a text on each option, what it takes, and its default."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import shlex
import textwrap
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from .model.fields import check_fields

SHORT = 6
"""Most choices that are listed in place of an option's value; more are listed in its text."""


@dataclasses.dataclass(frozen=True)
class Default:
    """Text of a default in the help, in place of the field's own."""

    text: str


@dataclasses.dataclass(frozen=True)
class Without:
    """Names of a group's fields that a command has no options for; they keep their defaults."""

    names: tuple[str, ...]


def examples(kind: type) -> list[list[str]]:
    """Words of the example commands of a command: the lines of its docstring that start with `$`."""
    return [shlex.split(line[2:]) for line in (inspect.getdoc(kind) or "").splitlines() if line.startswith("$ ")]


def first_sentence(kind: type) -> str:
    """First sentence of a command's docstring."""
    text = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", text, maxsplit=1)[0]


def parse(prog: str, kind: type, arguments: Sequence[str]) -> Any:
    """Make a command from its arguments; `--help` prints its help and exits.

    Args:
        prog: names of the program and the command.
        kind: dataclass of the command. A field that is a dataclass is a group of options, without a prefix if it is
            annotated with `tyro.conf.OmitArgPrefixes`.
        arguments: those after the command's name.
    """
    config = (tyro.conf.DisallowNone, tyro.conf.HelptextFromCommentsOff)
    described, description = _described(kind), inspect.getdoc(kind)
    return _original(kind, tyro.cli(described, prog=prog, args=arguments, description=description, config=config))


def check_options(command: Any, prefix: str = "--") -> None:
    """Check the values of a command, and of its groups of options, against their annotations.

    Raises:
        ValueError: one does not fit; the message has the option.
    """
    check_fields(command, lambda name: f"{prefix}{name.replace('_', '-')}")
    for name, hint in typing.get_type_hints(type(command), include_extras=True).items():
        bare, *metadata = _unwrapped(hint)
        if dataclasses.is_dataclass(bare):
            is_plain = tyro.conf.OmitArgPrefixes in metadata
            check_options(getattr(command, name), prefix if is_plain else f"{prefix}{name}.")


def _original(kind: type, value: Any) -> Any:
    """Make an instance of a class from one of its described class."""
    hints = typing.get_type_hints(kind)
    given = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    groups = {name: hints[name] for name in given if dataclasses.is_dataclass(hints[name])}
    return kind(**given | {name: _original(group, given[name]) for name, group in groups.items()})


@functools.cache
def _described(kind: type, left_out: tuple[str, ...] = ()) -> type:
    """Derive a class whose fields have their help, for tyro; it lacks the fields that are left out."""
    hints, texts, fields = typing.get_type_hints(kind, include_extras=True), field_texts(kind), []
    for field in dataclasses.fields(kind):
        if field.name in left_out:
            continue
        bare, *metadata = _unwrapped(hints[field.name])
        value: dict[str, Any] = {key: getattr(field, key) for key in ("default", "default_factory")}
        if dataclasses.is_dataclass(bare):
            without = next((m.names for m in metadata if isinstance(m, Without)), ())
            bare = _described(typing.cast(type, bare), without)
            value = {"default_factory": functools.partial(_copied, bare, field.default)}
            metadata.append(tyro.conf.arg(help=" ".join((inspect.getdoc(bare) or "").split())))
        else:
            metadata.append(_help(field, bare, metadata, texts.get(field.name, "")))
            if field.default is False:  # `--dry-run`, without `--no-dry-run`
                metadata.append(tyro.conf.FlagCreatePairsOff)
        fields.append((field.name, Annotated[(bare, *metadata)], dataclasses.field(**value, kw_only=field.kw_only)))
    # Values are checked in the original class.
    namespace = {"__doc__": kind.__doc__, "__module__": kind.__module__, "__post_init__": lambda self: None}
    return dataclasses.make_dataclass(kind.__name__, fields, namespace=namespace)


def _copied(described: Any, value: Any) -> Any:
    """Make an instance of a described class from one of its original."""
    return described(**{f.name: getattr(value, f.name) for f in dataclasses.fields(described)})


def _help(field: dataclasses.Field, hint: Any, metadata: Sequence[Any], text: str) -> Any:
    """Text, metavar and default of an option."""
    choices = _choices(hint)
    if len(choices) > SHORT:
        text = f"{text} Choices: {', '.join(map(str, choices))}."
    name = field.name.upper().replace("_", "-")
    metavar = _metavar(hint, name)
    if tyro.conf.Positional in metadata:
        several = "..." if typing.get_origin(hint) is tuple else ""
        metavar = " ".join([metavar if metavar.startswith("{") else name, several]).strip().replace("... ...", "...")
        metavar = metavar if field.default is dataclasses.MISSING else f"[{metavar}]"
    default = next((m.text for m in metadata if isinstance(m, Default)), None)
    return tyro.conf.arg(
        help=text.strip(),
        metavar=None if bool in (hint, *typing.get_args(hint)) else metavar,
        help_behavior_hint=_default_hint if default is None else f"(default: {default})",
    )


def _metavar(hint: Any, name: str) -> str:
    """Placeholder of an option's value: its choices if they are few, the kind of a number or path, or its name."""
    hint, *_ = _unwrapped(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _metavar(next(a for a in arguments if a is not type(None)), name)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"{_metavar(arguments[0], name)} ..."
        return " ".join(_metavar(a, name) for a in arguments)
    if origin is Literal:
        return f"{{{','.join(map(str, arguments))}}}" if len(arguments) <= SHORT else name
    return name if hint is str else hint.__name__.upper()


def _choices(hint: Any) -> tuple[Any, ...]:
    """Values of a Literal inside an annotation."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return next((found for inner in typing.get_args(hint) if (found := _choices(inner))), ())


def _default_hint(label: str) -> str:
    """Text of a default in the help: nothing where there is none, or where a flag is off."""
    if label in ("", "''", "None", "False"):
        return ""
    return f"(default: {'on' if label == 'True' else label})"


def _unwrapped(hint: Any) -> tuple[Any, ...]:
    """Type and metadata of an annotation."""
    return (hint.__origin__, *hint.__metadata__) if typing.get_origin(hint) is Annotated else (hint,)


def field_texts(kind: type) -> dict[str, str]:
    """Docstrings of the fields of a dataclass, those of its bases included, each in one line."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = inspect.getsource(base)
        except OSError:  # made by `make_dataclass`
            continue
        (tree,) = ast.parse(textwrap.dedent(source)).body
        body = typing.cast(ast.ClassDef, tree).body
        for field, text in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts
