"""Elementary functions of `Lanes`, to about one rounding of the dtype. NaN stays NaN."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

from .lanes import (
    Lanes,
    as_floats,
    as_integers,
    call,
    constant,
    fma_value,
    intrinsic,
    look_up,
    polynomial,
)

LOG2_E = math.log2(math.e)
LOG2_E_LOW = 2.0355273740931033e-17
"""Remainder of log2(e) that float64 does not hold."""
MANTISSA = {32: 23, 64: 52}
BIAS = {32: 127, 64: 1023}
MAX_EXPONENT = 126.0
"""Powers of two with an exponent of at most this size are neither zero nor infinite in any dtype."""

# Interpolated at Chebyshev nodes in 40 digits; relative errors of 2^r 5e-9 and 1.5e-19, in parts 1.5e-10 and 7e-18, by
# the short polynomial 5e-8; of atanh 4e-9 and 1.3e-18.
EXP2 = {  # 2^r on [-1/2, 1/2]
    32: (1.0, 0.6931471880262288, 0.24022650760568127, 0.055503571142190781, 0.0096180825572778515,
         0.0013390863364671234, 0.0001545316294512069),
    64: (1.0, 0.6931471805599453093, 0.2402265069591007123, 0.05550410866482162704, 0.009618129107628479493,
         0.00133335581464064707, 0.0001540353039337073341, 0.00001525273384155677259, 1.321548680870556279e-6,
         1.01780570877339411e-7, 7.054897304155499277e-9, 4.455817908336064493e-10, 2.572932417736230421e-11),
}  # fmt: skip
EXP2_IN_PARTS = {  # (2^r - 1) / r on [-1/64, 1/64] and [-1/32, 1/32]
    32: (0.6931471805599453094, 0.2402282680963039068, 0.05550435281007441905),
    64: (0.6931471805599468631, 0.240226506959100847, 0.05550410865209357225, 0.009618129106525681666,
         0.001333381881538923932, 0.0001540375624545770872),
}  # fmt: skip
SHORT = {32: (0.6931573437104842635, 0.2402282680963039068)}
"""In place of `EXP2_IN_PARTS` where an error of one rounding more does not count."""
ATANH = {  # 2 atanh(s) / s as a polynomial in s^2, on [0, 1/9]
    32: (2.000000007681758881, 0.6666632164137777316, 0.4002459523070374791, 0.2796515774519726889,
         0.2815777836310908065),
    64: (2.000000000000000002, 0.6666666666666614959, 0.4000000000018574747, 0.2857142854545411453,
         0.2222222408074767317, 0.1818174083250480451, 0.1538661404230400776, 0.1330037403267462434,
         0.1211016872806921765, 0.08324506511860820576, 0.1704416356278139813),
}  # fmt: skip


def _count_parts(context: Any, lanes: Lanes) -> int:
    """The parts of a unit whose powers of two a kernel looks up: 32, of float64 16.

    Two registers of AVX-512 hold them, and an instruction picks a number for each lane. Elsewhere there is one part.
    """
    return 2 * lanes.count if "+avx512f" in context.codegen().magic_tuple()[2] else 1


def _magic(lanes: Lanes, parts: int) -> Any:
    """1.5 * 2^mantissa / parts, where neighbouring numbers differ by a part: a sum is rounded to parts, of any sign."""
    return constant(lanes, 1.5 * 2.0 ** MANTISSA[lanes.dtype.bitwidth] / parts)


def _power_of_two(builder: Any, lanes: Lanes, parts: int, shifted: Any, r: Any, in_parts: dict) -> Any:
    """2^(n / parts + r), with n in the lowest bits of `shifted` and |r| at most half a part."""
    bits = lanes.dtype.bitwidth
    shift = MANTISSA[bits] - parts.bit_length() + 1
    # n / parts, as it is added to the bits of an exponent, and behind it the bits of the fraction
    steps = builder.shl(as_integers(builder, lanes, shifted), constant(lanes, shift, integer=True))
    if parts == 1:
        # 2^r is in [1/sqrt(2), sqrt(2)]: adding n to the bits of its exponent multiplies it by 2^n.
        power = polynomial(builder, lanes, r, EXP2[bits])
        return as_floats(builder, lanes, builder.add(as_integers(builder, lanes, power), steps))
    powers = (2.0 ** (np.arange(parts) / parts)).astype(lanes.dtype.name).view(f"int{bits}")
    # Less the bits of the fraction, which `steps` has too. The lowest bits of n pick one.
    looked_up = look_up(builder, lanes, powers - (np.arange(parts) << shift), shifted)
    scale = as_floats(builder, lanes, builder.add(looked_up, steps))
    # scale + scale (2^r - 1), of which only the sum is rounded as coarsely as the result
    less_one = polynomial(builder, lanes, r, in_parts[bits])
    return fma_value(builder, lanes, builder.fmul(scale, r), less_one, scale)


def _limited(builder: Any, lanes: Lanes, power: Any, x: Any, unit: float = 1.0, sides: str = "<>") -> Any:
    """Zero where x is less than its bound, infinity where it is more: there `power` has the wrong bits.

    Bounds are exponents of 2, in units of `unit`: of the least normal number, and of 0.97 of the largest.
    """
    bias = BIAS[lanes.dtype.bitwidth]
    for predicate, bound, value in (("<", 1 - bias, 0.0), (">", bias + 0.96, math.inf)):
        if predicate in sides:
            limit = bound * unit
            is_beyond = builder.fcmp_ordered(predicate, x, constant(lanes, limit))  # a NaN is neither
            power = builder.select(is_beyond, constant(lanes, value), power)
    return power


def _exp_value(context: Any, builder: Any, lanes: Lanes, x: Any, sides: str = "<>") -> Any:
    """e^x, where x can be beyond the bound on these sides."""
    parts = _count_parts(context, lanes)
    magic = _magic(lanes, parts)
    # x log2(e) to twice the precision: its rounding would be an error of the result for large x.
    high = float(np.dtype(lanes.dtype.name).type(LOG2_E))
    shifted = fma_value(builder, lanes, x, constant(lanes, high), magic)
    r = fma_value(builder, lanes, x, constant(lanes, high), builder.fsub(magic, shifted))
    r = fma_value(builder, lanes, x, constant(lanes, LOG2_E_LOW if high == LOG2_E else LOG2_E - high), r)
    power = _power_of_two(builder, lanes, parts, shifted, r, EXP2_IN_PARTS)
    return _limited(builder, lanes, power, x, 1 / LOG2_E, sides)


@intrinsic
def exp2(typingctx, x):
    """2^x."""

    def codegen(context, builder, sig, args):
        parts = _count_parts(context, x)
        magic = _magic(x, parts)
        shifted = builder.fadd(args[0], magic)
        r = builder.fsub(args[0], builder.fsub(shifted, magic))
        power = _power_of_two(builder, x, parts, shifted, r, EXP2_IN_PARTS)
        return _limited(builder, x, power, args[0])

    return x(x), codegen


@intrinsic
def exp2_product(typingctx, x, y, is_bounded):
    """2^(x y). `is_bounded` promises that |x y| is at most `MAX_EXPONENT`, and changes no bit of what is."""

    def codegen(context, builder, sig, args):
        a, b, is_bounded = args
        parts = _count_parts(context, x)
        # The product is never rounded by itself: one multiply-add gives its parts, another one what is left.
        magic = _magic(x, parts)
        shifted = fma_value(builder, x, a, b, magic)
        r = fma_value(builder, x, a, b, builder.fsub(magic, shifted))
        power = _power_of_two(builder, x, parts, shifted, r, EXP2_IN_PARTS | SHORT)
        result = cgutils.alloca_once_value(builder, power)
        with builder.if_then(builder.not_(is_bounded), likely=False):
            builder.store(_limited(builder, x, power, builder.fmul(a, b)), result)
        return builder.load(result)

    return x(x, x, types.boolean), codegen


@intrinsic
def sigmoid(typingctx, x):
    """1 / (1 + exp(-x))."""

    def codegen(context, builder, sig, args):
        one = constant(x, 1.0)
        e = _exp_value(context, builder, x, builder.fneg(args[0]))
        return builder.fdiv(one, builder.fadd(one, e))

    return x(x), codegen


def _softplus_values(context: Any, builder: Any, lanes: Lanes, x: Any) -> tuple[Any, Any]:
    """log(1 + exp(x)), as max(x, 0) + log1p(exp(-|x|)), and its derivative 1 / (1 + exp(-x))."""
    zero, one = constant(lanes, 0.0), constant(lanes, 1.0)
    size = call(builder, f"llvm.fabs.v{lanes.count}f{lanes.dtype.bitwidth}", x.type, x)
    e = _exp_value(context, builder, lanes, builder.fneg(size), "<")  # in [0, 1]
    s = builder.fdiv(e, builder.fadd(e, constant(lanes, 2.0)))  # log1p(e) = 2 atanh(e / (2 + e))
    p = polynomial(builder, lanes, builder.fmul(s, s), ATANH[lanes.dtype.bitwidth])
    is_negative = builder.fcmp_ordered("<", x, zero)
    result = fma_value(builder, lanes, s, p, builder.select(is_negative, zero, x))
    return result, builder.fdiv(builder.select(is_negative, e, one), builder.fadd(e, one))


@intrinsic
def softplus(typingctx, x):
    """log(1 + exp(x))."""

    def codegen(context, builder, sig, args):
        return _softplus_values(context, builder, x, args[0])[0]

    return x(x), codegen


@intrinsic
def softplus_and_slope(typingctx, x):
    """log(1 + exp(x)) and its derivative, the sigmoid of x."""

    def codegen(context, builder, sig, args):
        return context.make_tuple(builder, sig.return_type, _softplus_values(context, builder, x, args[0]))

    return types.UniTuple(x, 2)(x), codegen


@intrinsic
def rsqrt(typingctx, x):
    """1 / sqrt(x) of a number."""
    if not isinstance(x, types.Float):
        return None

    def codegen(context, builder, sig, args):
        root = call(builder, f"llvm.sqrt.f{x.bitwidth}", args[0].type, args[0])
        return builder.fdiv(ir.Constant(root.type, 1.0), root)

    return x(x), codegen
