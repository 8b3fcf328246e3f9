"""Products of small matrices that stay in the cache, in blocks of registers."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba import njit
from numba.core import cgutils, types

from .lanes import Lanes, _vector, address_of, fma_value, intrinsic, lane_count, splat_value

ROWS = 8
"""Rows of a block. With two vectors a row its sums fill half of the registers of AVX-512."""


def _block(n_rows: int, n_vectors: int) -> Callable:
    """Make the function that adds a product to `n_rows` rows of `n_vectors` vectors, which stay in registers."""

    @intrinsic
    def add_block(typingctx, target, at, row, left, left_at, left_row, left_column, right, right_at, right_row, depth):
        lanes = Lanes(target.dtype)

        def codegen(context, builder, sig, args):
            _, at, row, _, left_at, left_row, left_column, _, right_at, right_row, depth = args

            def offset(start, *terms):
                for count, stride in terms:
                    start = builder.add(start, builder.mul(ir.Constant(start.type, count), stride))
                return start

            def address(index, position):
                kind = _vector(lanes) if index != 3 else context.get_data_type(lanes.dtype)
                return address_of(context, builder, sig.args[index], kind, args[index], position)

            width, align = ir.Constant(at.type, lanes.count), lanes.dtype.bitwidth // 8
            cells = [(r, v) for r in range(n_rows) for v in range(n_vectors)]
            # LLVM keeps the sums in registers over the loop.
            sums = {cell: cgutils.alloca_once(builder, _vector(lanes)) for cell in cells}
            for r, v in cells:
                builder.store(builder.load(address(0, offset(at, (r, row), (v, width))), align=align), sums[r, v])
            with cgutils.for_range(builder, depth) as loop:
                start = builder.add(right_at, builder.mul(loop.index, right_row))
                vectors = [builder.load(address(7, offset(start, (v, width))), align=align) for v in range(n_vectors)]
                start = builder.add(left_at, builder.mul(loop.index, left_column))
                for r in range(n_rows):
                    factor = splat_value(builder, lanes, builder.load(address(3, offset(start, (r, left_row)))))
                    for v in range(n_vectors):
                        total = fma_value(builder, lanes, factor, vectors[v], builder.load(sums[r, v]))
                        builder.store(total, sums[r, v])
            for r, v in cells:
                builder.store(builder.load(sums[r, v]), address(0, offset(at, (r, row), (v, width))), align=align)
            return context.get_dummy_value()

        n = types.intp
        return types.none(target, n, n, left, n, n, n, right, n, n, n), codegen

    return add_block


_block_8_2, _block_1_2, _block_8_1, _block_1_1 = (_block(r, v) for v in (2, 1) for r in (ROWS, 1))


@njit
def add_product(
    target, at, row, left, left_at, left_row, left_column, right, right_at, right_row, n_rows, depth, n_columns
):  # fmt: skip
    """target[i, j] += sum_k left[i, k] right[k, j].

    Matrices are tiles from an offset on, with a stride of rows; `left` also has one of columns. `n_columns` is a
    multiple of a vector's size.
    """
    n = lane_count(target)
    for j in range(0, n_columns - n_columns % (2 * n), 2 * n):
        n_blocked = n_rows - n_rows % ROWS
        for i in range(0, n_blocked, ROWS):
            _block_8_2(target, at + i * row + j, row, left, left_at + i * left_row, left_row, left_column,
                       right, right_at + j, right_row, depth)  # fmt: skip
        for i in range(n_blocked, n_rows):
            _block_1_2(target, at + i * row + j, row, left, left_at + i * left_row, left_row, left_column,
                       right, right_at + j, right_row, depth)  # fmt: skip
    if n_columns % (2 * n):
        j = n_columns - n
        n_blocked = n_rows - n_rows % ROWS
        for i in range(0, n_blocked, ROWS):
            _block_8_1(target, at + i * row + j, row, left, left_at + i * left_row, left_row, left_column,
                       right, right_at + j, right_row, depth)  # fmt: skip
        for i in range(n_blocked, n_rows):
            _block_1_1(target, at + i * row + j, row, left, left_at + i * left_row, left_row, left_column,
                       right, right_at + j, right_row, depth)  # fmt: skip
