"""Loops in numba that keep one unit of a core busy. They share no code with the kernels that are measured by them.

Vectors are of 16 float32, which LLVM keeps in one register of AVX-512, two of AVX2 or four of NEON. Left to itself it
takes half of the widest register on some processors. The sizes of arrays are multiples of eight vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, extending, types

intrinsic: Callable[..., Any] = extending.intrinsic
"""The decorator; what it makes of a function takes no `typingctx`, which type checkers do not know."""
CHAIN = 16
"""Multiply-adds of an element between its load and its store, which take other units."""
POWERS = 4
"""Exponentials of an element, for the same reason."""
PLACES = 8
"""Vectors that are added at once."""
AHEAD = 1024
"""Bytes between what is read and what is fetched meanwhile."""
EXP2 = (1.0, 0.6931472, 0.24022651, 0.05550332, 0.009618, 0.0013399, 0.000154)
"""2^r on [-1/2, 1/2] as a polynomial, to a rounding of float32."""
PARTS = 32
EXP2_IN_PARTS = (0.69315734, 0.24022827)
"""(2^r - 1) / r on [-1/64, 1/64], to a rounding of the power."""
LANES = 16
VECTOR, INTEGERS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)


def _at(context: Any, builder: Any, kind: types.Array, array: Any, offset: Any) -> Any:
    """Pointer to the vector at an offset of an array."""
    data = cgutils.create_struct_proxy(kind)(context, builder, value=array).data
    return builder.bitcast(builder.gep(data, [offset]), VECTOR.as_pointer())


def _all(value: float) -> ir.Constant:
    return ir.Constant(VECTOR, [value] * LANES)


def _everywhere(builder: Any, scalar: Any) -> Any:
    """A number in all lanes."""
    vector = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), scalar, ir.IntType(32)(0))
    return builder.shuffle_vector(vector, vector, ir.Constant(INTEGERS, [0] * LANES))


def _call(builder: Any, name: str, kind: ir.Type, *args: Any) -> Any:
    function = ir.FunctionType(kind, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), args)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "llvm.fmuladd.v16f32", VECTOR, a, b, c)


def _adder(ahead: int) -> Any:
    """Make the function that adds vectors and has memory fetched so many bytes ahead, or none for 0."""

    @intrinsic
    def add_vectors(typingctx, sums, x, offset, stride):
        """sums += x[offset + k stride] for k < PLACES; a vector each."""

        def codegen(context, builder, sig, args):
            vectors = []
            for k in range(PLACES):
                place = builder.add(args[2], builder.mul(args[3], args[3].type(k)))
                pointer = _at(context, builder, sig.args[1], args[1], place)
                if ahead:
                    line = builder.gep(builder.bitcast(pointer, ir.IntType(8).as_pointer()), [ir.IntType(64)(ahead)])
                    numbers = [ir.IntType(32)(n) for n in (0, 3, 1)]  # to be read, into all caches, of data
                    _call(builder, "llvm.prefetch.p0", ir.VoidType(), line, *numbers)
                vectors.append(builder.load(pointer, align=4))
            while len(vectors) > 1:
                vectors = [builder.fadd(*pair) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
            pointer = _at(context, builder, sig.args[0], args[0], args[2].type(0))
            builder.store(builder.fadd(builder.load(pointer, align=4), vectors[0]), pointer, align=4)
            return context.get_dummy_value()

        return types.none(sums, x, types.intp, types.intp), codegen

    return add_vectors


_add_vectors, _add_and_fetch = _adder(0), _adder(AHEAD)


@intrinsic
def _copy_vector(typingctx, x, target, offset):
    def codegen(context, builder, sig, args):
        source, goal = (_at(context, builder, sig.args[i], args[i], args[2]) for i in (0, 1))
        builder.store(builder.load(source, align=4), goal, align=4)
        return context.get_dummy_value()

    return types.none(x, target, types.intp), codegen


@intrinsic
def _multiply_add_vector(typingctx, target, offset, factor, term):
    def codegen(context, builder, sig, args):
        pointer = _at(context, builder, sig.args[0], *args[:2])
        value, factor, term = builder.load(pointer, align=4), *(_everywhere(builder, a) for a in args[2:])
        for _ in range(CHAIN):
            value = _fma(builder, value, factor, term)
        builder.store(value, pointer, align=4)
        return context.get_dummy_value()

    return types.none(target, types.intp, types.float32, types.float32), codegen


@intrinsic
def _exponentiate_vector(typingctx, x, target, offset, factors):
    def codegen(context, builder, sig, args):
        source, goal = (_at(context, builder, sig.args[i], args[i], args[2]) for i in (0, 1))
        value, powers = builder.load(source, align=4), []
        for k in range(POWERS):
            factor = _everywhere(builder, builder.extract_value(args[3], k))
            powers.append(_power(context, builder, value, factor))
        total = builder.fadd(builder.fadd(powers[0], powers[1]), builder.fadd(powers[2], powers[3]))
        builder.store(total, goal, align=4)
        return context.get_dummy_value()

    return types.none(x, target, types.intp, factors), codegen


def _power(context: Any, builder: Any, x: Any, factor: Any) -> Any:
    """2^(x factor), by the fewest instructions that are known here."""
    has_permutations = "+avx512f" in context.codegen().magic_tuple()[2]
    parts = PARTS if has_permutations else 1
    # Numbers from here to twice it differ by a part: the sum is rounded to parts, of either sign.
    magic = _all(1.5 * 2.0**23 / parts)
    shifted = _fma(builder, x, factor, magic)
    r = _fma(builder, x, factor, builder.fsub(magic, shifted))
    index, shift = builder.bitcast(shifted, INTEGERS), 24 - parts.bit_length()
    steps = builder.shl(index, ir.Constant(INTEGERS, [shift] * LANES))
    result = _all((EXP2_IN_PARTS if has_permutations else EXP2)[-1])
    for c in reversed((EXP2_IN_PARTS if has_permutations else EXP2)[:-1]):
        result = _fma(builder, result, r, _all(c))
    if not has_permutations:
        return builder.bitcast(builder.add(builder.bitcast(result, INTEGERS), steps), VECTOR)
    bits = (2.0 ** (np.arange(PARTS) / PARTS)).astype(np.float32).view(np.int32) - (np.arange(PARTS) << shift)
    first, last = (ir.Constant(INTEGERS, [int(i) for i in half]) for half in (bits[:LANES], bits[LANES:]))
    looked_up = _call(builder, "llvm.x86.avx512.vpermi2var.d.512", INTEGERS, first, index, last)
    scale = builder.bitcast(builder.add(looked_up, steps), VECTOR)
    return _fma(builder, builder.fmul(scale, r), result, scale)


# --- compiled -------------------------------------------------------------------------------------------------------


def _compiled(function: Callable) -> Any:
    return numba.njit(nogil=True, cache=True)(function)


@_compiled
def read(x, target, rounds):
    """Sum x, `rounds` times, in order: target[0]."""
    sums = np.empty(LANES, np.float32)
    for _ in range(rounds):
        sums[:] = 0
        for i in range(0, x.size, PLACES * LANES):
            _add_vectors(sums, x, i, LANES)
        target[0] = sums.sum()


@_compiled
def read_places(x, target, rounds):
    """Sum x, `rounds` times, from several places at once, and have memory fetched ahead: target[0]."""
    sums, part = np.empty(LANES, np.float32), x.size // PLACES
    for _ in range(rounds):
        sums[:] = 0
        for i in range(0, part, LANES):
            _add_and_fetch(sums, x, i, part)
        target[0] = sums.sum()


@_compiled
def copy(x, target, rounds):
    """Copy x to the target, `rounds` times."""
    for _ in range(rounds):
        for i in range(0, x.size, LANES):
            _copy_vector(x, target, i)


@_compiled
def multiply_add(x, target, rounds):
    """Take `CHAIN` multiply-adds of each element of the target, `rounds` times."""
    factor, term = x[0], x[1]
    for _ in range(rounds):
        for i in range(0, x.size, LANES):
            _multiply_add_vector(target, i, factor, term)


@_compiled
def exponentiate(x, target, rounds):
    """Sum 2 to the power of each element of x times each of the first `POWERS`, `rounds` times.

    Products are between -126 and 126. No kernel's exponential is without one: log2(e) of e^x, or the step of a scan.
    """
    factors = x[0], x[1], x[2], x[3]
    for _ in range(rounds):
        for i in range(0, x.size, LANES):
            _exponentiate_vector(x, target, i, factors)
