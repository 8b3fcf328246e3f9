"""Programs that a command runs, which end with it."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

from .signals import hidden_from_ctrl_c


@contextlib.contextmanager
def running_program(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a program beside a block.

    At the end of the block, also by a signal, the program gets a SIGTERM and is waited for; a signal meanwhile kills
    it. It does not see Ctrl-C.

    Args:
        command: the program and its arguments.
        options: for `subprocess.Popen`.
    """
    with hidden_from_ctrl_c():
        process = subprocess.Popen(command, text=True, **options)
    with process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait()
            except BaseException:
                process.kill()
                process.wait()
                raise


def run_program(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as `subprocess.run` does with text; a signal ends it as `running_program` does."""
    with running_program(command, **options) as process:
        output, errors = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
