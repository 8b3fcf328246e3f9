"""Tensor cores of the fifth generation ("TensorCore 5th Generation Family Instructions").

An asynchronous instruction is executed at once, by an engine of its warp: nothing orders the engine's accesses before
later ones but an mbarrier at which `tcgen05.commit` arrives (products), `tcgen05.wait::ld` and `tcgen05.wait::st`. So
what is not waited for shows as a race. Products of a warp follow each other, as long as none reads as its operand A
what another one writes ("Pipelined tcgen05 Instructions"). Registers that a load writes may be read at once ("Register
dependencies, same thread"): its wait is for those who write to the memory that it reads.

`tcgen05.fence` has no effect here. The ISA asks for it where other synchronization orders `tcgen05` instructions of
different threads; Triton up to 3.9 leaves it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .clocks import LOAD, MMA, STORE
from .matrix import SharedTile, from_shared
from .memory import Fault, Findings, SharedMemory, gather
from .parser import Instruction, Unsupported
from .tensor_memory import CELL_LANES, LANES, TensorMemory, fragment
from .values import F4, U2, U4, Array

WARP_LANES = 32
"""Lanes that a warp may load and store: the quarter of its number in the warpgroup ("Access restrictions")."""


@dataclass(frozen=True)
class Product:
    """Shape and types of `tcgen05.mma` ("Instruction descriptor")."""

    m: int
    n: int
    kind: str
    """Type of A and B: bf16, f16 or tf32."""
    signs: tuple[int, int]
    """Factors of A and B, 1 or -1."""
    k_major: tuple[bool, bool]
    """Whether A and B in shared memory are contiguous along K."""

    @property
    def size(self) -> int:
        """Bytes of an element of A and B."""
        return 4 if self.kind == "tf32" else 2

    @property
    def k(self) -> int:
        """Elements along K, which take 32 bytes."""
        return 32 // self.size

    @classmethod
    def decode(cls, descriptor: int, kind: str) -> Product:
        """Decode a descriptor for `kind::f16` or `kind::tf32`.

        Raises:
            Unsupported: A and B are of different types, sparse, or the accumulators are not float32.
            Fault: the shape is not one of the "Matrix Shape"s.
        """
        types = {"kind::f16": {0: "f16", 1: "bf16"}, "kind::tf32": {2: "tf32"}}[kind]
        a, b = (types.get(descriptor >> shift & 7) for shift in (7, 10))
        others = descriptor & 0xE080004F  # sparsity, saturation, reserved bits, shift
        if a is None or a != b or others or descriptor >> 4 & 3 != 1:
            raise Unsupported(f"instruction descriptor {descriptor:#x} of {kind}")
        n, m = (descriptor >> 17 & 0x3F) << 3, (descriptor >> 24 & 0x1F) << 4
        if m not in (64, 128) or not 0 < n <= 256 or n % (8 if m == 64 else 16):
            raise Fault(f"tcgen05.mma of M {m} and N {n}")
        negate_a, negate_b, transpose_a, transpose_b = (bool(descriptor >> bit & 1) for bit in (13, 14, 15, 16))
        return cls(m, n, a, (1 - 2 * negate_a, 1 - 2 * negate_b), (not transpose_a, not transpose_b))

    def lanes(self, address: int, at: Instruction) -> NDArray[np.intp]:
        """Lanes of the rows of D, and of A in tensor memory ("Data Path Layout Organization", layouts D and F)."""
        row, first = np.arange(self.m), address >> 16
        if first not in ((0,) if self.m == 128 else (0, CELL_LANES)):
            raise Fault(f"{at}: a matrix of {self.m} rows from lane {first}")
        return first + (row if self.m == 128 else row // 16 * WARP_LANES + row % 16)


class TensorCore:
    """Execution of `tcgen05` instructions for a block."""

    def __init__(self, shared: SharedMemory, findings: Findings):
        self.shared, self.clocks, self.findings = shared, shared.clocks, findings
        self.memory = TensorMemory(shared.clocks, findings, shared.checks)

    # ---- allocation: by one warp -------------------------------------------------------------------------------

    def allocate(self, to: Array, columns: int, warps: Sequence[int], at: Instruction) -> None:
        """Allocate tensor memory, and store its address in shared memory ("tcgen05.alloc")."""
        for warp in warps:
            address = np.array([self.memory.allocate(columns, at)], U4)
            offset = np.array([to[32 * warp]], np.int64)
            self.shared.write(offset, address.view(np.uint8)[None], np.array([warp]), at)

    def free(self, address: Array, columns: int, warps: Sequence[int], at: Instruction) -> None:
        """Free tensor memory ("tcgen05.dealloc")."""
        for warp in warps:
            self.memory.free(int(address[32 * warp]), columns, warp, at)

    # ---- loads and stores: by each warp, of its own lanes ------------------------------------------------------

    def load(
        self, shape: tuple[str, str], address: Array, half_offset: int, warps: Sequence[int], at: Instruction
    ) -> list[Array]:
        """Load a fragment of each warp into registers ("tcgen05.ld"); other warps get 0.

        Args:
            shape: shape and repetition, `("32x32b", "x16")`.
            address: addresses of the fragments.
            half_offset: columns between the halves of `16x32bx2`.
        """
        lanes, columns = fragment(*shape, half_offset)
        out = np.zeros((32 * self.clocks.warps, lanes.shape[1]), U4)  # (threads, registers)
        for warp in warps:
            lane, column = self._place(int(address[32 * warp]), lanes, warp, at)
            engine = self.clocks.issue(warp, LOAD)
            out[32 * warp : 32 * warp + 32] = self.memory.read(lane + lanes, column + columns, engine, at)
        return list(np.ascontiguousarray(out.T))

    def store(
        self,
        shape: tuple[str, str],
        address: Array,
        half_offset: int,
        registers: Sequence[Array],
        warps: Sequence[int],
        at: Instruction,
    ) -> None:
        """Store registers of each warp to a fragment ("tcgen05.st"); arguments as of `load`."""
        lanes, columns = fragment(*shape, half_offset)
        threads = 32 * self.clocks.warps
        words = np.stack([np.broadcast_to(r, (threads,)) for r in registers], 1)  # (threads, registers)
        for warp in warps:
            lane, column = self._place(int(address[32 * warp]), lanes, warp, at)
            engine = self.clocks.issue(warp, STORE)
            of_warp = words[32 * warp : 32 * warp + 32]  # (32, registers)
            self.memory.write(lane + lanes, column + columns, of_warp, engine, at)

    def _place(self, address: int, lanes: Array, warp: int, at: Instruction) -> tuple[int, int]:
        """The first lane and column of a fragment.

        Raises:
            Fault: its lanes are not those of the warp.
        """
        lane, column = address >> 16, address & 0xFFFF
        quarter = WARP_LANES * (warp % (LANES // WARP_LANES))
        if lane % CELL_LANES or not quarter <= lane <= lane + int(lanes.max()) < quarter + WARP_LANES:
            raise Fault(f"{at}: warp {warp} accesses tensor memory from lane {lane}; its lanes start at {quarter}")
        return lane, column

    # ---- products: by one thread -------------------------------------------------------------------------------

    def multiply(
        self,
        kind: str,
        d: Array,
        a_in_tensor_memory: bool,
        a: Array,
        b: Array,
        descriptor: Array,
        adds: Array,
        threads: Sequence[int],
        at: Instruction,
    ) -> None:
        """Multiply A and B into tensor memory ("tcgen05.mma"), for each thread that issues it.

        Args:
            kind: `kind::f16`.
            d: addresses of the accumulators.
            a: addresses of A in tensor memory, or descriptors of A in shared memory.
            b: descriptors of B in shared memory.
            descriptor: instruction descriptors.
            adds: whether the product is added to the accumulators.
        """
        for thread in threads:
            product = Product.decode(int(descriptor[thread]), kind)
            engine = self.clocks.issue(thread // 32, MMA)
            if a_in_tensor_memory:
                left = self._from_tensor_memory(product, int(a[thread]), engine, at)  # (M, K)
            else:
                left = self._from_shared(product, 0, int(a[thread]), engine, at)  # (M, K)
            right = self._from_shared(product, 1, int(b[thread]), engine, at)  # (N, K)
            result = product.signs[0] * left @ (product.signs[1] * right).T  # (M, N)
            address = int(d[thread])
            lanes, columns = product.lanes(address, at)[:, None], (address & 0xFFFF) + np.arange(product.n)[None]
            if adds[thread]:
                result += self.memory.read(lanes, columns, engine, at).view(F4)
            self.memory.write(lanes, columns, result.astype(F4).view(U4), engine, at)

    def _from_shared(
        self, product: Product, operand: int, descriptor: int, engine: int, at: Instruction
    ) -> NDArray[np.float64]:
        """A (operand 0) or B (1) in shared memory: (rows, K)."""
        rows = (product.m, product.n)[operand]
        tile = SharedTile.of_tcgen05(descriptor)
        offsets = tile.offsets(rows, product.k, product.size, product.k_major[operand])
        cells = self.shared.cells(offsets.ravel(), product.size, at)  # (rows * K, cells)
        self.shared.note_descriptor_read(cells, [engine], "tcgen05.mma", at)
        raw = gather(self.shared.bytes, offsets.ravel(), product.size)  # (rows * K, size)
        return from_shared(np.ascontiguousarray(raw), product.kind).reshape(rows, product.k)

    def _from_tensor_memory(self, product: Product, address: int, engine: int, at: Instruction) -> NDArray[np.float64]:
        """A in tensor memory, 32 bits of a row in a column: (M, K)."""
        lanes = product.lanes(address, at)[:, None]
        columns = (address & 0xFFFF) + np.arange(product.k * product.size // 4)[None]
        if self.memory.is_unfinished(lanes, columns, engine, at):
            self.findings.add_at("tcgen05.mma reads as A what another one in flight writes", at)
        words = self.memory.read(lanes, columns, engine, at)  # (M, columns)
        raw = np.ascontiguousarray(words).view(U4 if product.kind == "tf32" else U2)
        return from_shared(raw, product.kind).reshape(product.m, product.k)
