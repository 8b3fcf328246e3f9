"""Registration of ops with torch.library, so that `torch.compile` sees each as one node."""

from __future__ import annotations

import contextlib
import importlib
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

NAMESPACE = __name__.rpartition("._core.")[0].replace(".", "_")
"""Namespace of the ops: another copy of this package, imported under another name, has its own."""
_NOTHING = contextlib.nullcontext()
_library = torch.library.Library(NAMESPACE, "DEF")
BODIES: dict[Callable, Callable] = {}
"""Body of each op."""


Formula = Callable[[Mapping[str, Any]], tuple[Tensor, ...]]
"""The differentiable results of an op from its arguments by name, in PyTorch operations alone."""


class Gradient(NamedTuple):
    """Gradient formula of an op. It belongs to the op, so that exported and compiled graphs have it too."""

    save: Callable[[Any, Any, tuple[Tensor, ...]], None]
    """`save(ctx, inputs, outputs)` saves what the backward needs; `inputs` is a named tuple by the schema."""
    backward: Callable[..., Mapping[str, Tensor | None]]
    """`backward(ctx, *grads)`: gradients of the differentiable outputs to those of inputs, by name."""
    formula: Formula
    """Computes the differentiable results under transforms of `torch.func` and in forward-mode AD."""
    n_differentiable: int
    """Leading outputs that have gradients; the others are for the backward alone."""
    materialize_grads: bool = True
    """Pass zeros, rather than None, for the gradient of an output that nothing depends on."""


def define_op(schema: str, body: Callable, fake: Callable, gradient: Gradient | None = None) -> Callable:
    """Define `<NAMESPACE>::<schema>` with one body for every device.

    Autocast is off inside the body: an op states its own precision, and autocast must not recast its matrix products.
    So is autograd, which `gradient` replaces.

    Args:
        schema: name, arguments and results in the syntax of `torch.library.define`.
        body: implementation.
        fake: implementation for tracing: results of the right shape, dtype and device.
        gradient: formula of the backward, if it has one.

    Returns:
        the op.
    """
    name = schema.split("(", 1)[0]

    def run(*args):
        device = next(a.device for a in args if isinstance(a, Tensor))
        with grad_off(), autocast_off(device):
            return run_body(op, args)

    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    if gradient is not None:
        _register_autograd(op, name, gradient)
    BODIES[op] = body
    return op


def call_op(op: Callable, *args: Any) -> Any:
    """Call an op that has no gradients: its body alone where the dispatcher would add nothing but its time."""
    return run_body(op, args) if is_plain_call(args) and not needs_gradients(args) else op(*args)


def run_body(op: Callable, args: Sequence[Any]) -> Any:
    """Run the body of an op, without autograd and autocast: of a plain call that needs no gradients."""
    results = BODIES[op](*args)
    return tuple([_as_base(r) for r in results]) if isinstance(results, tuple) else _as_base(results)


def is_plain_call(args: Sequence[Any]) -> bool:
    """Whether a call computes values on a CPU and nothing else: then no part of PyTorch but autograd must see the op.

    The dispatcher takes longer than a small kernel.
    """
    if torch.compiler.is_compiling() or has_func_transforms() or in_forward_mode():
        return False
    # Modes, traces and profiles show the op.
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    is_profiled = torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
    if is_profiled or torch._C._get_tracing_state() is not None or torch.is_autocast_enabled("cpu"):
        return False
    for a in args:
        kind = type(a)
        if kind is Tensor or kind is torch.nn.Parameter:
            if not a.is_cpu:
                return False
        elif isinstance(a, Tensor):
            return False
    return True


def needs_gradients(args: Sequence[Any]) -> bool:
    """Whether autograd records a call with these arguments."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)  # pyright: ignore[reportAttributeAccessIssue]


def _register_autograd(op: torch._ops.OpOverload, name: str, gradient: Gradient) -> None:
    """Do as `torch.library.register_autograd`, whose ops fail in transforms, or return tangents of zero."""
    setup_context, backward = autograd_formula(gradient, [a.name for a in op._schema.arguments])
    with_backward = make_autograd_impl(op, Info(backward, setup_context))

    def run(keyset, *args):
        # In a graph that was exported or compiled: the functions of this package do not call the op then.
        if has_func_transforms() or in_forward_mode():
            return run_formula(op, gradient.formula, args)
        return with_backward(keyset, *args)

    _library.impl(name, run, "Autograd", with_keyset=True)


def run_formula(op: Callable, formula: Formula, args: Sequence[Any]) -> Any:
    """Compute the results of an op by its formula; those that are for the backward alone are empty."""
    schema = op._schema  # pyright: ignore[reportFunctionMemberAccess]
    like = next(a for a in args if isinstance(a, Tensor))
    with autocast_off(like.device):
        results = formula(dict(zip((a.name for a in schema.arguments), args, strict=True)))
    results = (*results, *(like.new_empty(0) for _ in range(len(schema.returns) - len(results))))
    return results if len(schema.returns) > 1 else results[0]


def has_func_transforms() -> bool:
    """Whether a transform of `torch.func` is active."""
    return torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]


def in_forward_mode() -> bool:
    """Whether tensors may have tangents."""
    return forward_ad._current_level >= 0


def unknown_size(like: Tensor) -> int | torch.SymInt:
    """Return, for a fake, a size that depends on the values of an argument; 0 where nothing traced depends on it."""
    # Only a tracer with symbolic shapes can give out a size that nothing determines yet.
    if isinstance(like, FakeTensor) and like.fake_mode.shape_env is not None:
        return torch.library.get_ctx().new_dynamic_size()
    return 0


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context without autocast, on devices that have any (meta has none)."""
    # torch.compile of torch 2.9 does not trace is_autocast_available.
    if torch.compiler.is_compiling():
        has_autocast = device.type != "meta"
    else:
        # To enter a context takes as long as a small kernel.
        has_autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if has_autocast else _NOTHING


def grad_off() -> contextlib.AbstractContextManager:
    """Return a context without gradients."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


def lazy_function(module: str, name: str) -> Callable:
    """Return a function that imports its module, and Triton with it, when it first runs.

    Args:
        module: full name of the module that holds the function.
        name: name of the function in it.
    """

    def body(*args):
        # After the first call an import is one look-up in `sys.modules`.
        return getattr(importlib.import_module(module), name)(*args)

    return body


def _as_base(result: Tensor) -> Tensor:
    """Return the same memory as a tensor that is no view: autograd forbids in-place changes of a Function's views."""
    if not result._is_view():
        return result
    return result.new_empty(0).set_(result)  # pyright: ignore[reportArgumentType]


def autograd_formula(gradient: Gradient, argument_names: list[str]) -> tuple[Callable, Callable]:
    """Return `setup_context` and `backward`, as `torch.library.register_autograd` takes them."""
    n = gradient.n_differentiable
    inputs_type = namedtuple("Inputs", argument_names)

    def setup_context(ctx, inputs, output):
        outputs = output if isinstance(output, tuple) else (output,)
        # Zeros for the outputs that are for the backward alone would be as large as those.
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[n:])
        if gradient.materialize_grads:
            # Shapes rather than the outputs, which the context would keep alive.
            ctx.differentiable = [(t.shape, t.dtype, t.device) for t in outputs[:n]]
        gradient.save(ctx, inputs_type(*inputs), outputs)

    def backward(ctx, *grads):
        grads = list(grads[:n])
        if gradient.materialize_grads:
            for i, (shape, dtype, device) in enumerate(ctx.differentiable):
                if grads[i] is None:
                    # What runs on a CPU reads any strides: no memory to fill, and no threads to fill it.
                    size = () if device.type == "cpu" else shape
                    grads[i] = torch.zeros(size, dtype=dtype, device=device).expand(shape)
        input_grads = gradient.backward(ctx, *grads)
        return tuple(input_grads.get(name) for name in argument_names)

    return setup_context, backward
