"""Command lines of `vlmamba` and `ssm-bench`: parse, check, run, and report an error in one line."""

from __future__ import annotations

import difflib
import io
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version

import tyro

from .help import check_options, first_sentence, parse
from .train.errors import Interrupted
from .train.log_lines import show_warnings


def run_commands(
    prog: str,
    description: str,
    commands: Mapping[str, type],
    arguments: Sequence[str] | None = None,
    *,
    timing: Collection[str] = (),
) -> None:
    """Run the command that the arguments name.

    Without arguments the help is printed. An error in the arguments exits with status 2. An error in a command's input
    is one line on stderr and exits with status 1.

    Args:
        prog: name of the program.
        description: first paragraph of its help.
        commands: dataclasses by name; their fields are options, and `run` does the work.
        arguments: the process's own by default.
        timing: commands that time PyTorch's operations, for which OpenMP's threads wait as they do by default.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if arguments[0] not in timing:
        # OpenMP reads it when torch is loaded, in the processes that a command starts too. Its threads otherwise spin
        # after every small operation, on cores that others want.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # An option of the program, beside its commands, which tyro does not have.
    if arguments[0] == "--version":
        print(prog, version("vl-mamba"))
        return
    # An unknown command or option gets a suggestion in place of tyro's list of all options.
    if arguments[0] not in (*commands, "-h", "--help"):
        kind, known = ("option", ("--help", "--version")) if arguments[0].startswith("-") else ("command", commands)
        near = difflib.get_close_matches(arguments[0], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        print(f"{prog}: no {kind} {arguments[0]!r}; {hint}", file=sys.stderr)
        sys.exit(2)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal's encoding lacks is escaped
            stream.reconfigure(errors="backslashreplace")
    show_warnings()
    try:
        if arguments[0] not in commands:
            # The help of the program: one sentence on each command, whose own help has the rest. It ends the process.
            listed = {name: type(name, (), {"__doc__": first_sentence(kind)}) for name, kind in commands.items()}
            tyro.extras.subcommand_cli_from_dict(listed, prog=prog, description=description, args=arguments)
            return
        command = parse(f"{prog} {arguments[0]}", commands[arguments[0]], arguments[1:])
        check_options(command)
        command.run()
    except Interrupted:  # raised again: torchrun and the shell must see the signal's exit status
        print(f"\n{prog}: stopped and saved; the same command resumes here", file=sys.stderr)
        raise
    except BrokenPipeError:
        # The reader closed the pipe (`| head`): discard the rest of the output, also at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError, MemoryError) as e:
        sys.exit(f"{prog}: {printable(describe(e))}")
    except RuntimeError as e:
        # Without importing torch: what did not import it cannot have raised its error.
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(e, torch.OutOfMemoryError):
            raise
        sys.exit(f"{prog}: {printable(describe(e))}")


def describe(error: BaseException) -> str:
    """The message of an error, for a user who does not see the traceback."""
    if isinstance(error, ValueError | OSError | ImportError | FloatingPointError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"memory ran out {error}".strip()
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


def printable(text: str) -> str:
    """Escape what a terminal would interpret and not show.

    These are control characters other than line feeds and tabs, halves of surrogate pairs, and the marks that reverse
    the direction of text.
    """
    return _NOT_PRINTABLE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


_NOT_PRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
