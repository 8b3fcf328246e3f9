"""Products of a matrix and a vector, at the speed at which memory gives the matrix.

A matrix is an array of all of its elements; or a tuple of an array of integers, int8 or two a byte in uint8, and one of
their scales, as `modules.quantized.QuantizedMatrix` lays them out. Integers are multiplied by vectors rounded to int16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from .integers import (
    COUNT,
    LARGEST,
    PAIRED,
    add_half_of_halves,
    add_halves,
    add_multiple,
    add_products,
    as_floats,
    load_sums,
    no_sums,
    round_vector,
    store_sums,
    two_scales,
)
from .lanes import (
    BLOCK,
    BYTES,
    aligned_empty,
    borrow,
    element,
    element_as,
    fma,
    item_size,
    lane_count,
    load,
    load_as,
    prefetch_ahead,
    set_element,
    splat,
    total,
)
from .stages import array_at

HALF_GROUP = 16
GROUP = 2 * HALF_GROUP
"""Weights of a row that share a scale, where two are in a byte."""
OFFSET = 8
"""Subtracted from the integers of which two are in a byte."""
BLOCK_BYTES = 2**17
"""Bytes of a matrix in a block, some 10 microseconds: few enough that threads finish together."""
MIN_BLOCKS = 8
"""Blocks of a matrix that has the rows for them."""
STREAMS = 4
"""Places of a matrix that are read at once. One alone got 58 to 95 % of the bandwidth of a Xeon, four neighbouring rows
34 to 52 %, four far apart all of it."""


@njit
def block_rows_of(matrix, rows):
    """Rows of each stream in a block of a matrix."""
    fitting = BLOCK_BYTES * rows // (STREAMS * _bytes_of(matrix))
    return max(1, min(fitting, BLOCK, rows_of_stream(rows) // MIN_BLOCKS))


@njit
def count_blocks(rows, block_rows):
    """Blocks into which the rows of a matrix are divided: `block_rows` of each of STREAMS runs of rows."""
    return (rows_of_stream(rows) + block_rows - 1) // block_rows


@njit
def rows_of_stream(rows):
    """Rows of a stream, all but the last one's."""
    return (rows + STREAMS - 1) // STREAMS


@njit
def project(matrix, bias, block, block_rows, rows, vectors, b, columns, out, out_at, accumulate):
    """out[out_at + r] = matrix[r] . vector b + bias[r] for the rows r of a block.

    Args:
        matrix: (rows, columns).
        bias: (rows,), or of size 0.
        vectors: as `vectors_for` makes them.
        out: in the dtype of the arithmetic.
        accumulate: 1 adds to `out`, 0 overwrites it.
    """
    stride, has_bias = rows_of_stream(rows), bias.size > 0
    matrix, vectors, bias, out = borrow(matrix), borrow(vectors), borrow(bias), borrow(out)
    for i in range(block * block_rows, min((block + 1) * block_rows, stride)):
        if i + (STREAMS - 1) * stride < rows:
            p, q, r, s = _four_rows(vectors, b, matrix, i, stride, columns)
            _put(p, i, bias, has_bias, out, out_at, accumulate)
            _put(q, i + stride, bias, has_bias, out, out_at, accumulate)
            _put(r, i + 2 * stride, bias, has_bias, out, out_at, accumulate)
            _put(s, i + 3 * stride, bias, has_bias, out, out_at, accumulate)
        else:
            for row in range(i, rows, stride):
                _put(_row(vectors, b, matrix, row, columns), row, bias, has_bias, out, out_at, accumulate)


@njit
def _put(value, row, bias, has_bias, out, out_at, accumulate):
    if has_bias:
        value += element_as(out, bias, row)
    if accumulate:
        value += element(out, out_at + row)
    set_element(out, out_at + row, value)


# --- by the kind of matrix: numba compiles the function of the argument's type -------------------------------------


def matrix_at(like, scales, address, scale_address, rows, columns):
    """The matrix at an address, of the kind of elements that `like` has. `scales` has the dtype of scales."""
    raise NotImplementedError


def _bytes_of(matrix) -> Any:
    raise NotImplementedError


def vectors_for(matrix, x, batch, stride, columns) -> Any:
    """Vectors x[b * stride:] of `columns` elements, as products with a matrix take them."""
    raise NotImplementedError


def _row(vectors, b, matrix, row, columns):
    """Product of vector b with a row."""
    raise NotImplementedError


def _four_rows(vectors, b, matrix, row, stride, columns) -> Any:
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


@overload(_bytes_of)
def _bytes_of_kind(matrix):
    if isinstance(matrix, types.Array):
        return lambda matrix: matrix.size * matrix.itemsize
    return lambda matrix: matrix[0].size


@overload(vectors_for)
def _vectors_for(matrix, x, batch, stride, columns):
    if isinstance(matrix, types.Array):
        return lambda matrix, x, batch, stride, columns: (x, stride)
    if matrix[0].dtype == types.int8:
        return lambda matrix, x, batch, stride, columns: _rounded(x, batch, stride, columns, False)
    return lambda matrix, x, batch, stride, columns: _rounded(x, batch, stride, columns, True)


@njit
def _rounded(x, batch, stride, columns, has_halves):
    """Integers (batch, padded), what they are multiples of (batch,), and -8 times their sums, for halves."""
    padded = (columns + 2 * PAIRED - 1) // (2 * PAIRED) * (2 * PAIRED)
    integers = aligned_empty(np.empty(0, np.int16), batch * padded)
    factors, tile = np.empty(batch, x.dtype), aligned_empty(x, padded)
    offsets = aligned_empty(np.empty(0, np.int32), batch * padded // 4 if has_halves else 0)
    integers[:] = 0
    # No sum of products with int8 may exceed 32 bits.
    limit = min(LARGEST, 2**31 // (128 * 2 * (padded // PAIRED)) - 1)
    for b in range(batch):
        factors[b] = round_vector(x, b * stride, columns, limit, has_halves, tile, integers, b * padded)
    for i in range(0, offsets.size, COUNT):
        lower = add_multiple(no_sums(), -OFFSET, integers, 4 * i)
        store_sums(offsets, i, add_multiple(lower, -OFFSET, integers, 4 * i + PAIRED))
    return integers, factors, offsets, padded


@overload(_row)
def _row_of_kind(vectors, b, matrix, row, columns):
    if isinstance(matrix, types.CPointer):
        return lambda vectors, b, matrix, row, columns: dot(vectors[0], b * vectors[1], matrix, row * columns, columns)
    return lambda vectors, b, matrix, row, columns: _four_rows(vectors, b, matrix, row, 0, columns)[0]


@overload(_four_rows)
def _four_rows_of_kind(vectors, b, matrix, row, stride, columns):
    if isinstance(matrix, types.CPointer):
        return lambda vectors, b, matrix, row, stride, columns: four_dots(
            vectors[0], b * vectors[1], matrix, row * columns, stride * columns, columns
        )
    if matrix[0].dtype == types.int8:
        return lambda vectors, b, matrix, row, stride, columns: _four_rows_of_bytes(
            vectors, b, matrix, row, stride, columns
        )
    return lambda vectors, b, matrix, row, stride, columns: _four_rows_of_halves(
        vectors, b, matrix, row, stride, columns
    )


@njit
def _four_rows_of_bytes(vectors, b, matrix, row, stride, columns):
    """Products with four rows of int8, each of which has a scale."""
    x, factors, _, padded = vectors
    weight, scale = matrix
    at, whole, factor = b * padded, columns - columns % PAIRED, element(factors, b)
    first, second, third, fourth = (
        row * columns, (row + stride) * columns, (row + 2 * stride) * columns, (row + 3 * stride) * columns,
    )  # fmt: skip
    p, q, r, s = no_sums(), no_sums(), no_sums(), no_sums()
    for i in range(0, whole, PAIRED):
        prefetch_ahead(weight, first + i)
        prefetch_ahead(weight, second + i)
        prefetch_ahead(weight, third + i)
        prefetch_ahead(weight, fourth + i)
        p = add_products(p, weight, first + i, x, at + i)
        q = add_products(q, weight, second + i, x, at + i)
        r = add_products(r, weight, third + i, x, at + i)
        s = add_products(s, weight, fourth + i, x, at + i)
    a, c, d, e = total(as_floats(p)), total(as_floats(q)), total(as_floats(r)), total(as_floats(s))
    for i in range(whole, columns):
        v = element(x, at + i)
        a += element(weight, first + i) * v
        c += element(weight, second + i) * v
        d += element(weight, third + i) * v
        e += element(weight, fourth + i) * v
    return (
        a * factor * element_as(factors, scale, row), c * factor * element_as(factors, scale, row + stride),
        d * factor * element_as(factors, scale, row + 2 * stride),
        e * factor * element_as(factors, scale, row + 3 * stride),
    )  # fmt: skip


@njit
def _four_rows_of_halves(vectors, b, matrix, row, stride, columns):
    """Products with four rows of integers in [0, 15], less 8, in groups that have a scale."""
    x, factors, offsets, padded = vectors
    weight, scale = matrix
    groups, factor, zero = columns // GROUP, element(factors, b), splat(factors, 0.0)
    first, second, third, fourth = (
        row * groups, (row + stride) * groups, (row + 2 * stride) * groups, (row + 3 * stride) * groups,
    )  # fmt: skip
    p, q, r, s = zero, zero, zero, zero
    for i in range(0, groups - 1, 2):
        at = b * padded + i * GROUP
        # sum (q - 8) x = sum q x - 8 sum x, of which the second sum is that of all rows
        offset = load_sums(offsets, at // 4)
        p = _two_groups(p, offset, weight, scale, first + i, x, at)
        q = _two_groups(q, offset, weight, scale, second + i, x, at)
        r = _two_groups(r, offset, weight, scale, third + i, x, at)
        s = _two_groups(s, offset, weight, scale, fourth + i, x, at)
    if groups % 2:
        i, at = groups - 1, b * padded + (groups - 1) * GROUP
        offset = load_sums(offsets, at // 4)
        p = _last_group(p, offset, weight, scale, first + i, x, at)
        q = _last_group(q, offset, weight, scale, second + i, x, at)
        r = _last_group(r, offset, weight, scale, third + i, x, at)
        s = _last_group(s, offset, weight, scale, fourth + i, x, at)
    return total(p) * factor, total(q) * factor, total(r) * factor, total(s) * factor


@njit(forceinline=True)
def _two_groups(result, offset, weight, scale, group, x, at):
    """`result` and the products of a group and the next one, each times its scale, lane by lane."""
    prefetch_ahead(weight, group * HALF_GROUP)
    sums = add_halves(offset, weight, group * HALF_GROUP, x, at)
    return fma(as_floats(sums), two_scales(scale, group), result)


@njit(forceinline=True)
def _last_group(result, offset, weight, scale, group, x, at):
    """Add the products of a group that has no next one, as `_two_groups` those of two."""
    sums = add_half_of_halves(offset, weight, group * HALF_GROUP, x, at)
    return fma(as_floats(sums), element_as(result, scale, group), result)


@njit
def four_dots(x, at, weight, start, stride, count):
    """Products with four rows that are `stride` elements apart; each is the one that `dot` computes, but for order."""
    n = lane_count(x)
    a, b, c, d = splat(x, 0.0), splat(x, 0.0), splat(x, 0.0), splat(x, 0.0)
    e, f, g, h = splat(x, 0.0), splat(x, 0.0), splat(x, 0.0), splat(x, 0.0)
    second, third, fourth = start + stride, start + 2 * stride, start + 3 * stride
    unrolled, whole = count - count % (2 * n), count - count % n
    for i in range(0, unrolled, 2 * n):
        v, w = load(x, at + i), load(x, at + i + n)
        for j in range(i, i + 2 * n, BYTES // item_size(weight)):
            prefetch_ahead(weight, start + j)
            prefetch_ahead(weight, second + j)
            prefetch_ahead(weight, third + j)
            prefetch_ahead(weight, fourth + j)
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
