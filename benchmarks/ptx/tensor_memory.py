"""Tensor memory of a block: 128 lanes of 512 columns of 32 bits, allocated by columns ("Tensor Memory").

Races are detected as in shared memory, by vector clocks, in cells of 16 lanes and one column: all instructions access
whole cells. What is read too early is NaN.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .clocks import LOAD, MMA, STORE, Clocks
from .matrix import GROUP, IN_GROUP, LANE, accumulator_elements
from .memory import Fault, Findings
from .parser import Instruction, Unsupported
from .values import U4, Array

LANES, COLUMNS = 128, 512
CELL_LANES = 16
UNSETTLED = np.uint32(0xFFFFFFFF)
"""Bits of what is read too early: NaN in every floating-point type."""
OF_THE_WARP = {
    LOAD: "tensor memory is {how} before the tcgen05.wait::ld of a load from it",
    STORE: "tensor memory is {how} before the tcgen05.wait::st of a store to it",
}
OF_ANOTHER_WARP = {
    LOAD: "tensor memory is loaded by one warp and {how} by another, with no wait or no barrier between",
    STORE: "tensor memory is stored by one warp and {how} by another, with no wait or no barrier between",
}
"""Findings, by the engine whose access is not ordered before one of the same warp, or of another."""


class TensorMemory:
    """Words of tensor memory, their allocation, and the checks of accesses."""

    def __init__(self, clocks: Clocks, findings: Findings, checks: bool):
        self.clocks, self.findings, self.checks = clocks, findings, checks
        cells = LANES // CELL_LANES * COLUMNS
        self.words = np.zeros((LANES, COLUMNS), U4)
        self.writer, self.write_clock = np.zeros(cells, np.intp), np.zeros(cells, np.int64)  # (cells,)
        self.read_clock = np.zeros((len(clocks.known), cells), np.int64)  # (actors, cells)
        self.is_written = np.zeros(cells, bool)
        self.allocations: dict[int, int] = {}  # columns by first column
        self.may_allocate = True

    def start_program(self) -> None:
        self.words[:] = UNSETTLED
        self.is_written[:] = False
        self.allocations.clear()
        self.may_allocate = True

    def finish_program(self) -> None:
        """Check that a program has freed what it allocated.

        Raises:
            Fault: it has not; on a device, programs that follow may wait for ever.
        """
        if self.allocations:
            first, columns = next(iter(self.allocations.items()))
            raise Fault(f"the program ends with {columns} columns of tensor memory allocated, from column {first}")

    # ---- allocation --------------------------------------------------------------------------------------------

    def allocate(self, columns: int, at: Instruction) -> int:
        """Allocate columns, the highest that are free; return the address ("tcgen05.alloc").

        Raises:
            Fault: the number is not a power of 2 from 32 to 512, none are left, or the right was relinquished.
        """
        if columns not in (32, 64, 128, 256, 512):
            raise Fault(f"{at}: {columns} columns of tensor memory")
        if not self.may_allocate:
            raise Fault(f"{at}: after tcgen05.relinquish_alloc_permit")
        for first in range(COLUMNS - columns, -1, -32):
            if all(first >= a + n or first + columns <= a for a, n in self.allocations.items()):
                self.allocations[first] = columns
                return first
        raise Fault(f"{at}: {columns} columns of tensor memory are not free; the block waits for ever")

    def free(self, address: int, columns: int, warp: int, at: Instruction) -> None:
        """Free an allocation ("tcgen05.dealloc").

        Raises:
            Fault: no such one was made.
        """
        if self.allocations.get(address) != columns:
            raise Fault(f"{at}: no allocation of {columns} columns is at {address:#x}")
        lanes, of_allocation = np.ogrid[:LANES, address : address + columns]
        cells = self._cells(lanes, of_allocation, at)
        self._check_order(cells, warp, "freed", at)
        self.is_written[cells] = False
        del self.allocations[address]

    def relinquish(self) -> None:
        """Give up the right to allocate ("tcgen05.relinquish_alloc_permit")."""
        self.may_allocate = False

    # ---- accesses ----------------------------------------------------------------------------------------------

    def read(self, lanes: Array, columns: Array, actor: int, at: Instruction) -> NDArray[np.uint32]:
        """Words at lanes and columns that broadcast to one shape; NaN where a write of them is not ordered before.

        Raises:
            Fault: a column is not allocated.
        """
        cells = self._cells(lanes, columns, at)
        words = self.words[lanes, columns]
        if self.checks:
            if not self.is_written[cells].all():
                self.findings.add_at("tensor memory is read that was never written", at)
            races = self._check_writes(cells, actor, "read", at)
            words = np.where(races, UNSETTLED, words)
            self.read_clock[actor, cells] = self.clocks.epoch(np.array(actor))
        return words

    def write(self, lanes: Array, columns: Array, words: Array, actor: int, at: Instruction) -> None:
        """Store words at lanes and columns that broadcast to their shape.

        Raises:
            Fault: a column is not allocated.
        """
        cells = self._cells(lanes, columns, at)
        self._check_order(cells, actor, "written", at)
        self.words[lanes, columns] = words
        self.is_written[cells] = True
        self.writer[cells], self.write_clock[cells] = actor, self.clocks.epoch(np.array(actor))

    def is_unfinished(self, lanes: Array, columns: Array, engine: int, at: Instruction) -> bool:
        """Whether an engine itself writes one of these words, and its warp has not waited for that."""
        cells = self._cells(lanes, columns, at)
        is_in_flight = self.write_clock[cells] > self.clocks.known[engine % self.clocks.warps, engine]
        return bool(((self.writer[cells] == engine) & is_in_flight).any())

    def _cells(self, lanes: Array, columns: Array, at: Instruction) -> NDArray[np.intp]:
        """Indices of the cells of words, in their shape."""
        first, last = int(columns.min()), int(columns.max())
        if not any(a <= first and last < a + n for a, n in self.allocations.items()):
            raise Fault(f"{at}: columns {first} to {last} of tensor memory, which are not one allocation's")
        return lanes // CELL_LANES * COLUMNS + columns

    def _check_order(self, cells: Array, actor: int, how: str, at: Instruction) -> None:
        """Check that all accesses of cells are ordered before one that replaces what they hold."""
        if not self.checks:
            return
        self._check_writes(cells, actor, how, at)
        races = (self.read_clock[:, cells.ravel()] > self.clocks.known[actor][:, None]).any(1)  # (actors,)
        races[actor] = False
        self._add_findings(np.flatnonzero(races), "reads", actor, how, at)

    def _check_writes(self, cells: Array, actor: int, how: str, at: Instruction) -> NDArray[np.bool_]:
        """Cells whose last write is not ordered before an access of an actor."""
        writer = self.writer[cells]
        races = (writer != actor) & (self.write_clock[cells] > self.clocks.known[actor, writer])
        self._add_findings(writer[races], "writes", actor, how, at)
        return races

    def _add_findings(self, earlier: Array, access: str, actor: int, how: str, at: Instruction) -> None:
        """Report accesses of earlier actors that are not ordered before one of `actor`."""
        found = set()
        for other in np.unique(earlier).tolist():
            engine, is_same_warp = self.clocks.engine(other), (other - actor) % self.clocks.warps == 0
            if engine == MMA:
                found.add(f"tensor memory is {how} while a tcgen05.mma that {access} it is in flight")
            else:
                found.add((OF_THE_WARP if is_same_warp else OF_ANOTHER_WARP)[engine].format(how=how))
        for what in found:
            self.findings.add_at(what, at)


def fragment(shape: str, repeat: str, half_offset: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Lanes and columns, from an address, that the registers of a warp hold ("Data Movement Shape").

    Args:
        shape: `32x32b`.
        repeat: `x16`.
        half_offset: columns between the halves of `16x32bx2`.

    Returns:
        Two arrays (32 threads, registers).
    """
    found = re.fullmatch(r"x(\d+)", repeat)
    if found is None or shape not in SHAPES:
        raise Unsupported(f"shape {shape}.{repeat}")
    lanes, columns = SHAPES[shape](int(found[1]), half_offset)
    shape_of_both = np.broadcast_shapes(lanes.shape, columns.shape)
    return np.broadcast_to(lanes, shape_of_both), np.broadcast_to(columns, shape_of_both)


def _rows_of_threads(repeats: int, half_offset: int) -> tuple[Array, Array]:
    """A lane per thread, a column per register."""
    return LANE[:, None], np.arange(repeats)[None]


def _two_halves(repeats: int, half_offset: int) -> tuple[Array, Array]:
    """16 lanes twice: the second half of the threads has columns further on."""
    return LANE[:, None] % 16, LANE[:, None] // 16 * half_offset + np.arange(repeats)


def _four_columns(repeats: int, half_offset: int) -> tuple[Array, Array]:
    """Groups of 4 threads hold 4 columns of a lane, and of the lane 8 below in the next register."""
    r = np.arange(2 * repeats)
    return GROUP[:, None] + 8 * (r % 2), IN_GROUP[:, None] + 4 * (r // 2)


def _eight_columns(repeats: int, half_offset: int) -> tuple[Array, Array]:
    """The accumulators of mma and wgmma: 2 of 8 columns, then the lane 8 below."""
    lanes, columns = zip(*map(accumulator_elements, range(4 * repeats)), strict=True)
    return np.stack(lanes, 1), np.stack(columns, 1)


SHAPES: dict[str, Callable[[int, int], tuple[Array, Array]]] = {
    "32x32b": _rows_of_threads, "16x32bx2": _two_halves, "16x128b": _four_columns, "16x256b": _eight_columns,
}  # fmt: skip
"""Lanes and columns of each register by thread, by the instruction's shape."""
