"""Products of a matrix and a vector, at the speed at which memory gives the matrix."""

from __future__ import annotations

from numba import njit

from .lanes import element, element_as, fma, lane_count, load, load_as, set_element, splat, total

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
def project(weight, bias, block, block_rows, rows, x, at, columns, out, out_at, accumulate):
    """out[out_at + r] = weight[r] . x[at:] + bias[r] for the rows r of a block.

    Args:
        weight: (rows, columns), of any dtype that `load_as` reads.
        bias: (rows,), or of size 0.
        x, out: vectors in the dtype of the arithmetic.
        accumulate: 1 adds to `out`, 0 overwrites it.
    """
    stride = rows_of_stream(rows)
    for i in range(block * block_rows, min((block + 1) * block_rows, stride)):
        if i + (STREAMS - 1) * stride < rows:
            a, b, c, d = _four_dots(x, at, weight, i * columns, stride * columns, columns)
            _put(a, i, bias, out, out_at, accumulate)
            _put(b, i + stride, bias, out, out_at, accumulate)
            _put(c, i + 2 * stride, bias, out, out_at, accumulate)
            _put(d, i + 3 * stride, bias, out, out_at, accumulate)
        else:
            for r in range(i, rows, stride):
                _put(dot(x, at, weight, r * columns, columns), r, bias, out, out_at, accumulate)


@njit
def _put(value, row, bias, out, out_at, accumulate):
    if bias.size:
        value += element_as(out, bias, row)
    if accumulate:
        value += element(out, out_at + row)
    set_element(out, out_at + row, value)


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
