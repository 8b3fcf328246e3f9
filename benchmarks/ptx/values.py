"""Arithmetic of PTX on NumPy arrays: registers are raw bits, which each instruction reads in its own type.

Differences from a device: `ex2.approx`, `lg2.approx`, `rsqrt.approx` and the like are correctly rounded here, and a
fused multiply-add of float32 is rounded through float64, which differs by one ulp in rare cases.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
U1, U2, U4, U8 = (np.dtype(f"u{n}") for n in (1, 2, 4, 8))
I1, I2, I4, I8 = (np.dtype(f"i{n}") for n in (1, 2, 4, 8))
F2, F4, F8 = (np.dtype(f"f{n}") for n in (2, 4, 8))
BOOL = np.dtype("?")

TYPES = {
    "b8": U1, "u8": U1, "s8": I1, "b16": U2, "u16": U2, "s16": I2, "b32": U4, "u32": U4, "s32": I4, "b64": U8,
    "u64": U8, "s64": I8, "f16": F2, "bf16": U2, "f32": F4, "f64": F8, "pred": BOOL, "bf16x2": U4, "f16x2": U4,
    "f32x2": U8,
}  # fmt: skip
"""Types of the "Fundamental Types"; NumPy has no bfloat16, so a register holds its bits."""


def flush_subnormal(x: Array) -> Array:
    """Replace subnormal float32 by zero of the same sign (`.ftz`)."""
    tiny = np.abs(x) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), x), x)


def from_bf16(bits: Array) -> Array:
    """Widen bfloat16 bits to float32."""
    return (np.asarray(bits).astype(U4) << np.uint32(16)).view(F4)


def to_bf16(x: Array) -> Array:
    """Round float32 to bfloat16 bits, to nearest even; NaN becomes 0x7fff."""
    bits = np.asarray(x, F4).view(U4)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(U2)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def to_f16(x: Array) -> Array:
    """Round float32 to float16 bits."""
    return np.asarray(x).astype(F2).view(U2)


def from_f16(bits: Array) -> Array:
    """Widen float16 bits to float32."""
    return np.asarray(bits).astype(U2).view(F2).astype(F4)


def to_tf32(x: Array, nearest: bool) -> Array:
    """Round float32 to TF32 bits: 10 bits of mantissa, to nearest with ties away from zero, or truncated."""
    bits = np.asarray(x, F4).view(U4)
    return (bits + np.uint32(0x1000 if nearest else 0)) & np.uint32(0xFFFFE000)


def fma(a: Array, b: Array, c: Array) -> Array:
    """Multiply and add with one rounding; in float64 with two."""
    if a.dtype != F4:
        return a * b + c
    return (a.astype(F8) * b.astype(F8) + c.astype(F8)).astype(F4)


ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integer(x: Array, kind: np.dtype, rounding: str) -> Array:
    """Convert a float to an integer, clamped to its range; NaN gives 0."""
    x = ROUND[rounding](x.astype(F8))
    limits = np.iinfo(kind)
    # The largest 64-bit integers are not float64 values: clamp to the next one below.
    top = float(limits.max) if kind.itemsize < 8 else float(limits.max) * (1 - 2.0**-53)
    return np.clip(np.where(np.isnan(x), 0, x), float(limits.min), top).astype(kind)


def divide(a: Array, b: Array) -> Array:
    """Divide integers, rounding towards zero; a divisor of zero counts as one."""
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // b
    # NumPy rounds down: add one where the quotient is negative and inexact.
    return quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype) if a.dtype.kind == "i" else quotient


def remainder(a: Array, b: Array) -> Array:
    """Remainder of `divide`."""
    return (a - divide(a, b) * b).astype(a.dtype)


def multiply_high(a: Array, b: Array) -> Array:
    """Upper half of the product of two integers."""
    if a.dtype.itemsize < 8:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(8 * a.dtype.itemsize)).astype(a.dtype)
    pairs = zip(*(np.atleast_1d(x) for x in np.broadcast_arrays(a, b)), strict=True)
    return np.array([int(x) * int(y) >> 64 for x, y in pairs], dtype=object).astype(a.dtype)


def shift_left(a: Array, n: Array) -> Array:
    """Shift left ("shl"); counts beyond the width give 0."""
    width = 8 * a.dtype.itemsize
    return np.where(n >= width, a.dtype.type(0), a << np.minimum(n, width - 1).astype(a.dtype))


def shift_right(a: Array, n: Array) -> Array:
    """Shift right ("shr"), arithmetically for signed types; counts beyond the width give 0 or the sign."""
    top = 8 * a.dtype.itemsize - 1
    beyond = a >> a.dtype.type(top) if a.dtype.kind == "i" else a.dtype.type(0)
    return np.where(n > top, beyond, a >> np.minimum(n, top).astype(a.dtype))


def funnel_shift(low: Array, high: Array, n: Array, left: bool, wrap: bool) -> Array:
    """Shift the 64 bits `high:low` and take 32 of them ("shf")."""
    both = low.astype(U8) | (high.astype(U8) << np.uint64(32))
    n = (n & np.uint32(31) if wrap else np.minimum(n, np.uint32(32))).astype(U8)
    return ((both << n) >> np.uint64(32) if left else both >> n).astype(U4)


def extract_bits(a: Array, position: Array, length: Array) -> Array:
    """Extract a bit field ("bfe"), sign-extended for signed types."""
    p, n = ((x & np.uint32(0xFF)).astype(I8) for x in (position, length))
    value = (a.astype(I8) if a.dtype.kind == "i" else a.astype(U8).view(I8)) >> np.minimum(p, 63)
    mask = np.where(n >= 63, np.int64(-1), (np.int64(1) << np.minimum(n, 62)) - 1)
    field = value & mask
    if a.dtype.kind == "i":
        is_negative = (n > 0) & (n < 8 * a.dtype.itemsize) & ((field >> np.maximum(n - 1, 0)) & 1 == 1)
        field = np.where(is_negative, field | ~mask, field)
    return field.astype(a.dtype)


def insert_bits(a: Array, b: Array, position: Array, length: Array) -> Array:
    """Insert the bit field `a` into `b` ("bfi")."""
    p, n = position & np.uint32(0xFF), length & np.uint32(0xFF)
    ones = (np.uint64(1) << np.minimum(n, np.uint32(32)).astype(U8)) - np.uint64(1)
    mask = (ones << p.astype(U8)).astype(U4)
    return (b & ~mask) | (shift_left(a, p) & mask)


def permute_bytes(a: Array, b: Array, selectors: Array) -> Array:
    """Select four of the eight bytes `b:a` by 4-bit selectors whose top bit replicates the sign ("prmt")."""
    both = a.astype(U8) | (b.astype(U8) << np.uint64(32))
    out = np.zeros(np.broadcast(a, b, selectors).shape, U4)
    for i in range(4):
        selector = (selectors >> np.uint32(4 * i)) & np.uint32(0xF)
        byte = (both >> ((selector & np.uint32(7)).astype(U8) * np.uint64(8))) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        out |= np.where(selector & np.uint32(8), sign, byte).astype(U4) << np.uint32(8 * i)
    return out


def lookup3(a: Array, b: Array, c: Array, table: int) -> Array:
    """A bitwise function of three operands by its truth table ("lop3")."""
    out = np.zeros_like(a | b | c)
    for i in range(8):
        if table >> i & 1:
            out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return out


def leading_zeros(a: Array) -> Array:
    """Number of zero bits above the highest one bit ("clz")."""
    width = 8 * a.dtype.itemsize
    return np.array([width - int(x).bit_length() for x in np.atleast_1d(a)], U4)


def count_ones(a: Array) -> Array:
    """Number of one bits ("popc")."""
    return np.array([int(x).bit_count() for x in np.atleast_1d(a)], U4)


def difference_in_ulps(a: Array, b: Array) -> str:
    """Largest difference of two arrays of float bits in ulps, as text; empty if it is large."""
    signed = np.dtype(f"i{a.dtype.itemsize}")
    ulps = int(np.abs(a.view(signed).astype(I8) - b.view(signed).astype(I8)).max())
    return f", by at most {ulps} ulp" if ulps < 64 else ""
