"""Stored states in compiled kernels: reading, and rounding as `_core.state_format` defines it.

Kernels keep the state of a tile as rows of numbers. Where the pool holds numbers of that dtype, the rows are the pool's
own memory; else they are a copy, which is rounded when it is written back. Which of the two is known when a kernel is
compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import extending, types

from .._core.state_format import BITS_PER_CALL, INT8_MAX, KEY_INCREMENTS, LEAST_ROW, MULTIPLIERS, ROUNDS
from .lanes import (
    address_of,
    aligned_empty,
    call,
    intrinsic,
    lane_count,
    load,
    read_row,
    set_element,
    store,
    store_as,
    write_row,
)

CALLS = 16
"""Calls of Philox in a vector."""
ELEMENTS = CALLS * BITS_PER_CALL
"""Elements of a row that one vector of calls is for."""
I16, I32, I64 = (ir.VectorType(ir.IntType(size), CALLS) for size in (16, 32, 64))
FLOATS, HALVES = ir.VectorType(ir.FloatType(), CALLS), ir.VectorType(ir.HalfType(), CALLS)


def open_state(stored, scale, tile) -> Any:
    """Return the rows (1, rows, N) of a stored state: `stored` itself, or `tile`, into which it is read.

    Args:
        stored: (1, rows, N).
        scale: (1, rows) for int8.
        tile: (1, at least rows, N), contiguous.
    """
    raise NotImplementedError


def state_rows(stored, tile) -> Any:
    """Return the memory (1, rows, N) that takes the next state of a slot: `stored` itself, or `tile`."""
    raise NotImplementedError


def keep_state(tile, stored, scale, seed, has_seed, first_row, values, bits) -> Any:
    """Round the state in `tile` to the format of `stored`, if that is not its own; `tile` becomes what was stored.

    Args:
        tile: (1, at least rows, N), contiguous.
        stored: (1, rows, N), written.
        scale: (1, rows), written for int8.
        seed: of the token.
        has_seed: whether rounding is stochastic.
        first_row: number of the first row in the state.
        values: padded(N) numbers of scratch memory.
        bits: N numbers of uint16 of scratch memory, up to a multiple of 128.
    """
    raise NotImplementedError


@njit
def random_scratch(n):
    """Memory for the random bits of a row of n elements."""
    return np.empty((n + ELEMENTS - 1) // ELEMENTS * ELEMENTS, np.uint16)


@extending.overload(open_state)
def _open_state(stored, scale, tile):
    if stored.dtype == tile.dtype:
        return lambda stored, scale, tile: stored

    def read(stored, scale, tile):
        _, rows, n = stored.shape
        size = stored.itemsize
        values = aligned_empty(tile, n + lane_count(tile))
        for i in range(rows):
            read_row(stored, i * (stored.strides[1] // size), stored.strides[2] // size, n, values, 0)
            if scale.size:
                multiply(values, n, scale[0, i])
            write_row(values, 0, tile, i * n, 1, n)
        return tile

    return read


@extending.overload(state_rows)
def _state_rows(stored, tile):
    if stored.dtype == tile.dtype:
        return lambda stored, tile: stored
    return lambda stored, tile: tile


@extending.overload(keep_state)
def _keep_state(tile, stored, scale, seed, has_seed, first_row, values, bits):
    if stored.dtype == tile.dtype:
        return lambda tile, stored, scale, seed, has_seed, first_row, values, bits: None

    def keep(tile, stored, scale, seed, has_seed, first_row, values, bits):
        _, rows, n = stored.shape
        size = stored.itemsize
        narrow = np.empty(bits.size, stored.dtype)
        for i in range(rows):
            read_row(tile, i * n, 1, n, values, 0)
            if has_seed:
                for first in range(0, n, ELEMENTS):
                    store_random(bits, first, seed, first_row + i, first // BITS_PER_CALL)
            factor = round_row(values, n, bits, has_seed, narrow)
            write_integers(narrow, stored, i * (stored.strides[1] // size), stored.strides[2] // size, n)
            if scale.size:
                scale[0, i] = factor
            read_row(narrow, 0, 1, n, values, 0)
            multiply(values, n, factor)
            write_row(values, 0, tile, i * n, 1, n)

    return keep


def round_row(values, n, bits, has_seed, narrow) -> Any:
    """Round a row to the format of `narrow`, and return its scale, 1 for floats. `values` are then of no use."""
    raise NotImplementedError


@extending.overload(round_row)
def _round_row(values, n, bits, has_seed, narrow):
    if narrow.dtype == types.int8:

        def to_integers(values, n, bits, has_seed, narrow):
            if not has_seed:
                bits[:] = 32768
            largest = largest_magnitude(values, n)
            is_zero = largest < np.float32(LEAST_ROW)
            multiply(values, n, np.float32(0) if is_zero else np.float32(INT8_MAX * 65536) / largest)
            for k in range(0, n, lane_count(values)):
                store_stochastic(narrow, k, load(values, k), bits)
            return np.float32(0) if is_zero else largest * np.float32(1 / INT8_MAX)

        return to_integers

    def to_floats(values, n, bits, has_seed, narrow):
        for k in range(0, n, lane_count(values)):
            if has_seed:
                store_stochastic(narrow, k, load(values, k), bits)
            else:
                store_as(narrow, k, load(values, k))
        return np.float32(1)

    return to_floats


@njit
def multiply(values, n, factor):
    """Multiply n numbers, up to a complete vector."""
    if factor != 1:
        for k in range(0, n, lane_count(values)):
            store(values, k, load(values, k) * factor)


@njit
def write_integers(source, target, offset, stride, n):
    """Copy n numbers to target, from an offset on."""
    for k in range(n):
        set_element(target, offset + k * stride, source[k])


@njit
def largest_magnitude(values, n):
    """The largest magnitude of n numbers; NaN where there is one."""
    # As integers, magnitudes have the order of the numbers, with NaN above all.
    integers, largest = values.view(np.int32), np.int32(0)
    for k in range(n):
        largest = max(largest, integers[k] & np.int32(0x7FFFFFFF))
    return as_float(largest)


@intrinsic
def as_float(typingctx, bits):
    """The float32 of the bits."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


def _all(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [ir.Constant(kind.element, value)] * CALLS)


@intrinsic
def store_random(typingctx, bits, offset, seed, row, first_call):
    """Write the random bits of 16 calls of Philox, which are those of 128 elements of a row."""

    def codegen(context, builder, sig, args):
        array, offset, seed, row, first_call = args

        def everywhere(integer: Any) -> Any:
            vector = builder.insert_element(_all(I32, 0), builder.trunc(integer, ir.IntType(32)), ir.IntType(32)(0))
            return builder.shuffle_vector(vector, vector, _all(I32, 0))

        lanes = ir.Constant(I32, [ir.Constant(ir.IntType(32), i) for i in range(CALLS)])
        c = [builder.add(everywhere(first_call), lanes), everywhere(row), _all(I32, 0), _all(I32, 0)]
        keys = [everywhere(seed), everywhere(builder.lshr(seed, ir.IntType(64)(32)))]
        for _ in range(ROUNDS):
            products = [
                builder.mul(builder.zext(word, I64), _all(I64, multiplier))
                for word, multiplier in zip((c[0], c[2]), MULTIPLIERS, strict=True)
            ]
            high = [builder.trunc(builder.lshr(product, _all(I64, 32)), I32) for product in products]
            low = [builder.trunc(product, I32) for product in products]
            c = [
                builder.xor(builder.xor(high[1], c[1]), keys[0]), low[1],
                builder.xor(builder.xor(high[0], c[3]), keys[1]), low[0],
            ]  # fmt: skip
            keys = [builder.add(key, _all(I32, step)) for key, step in zip(keys, KEY_INCREMENTS, strict=True)]
        # Word w of call i is number 4 i + w; of each, the lower half comes first.
        first, last = (_shuffled(builder, *pair, range(2 * CALLS)) for pair in ((c[0], c[1]), (c[2], c[3])))
        words = _shuffled(builder, first, last, [w * CALLS + i for i in range(CALLS) for w in range(4)])
        pointer = address_of(context, builder, sig.args[0], words.type, array, offset)
        builder.store(words, pointer, align=2)
        return context.get_dummy_value()

    return types.none(bits, types.intp, types.int64, types.int64, types.int64), codegen


def _shuffled(builder: Any, a: Any, b: Any, indices: Sequence[int]) -> Any:
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(indices)), [*indices])
    return builder.shuffle_vector(a, b, mask)


@intrinsic
def store_stochastic(typingctx, array, offset, value, bits):
    """Write a vector, rounded by the random bits at the same offset; for int8 as numbers of 1/65536 of a unit."""

    def codegen(context, builder, sig, args):
        kind = sig.args[0].dtype
        pointer = address_of(context, builder, sig.args[3], I16, args[3], args[1])
        noise = builder.zext(builder.load(pointer, align=2), I32)
        value = args[2]
        raw = {types.uint16: _to_bfloat16, types.int16: _to_float16, types.int8: _to_int8}[kind](builder, value, noise)
        pointer = address_of(context, builder, sig.args[0], raw.type, *args[:2])
        builder.store(raw, pointer, align=kind.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(array, types.intp, value, bits), codegen


def _to_bfloat16(builder: Any, value: Any, noise: Any) -> Any:
    bits = builder.lshr(builder.add(builder.bitcast(value, I32), noise), _all(I32, 16))
    bits = builder.select(builder.fcmp_unordered("uno", value, value), _all(I32, 0x7FC0), bits)
    return builder.trunc(bits, I16)


def _to_float16(builder: Any, value: Any, noise: Any) -> Any:
    size = call(builder, f"llvm.fabs.v{CALLS}f32", FLOATS, value)
    smallest = _all(FLOATS, 2.0**-14)
    is_small = builder.fcmp_ordered("<", size, smallest)
    shifted = builder.select(is_small, builder.fadd(size, smallest), size)
    bits = builder.add(builder.bitcast(shifted, I32), builder.lshr(noise, _all(I32, 3)))
    cut = builder.bitcast(builder.and_(bits, _all(I32, ~0x1FFF)), FLOATS)
    cut = builder.select(is_small, builder.fsub(cut, smallest), cut)
    # As numbers of float16 they are converted exactly.
    half = builder.bitcast(builder.fptrunc(cut, HALVES), I16)
    sign = builder.and_(builder.lshr(builder.bitcast(value, I32), _all(I32, 16)), _all(I32, 0x8000))
    half = builder.or_(half, builder.trunc(sign, I16))
    return builder.select(builder.fcmp_unordered("uno", value, value), _all(I16, 0x7E00), half)


def _to_int8(builder: Any, value: Any, noise: Any) -> Any:
    size = call(builder, f"llvm.fabs.v{CALLS}f32", FLOATS, value)
    # At most 127 * 65536, and 0 for NaN; LLVM's conversion that saturates is of one number after the other.
    size = builder.select(builder.fcmp_ordered("ord", size, size), size, _all(FLOATS, 0.0))
    units = builder.fptosi(size, I32)
    units = builder.lshr(builder.add(units, noise), _all(I32, 16))
    is_negative = builder.fcmp_ordered("<", value, _all(FLOATS, 0.0))
    return builder.trunc(builder.select(is_negative, builder.neg(units), units), ir.VectorType(ir.IntType(8), CALLS))
