"""Subcommands of `vlmamba`, one a module.

A command is a dataclass: its fields are the options, its docstring is the help text, and `run` does the work. The
modules import no torch before `run`, so that `--help` and errors in the options are immediate.
"""

from __future__ import annotations

from .chat import Chat
from .convert import Convert
from .data import Data
from .demo import Demo
from .evaluate import Evaluate
from .export import Export
from .generate import Generate
from .inspect import Inspect
from .reproduce import Reproduce
from .serve import Serve
from .serve_bench import ServeBench
from .train import Train

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
