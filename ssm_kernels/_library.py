"""Registration of ops with torch.library, so that `torch.compile` sees each as one node."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

NAMESPACE = __package__.replace(".", "_")
"""Of the ops: another copy of this package, imported under another name, has its own."""
_library = torch.library.Library(NAMESPACE, "DEF")
BODIES: dict[torch._ops.OpOverload, Callable] = {}
"""What each op runs, for tools that run it where the dispatcher takes the fake."""


def define_op(schema: str, body: Callable, fake: Callable) -> Callable:
    """Define `<NAMESPACE>::<schema>` with one body for every device and a fake for tracing; give the callable.

    Autocast is off inside the body: an op states its own precision, and its matrix products must not be
    recast behind its back. Gradients are the caller's: wrap the op in an `autograd.Function`.
    """
    name = schema.split("(", 1)[0]

    def without_autocast(*args):
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        with torch.autocast(device, enabled=False):
            return body(*args)

    _library.define(schema)
    _library.impl(name, without_autocast, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    BODIES[op] = body
    return op


def from_kernels(package: str, name: str) -> Callable:
    """A function of the package's `kernels` module, which is imported, and Triton with it, when it first runs."""

    def body(*args):
        return getattr(importlib.import_module(f"{package}.kernels"), name)(*args)

    return body
