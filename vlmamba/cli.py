"""The `vlmamba` command."""

from __future__ import annotations

from .interrupts import ending_by_signals


def main(arguments: list[str] | None = None) -> None:
    """Run one command; an error in its input is one line on stderr and exit status 1."""
    with ending_by_signals("vlmamba", is_process=arguments is None):
        from .command_line import run_commands
        from .commands import COMMANDS

        run_commands(
            "vlmamba",
            "Train, evaluate, run and convert VL-Mamba and ML-Mamba models. Start with: vlmamba demo",
            COMMANDS,
            arguments,
        )
