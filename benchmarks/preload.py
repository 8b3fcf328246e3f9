"""Imports of the server that forks the processes which measure memory, so that each of them need not."""

from __future__ import annotations

import contextlib
import importlib

from ..train.log_lines import show_warnings
from .inference import measure  # noqa: F401

show_warnings()  # before transformers, which imports torchao
with contextlib.suppress(ImportError):  # optional
    for name in ("llama", "phi"):
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")
