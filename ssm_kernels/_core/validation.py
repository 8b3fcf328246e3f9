"""Argument checks shared by the ops. Each error names the argument, the value and the expectation."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(
    name: str,
    value: object,
    shape: tuple[int | str, ...],
    *,
    like: Tensor | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    """Check the type, shape, dtype and device of one tensor.

    Args:
        name: argument, for the message.
        value: the tensor.
        shape: a size for each dimension; a letter stands for any size.
        like: tensor whose device `value` must share.
        dtypes: allowed dtypes.

    Raises:
        TypeError: not a tensor, or a dtype that is not in `dtypes`.
        ValueError: wrong shape or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    have = value.shape
    fits = len(have) == len(shape)
    if fits:
        for i, want in enumerate(shape):  # no generator: a step's checks take as long as its kernel
            if not isinstance(want, str) and have[i] != want:
                fits = False
                break
    if not fits:
        expected = ", ".join(str(s) for s in shape)
        raise ValueError(f"{name} must have shape ({expected}), got {tuple(have)}")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must have a dtype among {allowed}; got {str(value.dtype).removeprefix('torch.')}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the input, got {value.device}")


def check_integer(name: str, value: object, low: int) -> int:
    """Return `value` as an int, if it is an integer of any type and at least `low`. A bool is not.

    Args:
        name: argument, for the message.
        value: an int, or an object with `__index__`.
        low: least value.

    Raises:
        TypeError: not an integer.
        ValueError: an integer below `low`.
    """
    # A tuple: torch.compile of torch 2.9 does not trace a union of types.
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        integer = value  # a symbolic size stays symbolic
    else:
        try:
            is_bool = isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool
            integer = None if is_bool else operator.index(value)  # pyright: ignore[reportArgumentType]
        except TypeError:
            integer = None
        if integer is None:
            raise TypeError(f"{name} must be an integer, got {value!r}")
    if integer < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
    return integer  # pyright: ignore[reportReturnType]  # callers treat a SymInt as an int


def check_divides(small_name: str, small: int, big_name: str, big: int) -> None:
    """Raise a ValueError unless `small` divides `big`."""
    # No remainder by zero: `small` is often the size of a dimension, which may be empty.
    if small <= 0 or big % small:
        raise ValueError(f"{small_name} must divide {big_name}: got {small_name} = {small}, {big_name} = {big}")


class NonFiniteError(ValueError):
    """An argument holds NaN, which would spread to everything after it."""


def has_readable_values(x: Tensor) -> bool:
    """Whether checks may read the values of a tensor.

    On a GPU it would be a host-device synchronization; in a compiled or exported graph, and in `FakeTensorMode`, there
    are no values.

    Args:
        x: any tensor.

    Returns:
        True for a CPU tensor outside of tracing.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


def without_transforms(x: Tensor) -> Tensor:
    """Return the tensor inside those of transforms of `torch.func`: under vmap, that of all samples."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    while not torch.compiler.is_compiling() and functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x


SERIAL = 1 << 15
"""Elements that PyTorch sums in the calling thread."""


def _sum(x: Tensor) -> float:
    # OpenMP's threads would spin for milliseconds after a larger sum, on cores that a kernel of the CPU wants.
    if x.numel() < SERIAL or torch.get_num_threads() == 1 or x.device.type != "cpu":
        return x.sum().item()
    rows = max(1, (SERIAL - 1) // x[0].numel() if x.dim() > 1 else SERIAL - 1)
    if rows > 1:
        return sum(part.sum().item() for part in x.split(rows))
    return sum(_sum(row) for row in x)


def check_no_nan(name: str, value: Tensor) -> None:
    """Raise a `NonFiniteError` with the index of the first NaN, where values can be read."""
    value = without_transforms(value)
    if not has_readable_values(value) or not value.numel():
        return
    # One pass, and no mask of the tensor's size unless the sum is NaN.
    if math.isnan(_sum(value.detach())):
        indices = torch.isnan(value).nonzero()
        # The sum of infinities of both signs is NaN too.
        if len(indices):
            first = tuple(indices[0].tolist())
            raise NonFiniteError(f"{name} must not hold NaN: {len(indices)} found, the first at index {first}")
