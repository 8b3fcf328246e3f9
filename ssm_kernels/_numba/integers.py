"""Products of integers: weights in 8 or 4 bits by activations in 16, summed in 32 bits.

A vector is `Sums`, 16 int32. LLVM makes multiply-adds of pairs of it (vpdpwssd or vpmaddwd on x86-64): two instructions
for 32 weights, where conversion to float32 takes six. Activations are rounded to 1/32767 of the largest one of a
vector, which is less than bfloat16 rounds all but the smallest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.core.datamodel import models
from numba.core.extending import register_model

from .lanes import (
    Lanes,
    _shuffle,
    address_of,
    as_integers,
    constant,
    intrinsic,
    lane_count,
    larger_sizes,
    largest,
    load,
    read_row,
    splat,
    total,
)

COUNT = 16
"""Sums in a vector; each is of the products of two neighbours."""
PAIRED = 2 * COUNT
"""Integers that are multiplied at once."""
LARGEST = 2**15 - 1
"""Magnitude of the largest activation."""


class Sums(types.Type):
    """The numba type of a vector of sums."""

    def __init__(self):
        super().__init__("Sums")


def _vector(bits: int, count: int) -> ir.VectorType:
    return ir.VectorType(ir.IntType(bits), count)


@register_model(Sums)
class _SumsModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _vector(32, COUNT))


SUMS, FLOATS = Sums(), Lanes(types.float32)


def _load(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, bits: int, count: int) -> Any:
    pointer = address_of(context, builder, array_type, _vector(bits, count), array, offset)
    return builder.load(pointer, align=bits // 8)


def _add_pairs(builder: Any, sums: Any, a: Any, b: Any) -> Any:
    """Add a_2j b_2j + a_(2j + 1) b_(2j + 1) to sum j; a and b have 32 int16."""
    wide = _vector(32, PAIRED)
    products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    # LLVM recognises a multiply-add of pairs by these shuffles.
    even, odd = (_shuffle(builder, products, products, [*range(i, PAIRED, 2)]) for i in (0, 1))
    return builder.add(sums, builder.add(even, odd))


def _all(bits: int, count: int, value: int) -> ir.Constant:
    return ir.Constant(_vector(bits, count), [ir.Constant(ir.IntType(bits), value)] * count)


@intrinsic
def no_sums(typingctx):
    """Sums of nothing."""
    return SUMS(), lambda context, builder, sig, args: ir.Constant(_vector(32, COUNT), None)


@intrinsic
def load_sums(typingctx, array, offset):
    """Sums that an array of int32 holds."""

    def codegen(context, builder, sig, args):
        return _load(context, builder, sig.args[0], args[0], args[1], 32, COUNT)

    return SUMS(array, types.intp), codegen


@intrinsic
def store_sums(typingctx, array, offset, sums):
    """Write sums to an array of int32."""

    def codegen(context, builder, sig, args):
        builder.store(args[2], address_of(context, builder, sig.args[0], args[2].type, *args[:2]), align=4)
        return context.get_dummy_value()

    return types.none(array, types.intp, SUMS), codegen


@intrinsic
def as_floats(typingctx, sums):
    """The sums as float32."""
    return FLOATS(SUMS), lambda context, builder, sig, args: builder.sitofp(
        args[0], ir.VectorType(ir.FloatType(), COUNT)
    )


@intrinsic
def add_products(typingctx, sums, weights, at, x, x_at):
    """Add the products of 32 int8 and 32 int16."""

    def codegen(context, builder, sig, args):
        w = _load(context, builder, sig.args[1], args[1], args[2], 8, PAIRED)
        v = _load(context, builder, sig.args[3], args[3], args[4], 16, PAIRED)
        return _add_pairs(builder, args[0], builder.sext(w, _vector(16, PAIRED)), v)

    return SUMS(SUMS, weights, types.intp, x, types.intp), codegen


def _halves(n_bytes: int) -> Any:
    """Make the function that adds the products of the halves of `n_bytes` bytes, 32 or fewer."""

    @intrinsic
    def add_halves(typingctx, sums, weights, at, x, x_at):
        def codegen(context, builder, sig, args):
            raw = _load(context, builder, sig.args[1], args[1], args[2], 8, n_bytes)
            if n_bytes < PAIRED:
                nothing = ir.Constant(raw.type, None)
                raw = _shuffle(builder, raw, nothing, [*range(n_bytes), *[n_bytes] * (PAIRED - n_bytes)])
            both = builder.zext(raw, _vector(16, PAIRED))
            lower = builder.and_(both, _all(16, PAIRED, 15))
            upper = builder.lshr(both, _all(16, PAIRED, 4))
            sums = args[0]
            for i, w in enumerate((lower, upper)):
                at = builder.add(args[4], ir.Constant(args[4].type, i * PAIRED))
                sums = _add_pairs(builder, sums, w, _load(context, builder, sig.args[3], args[3], at, 16, PAIRED))
            return sums

        return SUMS(SUMS, weights, types.intp, x, types.intp), codegen

    return add_halves


add_halves, add_half_of_halves = _halves(PAIRED), _halves(PAIRED // 2)


@intrinsic
def add_multiple(typingctx, sums, factor, x, x_at):
    """Add 32 int16, times the same integer."""

    def codegen(context, builder, sig, args):
        v = _load(context, builder, sig.args[2], args[2], args[3], 16, PAIRED)
        wide = builder.trunc(args[1], ir.IntType(16))
        undefined = ir.Constant(_vector(16, PAIRED), ir.Undefined)
        first = builder.insert_element(undefined, wide, ir.IntType(32)(0))
        return _add_pairs(builder, args[0], _shuffle(builder, first, undefined, [0] * PAIRED), v)

    return SUMS(SUMS, types.intp, x, types.intp), codegen


@intrinsic
def two_scales(typingctx, scales, offset):
    """Two neighbouring bfloat16: the first in the lower half of the lanes, the second in the upper one."""

    def codegen(context, builder, sig, args):
        pointer = address_of(context, builder, sig.args[0], ir.IntType(32), *args)
        raw = builder.load(pointer, align=2)
        undefined = ir.Constant(_vector(32, COUNT), ir.Undefined)
        first = builder.insert_element(undefined, raw, ir.IntType(32)(0))
        both = _shuffle(builder, first, undefined, [0] * COUNT)
        # Memory has the first of two in the lower bits.
        integer, half = ir.IntType(32), COUNT // 2
        shift = ir.Constant(_vector(32, COUNT), [ir.Constant(integer, n) for n in [16] * half + [0] * half])
        bits = builder.and_(builder.shl(both, shift), _all(32, COUNT, 0xFFFF0000))
        return builder.bitcast(bits, ir.VectorType(ir.FloatType(), COUNT))

    return FLOATS(scales, types.intp), codegen


@intrinsic
def _store_rounded(typingctx, array, offset, x):
    """Write numbers, rounded to the nearest int16, which must hold them."""

    def codegen(context, builder, sig, args):
        # At 1.5 * 2^23 neighbouring numbers differ by one: the lowest bits of the sum are the integer.
        shifted = builder.fadd(args[2], constant(FLOATS, 1.5 * 2.0**23))
        raw = builder.trunc(as_integers(builder, FLOATS, shifted), _vector(16, COUNT))
        builder.store(raw, address_of(context, builder, sig.args[0], raw.type, *args[:2]), align=2)
        return context.get_dummy_value()

    return types.none(array, types.intp, FLOATS), codegen


@njit
def round_vector(x, at, count, limit, has_halves, tile, out, out_at):
    """Round x[at : at + count] to integers of at most `limit`, and return the number that they are multiples of.

    Args:
        x: float32.
        has_halves: the second and the third of each four vectors change places, as `add_halves` takes them.
        tile: float32, of whole vectors.
        out: int16, zero after the last vector.
    """
    lanes, zero, one = lane_count(x), np.int64(0), np.int64(1)
    read_row(x, at, one, count, tile, zero)
    size, zeros = splat(x, 0.0), splat(x, 0.0)
    for i in range(0, count, lanes):
        value = load(tile, i)
        size = larger_sizes(value, size)
        zeros = zeros + value * 0.0
    bound = largest(size)
    inverse = limit / bound if bound > 0 else bound
    for i in range(0, count, lanes):
        quarter = i // lanes % 4
        to = i + (1 if quarter == 1 else -1) * lanes if has_halves and 0 < quarter < 3 else i
        _store_rounded(out, out_at + to, load(tile, i) * inverse)
    # NaN where a number is not finite
    return bound / limit + total(zeros)
