"""The `vlmamba` command."""

from __future__ import annotations

from .command_line import run_commands
from .commands.chat import Chat
from .commands.convert import Convert
from .commands.data import Data
from .commands.demo import Demo
from .commands.evaluate import Evaluate
from .commands.export import Export
from .commands.generate import Generate
from .commands.inspect import Inspect
from .commands.reproduce import Reproduce
from .commands.serve import Serve
from .commands.serve_bench import ServeBench
from .commands.train import Train

COMMANDS = {
    "demo": Demo,
    "data": Data,
    "train": Train,
    "reproduce": Reproduce,
    "evaluate": Evaluate,
    "generate": Generate,
    "chat": Chat,
    "serve": Serve,
    "serve-bench": ServeBench,
    "inspect": Inspect,
    "convert": Convert,
    "export": Export,
}


def main(arguments: list[str] | None = None) -> None:
    """Run one command; an error in its input is one line on stderr and exit status 1."""
    run_commands(
        "vlmamba",
        "Train, evaluate, run and convert VL-Mamba and ML-Mamba models. Start with: vlmamba demo",
        COMMANDS,
        arguments,
    )
