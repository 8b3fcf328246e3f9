"""Vectors of 64 bytes in numba: `Lanes`, 16 numbers of float32 or 8 of float64.

LLVM makes one AVX-512 register of them, two of AVX2 or four of NEON. Kernels that are written on them do not depend
on whether LLVM's loop vectorizer sees that arrays do not overlap. Offsets count elements from an array's first one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils, extending, types
from numba.core.datamodel import models
from numba.core.extending import lower_builtin, register_model
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

from .launch import BLOCK

BYTES = 64
AHEAD = 1024
"""Bytes between what is read and what is fetched into the cache meanwhile. On a Xeon four streams of int8 got 15.3 GB/s
of a core's 15.6 so, and 12.8 without; 512 and 2,048 were within 5 % of it."""
intrinsic: Callable[..., Any] = extending.intrinsic
"""The decorator; what it makes of a function takes no `typingctx`, which type checkers do not know."""
intrinsic_of_literals: Callable[..., Any] = extending.intrinsic(prefer_literal=True)
"""`intrinsic`, whose function gets the types of literals, which have their values."""


class Lanes(types.Type):
    """The numba type of a vector."""

    def __init__(self, dtype: types.Float):
        self.dtype = dtype
        self.count = BYTES * 8 // dtype.bitwidth
        super().__init__(name=f"Lanes({dtype})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _vector(fe_type))


def _element(lanes: Lanes) -> ir.Type:
    return ir.FloatType() if lanes.dtype == types.float32 else ir.DoubleType()


def _vector(lanes: Lanes) -> ir.VectorType:
    return ir.VectorType(_element(lanes), lanes.count)


def _integers(lanes: Lanes) -> ir.VectorType:
    return ir.VectorType(ir.IntType(lanes.dtype.bitwidth), lanes.count)


def constant(lanes: Lanes, value: float | int, *, integer: bool = False) -> ir.Constant:
    """The same number in all lanes."""
    kind = _integers(lanes) if integer else _vector(lanes)
    return ir.Constant(kind, [ir.Constant(kind.element, value)] * lanes.count)


def splat_value(builder: Any, lanes: Lanes, scalar: Any) -> Any:
    """A scalar of the element's type in all lanes."""
    undefined = ir.Constant(_vector(lanes), ir.Undefined)
    # LLVM recognises an insertion into lane 0 that is shuffled to all lanes as a broadcast.
    first = builder.insert_element(undefined, scalar, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes.count), None)
    return builder.shuffle_vector(first, undefined, zeros)


def _shuffle(builder: Any, a: Any, b: Any, indices: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(indices)), indices)
    return builder.shuffle_vector(a, b, mask)


def call(builder: Any, name: str, result: ir.Type, *args: Any) -> Any:
    """Call an LLVM intrinsic."""
    function = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), args)


def fma_value(builder: Any, lanes: Lanes, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once where the processor can."""
    return call(builder, f"llvm.fmuladd.v{lanes.count}f{lanes.dtype.bitwidth}", _vector(lanes), a, b, c)


def polynomial(builder: Any, lanes: Lanes, x: Any, coefficients: tuple[float, ...]) -> Any:
    """Evaluate a polynomial by Horner's rule; the constant term comes first."""
    result = constant(lanes, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        result = fma_value(builder, lanes, result, x, constant(lanes, c))
    return result


def look_up(builder: Any, lanes: Lanes, table: Sequence[int] | np.ndarray, x: Any) -> Any:
    """The integers that the lowest bits of x number, in a table of twice as many as there are lanes. For AVX-512."""
    kind, n = _integers(lanes), lanes.count
    halves = (ir.Constant(kind, [int(i) for i in half]) for half in (table[:n], table[n:]))
    letter = "d" if lanes.dtype == types.float32 else "q"
    first, last = halves
    return call(builder, f"llvm.x86.avx512.vpermi2var.{letter}.512", kind, first, as_integers(builder, lanes, x), last)


def as_integers(builder: Any, lanes: Lanes, x: Any) -> Any:
    """The bits of the numbers."""
    return builder.bitcast(x, _integers(lanes))


def as_floats(builder: Any, lanes: Lanes, bits: Any) -> Any:
    """The numbers of the bits."""
    return builder.bitcast(bits, _vector(lanes))


# --- operators: between vectors, and between a vector and a number -------------------------------------------------


class _Arithmetic(AbstractTemplate):
    def generic(self, args, kws):
        lanes = next((a for a in args if isinstance(a, Lanes)), None)
        if lanes is None or len(args) != 2:
            return None
        # A number takes the vector's dtype: float64 literals do not widen float32.
        if all(a == lanes or isinstance(a, (types.Float, types.Integer)) for a in args):
            return signature(lanes, *(a if a == lanes else lanes.dtype for a in args))
        return None


def _define(op, instruction: str) -> None:
    # Typing and lowering are registered apart: numba looks for a signature first, then for code of that signature.
    infer_global(op)(type(f"_{instruction}", (_Arithmetic,), {}))  # pyright: ignore[reportOptionalCall]

    def lower(context, builder, sig, args):
        lanes = sig.return_type
        pairs = zip(args, sig.args, strict=True)
        a, b = (x if kind == lanes else splat_value(builder, lanes, x) for x, kind in pairs)
        return getattr(builder, instruction)(a, b)

    for kinds in ((Lanes, Lanes), (Lanes, types.Float), (types.Float, Lanes)):
        lower_builtin(op, *kinds)(lower)


for _op, _instruction in (
    (operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv"),
):  # fmt: skip
    _define(_op, _instruction)


# --- memory ---------------------------------------------------------------------------------------------------------


def address_of(context, builder, array_type, kind, array, offset):
    """Pointer to something of an LLVM type at an offset of an array, or of what `borrow` makes of one."""
    is_array = isinstance(array_type, types.Array)
    data = cgutils.create_struct_proxy(array_type)(context, builder, value=array).data if is_array else array
    return builder.bitcast(builder.gep(data, [offset]), kind.as_pointer())


@intrinsic
def borrow_from(typingctx, array, offset):
    """The elements of an array from an offset on, without a reference to it: see `borrow`."""

    def codegen(context, builder, sig, args):
        return address_of(context, builder, sig.args[0], context.get_data_type(array.dtype), *args)

    return types.CPointer(array.dtype)(array, types.intp), codegen


@intrinsic_of_literals
def parts(typingctx, array, size, count):
    """The first `count` parts of `size` elements of an array, without references to it: see `borrow`."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    part = types.CPointer(array.dtype)

    def codegen(context, builder, sig, args):
        kind = context.get_data_type(array.dtype)
        offsets = [builder.mul(args[1], args[1].type(k)) for k in range(count.literal_value)]
        pointers = [address_of(context, builder, sig.args[0], kind, args[0], offset) for offset in offsets]
        return context.make_tuple(builder, sig.return_type, pointers)

    return types.UniTuple(part, count.literal_value)(array, types.intp, count), codegen


@intrinsic
def keep(typingctx, array):
    """Keep an array alive until here."""
    return types.none(array), lambda context, builder, sig, args: context.get_dummy_value()


def borrow(x) -> Any:
    """The elements of an array, or of those in a tuple, without references, for functions that are called often.

    numba counts references at each call, by atomic additions, which wait for all loads before them. The array must be
    alive for as long: an argument of the caller is, another one by `keep`.
    """
    raise NotImplementedError


@extending.overload(borrow)
def _borrow(x):
    if isinstance(x, types.Array):
        return lambda x: borrow_from(x, 0)
    if isinstance(x, types.BaseTuple) and len(x) == 2:
        return lambda x: (borrow(x[0]), borrow(x[1]))
    if isinstance(x, types.BaseTuple) and len(x) == 4:
        return lambda x: (borrow(x[0]), borrow(x[1]), borrow(x[2]), borrow(x[3]))
    return lambda x: x


@intrinsic
def load(typingctx, array, offset):
    """Consecutive elements from an offset on."""
    lanes = Lanes(array.dtype)

    def codegen(context, builder, sig, args):
        # Aligned to an element only: an offset may be any, and processors load a vector from any address.
        pointer = address_of(context, builder, sig.args[0], _vector(lanes), *args)
        return builder.load(pointer, align=lanes.dtype.bitwidth // 8)

    return lanes(array, types.intp), codegen


@intrinsic
def load_as(typingctx, like, array, offset):
    """Consecutive elements in the dtype of `like`; uint16 holds bfloat16, int16 float16, int8 integers."""
    lanes = Lanes(like.dtype)

    def codegen(context, builder, sig, args):
        kind = ir.VectorType(_storage(array.dtype), lanes.count)
        pointer = address_of(context, builder, sig.args[1], kind, *args[1:])
        raw = builder.load(pointer, align=array.dtype.bitwidth // 8)
        return _widen(builder, array.dtype, lanes.dtype, raw, lanes.count)

    return lanes(like, array, types.intp), codegen


def _prefetch(builder: Any, line: Any) -> None:
    numbers = [ir.IntType(32)(n) for n in (0, 3, 1)]  # to be read, into all caches, of data
    call(builder, "llvm.prefetch.p0", ir.VoidType(), line, *numbers)


@intrinsic
def prefetch_ahead(typingctx, array, offset):
    """Have the cache line fetched that is `AHEAD` bytes after an element, which may be beyond the array."""

    def codegen(context, builder, sig, args):
        element = address_of(context, builder, sig.args[0], ir.IntType(8), *args)
        _prefetch(builder, builder.gep(element, [ir.IntType(64)(AHEAD)]))
        return context.get_dummy_value()

    return types.none(array, types.intp), codegen


@intrinsic
def address_at(typingctx, array, offset):
    """The address of an element."""

    def codegen(context, builder, sig, args):
        element = address_of(context, builder, sig.args[0], ir.IntType(8), *args)
        return builder.ptrtoint(element, ir.IntType(64))

    return types.int64(array, types.intp), codegen


@intrinsic
def prefetch_line(typingctx, address):
    """Have the cache line of an address fetched."""

    def codegen(context, builder, sig, args):
        _prefetch(builder, builder.inttoptr(args[0], ir.IntType(8).as_pointer()))
        return context.get_dummy_value()

    return types.none(types.int64), codegen


@intrinsic
def store_as(typingctx, array, offset, value):
    """Write consecutive elements, rounded to the dtype of the array as `load_as` reads it."""

    def codegen(context, builder, sig, args):
        raw = _narrow(builder, value.dtype, array.dtype, args[2], value.count)
        pointer = address_of(context, builder, sig.args[0], raw.type, *args[:2])
        builder.store(raw, pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(array, types.intp, value), codegen


@intrinsic
def element_as(typingctx, like, array, offset):
    """One element, as `load_as`."""

    def codegen(context, builder, sig, args):
        raw = builder.load(address_of(context, builder, sig.args[1], _storage(array.dtype), *args[1:]))
        return _widen(builder, array.dtype, like.dtype, raw, 1)

    return like.dtype(like, array, types.intp), codegen


@intrinsic
def set_element_as(typingctx, array, offset, value):
    """Write one element, as `store_as`."""

    def codegen(context, builder, sig, args):
        raw = _narrow(builder, value, array.dtype, args[2], 1)
        builder.store(raw, address_of(context, builder, sig.args[0], raw.type, *args[:2]))
        return context.get_dummy_value()

    return types.none(array, types.intp, value), codegen


def _storage(dtype: Any) -> ir.Type:
    """The LLVM type of an array's elements."""
    kinds = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
    return kinds.get(dtype) or ir.IntType(dtype.bitwidth)


def _shaped(kind: ir.Type, count: int) -> ir.Type:
    return kind if count == 1 else ir.VectorType(kind, count)


def _all(kind: ir.Type, count: int, value: int) -> ir.Constant:
    return ir.Constant(_shaped(kind, count), value if count == 1 else [ir.Constant(kind, value)] * count)


def _widen(builder: Any, stored: types.Type, wanted: types.Float, raw: Any, count: int) -> Any:
    """Elements as an array holds them in the dtype of the arithmetic."""
    single = _shaped(ir.FloatType(), count)
    if stored == types.int8:
        raw, stored = builder.sitofp(builder.sext(raw, _shaped(ir.IntType(32), count)), single), types.float32
    if stored == types.uint16:  # bfloat16: the upper half of a float32
        bits = builder.shl(builder.zext(raw, _shaped(ir.IntType(32), count)), _all(ir.IntType(32), count, 16))
        raw = builder.bitcast(bits, single)
    if stored == types.int16:  # float16
        raw = builder.fpext(builder.bitcast(raw, _shaped(ir.HalfType(), count)), single)
    if wanted == types.float64 and stored != wanted:
        return builder.fpext(raw, _shaped(ir.DoubleType(), count))
    if wanted == types.float32 and stored == types.float64:
        return builder.fptrunc(raw, single)
    return raw


def _narrow(builder: Any, given: types.Float, stored: types.Type, value: Any, count: int) -> Any:
    """Numbers of the dtype of the arithmetic as an array holds them, rounded to the nearest."""
    if given == stored:
        return value
    if stored == types.float64:
        return builder.fpext(value, _shaped(ir.DoubleType(), count))
    if given == types.float64:
        value = builder.fptrunc(value, _shaped(ir.FloatType(), count))
    if stored == types.float32:
        return value
    if stored == types.int16:
        half = builder.fptrunc(value, _shaped(ir.HalfType(), count))
        return builder.bitcast(half, _shaped(ir.IntType(16), count))
    integer = ir.IntType(32)
    bits = builder.bitcast(value, _shaped(integer, count))
    # To the nearest, and to an even last bit between two: half a unit less the parity is added.
    parity = builder.and_(builder.lshr(bits, _all(integer, count, 16)), _all(integer, count, 1))
    rounded = builder.add(bits, builder.add(parity, _all(integer, count, 0x7FFF)))
    rounded = builder.select(builder.fcmp_unordered("uno", value, value), _all(integer, count, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(rounded, _all(integer, count, 16)), _shaped(ir.IntType(16), count))


@intrinsic
def store(typingctx, array, offset, value):
    """Write consecutive elements from an offset on."""

    def codegen(context, builder, sig, args):
        pointer = address_of(context, builder, sig.args[0], args[2].type, *args[:2])
        builder.store(args[2], pointer, align=value.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(array, types.intp, value), codegen


@intrinsic
def element(typingctx, array, offset):
    """One element, whatever the array's dimensions."""

    def codegen(context, builder, sig, args):
        return builder.load(address_of(context, builder, sig.args[0], context.get_data_type(array.dtype), *args))

    return array.dtype(array, types.intp), codegen


@intrinsic
def set_element(typingctx, array, offset, value):
    """Write one element."""

    def codegen(context, builder, sig, args):
        builder.store(args[2], address_of(context, builder, sig.args[0], args[2].type, *args[:2]))
        return context.get_dummy_value()

    return types.none(array, types.intp, array.dtype), codegen


@intrinsic
def splat(typingctx, array, value):
    """A number in all lanes of a vector of the array's dtype."""
    lanes = Lanes(array.dtype)

    def codegen(context, builder, sig, args):
        return splat_value(builder, lanes, args[1])

    return lanes(array, array.dtype), codegen


# --- arithmetic -----------------------------------------------------------------------------------------------------


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c; numbers among them are taken for all lanes."""
    lanes = next(x for x in (a, b, c) if isinstance(x, Lanes))

    def codegen(context, builder, sig, args):
        pairs = zip(args, sig.args, strict=True)
        vectors = (x if kind == lanes else splat_value(builder, lanes, x) for x, kind in pairs)
        return fma_value(builder, lanes, *vectors)

    return lanes(*(x if x == lanes else lanes.dtype for x in (a, b, c))), codegen


@intrinsic
def total(typingctx, x):
    """The sum of the lanes, by halves."""
    lanes = x

    def codegen(context, builder, sig, args):
        value, n = args[0], lanes.count
        while n > 1:
            n //= 2
            # A fixed order of additions: LLVM's reduction is sequential, or with `reassoc` in any order.
            halves = (_shuffle(builder, value, value, [*part]) for part in (range(n), range(n, 2 * n)))
            value = builder.fadd(*halves)
        return builder.extract_element(value, ir.IntType(32)(0))

    return lanes.dtype(lanes), codegen


@intrinsic
def add_totals(typingctx, target, at, source, offset):
    """Add the sums of the lanes of consecutive vectors, as many as a vector has lanes, to consecutive elements.

    Two vectors become one, in which each has half of the lanes, until one is left: the additions are those of one sum
    by halves for every lane of the result, and no lane is idle.
    """
    lanes = Lanes(target.dtype)

    def codegen(context, builder, sig, args):
        kind, n, align = _vector(lanes), lanes.count, lanes.dtype.bitwidth // 8

        def vector(i):
            place = builder.add(args[3], ir.Constant(args[3].type, i * n))
            return builder.load(address_of(context, builder, sig.args[2], kind, args[2], place), align=align)

        def sums(first, count):
            """Sum parts of `count` vectors: lane i has its share of the sum of vector `first` + i % `count`."""
            if count == 1:
                return vector(first)
            half = count // 2
            x, y = sums(first, half), sums(first + half, half)
            kept = _shuffle(builder, x, y, [i + n * bool(i & half) for i in range(n)])
            moved = _shuffle(builder, x, y, [(i ^ half) + n * bool(i & half) for i in range(n)])
            return builder.fadd(kept, moved)

        pointer = address_of(context, builder, sig.args[0], kind, *args[:2])
        total = sums(0, n)
        builder.store(builder.fadd(builder.load(pointer, align=align), total), pointer, align=align)
        return context.get_dummy_value()

    return types.none(target, types.intp, source, types.intp), codegen


@intrinsic
def larger_sizes(typingctx, x, y):
    """The larger of |x| and y in each lane; y where x is NaN."""

    def codegen(context, builder, sig, args):
        size = call(builder, f"llvm.fabs.v{x.count}f{x.dtype.bitwidth}", args[0].type, args[0])
        return builder.select(builder.fcmp_ordered(">", size, args[1]), size, args[1])

    return x(x, x), codegen


@intrinsic
def largest(typingctx, x):
    """The largest lane, of lanes that are no NaN."""
    lanes = x

    def codegen(context, builder, sig, args):
        value, n = args[0], lanes.count
        while n > 1:
            n //= 2
            low, high = (_shuffle(builder, value, value, [*part]) for part in (range(n), range(n, 2 * n)))
            value = builder.select(builder.fcmp_ordered(">", low, high), low, high)
        return builder.extract_element(value, ir.IntType(32)(0))

    return lanes.dtype(lanes), codegen


@intrinsic
def lane_count(typingctx, array):
    """Elements in a vector of the array's dtype."""

    def codegen(context, builder, sig, args):
        return context.get_constant(types.intp, BYTES * 8 // array.dtype.bitwidth)

    return types.intp(array), codegen


@intrinsic
def item_size(typingctx, array):
    """Bytes of an element."""

    def codegen(context, builder, sig, args):
        return context.get_constant(types.intp, array.dtype.bitwidth // 8)

    return types.intp(array), codegen


# --- tiles ----------------------------------------------------------------------------------------------------------
# Not inlined: they would be optimized again in every kernel, which is most of the time that one takes to compile.


@njit
def aligned_empty(like, size):
    """Memory for tiles that starts at a multiple of a vector's size."""
    # One vector more than asked for, so that an aligned start is among its elements.
    memory = np.empty(size + lane_count(like), like.dtype)
    start = -(memory.ctypes.data // memory.itemsize) % lane_count(like)
    return memory[start : start + size]


@njit
def clear(tile, at, size):
    """Set a part of a tile, of complete vectors, to zero."""
    for i in range(at, at + size, lane_count(tile)):
        store(tile, i, splat(tile, 0.0))


@njit
def locate_tile(tile, dim, groups):
    """Return the sequence of a tile of `groups` groups of `dim` channels, its group, first channel, and channels."""
    # Tiles in the order sequence, group, block of channels: (S, G, blocks).
    blocks = (dim + BLOCK - 1) // BLOCK
    sequence, block = tile // (groups * blocks), tile % (groups * blocks)
    group, channel = block // blocks, block % blocks * BLOCK
    return sequence, group, channel, min(BLOCK, dim - channel)


@njit
def set_positions(positions, first, count, direction, height, length):
    """Set the positions of steps `first` to `first + count - 1` along a scan direction of a row-major grid.

    `direction` is a code of `cross_scan.directions`, `length` the area of the grid; in time, 0 and any height.
    """
    for r in range(count):
        step = first + r if direction < 2 else length - 1 - first - r
        if direction % 2:  # column by column
            step = step % height * (length // height) + step // height
        positions[r] = step


@njit
def read_steps(source, i, positions, count, group, channel, width, tile, row):
    """Copy source[i, positions[:count], group, channel : channel + width] to the rows of a tile (count, row).

    Zeros fill the last vector of a row.
    """
    size, lanes = source.itemsize, lane_count(tile)
    step_stride, stride = source.strides[1] // size, source.strides[3] // size
    offset = i * (source.strides[0] // size) + group * (source.strides[2] // size) + channel * stride
    if step_stride == 1 and stride != 1:  # neighbours in memory are neighbours in time
        for r in range(count):
            store(tile, r * row + (width - 1) // lanes * lanes, splat(tile, 0.0))
        for k in range(width):
            for r in range(count):
                set_element(tile, r * row + k, element(source, offset + k * stride + positions[r]))
    elif stride == 1 and width == lanes:
        for r in range(count):
            store(tile, r * row, load(source, offset + positions[r] * step_stride))
    else:
        for r in range(count):
            read_row(source, offset + positions[r] * step_stride, stride, width, tile, r * row)


@njit
def write_steps(tile, row, target, i, positions, count, group, channel, width):
    """Copy the rows of a tile (count, row) to target[i, positions[:count], group, channel : channel + width]."""
    size, lanes = target.itemsize, lane_count(tile)
    step_stride, stride = target.strides[1] // size, target.strides[3] // size
    offset = i * (target.strides[0] // size) + group * (target.strides[2] // size) + channel * stride
    if step_stride == 1 and stride != 1:  # as in `read_steps`
        for k in range(width):
            for r in range(count):
                set_element(target, offset + k * stride + positions[r], element(tile, r * row + k))
    elif stride == 1 and width == lanes:
        for r in range(count):
            store(target, offset + positions[r] * step_stride, load(tile, r * row))
    else:
        for r in range(count):
            write_row(tile, r * row, target, offset + positions[r] * step_stride, stride, width)


@njit
def list_lines(source, i, positions, first, end, group, channel, lines, count):
    """Add the addresses to a list from which `read_steps` will read steps `first` to `end` - 1, or `write_steps` write.

    `lines` holds `count` addresses, and those of `channel` from there on.

    Returns:
        the number of addresses.
    """
    size = source.itemsize
    step_stride, stride = source.strides[1] // size, source.strides[3] // size
    if source.size == 0 or stride != 1:
        return count
    offset = i * (source.strides[0] // size) + group * (source.strides[2] // size) + channel
    for r in range(first, end):
        set_element(lines, count + r - first, address_at(source, offset + positions[r] * step_stride))
    return count + end - first


@njit(forceinline=True)
def prefetch_share(lines, count, shift, part, n_parts):
    """Have one of `n_parts` shares of the listed lines fetched, each `shift` bytes after its address.

    Steps are far apart in memory, so that no processor foresees them: without this a kernel waits for each block. A
    core fetches some 16 to 24 lines at once, and waits where it is asked for more.
    """
    for k in range(count * part // n_parts, count * (part + 1) // n_parts):
        prefetch_line(element(lines, k) + shift)


@njit
def read_rows(source, i, first, count, channel, width, tile):
    """Copy source[i, first : first + count, channel : channel + width] to the rows of a tile (count, BLOCK).

    Zeros fill the last vector of a row.
    """
    size = source.itemsize
    row_stride, stride = source.strides[1] // size, source.strides[2] // size
    offset = i * (source.strides[0] // size) + first * row_stride + channel * stride
    for r in range(count):
        read_row(source, offset + r * row_stride, stride, width, tile, r * BLOCK)


@njit
def write_rows(tile, target, i, first, count, channel, width):
    """Copy the rows of a tile (count, BLOCK) to target[i, first : first + count, channel : channel + width]."""
    size = target.itemsize
    row_stride, stride = target.strides[1] // size, target.strides[2] // size
    offset = i * (target.strides[0] // size) + first * row_stride + channel * stride
    for r in range(count):
        write_row(tile, r * BLOCK, target, offset + r * row_stride, stride, width)


@njit(forceinline=True)
def read_row(source, offset, stride, width, tile, at):
    """Copy `width` elements to a tile, in its dtype; zeros fill its last vector."""
    n = lane_count(tile)
    n_vectors = width // n if stride == 1 else 0
    for v in range(n_vectors):
        store(tile, at + v * n, load_as(tile, source, offset + v * n))
    if n_vectors * n < width:
        # Kernels compute complete vectors, and some sum their lanes: nothing may remain of the tile before.
        store(tile, at + (width - 1) // n * n, splat(tile, 0.0))
    for k in range(n_vectors * n, width):
        set_element(tile, at + k, element_as(tile, source, offset + k * stride))


@njit(forceinline=True)
def write_row(tile, at, target, offset, stride, width):
    """Copy `width` elements of a tile, rounded to the dtype of the target."""
    n = lane_count(tile)
    n_vectors = width // n if stride == 1 else 0
    for v in range(n_vectors):
        store_as(target, offset + v * n, load(tile, at + v * n))
    for k in range(n_vectors * n, width):
        set_element_as(target, offset + k * stride, element(tile, at + k))


@njit(forceinline=True)
def read_lanes(source, i, row, column, scratch):
    """source[i, row, column:], as many as a vector holds; zeros where there are fewer."""
    offset, stride = place_of(source, i, row, column)
    return read_vector(source, offset, stride, source.shape[2] - column, scratch)


@njit(forceinline=True)
def write_lanes(value, target, i, row, column, scratch):
    """Write a vector to target[i, row, column:]."""
    offset, stride = place_of(target, i, row, column)
    write_vector(value, target, offset, stride, target.shape[2] - column, scratch)


@njit(forceinline=True)
def place_of(array, i, row, column):
    """The offset of array[i, row, column], and the stride of columns."""
    size = array.itemsize
    stride = array.strides[2] // size
    return i * (array.strides[0] // size) + row * (array.strides[1] // size) + column * stride, stride


@njit(forceinline=True)
def read_vector(source, offset, stride, count, scratch):
    """A vector in the dtype of `scratch`, which holds one; zeros beyond `count` elements."""
    if stride == 1 and count >= lane_count(scratch):
        return load_as(scratch, source, offset)
    store(scratch, 0, splat(scratch, 0.0))
    for k in range(min(lane_count(scratch), count)):
        set_element(scratch, k, element_as(scratch, source, offset + k * stride))
    return load(scratch, 0)


@njit(forceinline=True)
def write_vector(value, target, offset, stride, count, scratch):
    """Write the first `count` elements of a vector, rounded to the dtype of the target; `scratch` holds one."""
    if stride == 1 and count >= lane_count(scratch):
        store_as(target, offset, value)
        return
    store(scratch, 0, value)
    for k in range(min(lane_count(scratch), count)):
        set_element_as(target, offset + k * stride, element(scratch, k))
