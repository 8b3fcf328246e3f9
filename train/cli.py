"""The `vlmamba` command."""

from __future__ import annotations

from .command_line import run_commands
from .options import COMMANDS


def main(arguments: list[str] | None = None) -> None:
    """Run one command; what goes wrong with its input is one line on stderr and exit status 1."""
    run_commands(
        "vlmamba",
        "VL-Mamba and ML-Mamba: train, evaluate, talk, look at checkpoints. Begin with: vlmamba demo",
        COMMANDS,
        arguments,
    )


if __name__ == "__main__":
    main()
