"""The point where a scan or a convolution consults the sequence sharding in force, if there is one.

`context_parallel` imports the ops, so the ops cannot import it: it registers its versions of them here. Within
`context_parallel(...)` a public op runs its registered version, as `scaled_dot_product_attention` does within PyTorch's
context manager of that name.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# A plain global, not thread-local: autograd runs the backward of a GPU in a thread of its own.
_current: Any = None
_sharded_versions: dict[Callable, Callable] = {}


def shardable(op: Callable[P, R]) -> Callable[P, R]:
    """Make a public op run its sharded version while a sharding is in force."""
    signature = inspect.signature(op)

    @functools.wraps(op)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if _current is None:
            return op(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return _sharded_versions[op](_current, bound.arguments)

    return call


def local(op: Callable[P, R]) -> Callable[P, R]:
    """Return the op under `shardable`, which never communicates."""
    return op.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]  # set by functools.wraps


def sharded_version_of(op: Callable) -> Callable[[Callable], Callable]:
    """Register the sharded version of a `shardable` op.

    It is a function of the sharding and the arguments of the call by name, defaults filled in.
    """

    def register(function: Callable) -> Callable:
        _sharded_versions[local(op)] = function
        return function

    return register


@contextlib.contextmanager
def use_sharding(sharding: Any) -> Iterator[None]:
    """Put a sharding in force inside the `with` block."""
    global _current
    # Contexts may be nested: the outer one is in force again afterwards.
    before, _current = _current, sharding
    try:
        yield
    finally:
        _current = before


def current() -> Any:
    """Return the sharding in force, or None."""
    return _current
