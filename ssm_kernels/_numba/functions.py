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
    polynomial,
)

LOG2_E = math.log2(math.e)
LOG2_E_LOW = 2.0355273740931033e-17
"""Remainder of log2(e) that float64 does not hold."""
MANTISSA = {32: 23, 64: 52}
BIAS = {32: 127, 64: 1023}
MAX_EXPONENT = 126.0
"""Powers of two with an exponent of at most this size are neither zero nor infinite in any dtype."""

# Interpolated at Chebyshev nodes in 40 digits; relative errors 5e-9 and 1.5e-19, and 4e-9 and 1.3e-18.
EXP2 = {  # 2^r on [-1/2, 1/2]
    32: (1.0, 0.6931471880262288, 0.24022650760568127, 0.055503571142190781, 0.0096180825572778515,
         0.0013390863364671234, 0.0001545316294512069),
    64: (1.0, 0.6931471805599453093, 0.2402265069591007123, 0.05550410866482162704, 0.009618129107628479493,
         0.00133335581464064707, 0.0001540353039337073341, 0.00001525273384155677259, 1.321548680870556279e-6,
         1.01780570877339411e-7, 7.054897304155499277e-9, 4.455817908336064493e-10, 2.572932417736230421e-11),
}  # fmt: skip
ATANH = {  # 2 atanh(s) / s as a polynomial in s^2, on [0, 1/9]
    32: (2.000000007681758881, 0.6666632164137777316, 0.4002459523070374791, 0.2796515774519726889,
         0.2815777836310908065),
    64: (2.000000000000000002, 0.6666666666666614959, 0.4000000000018574747, 0.2857142854545411453,
         0.2222222408074767317, 0.1818174083250480451, 0.1538661404230400776, 0.1330037403267462434,
         0.1211016872806921765, 0.08324506511860820576, 0.1704416356278139813),
}  # fmt: skip


def _exp2_value(builder: Any, lanes: Lanes, x: Any) -> Any:
    bias = BIAS[lanes.dtype.bitwidth]
    # At -bias the exponent's bits are those of zero, at bias + 1 those of infinity.
    for predicate, limit in (("<", -bias), (">", bias + 1)):
        bound = constant(lanes, float(limit))
        x = builder.select(builder.fcmp_ordered(predicate, x, bound), bound, x)  # a NaN is neither
    shifted, nearest = _to_integer(builder, lanes, x)
    return _power_of_two(builder, lanes, shifted, builder.fsub(x, nearest))


def _exp_value(builder: Any, lanes: Lanes, x: Any) -> Any:
    bias = BIAS[lanes.dtype.bitwidth]
    scaled = builder.fmul(x, constant(lanes, LOG2_E))
    shifted, nearest = _to_integer(builder, lanes, scaled)
    # x log2(e) to twice the precision: its rounding would be an error of the result for large x.
    high = float(np.dtype(lanes.dtype.name).type(LOG2_E))
    r = fma_value(builder, lanes, x, constant(lanes, high), builder.fneg(nearest))
    r = fma_value(builder, lanes, x, constant(lanes, LOG2_E_LOW if high == LOG2_E else LOG2_E - high), r)
    result = _power_of_two(builder, lanes, shifted, r)
    # Beyond these limits the exponent does not fit its bits.
    for predicate, limit, value in (("<", -bias, 0.0), (">", bias + 1, math.inf)):
        is_beyond = builder.fcmp_ordered(predicate, scaled, constant(lanes, float(limit)))
        result = builder.select(is_beyond, constant(lanes, value), result)
    return result


def _to_integer(builder: Any, lanes: Lanes, x: Any) -> tuple[Any, Any]:
    """Round to the nearest integer, as the lowest bits of a number and as a number."""
    magic = _magic(lanes)
    shifted = builder.fadd(x, magic)
    return shifted, builder.fsub(shifted, magic)


def _magic(lanes: Lanes) -> Any:
    """1.5 * 2^mantissa, where neighbouring numbers differ by one: a sum is rounded to an integer, of either sign."""
    return constant(lanes, 1.5 * 2.0 ** MANTISSA[lanes.dtype.bitwidth])


def _power_of_two(builder: Any, lanes: Lanes, shifted: Any, r: Any) -> Any:
    """2^(n + r), with n in the lowest bits of `shifted` and r in [-1/2, 1/2]."""
    bits = lanes.dtype.bitwidth
    # 2^r is in [1/sqrt(2), sqrt(2)]: adding n to the bits of its exponent multiplies it by 2^n.
    power = polynomial(builder, lanes, r, EXP2[bits])
    exponent = builder.shl(as_integers(builder, lanes, shifted), constant(lanes, MANTISSA[bits], integer=True))
    return as_floats(builder, lanes, builder.add(as_integers(builder, lanes, power), exponent))


@intrinsic
def exp2(typingctx, x):
    """2^x."""

    def codegen(context, builder, sig, args):
        return _exp2_value(builder, x, args[0])

    return x(x), codegen


@intrinsic
def exp2_product(typingctx, x, y, is_bounded):
    """2^(x y). `is_bounded` promises that |x y| is at most `MAX_EXPONENT`, and changes no bit of what is."""
    bound = BIAS[x.dtype.bitwidth] - 1.0

    def codegen(context, builder, sig, args):
        a, b, is_bounded = args
        # The product is never rounded by itself: one multiply-add gives its integer, another one what is left.
        magic = _magic(x)
        shifted = fma_value(builder, x, a, b, magic)
        nearest = builder.fsub(shifted, magic)
        power = _power_of_two(builder, x, shifted, fma_value(builder, x, a, b, builder.fneg(nearest)))
        result = cgutils.alloca_once_value(builder, power)
        with builder.if_then(builder.not_(is_bounded), likely=False):
            product = builder.fmul(a, b)
            for predicate, limit, value in (("<", -bound, 0.0), (">", bound, math.inf)):
                is_beyond = builder.fcmp_ordered(predicate, product, constant(x, limit))  # a NaN is neither
                power = builder.select(is_beyond, constant(x, value), power)
            builder.store(power, result)
        return builder.load(result)

    return x(x, x, types.boolean), codegen


@intrinsic
def sigmoid(typingctx, x):
    """1 / (1 + exp(-x))."""

    def codegen(context, builder, sig, args):
        one = constant(x, 1.0)
        e = _exp_value(builder, x, builder.fneg(args[0]))
        return builder.fdiv(one, builder.fadd(one, e))

    return x(x), codegen


@intrinsic
def softplus(typingctx, x):
    """log(1 + exp(x)), as max(x, 0) + log1p(exp(-|x|))."""

    def codegen(context, builder, sig, args):
        value, zero = args[0], constant(x, 0.0)
        size = call(builder, f"llvm.fabs.v{x.count}f{x.dtype.bitwidth}", value.type, value)
        e = _exp_value(builder, x, builder.fneg(size))  # in [0, 1]
        s = builder.fdiv(e, builder.fadd(e, constant(x, 2.0)))  # log1p(e) = 2 atanh(e / (2 + e))
        p = polynomial(builder, x, builder.fmul(s, s), ATANH[x.dtype.bitwidth])
        positive = builder.select(builder.fcmp_ordered("<", value, zero), zero, value)
        return fma_value(builder, x, s, p, positive)

    return x(x), codegen


@intrinsic
def rsqrt(typingctx, x):
    """1 / sqrt(x) of a number."""
    if not isinstance(x, types.Float):
        return None

    def codegen(context, builder, sig, args):
        root = call(builder, f"llvm.sqrt.f{x.bitwidth}", args[0].type, args[0])
        return builder.fdiv(ir.Constant(root.type, 1.0), root)

    return x(x), codegen
