"""Ops under the transforms of `torch.func`, in forward-mode AD, and differentiated more than once.

PyTorch cannot look into a kernel. So three things are told to it:

- a vmap is one call of the same kernel, with the new dimension among the channels or heads (`Fold`): there each sample
  has its own copy of a parameter, and so its own gradient;
- a backward is differentiated as its formula is, which is the op in PyTorch operations alone;
- forward-mode AD runs the formula in place of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .library import (
    Formula,
    Gradient,
    autocast_off,
    autograd_formula,
    has_func_transforms,
    in_forward_mode,
    is_plain_call,
    needs_gradients,
    run_body,
    run_formula,
)


class Fold(NamedTuple):
    """A vmapped call as one call."""

    dims: dict[str, int]
    """Dimension of each tensor that takes the vmapped one as its outer part, counted from the end."""
    results: tuple[str | None, ...]
    """Tensor in `dims` that each result is like. None stands for what only the backward reads: it is left empty."""
    per_group: tuple[str, ...] = ()
    """Lists that have an entry for each group of channels."""
    saved: Callable[[Mapping[str, Any]], dict[str, Tensor]] | None = None
    """Compute what the forward left empty, from the arguments of its backward."""


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode AD is active; never in a compiled or exported graph."""
    return not torch.compiler.is_compiling() and (has_func_transforms() or in_forward_mode())


def refuse_forward_mode(name: str) -> None:
    """Raise a NotImplementedError in forward-mode AD, for a decoding step whose result would have a tangent of zero."""
    if in_forward_mode():
        raise NotImplementedError(
            f"{name} has no forward-mode derivative on this backend; scan one step with initial_states, or take"
            " backend='torch'"
        )


def _unwrap_ended(x: Any) -> Any:
    """Return the tensor inside those of transforms that have ended: PyTorch's ops take both, its Functions do not."""
    unwrap = torch._C._functorch.unwrap_if_dead  # pyright: ignore[reportAttributeAccessIssue]
    while isinstance(x, Tensor) and (inner := unwrap(x)) is not x:
        x = inner
    return x


def may_need_gradients(arguments: Iterable[Any]) -> bool:
    """Whether a backward may follow a call with these arguments."""
    if not torch.is_grad_enabled():
        return False
    # The tensors inside those of a transform may require a gradient where these do not.
    return is_transformed() or any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def transformable(op: Callable, fold: Fold, gradient: Gradient | Formula) -> Callable[..., Any]:
    """Return a function that runs an op under any transform. Without one, it calls the op.

    Args:
        op: as `define_op` returns it.
        fold: its vmapped call.
        gradient: the one it is defined with. The backward of an op has none, and is differentiated by its formula.
    """
    names = [a.name for a in op._schema.arguments]  # pyright: ignore[reportFunctionMemberAccess]
    n_results = len(op._schema.returns)  # pyright: ignore[reportFunctionMemberAccess]
    is_backward = not isinstance(gradient, Gradient)
    gradient = _gradient_of(gradient, names, n_results) if is_backward else gradient
    setup_context, backward = autograd_formula(gradient, names)

    def vmap(info, in_dims, *args):
        arguments = dict(zip(names, args, strict=True))
        dims = {name: dim for name, dim in zip(names, in_dims, strict=True) if isinstance(dim, int)}
        # Sequences of each sample's own do not fit into one call.
        is_packed_apart = not dims.keys().isdisjoint(("cu_seqlens", "seq_idx"))
        call = _call_each if is_packed_apart else _call_folded
        results = call(run, fold, arguments, dims, info.batch_size)
        return tuple(zip(*results, strict=True)) if n_results > 1 else results[0]

    function: Any = type(
        op._schema.name.rpartition("::")[2],  # pyright: ignore[reportFunctionMemberAccess]
        (torch.autograd.Function,),
        {
            "forward": staticmethod(lambda *args: op(*args)),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
            "vmap": staticmethod(vmap),
        },
    )

    class Plain(torch.autograd.Function):
        """The same for a plain call: a Function with a context of its own looks at its signature in each call."""

        @staticmethod
        def forward(ctx, *args):
            results = run_body(op, args)
            setup_context(ctx, args, results)
            return results

        @staticmethod
        def backward(ctx, *grads):
            return backward(ctx, *grads)

    def run(*args):
        if is_plain_call(args):
            if not needs_gradients(args):
                return run_body(op, args)
            if not is_backward:
                return Plain.apply(*args)
        if torch.compiler.is_compiling():
            return op(*args)
        if in_forward_mode():
            return run_formula(op, gradient.formula, args)
        # A backward runs with gradients on where its own graph is wanted.
        if has_func_transforms() or (is_backward and torch.is_grad_enabled()):
            return function.apply(*map(_unwrap_ended, args))
        return op(*args)

    return run


def vjp(
    formula: Formula, arguments: Mapping[str, Any], names: Sequence[str], cotangents: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    """Compute gradients of a formula, differentiably.

    Args:
        formula: the formula.
        arguments: its arguments.
        names: those to differentiate by.
        cotangents: gradient of each result; None is zero.

    Returns:
        the gradients by name.
    """

    def of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
        return formula({**arguments, **dict(zip(names, tensors, strict=True))})

    tensors = [_unwrap_ended(arguments[name]) for name in names]
    with autocast_off(tensors[0].device):
        results, pull = torch.func.vjp(of_tensors, *tensors)  # pyright: ignore[reportAssignmentType]
        grads = pull(
            tuple(
                torch.zeros_like(result) if grad is None else grad.to(result.dtype)
                for result, grad in zip(results, cotangents, strict=True)
            )
        )
    return dict(zip(names, grads, strict=True))


def backward_formula(formula: Formula, names: Sequence[str], cotangents: Sequence[str]) -> Formula:
    """Return the formula of the backward of an op.

    Args:
        formula: that of the op.
        names: arguments whose gradients the backward returns, in its order; an empty tensor for one that is None.
        cotangents: arguments of the backward that are gradients of the results.
    """

    def backward(arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
        grads = [arguments[name] for name in cotangents]
        present = [name for name in names if arguments[name] is not None]
        found = vjp(formula, arguments, present, grads)
        return tuple(found[name] if name in found else found[present[0]].new_empty(0) for name in names)

    return backward


def _gradient_of(formula: Formula, names: Sequence[str], n_results: int) -> Gradient:
    """Return the gradient of a backward, which computes all of it again."""

    def save(ctx, inputs, outputs) -> None:
        is_tensor = [isinstance(a, Tensor) for a in inputs]
        ctx.save_for_backward(*(a if t else None for a, t in zip(inputs, is_tensor, strict=True)))
        ctx.others = [None if t else a for a, t in zip(inputs, is_tensor, strict=True)]

    def backward(ctx, *grads) -> Mapping[str, Tensor | None]:
        values = (b if a is None else a for a, b in zip(ctx.saved_tensors, ctx.others, strict=True))
        wanted = [name for name, needed in zip(names, ctx.needs_input_grad, strict=True) if needed]
        return vjp(formula, dict(zip(names, values, strict=True)), wanted, grads)

    return Gradient(save, backward, formula, n_results)


# --- vmap ---------------------------------------------------------------------------------------------------------


def _call_folded(
    run: Callable, fold: Fold, arguments: dict[str, Any], dims: Mapping[str, int], size: int
) -> list[tuple[Tensor, int | None]]:
    """Run one call for all samples: its results, each with its vmapped dimension."""
    folded = dict(arguments)
    for name, dim in fold.dims.items():
        if arguments.get(name) is not None:
            folded[name] = _fold(arguments[name], dims.get(name), size, dim)
    for name in fold.per_group:
        folded[name] = arguments[name] * size
    results = _call(run, fold, folded)
    return [
        # The gradient of an argument that is None is empty already.
        (r.new_empty(0), None) if name is None or r.shape == (0,) else (_unfold(r, size, fold.dims[name]), 0)
        for name, r in zip(fold.results, results, strict=True)
    ]


def _call_each(
    run: Callable, fold: Fold, arguments: dict[str, Any], dims: Mapping[str, int], size: int
) -> list[tuple[Tensor, int | None]]:
    """Run a call for each sample."""
    samples = [
        _call(run, fold, arguments | {name: arguments[name].select(dim, i) for name, dim in dims.items()})
        for i in range(size)
    ]
    return [
        (r[0].new_empty(0), None) if name is None else (torch.stack(r), 0)
        for name, r in zip(fold.results, zip(*samples, strict=True), strict=True)
    ]


def _call(run: Callable, fold: Fold, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    saved = {} if fold.saved is None else fold.saved(arguments)
    results = run(*({**arguments, **saved}.values()))
    return results if isinstance(results, tuple) else (results,)


def _fold(x: Tensor, vmapped: int | None, size: int, dim: int) -> Tensor:
    """Move the vmapped dimension into `dim`; a tensor without one is repeated."""
    x = x.expand(size, *x.shape) if vmapped is None else x.movedim(vmapped, 0)  # (V, ...)
    # What a forward saves, kernels read as contiguous, and a repeated one may be a view.
    return x.movedim(0, dim - 1).flatten(dim - 1, dim).contiguous()


def _unfold(x: Tensor, size: int, dim: int) -> Tensor:
    """Move the outer part of `dim` to the front: (V, ...)."""
    return x.unflatten(dim, (size, x.shape[dim] // size)).movedim(dim - 1, 0)
