"""Subcommands of `vlmamba`, one a module.

A command is a dataclass: its fields are the options, its docstring is the help text, and `run` does the work. The
modules import no torch before `run`, so that `--help` and errors in the options are immediate.
"""
