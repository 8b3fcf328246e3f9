"""Which barriers, waits and fences of a kernel order anything, told from a run of the kernel as it was compiled.

An instruction that orders nothing may be removed and nothing can tell. So the mutation tests of the emulator count only
those that are needed, by the rules in `Recorder`. These know neither vector clocks nor in-flight flags: they compare
the accesses between two instructions of a kind, which is simpler than what the emulator does and apart from it.
"""

from __future__ import annotations

import numpy as np

from tests.benchmarks.tensor_ordering import NOBODY, TensorRecorder, mark
from vlmamba.benchmarks.ptx import machine


class Recorder(machine.Block):
    """A block that notes the lines of the instructions that its accesses need.

    - A barrier: two warps access a cell of shared memory, one before it and one after it, each no further away than
      the next barrier, and one of them writes.
    - A wait for copies: a cell that it waits for is accessed before another wait covers it.
    - A wait for products: one of their accumulators is read, or one of their operands in shared memory is written,
      before another wait covers them.
    - A fence: a product reads what was written before it and after the fence before, and no fence follows in between.
    - `wgmma.fence` always: products need it after each wait.
    - Tensor memory, and waits at mbarriers: `TensorRecorder`.

    An asynchronous product counts for barriers when it is issued: its end is a matter of waits.
    """

    needed: set[int]
    """Lines of the PTX; set by the test, for all programs of a kernel together."""

    def __init__(self, memory, shared, findings):
        super().__init__(memory, shared, findings)
        order_read, order_write = shared.order_read, shared.order_write

        def read(cells, warps, at):
            self._access(cells, warps, at, is_write=False)
            order_read(cells, warps, at)

        def write(cells, warps, at):
            self._access(cells, warps, at, is_write=True)
            order_write(cells, warps, at)

        shared.order_read, shared.order_write = read, write
        self.tensor = TensorRecorder(self) if self.clocks.has_engines else None

    def start(self) -> None:
        super().start()
        self.products = _Products()
        cells = len(self.shared.writer)
        # Of each cell the warp that wrote and read it, before and after the last barrier.
        self.before, self.after = np.full((2, cells), NOBODY), np.full((2, cells), NOBODY)
        self.last_barrier = 0
        # Of each cell the line of the instruction that settled it, until another one would have.
        self.copy_wait, self.product_wait, self.fenced_by = np.zeros((3, cells), np.int64)
        self.n_copies = self.n_groups = 0
        self.waited: dict[str, list[tuple[int, np.ndarray]]] = {"copies": [], "products": []}
        self.results: dict[int, tuple[int, int, np.ndarray]] = {}  # group, line and array of settled accumulators
        if self.tensor:
            self.tensor.start()

    def _access(self, cells, warps, at, is_write: bool) -> None:
        is_product = bool((warps >= self.warps).any())
        cells, warps = cells.ravel(), np.repeat(warps % self.warps, cells.shape[1])
        written, read = self.before[:, cells]
        others = (written != NOBODY) & (written != warps)
        if is_write:
            others |= (read != NOBODY) & (read != warps)
        if others.any() and self.last_barrier:
            self.needed.add(self.last_barrier)
        if is_product:
            self.tensor.shared.touch(cells)
        else:
            self._mark(cells, warps, is_write)
        lines = {*self.copy_wait[cells].tolist()}
        if is_write:
            lines |= {*self.product_wait[cells].tolist()}
            if self.tensor:
                lines |= {*self.tensor.shared.settled_by[cells].tolist()}
        elif at.opcode.startswith(("wgmma.mma", "tcgen05.mma")):
            lines |= {*self.fenced_by[cells].tolist()}
        self.needed |= lines - {0}

    def _mark(self, cells, warps, is_write: bool) -> None:
        for warp in np.unique(warps):
            mark(self.after[0 if is_write else 1], cells[warps == warp], warp)

    def barrier(self, number, count, active, at) -> None:
        super().barrier(number, count, active, at)
        if not self.is_blocked.any():
            self.before, self.after = self.after, np.full_like(self.after, NOBODY)
            self.last_barrier = at.line
            if self.tensor:
                self.tensor.pass_barrier()

    def fence_proxy(self, active, at) -> None:
        waiting = self.shared.unfenced.copy()
        super().fence_proxy(active, at)
        self.fenced_by[:] = np.where(waiting & ~self.shared.unfenced, at.line, 0)

    def commit_copies(self) -> None:
        super().commit_copies()
        self.n_copies += 1

    def commit_wgmma(self) -> None:
        super().commit_wgmma()
        self.n_groups += 1

    def initialize_mbarrier(self, address, count, active, at) -> None:
        super().initialize_mbarrier(address, count, active, at)
        for _, place in self._places(address, active):
            self.tensor.commits[place] = []

    def commit_products(self, address, active, at) -> None:
        super().commit_products(address, active, at)
        for _, place in self._places(address, active):
            self.tensor.commits[place].append(self.tensor.n_products)

    def wait_at_mbarrier(self, address, parity, active, at) -> np.ndarray:
        done = super().wait_at_mbarrier(address, parity, active, at)
        for thread, place in self._places(address, active):
            if done[thread]:
                self.tensor.wait_at(place, self.mbarriers.objects[place].phase, at.line)
        return done

    def wait_for_tensor_memory(self, engine, active, at) -> None:
        super().wait_for_tensor_memory(engine, active, at)
        for warp in self.chosen_warps(active, at):
            self.tensor.wait_for(engine, warp, at.line)

    def _cover(self, kind: str, marks, done: int) -> None:
        """Forget the groups that a wait for the first `done` covers again."""
        for group, cells in self.waited[kind]:
            if group < done:
                marks[cells] = 0
        self.waited[kind] = [entry for entry in self.waited[kind] if entry[0] >= done]

    def wait_for_copies(self, pending, at) -> None:
        done = self.n_copies - pending
        self._cover("copies", self.copy_wait, done)
        first = self.n_copies - len(self.copies)
        groups = self.copies[: max(0, len(self.copies) - pending)]
        super().wait_for_copies(pending, at)
        for i, group in enumerate(groups):
            for offsets, data, warps, copy in group:
                cells = self.shared.cells(offsets, data.shape[1], copy)
                self._mark(np.ravel(cells), np.repeat(warps, cells.shape[1]), is_write=True)
                self.copy_wait[cells] = at.line
                self.waited["copies"].append((first + i, np.ravel(cells)))

    def wait_for_wgmma(self, pending, at) -> None:
        done = self.n_groups - pending
        self._cover("products", self.product_wait, done)
        self.results = {k: entry for k, entry in self.results.items() if entry[0] >= done}
        first = self.n_groups - len(self.product_groups)
        groups = self.product_groups[: max(0, len(self.product_groups) - pending)]
        super().wait_for_wgmma(pending, at)
        for i, group in enumerate(groups):
            for numbers, read in group:
                for cells in read:
                    self.product_wait[cells] = at.line
                    self.waited["products"].append((first + i, cells))
                for number in numbers:
                    result = self.finished[number]
                    self.results[id(_root(result))] = first + i, at.line, result

    def check_settled(self, register, at) -> None:
        super().check_settled(register, at)
        found = self.results.get(id(_root(register)))
        if found is not None:
            self.needed.add(found[1])


class _Products(dict):
    """Products in flight. Always true, so that `check_settled` is called where there are none too."""

    def __bool__(self) -> bool:
        return True


def _root(array: np.ndarray) -> np.ndarray:
    """The array that owns the memory of a view."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
