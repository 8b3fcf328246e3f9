"""Which barriers and waits order accesses to tensor memory, and products of it: the part of `ordering` for `tcgen05`.

It knows no clocks: each cell remembers the line of the wait that settled its last load, store or product, and an access
that would not be allowed before that needs the wait.
"""

from __future__ import annotations

import numpy as np

from vlmamba.benchmarks.ptx.clocks import LOAD, MMA, STORE

NOBODY, SEVERAL = -1, -2


def mark(row: np.ndarray, cells: np.ndarray, warp: int) -> None:
    """Note an access of a warp in a row with one entry per cell: a warp, NOBODY or SEVERAL."""
    row[cells] = np.where((row[cells] == NOBODY) | (row[cells] == warp), warp, SEVERAL)


class Products:
    """The last product that accesses each cell in one way, and the wait that settled it."""

    def __init__(self, recorder: TensorRecorder, cells: int):
        self.recorder = recorder
        self.product = np.zeros(cells, np.int64)  # number of the product, 0 none
        self.is_settled = np.zeros(cells, bool)
        self.settled_by = np.zeros(cells, np.int64)  # line of the wait, 0 where another one covers the product too

    def touch(self, cells: np.ndarray) -> None:
        self.product[cells], self.is_settled[cells], self.settled_by[cells] = self.recorder.n_products, False, 0

    def wait(self, covered: int, line: int) -> None:
        """Settle the products up to a number."""
        reached = (self.product > 0) & (self.product <= covered)
        self.settled_by[reached] = np.where(self.is_settled[reached], 0, line)
        self.is_settled[reached] = True


class Transfers:
    """Loads, or stores, of each cell, and the waits that settled them."""

    def __init__(self, warps: int, cells: int):
        self.issued: list[list[np.ndarray]] = [[] for _ in range(warps)]  # since the last wait of each warp
        self.settled: list[list[np.ndarray]] = [[] for _ in range(warps)]  # by that wait
        self.settled_by = np.zeros((warps, cells), np.int64)  # line of the wait
        self.fading = np.zeros((warps, cells), np.int64)
        """Lines of waits that a later one covers too, though other warps know that from the next barrier on only."""

    def wait(self, warp: int, line: int) -> None:
        for cells in self.settled[warp]:
            self.fading[warp, cells], self.settled_by[warp, cells] = self.settled_by[warp, cells], 0
        self.settled[warp], self.issued[warp] = self.issued[warp], []
        for cells in self.settled[warp]:
            self.settled_by[warp, cells] = line

    def needed(self, cells: np.ndarray, warp: int) -> set[int]:
        """Lines of the waits that an access of a warp to cells needs."""
        others = np.arange(len(self.fading)) != warp
        return {*np.unique(self.settled_by[:, cells]).tolist(), *np.unique(self.fading[others][:, cells]).tolist()}


class TensorRecorder:
    """Notes in `block.needed`, of accesses to tensor memory:

    - A barrier: two warps access a cell, one before and one after it, each no further away than the next barrier, and
      one of them writes.
    - `tcgen05.wait::ld`: a loaded cell is written, `tcgen05.wait::st`: a stored one is accessed, before another wait of
      the warp covers it.
    - A wait at an mbarrier: of a product that it settles, an accumulator is accessed, or an operand is written, in
      tensor or in shared memory, before another wait covers it.
    """

    def __init__(self, block):
        self.block = block
        memory = block.tensor_core.memory
        read, write, free = memory.read, memory.write, memory.free

        def noted_read(lanes, columns, actor, at):
            self._access(lanes, columns, actor, is_write=False)
            return read(lanes, columns, actor, at)

        def noted_write(lanes, columns, words, actor, at):
            self._access(lanes, columns, actor, is_write=True)
            write(lanes, columns, words, actor, at)

        def noted_free(address, columns, warp, at):
            lanes, of_allocation = np.ogrid[:128, address : address + columns]
            self._access(lanes, of_allocation, warp, is_write=True)
            free(address, columns, warp, at)

        memory.read, memory.write, memory.free = noted_read, noted_write, noted_free
        multiply = block.tensor_core.multiply

        def noted_multiply(*arguments):
            self.n_products += 1
            multiply(*arguments)

        block.tensor_core.multiply = noted_multiply

    def start(self) -> None:
        cells, warps = 8 * 512, self.block.warps
        self.n_products = 0
        self.commits: dict[int, list[int]] = {}  # by mbarrier, the number of products before each commit
        self.seen: set[tuple[int, int, int]] = set()
        self.shared = Products(self, len(self.block.shared.writer))
        self.operands, self.accumulators = Products(self, cells), Products(self, cells)
        self.loads, self.stores = Transfers(warps, cells), Transfers(warps, cells)
        self.before, self.after = np.full((2, cells), NOBODY), np.full((2, cells), NOBODY)

    def pass_barrier(self) -> None:
        self.before, self.after = self.after, np.full_like(self.after, NOBODY)
        self.loads.fading[:] = self.stores.fading[:] = 0

    def wait_at(self, mbarrier: int, phase: int, line: int) -> None:
        """Note a wait for the last phase of an mbarrier that completed; other warps wait for it too."""
        commits = self.commits[mbarrier]
        if phase and (mbarrier, id(commits), phase) not in self.seen:
            self.seen.add((mbarrier, id(commits), phase))
            for products in (self.shared, self.operands, self.accumulators):
                products.wait(commits[phase - 1], line)

    def wait_for(self, engine: int, warp: int, line: int) -> None:
        (self.loads if engine == LOAD else self.stores).wait(warp, line)

    def _access(self, lanes, columns, actor: int, is_write: bool) -> None:
        engine, warp = divmod(actor, self.block.warps)
        cells = np.unique(lanes // 16 * 512 + columns)
        written, read = self.before[:, cells]
        others = (written != NOBODY) & (written != warp)
        if is_write:
            others |= (read != NOBODY) & (read != warp)
        lines = {self.block.last_barrier} if others.any() else set()
        if engine != STORE or not is_write:
            lines |= self.stores.needed(cells, warp)
        if is_write:
            lines |= self.loads.needed(cells, warp)
        if engine == MMA:  # after the products before, in order
            (self.accumulators if is_write else self.operands).touch(cells)
        else:
            lines |= {*self.accumulators.settled_by[cells].tolist()}
            if is_write:
                lines |= {*self.operands.settled_by[cells].tolist()}
            mark(self.after[0 if is_write else 1], cells, warp)
        if engine in (LOAD, STORE):
            (self.loads if engine == LOAD else self.stores).issued[warp].append(cells)
        self.block.needed |= lines - {0}
