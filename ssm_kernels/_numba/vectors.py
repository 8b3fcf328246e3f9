"""Products of a matrix and a vector, at the speed at which memory gives the matrix.

A matrix is an array of all of its elements; or a tuple of an array of integers, int8 or two a byte in uint8, and one of
their scales, as `modules.quantized.QuantizedMatrix` lays them out.
"""

from __future__ import annotations

from typing import Any

from numba import njit, types
from numba.extending import overload

from .lanes import (
    element,
    element_as,
    fma,
    lane_count,
    load,
    load_as,
    load_lower_halves,
    load_upper_halves,
    set_element,
    splat,
    total,
)
from .stages import array_at

HALF_GROUP = 16
GROUP = 2 * HALF_GROUP
"""Weights of a row that share a scale, where two are in a byte."""
STREAMS = 4
"""Places of a matrix that are read at once. One alone got 58 to 95 % of the bandwidth of a Xeon, four neighbouring rows
34 to 52 %, four far apart all of it."""


@njit
def count_blocks(rows, block_rows):
    """Blocks into which the rows of a matrix are divided: `block_rows` of each of STREAMS runs of rows."""
    return (rows_of_stream(rows) + block_rows - 1) // block_rows


@njit
def rows_of_stream(rows):
    """Rows of a stream, all but the last one's."""
    return (rows + STREAMS - 1) // STREAMS


@njit
def project(matrix, bias, block, block_rows, rows, x, at, columns, out, out_at, accumulate):
    """out[out_at + r] = matrix[r] . x[at:] + bias[r] for the rows r of a block.

    Args:
        matrix: (rows, columns).
        bias: (rows,), or of size 0.
        x, out: vectors in the dtype of the arithmetic.
        accumulate: 1 adds to `out`, 0 overwrites it.
    """
    stride = rows_of_stream(rows)
    for i in range(block * block_rows, min((block + 1) * block_rows, stride)):
        if i + (STREAMS - 1) * stride < rows:
            a, b, c, d = _four_rows(x, at, matrix, i, stride, columns)
            _put(a, i, bias, out, out_at, accumulate)
            _put(b, i + stride, bias, out, out_at, accumulate)
            _put(c, i + 2 * stride, bias, out, out_at, accumulate)
            _put(d, i + 3 * stride, bias, out, out_at, accumulate)
        else:
            for r in range(i, rows, stride):
                _put(_row(x, at, matrix, r, columns), r, bias, out, out_at, accumulate)


@njit
def _put(value, row, bias, out, out_at, accumulate):
    if bias.size:
        value += element_as(out, bias, row)
    if accumulate:
        value += element(out, out_at + row)
    set_element(out, out_at + row, value)


# --- by the kind of matrix: numba compiles the function of the argument's type -------------------------------------


def matrix_at(like, scales, address, scale_address, rows, columns):
    """The matrix at an address, of the kind of elements that `like` has. `scales` has the dtype of scales."""
    raise NotImplementedError


def _row(x, at, matrix, row, columns):
    """x[at:] . matrix[row]"""
    raise NotImplementedError


def _four_rows(x, at, matrix, row, stride, columns) -> Any:
    """Products with four rows that are `stride` apart. Each is the one that `_row` computes, but for order."""
    raise NotImplementedError


@overload(matrix_at)
def _matrix_at(like, scales, address, scale_address, rows, columns):
    if like.dtype == types.int8:
        return lambda like, scales, address, scale_address, rows, columns: (
            array_at(like, address, rows * columns), array_at(scales, scale_address, rows),
        )  # fmt: skip
    if like.dtype == types.uint8:
        return lambda like, scales, address, scale_address, rows, columns: (
            array_at(like, address, rows * columns // 2), array_at(scales, scale_address, rows * columns // GROUP),
        )  # fmt: skip
    return lambda like, scales, address, scale_address, rows, columns: array_at(like, address, rows * columns)


@overload(_row)
def _row_of_kind(x, at, matrix, row, columns):
    if isinstance(matrix, types.Array):
        return lambda x, at, matrix, row, columns: dot(x, at, matrix, row * columns, columns)
    if matrix[0].dtype == types.int8:
        return lambda x, at, matrix, row, columns: (
            dot(x, at, matrix[0], row * columns, columns) * element_as(x, matrix[1], row)
        )
    return lambda x, at, matrix, row, columns: _four_rows_of_halves(x, at, matrix, row, 0, columns)[0]


@overload(_four_rows)
def _four_rows_of_kind(x, at, matrix, row, stride, columns):
    if isinstance(matrix, types.Array):
        return lambda x, at, matrix, row, stride, columns: _four_dots(
            x, at, matrix, row * columns, stride * columns, columns
        )
    if matrix[0].dtype == types.int8:

        def rows_of_integers(x, at, matrix, row, stride, columns):
            weight, scale = matrix
            a, b, c, d = _four_dots(x, at, weight, row * columns, stride * columns, columns)
            return (
                a * element_as(x, scale, row), b * element_as(x, scale, row + stride),
                c * element_as(x, scale, row + 2 * stride), d * element_as(x, scale, row + 3 * stride),
            )  # fmt: skip

        return rows_of_integers
    return lambda x, at, matrix, row, stride, columns: _four_rows_of_halves(x, at, matrix, row, stride, columns)


@njit
def _four_rows_of_halves(x, at, matrix, row, stride, columns):
    """Products with four rows of integers in [0, 15], less 8, in groups that have a scale. `x` is float32."""
    weight, scale = matrix
    n, groups = lane_count(x), columns // GROUP
    a, b, c, d = splat(x, 0.0), splat(x, 0.0), splat(x, 0.0), splat(x, 0.0)
    first, second, third, fourth = (
        row * groups, (row + stride) * groups, (row + 2 * stride) * groups, (row + 3 * stride) * groups,
    )  # fmt: skip
    for i in range(groups):
        v, w = load(x, at + i * GROUP), load(x, at + i * GROUP + n)
        # sum (q - 8) x = sum q x - 8 sum x, of which the second sum is that of all rows
        offset = (v + w) * -8.0
        a = fma(_group(x, weight, first + i, v, w, offset), splat(x, element_as(x, scale, first + i)), a)
        b = fma(_group(x, weight, second + i, v, w, offset), splat(x, element_as(x, scale, second + i)), b)
        c = fma(_group(x, weight, third + i, v, w, offset), splat(x, element_as(x, scale, third + i)), c)
        d = fma(_group(x, weight, fourth + i, v, w, offset), splat(x, element_as(x, scale, fourth + i)), d)
    return total(a), total(b), total(c), total(d)


@njit(forceinline=True)
def _group(x, weight, group, v, w, offset):
    """q_j v_j + q_(j + 16) w_j + offset_j for the 16 bytes j of a group."""
    at = group * HALF_GROUP
    return fma(load_lower_halves(x, weight, at), v, fma(load_upper_halves(x, weight, at), w, offset))


@njit
def _four_dots(x, at, weight, start, stride, count):
    """Products with four rows that are `stride` elements apart; each is the one that `dot` computes, but for order."""
    n = lane_count(x)
    a, b, c, d = splat(x, 0.0), splat(x, 0.0), splat(x, 0.0), splat(x, 0.0)
    e, f, g, h = splat(x, 0.0), splat(x, 0.0), splat(x, 0.0), splat(x, 0.0)
    second, third, fourth = start + stride, start + 2 * stride, start + 3 * stride
    unrolled, whole = count - count % (2 * n), count - count % n
    for i in range(0, unrolled, 2 * n):
        v, w = load(x, at + i), load(x, at + i + n)
        a = fma(load_as(x, weight, start + i), v, a)
        b = fma(load_as(x, weight, second + i), v, b)
        c = fma(load_as(x, weight, third + i), v, c)
        d = fma(load_as(x, weight, fourth + i), v, d)
        e = fma(load_as(x, weight, start + i + n), w, e)
        f = fma(load_as(x, weight, second + i + n), w, f)
        g = fma(load_as(x, weight, third + i + n), w, g)
        h = fma(load_as(x, weight, fourth + i + n), w, h)
    for i in range(unrolled, whole, n):
        v = load(x, at + i)
        a = fma(load_as(x, weight, start + i), v, a)
        b = fma(load_as(x, weight, second + i), v, b)
        c = fma(load_as(x, weight, third + i), v, c)
        d = fma(load_as(x, weight, fourth + i), v, d)
    p, q, r, s = total(a + e), total(b + f), total(c + g), total(d + h)
    for i in range(whole, count):
        v = element(x, at + i)
        p += element_as(x, weight, start + i) * v
        q += element_as(x, weight, second + i) * v
        r += element_as(x, weight, third + i) * v
        s += element_as(x, weight, fourth + i) * v
    return p, q, r, s


@njit
def dot(x, at, weight, start, count):
    """x[at : at + count] . weight[start : start + count], in a fixed order."""
    n = lane_count(x)
    a, b, c, d = splat(x, 0.0), splat(x, 0.0), splat(x, 0.0), splat(x, 0.0)
    unrolled, whole = count - count % (4 * n), count - count % n
    for i in range(0, unrolled, 4 * n):
        a = fma(load_as(x, weight, start + i), load(x, at + i), a)
        b = fma(load_as(x, weight, start + i + n), load(x, at + i + n), b)
        c = fma(load_as(x, weight, start + i + 2 * n), load(x, at + i + 2 * n), c)
        d = fma(load_as(x, weight, start + i + 3 * n), load(x, at + i + 3 * n), d)
    for i in range(unrolled, whole, n):
        a = fma(load_as(x, weight, start + i), load(x, at + i), a)
    result = total((a + b) + (c + d))
    for i in range(whole, count):
        result += element_as(x, weight, start + i) * element(x, at + i)
    return result
