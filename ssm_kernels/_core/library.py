"""Registration of ops with torch.library, so that `torch.compile` sees each as one node."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

NAMESPACE = __package__.rpartition(".")[0].replace(".", "_")
"""Of the ops: another copy of this package, imported under another name, has its own."""
_library = torch.library.Library(NAMESPACE, "DEF")
BODIES: dict[torch._ops.OpOverload, Callable] = {}
"""What each op runs, for tools that run it where the dispatcher takes the fake."""


class Gradient(NamedTuple):
    """The gradient formula of an op. It belongs to the op, so that exported and compiled graphs have it too."""

    save: Callable[[Any, tuple, tuple], None]
    """`save(ctx, inputs, outputs)` keeps what the backward needs."""
    backward: Callable[..., tuple]
    """`backward(ctx, *grads)` takes the gradients of the results and gives one for each input of the schema."""
    n_results: int
    """Outputs that have gradients. Those after them are for the backward alone."""
    with_zeros: bool = True
    """Whether the backward gets zeros, rather than None, for a result that nothing depends on."""


def define_op(schema: str, body: Callable, fake: Callable, gradient: Gradient | None = None) -> Callable:
    """Define `<NAMESPACE>::<schema>` with one body for every device and a fake for tracing; give the callable.

    Autocast is off inside the body: an op states its own precision, and its matrix products must not be
    recast behind its back. So is autograd, whose part `gradient` is.
    """
    name = schema.split("(", 1)[0]

    def run(*args):
        device = next(a.device for a in args if isinstance(a, Tensor))
        with torch.no_grad(), autocast_off(device):
            results = body(*args)
        return tuple(map(_base, results)) if isinstance(results, tuple) else _base(results)

    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    if gradient is not None:
        setup_context, backward = _formula(gradient)
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    BODIES[op] = body
    return op


def unknown_size(like: Tensor) -> int | torch.SymInt:
    """For a fake: a size that only the values of an argument tell; 0 where nothing is traced that depends on it."""
    if isinstance(like, FakeTensor) and like.fake_mode.shape_env is not None:
        return torch.library.get_ctx().new_dynamic_size()
    return 0


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager:
    """A context without autocast, on devices that have any (meta has none)."""
    # torch.compile of torch 2.9 does not trace the question.
    if device.type != "meta" and (torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type)):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _base(result: Tensor) -> Tensor:
    """The same memory as a tensor of its own: autograd lets no view that a Function made be changed in place."""
    return result.new_empty(0).set_(result) if result._is_view() else result


def _formula(gradient: Gradient) -> tuple[Callable, Callable]:
    """What `torch.library.register_autograd` takes."""
    n = gradient.n_results

    def setup_context(ctx, inputs, output):
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.set_materialize_grads(False)  # of what is kept for the backward, they would be as large as that
        ctx.mark_non_differentiable(*outputs[n:])
        ctx.results = [(t.shape, t.dtype, t.device) for t in outputs[:n]]
        gradient.save(ctx, inputs, outputs)

    def backward(ctx, *grads):
        grads = list(grads[:n])
        for i, (shape, dtype, device) in enumerate(ctx.results):
            if grads[i] is None and gradient.with_zeros:
                grads[i] = torch.zeros(shape, dtype=dtype, device=device)
        return gradient.backward(ctx, *grads)

    return setup_context, backward


def from_kernels(package: str, name: str) -> Callable:
    """A function of the package's `kernels` module, which is imported, and Triton with it, when it first runs."""

    def body(*args):
        return getattr(importlib.import_module(f"{package}.kernels"), name)(*args)

    return body


def lazy_function(module: str, name: str) -> Callable:
    """A function that imports its module, and Triton with it, when it first runs.

    Args:
        module: full name of the module that holds the function.
        name: name of the function in it.
    """

    def body(*args):
        return getattr(importlib.import_module(module), name)(*args)

    return body
