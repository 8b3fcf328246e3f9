"""Matrix fragments of the tensor-core instructions: the elements that the registers of each lane hold.

Products are accumulated in float64 and rounded once; a device truncates its sums, in undocumented ways.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .parser import Unsupported
from .values import F2, F4, F8, U2, U4, U8, Array, from_bf16

LANE = np.arange(32)
GROUP, IN_GROUP = LANE // 4, LANE % 4
"""Lanes form 8 groups of 4: "Matrix Fragments for mma"."""


def shape_of(text: str) -> tuple[int, int, int]:
    """M, N, K of `m16n8k16`."""
    found = re.fullmatch(r"m(\d+)n(\d+)k(\d+)", text)
    if found is None:
        raise Unsupported(f"matrix shape {text}")
    m, n, k = map(int, found.groups())
    return m, n, k


def _stacked(registers: Sequence[Array], warps: int) -> Array:
    """Registers of all threads: (warps, 32, registers)."""
    rows = [np.broadcast_to(r, (32 * warps,)) for r in registers]
    return np.ascontiguousarray(np.stack(rows, 1)).reshape(warps, 32, len(registers))


def elements(registers: Sequence[Array], kind: str, warps: int) -> NDArray[np.float64]:
    """Values in registers: (warps, 32, registers, values per register)."""
    raw = _stacked(registers, warps)  # (warps, 32, registers)
    if kind in ("bf16", "f16"):
        halves = raw.view(U2).reshape(*raw.shape, 2)  # (warps, 32, registers, 2)
        return (from_bf16(halves) if kind == "bf16" else halves.view(F2)).astype(F8)
    if kind == "tf32":
        return (raw & np.uint32(0xFFFFE000)).view(F4).astype(F8)[..., None]
    return raw.view({"f32": F4, "f64": F8}[kind]).astype(F8)[..., None]


def left_fragment(registers: Sequence[Array], kind: str, m: int, k: int, warps: int) -> NDArray[np.float64]:
    """The A operand of mma, and of wgmma with 16 rows per warp: (warps, M, K)."""
    values = elements(registers, kind, warps)
    out = np.zeros((warps, m, k))  # (warps, M, K)
    width = values.shape[3]  # values per register, adjacent in a row
    for r in range(len(registers)):
        for i in range(width):
            out[:, GROUP + 8 * (r % 2), width * IN_GROUP + i + 4 * width * (r // 2)] = values[:, :, r, i]
    return out


def right_fragment(registers: Sequence[Array], kind: str, k: int, n: int, warps: int) -> NDArray[np.float64]:
    """The B operand of mma: (warps, K, N)."""
    values = elements(registers, kind, warps)
    out = np.zeros((warps, k, n))  # (warps, K, N)
    width = values.shape[3]
    for r in range(len(registers)):
        for i in range(width):
            out[:, width * IN_GROUP + i + 4 * width * r, GROUP] = values[:, :, r, i]
    return out


def accumulator_elements(r: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows and columns, by lane, of register r of 32- or 64-bit accumulators, in mma and wgmma."""
    tile, within = divmod(r, 4)
    return GROUP + 8 * (within // 2), 8 * tile + 2 * IN_GROUP + within % 2


def mma(
    shape: str, kinds: Sequence[str], a: Sequence[Array], b: Sequence[Array], c: Sequence[Array], warps: int
) -> list[Array]:
    """Multiply-accumulate one tile per warp ("Multiply-and-Accumulate Instruction: mma"); returns D's registers."""
    m, n, k = shape_of(shape)
    d_kind, a_kind, b_kind, c_kind = kinds
    if a_kind not in ("bf16", "f16", "tf32", "f64") or a_kind != b_kind or c_kind == "f16" or d_kind != c_kind:
        raise Unsupported(f"mma of {a_kind} and {b_kind} to {d_kind}")
    left = left_fragment(a, a_kind, m, k, warps)  # (warps, M, K)
    right = right_fragment(b, b_kind, k, n, warps)  # (warps, K, N)
    before = elements(c, c_kind, warps)[..., 0]  # (warps, 32, registers)
    product = left @ right  # (warps, M, N)
    kind, raw = (F8, U8) if d_kind == "f64" else (F4, U4)
    out = []
    for r in range(len(c)):
        rows, columns = accumulator_elements(r)
        value = (product[:, rows, columns] + before[:, :, r]).astype(kind)  # (warps, 32)
        out.append(np.ascontiguousarray(value).reshape(-1).view(raw))
    return out


@dataclass(frozen=True)
class SharedTile:
    """An operand in shared memory, as a matrix descriptor places it."""

    start: int
    """Offset in bytes."""
    leading: int
    """Bytes of the leading dimension's stride."""
    stride: int
    """Bytes of the stride dimension's."""
    swizzle: int
    """Logarithm of the swizzled 16-byte units of a row: 0 none, 1 of 32 bytes, 2 of 64, 3 of 128."""

    @classmethod
    def of_wgmma(cls, descriptor: int) -> SharedTile:
        """Decode the "Matrix Descriptor Format" of "Asynchronous Warpgroup Level Matrix Instructions"."""
        return cls(*_strides(descriptor), swizzle={0: 0, 1: 3, 2: 2, 3: 1}[descriptor >> 62 & 3])

    @classmethod
    def of_tcgen05(cls, descriptor: int) -> SharedTile:
        """Decode the "Shared memory descriptor" of the fifth generation of tensor cores.

        Raises:
            Unsupported: it has a base offset, an absolute leading dimension, or 32-byte atoms.
        """
        swizzle = {0: 0, 2: 3, 4: 2, 6: 1}.get(descriptor >> 61)
        if swizzle is None or descriptor >> 46 & 0x7FFF != 1:  # bits 46 to 60: version 1, and zeros
            raise Unsupported(f"shared memory descriptor {descriptor:#x}")
        return cls(*_strides(descriptor), swizzle)

    def offsets(self, rows: int, k: int, size: int, k_major: bool) -> NDArray[np.int64]:
        """Offsets in shared memory of the elements: (rows, K).

        "Asynchronous Warpgroup Level Matrix Shared Memory Layout", which tensor cores of the fifth generation share.

        Args:
            rows: M of A, or N of B.
            size: bytes of an element.
            k_major: whether the operand is contiguous along K.
        """
        width = 16 << self.swizzle  # bytes of a row of the swizzled atom
        row, column = np.meshgrid(np.arange(rows), np.arange(k), indexing="ij")  # (rows, K)
        # Core matrices are 8 rows of 16 bytes, or of the swizzle's width.
        if k_major:
            byte = column * size
            offset = row // 8 * self.stride + row % 8 * width + byte % width + byte // width * self.leading
        elif self.swizzle:
            byte = row * size
            offset = byte // width * self.leading + byte % width + column // 8 * self.stride + column % 8 * width
        else:
            byte = row * size
            offset = byte // 16 * self.stride + byte % 16 + column // 8 * self.leading + column % 8 * 16
        # The swizzle exchanges 16-byte units: bits 4 to 6 by bits 7 to 9.
        address = self.start + offset
        return address ^ ((address >> 7 & ((1 << self.swizzle) - 1)) << 4)


def _strides(descriptor: int) -> tuple[int, int, int]:
    """Start address, and strides of the leading and the stride dimension, in bytes."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    return start, leading, stride


def from_shared(raw: Array, kind: str) -> NDArray[np.float64]:
    """Values of elements read from shared memory."""
    if kind == "tf32":
        return (raw.view(U4) & np.uint32(0xFFFFE000)).view(F4).astype(F8)
    return (from_bf16(raw.view(U2)) if kind == "bf16" else raw.view(F2)).astype(F8)
