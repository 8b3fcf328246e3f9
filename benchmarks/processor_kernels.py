"""Loops in numba that keep one unit of a core busy. They share no code with the kernels that are measured by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import extending, types

intrinsic: Callable[..., Any] = extending.intrinsic
"""The decorator; what it makes of a function takes no `typingctx`, which type checkers do not know."""
CHAIN = 16
"""Multiply-adds of an element between its load and its store, which take other units."""
EXP2 = (1.0, 0.6931472, 0.24022651, 0.05550332, 0.009618, 0.0013399, 0.000154)
"""2^r on [-1/2, 1/2] as a polynomial, to a rounding of float32."""


def _compiled(*fastmath: str) -> Any:
    return numba.njit(nogil=True, cache=True, fastmath=set(fastmath))


@intrinsic
def _bits(typingctx, x):
    return types.int32(types.float32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _float(typingctx, bits):
    return types.float32(types.int32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.FloatType())


@_compiled("reassoc")  # so that a sum takes all lanes of a register
def read(x, target, rounds):
    """Sum x, `rounds` times."""
    for i in range(rounds):
        target[i % target.size] = x.sum()


@_compiled()
def copy(x, target, rounds):
    """Copy x to the target, `rounds` times."""
    for _ in range(rounds):
        for i in range(x.size):
            target[i] = x[i]


@_compiled("contract")
def multiply_add(x, target, rounds):
    """Take `CHAIN` multiply-adds of each element of the target, `rounds` times."""
    factor, term = x[0], x[1]
    for _ in range(rounds):
        for i in range(x.size):
            value = target[i]
            for _ in range(CHAIN):
                value = value * factor + term
            target[i] = value


@_compiled("contract")
def exponentiate(x, target, rounds):
    """Take 2 to the power of each element of x, between -126 and 126, `rounds` times."""
    # Numbers from here to twice it differ by one: the sum is rounded to an integer, of either sign.
    magic = np.float32(1.5 * 2**23)
    for _ in range(rounds):
        for i in range(x.size):
            shifted = x[i] + magic
            r = x[i] - (shifted - magic)
            power = np.float32(EXP2[6])
            for k in range(5, -1, -1):
                power = power * r + np.float32(EXP2[k])
            target[i] = _float(np.int32(_bits(power) + np.int32(_bits(shifted) << 23)))
