"""`ssm-bench page`: the tables of a documentation page, from the files that its own commands write.

A table is between `<!-- table: FILE -->` and `<!-- end of table -->`, where FILE is a result of `ssm-bench run` or
`sweep`. The commands are the lines of the page's `sh` blocks that start with `ssm-bench run` or `ssm-bench sweep`.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from ..model.files import write_atomic
from ..train.programs import run_program
from . import op_report
from .options import Page

TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
MEASURING = ("run", "sweep")


def run_page(command: Page) -> None:
    """`ssm-bench page`."""
    text = command.page.read_text(encoding="utf-8")
    if not TABLE.search(text):
        raise ValueError(f"{command.page} has no table: <!-- table: FILE --> ... <!-- end of table -->")
    if command.measure:
        for words in commands(text):
            print(f"$ {shlex.join(words)}", file=sys.stderr, flush=True)
            # Each in a process of its own: one's memory and compiled kernels are not the next one's.
            done = run_program([sys.executable, "-m", f"{__package__}.cli", *words[1:]])
            if done.returncode:
                raise ValueError(
                    f"{shlex.join(words)} ended with status {done.returncode}; {command.page} is unchanged"
                )
    write_atomic(command.page, fill(text))
    print(f"wrote the tables of {command.page}")


def commands(text: str) -> list[list[str]]:
    """The words of a page's commands that measure, in order."""
    lines = [line.split("  #")[0] for block in BLOCK.findall(text) for line in block.splitlines()]
    words = [shlex.split(line) for line in lines]
    return [w for w in words if w[:1] == ["ssm-bench"] and w[1:2] and w[1] in MEASURING]


def fill(text: str) -> str:
    """The page with its tables written anew.

    Raises:
        ValueError: a file is no result of `ssm-bench run` or `sweep`.
        OSError: a file cannot be read.
    """

    def table(found: re.Match[str]) -> str:
        return found[1] + op_report.markdown(op_report.read(Path(found[2]))) + found[3]

    return TABLE.sub(table, text)
