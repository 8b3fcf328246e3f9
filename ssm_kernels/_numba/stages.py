"""Stages of a kernel that several threads run together: blocks of work that they share, one stage after the other.

A thread waits in the kernel, not in Python, so that a stage may take microseconds. Whoever comes takes the next block:
a thread that never starts, or starts late, is not waited for, but for the block that it has taken.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit, types  # pyright: ignore[reportPrivateImportUsage]

from .lanes import address_of, intrinsic

LINE = 8
"""int64 in a cache line. Each counter has one of its own."""
SPINS = 1000
"""Looks at a counter, some microseconds, before a waiting thread offers its core to another one."""

_yield_core = types.ExternalFunction("sched_yield", types.int32())


def new_counters(n_stages: int) -> np.ndarray:
    """Make the counters of all stages. They are zero before a kernel starts."""
    return np.zeros(2 * LINE * n_stages, np.int64)


# --- compiled -------------------------------------------------------------------------------------------------------


@njit
def take_block(counters, stage):
    """Take a block of a stage: its number, or one beyond the last where none is left."""
    return _fetch_add(counters, 2 * LINE * stage, 1)


@njit
def finish_block(counters, stage):
    """Say that a block is complete."""
    _fetch_add(counters, 2 * LINE * stage + LINE, 1)


@njit
def await_blocks(counters, stage, n_blocks):
    """Wait until all blocks of a stage are complete, whoever took them. Their results can be read then."""
    looks = 0
    while _load_acquire(counters, 2 * LINE * stage + LINE) < n_blocks:
        looks += 1
        if looks > SPINS:
            _yield_core()


@njit
def array_at(like, address, size):
    """`size` elements from an address on, in the dtype of `like`; none where the address is 0."""
    return carray(_pointer(like, address), (size if address else 0,))


@intrinsic
def _pointer(typingctx, like, address):
    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[1], context.get_value_type(sig.return_type))

    return types.CPointer(like.dtype)(like, address), codegen


@intrinsic
def _fetch_add(typingctx, array, offset, value):
    def codegen(context, builder, sig, args):
        pointer = address_of(context, builder, sig.args[0], context.get_data_type(array.dtype), *args[:2])
        # What was written before is visible to a thread that reads the sum.
        return builder.atomic_rmw("add", pointer, args[2], "acq_rel")

    return array.dtype(array, types.intp, array.dtype), codegen


@intrinsic
def _load_acquire(typingctx, array, offset):
    def codegen(context, builder, sig, args):
        pointer = address_of(context, builder, sig.args[0], context.get_data_type(array.dtype), *args)
        return builder.load_atomic(pointer, "acquire", array.dtype.bitwidth // 8)

    return array.dtype(array, types.intp), codegen
