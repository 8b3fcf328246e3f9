"""One launch on a CPU: the threads of a block in step, registers as NumPy arrays over them.

Where the threads of a block branch apart (`Divergence`), the launch is run again with a program counter for each
thread: those that are furthest behind go first, and a barrier holds its threads until all have come.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import matrix
from .memory import Allocation, Fault, Findings, GlobalMemory, SharedMemory, gather
from .parser import Instruction, Kernel
from .values import F4, TYPES, U4, Array

Mask = NDArray[np.bool_] | None
"""Threads that execute an instruction; None is all."""
END = np.iinfo(np.int64).max
"""Program counter of a thread that has returned."""
POISON = np.uint32(0xFFC00000)
"""Bits of a NaN: with a number in the low 22, an accumulator of a wgmma that nobody has waited for."""


class Divergence(Exception):
    """The threads of a block take different ways at a branch."""


class Block:
    """Threads of one program, as the translated code drives them."""

    def __init__(self, warps: int, memory: GlobalMemory, shared: SharedMemory, findings: Findings):
        self.warps, self.threads = warps, 32 * warps
        self.memory, self.shared, self.findings = memory, shared, findings
        self.warp = np.repeat(np.arange(warps), 32)
        self.every = np.ones(self.threads, bool)

    def start(self) -> None:
        """Begin a program."""
        self.shared.start_program()
        self.counters = np.zeros(self.threads, np.int64)
        self.is_blocked = np.zeros(self.threads, bool)
        self.at_barrier: dict[int, NDArray[np.bool_]] = {}
        self.copies: list[list[tuple[Array, NDArray[np.uint8], Array, Instruction]]] = []
        self.open_copies: list[tuple[Array, NDArray[np.uint8], Array, Instruction]] = []
        self.products: dict[int, Array] = {}  # accumulators of wgmma that nobody has waited for
        self.finished: dict[int, Array] = {}
        self.product_groups: list[list[tuple[list[int], list[Array]]]] = []
        self.open_products: list[tuple[list[int], list[Array]]] = []
        self.n_products, self.is_wgmma_fenced = 0, False

    # ---- control flow ------------------------------------------------------------------------------------------

    def branches(self, predicate: Array, at: Instruction) -> bool:
        """Whether all threads take a branch.

        Raises:
            Divergence: some do.
        """
        predicate = np.broadcast_to(predicate, (self.threads,))
        if predicate.all():
            return True
        if predicate.any():
            raise Divergence(str(at))
        return False

    def schedule(self) -> tuple[int, NDArray[np.bool_]] | None:
        """The basic block to run next, and its threads; None when all have returned.

        Raises:
            Fault: all that are left wait at barriers.
        """
        ready = ~self.is_blocked & (self.counters != END)
        if not ready.any():
            if self.is_blocked.any():
                raise Fault(f"threads wait at barriers {sorted(self.at_barrier)} to which the others never come")
            return None
        place = int(self.counters[ready].min())
        return place, ready & (self.counters == place)

    def barrier(self, number: int, count: int | None, active: Mask, at: Instruction) -> None:
        """Wait for the threads that take part ("bar, barrier"): `count`, or all that have not returned."""
        active = self.every if active is None else active
        arrived = self.at_barrier.pop(number, np.zeros(self.threads, bool)) | active
        wanted = int((self.counters != END).sum()) if count is None else count
        if arrived.sum() > wanted:
            raise Fault(f"{at}: {arrived.sum()} threads at a barrier for {wanted}")
        if arrived.sum() < wanted:
            if active.all():
                raise Fault(f"{at}: the block has {self.threads} threads, fewer than the {wanted} that are waited for")
            self.at_barrier[number] = arrived
            self.is_blocked |= active
            return
        self.is_blocked &= ~arrived
        self.shared.synchronize(np.unique(self.warp[arrived]))

    def fence_proxy(self, active: Mask) -> None:
        self.shared.fence(np.unique(self.warp[np.broadcast_to(True if active is None else active, (self.threads,))]))

    # ---- memory ------------------------------------------------------------------------------------------------

    def _chosen(self, addresses: Array, active: Mask) -> tuple[NDArray[np.intp], Array]:
        addresses = np.broadcast_to(addresses, (self.threads,))
        # A predicate may be one constant for all threads.
        chosen = np.flatnonzero(np.broadcast_to(True if active is None else active, (self.threads,)))
        return chosen, addresses[chosen]

    def load(self, space: str, addresses: Array, active: Mask, size: int, count: int, at: Instruction) -> list[Array]:
        """`count` values of `size` bytes at each thread's address; 0 for those that do not take part."""
        chosen, addresses = self._chosen(addresses, active)
        out = np.zeros((count, self.threads), np.dtype(f"u{size}"))
        if len(chosen):
            if space == "global":
                data = self.memory.read(addresses, size * count, at)
            else:
                data = self.shared.read(addresses.astype(np.int64), size * count, self.warp[chosen], at)
            out[:, chosen] = np.ascontiguousarray(data).view(out.dtype).T
        return list(out)

    def store(self, space: str, addresses: Array, active: Mask, values: Sequence[Array], at: Instruction) -> None:
        """Store values side by side at each thread's address."""
        chosen, addresses = self._chosen(addresses, active)
        if not len(chosen):
            return
        rows = np.stack([np.broadcast_to(v, (self.threads,))[chosen] for v in values], 1)
        data = np.ascontiguousarray(rows).view(np.uint8)
        if space == "global":
            self.memory.write(addresses, data, at)
        else:
            self.shared.write(addresses.astype(np.int64), data, self.warp[chosen], at)

    def atomic(
        self, operation: str, kind: np.dtype, addresses: Array, active: Mask, operand: Array, at: Instruction
    ) -> Array:
        """Change memory at each thread's address, one thread after the other; give the values before."""
        chosen, addresses = self._chosen(addresses, active)
        operand = np.broadcast_to(operand, (self.threads,))
        out = np.zeros(self.threads, kind)
        for thread, address in zip(chosen, addresses.tolist(), strict=True):
            out[thread] = self.memory.atomic(operation, kind, address, operand[thread], at)
        return out

    def copy_async(
        self, to: Array, source: Array, active: Mask, size: int, source_size: Array | None, at: Instruction
    ) -> None:
        """Start a copy from global to shared memory ("cp.async"); it arrives when its group is waited for."""
        chosen, to = self._chosen(to, active)
        if not len(chosen):
            return
        source = np.broadcast_to(source, (self.threads,))[chosen]
        wanted = np.full(len(chosen), size)
        if source_size is not None:
            wanted = np.broadcast_to(source_size, (self.threads,))[chosen].astype(np.int64)
        data = np.zeros((len(chosen), size), np.uint8)  # what is beyond the source's size is filled with zeros
        for n in np.unique(wanted[wanted > 0]).tolist():
            rows = wanted == n
            data[rows, :n] = self.memory.read(source[rows], n, at)
        to = to.astype(np.int64)
        cells = self.shared.cells(to, size, at)
        self.shared.note_write(cells, self.warp[chosen], at)
        self.shared.in_flight[cells] = True
        self.open_copies.append((to, data, self.warp[chosen], at))

    def commit_copies(self) -> None:
        self.copies.append(self.open_copies)
        self.open_copies = []

    def wait_for_copies(self, pending: int) -> None:
        """Let all groups but the newest `pending` arrive."""
        while len(self.copies) > pending:
            for copy in self.copies.pop(0):
                self.shared.deliver(*copy)

    # ---- warps -------------------------------------------------------------------------------------------------

    def shuffle(self, mode: str, value: Array, b: Array, c: Array) -> tuple[Array, Array]:
        """Exchange registers within warps ("shfl.sync"): values, and whether the source lane is in range."""
        rows = np.broadcast_to(value, (self.threads,)).reshape(self.warps, 32)
        b, c = (np.broadcast_to(x, (self.threads,)).astype(np.int64).reshape(self.warps, 32) for x in (b, c))
        lane, b = matrix.LANE, b & 31
        segment, clamp = c >> 8 & 31, c & 31
        highest = lane & segment | clamp & ~segment
        if mode == "up":
            source = lane - b
            in_range = source >= highest
        else:
            source = {"down": lane + b, "bfly": lane ^ b, "idx": lane & segment | b & ~segment}[mode]
            in_range = source <= highest
        source = np.where(in_range, source, lane)
        return np.take_along_axis(rows, source, 1).reshape(-1), in_range.reshape(-1)

    def vote(self, mode: str, predicate: Array) -> Array:
        """Combine a predicate over each warp ("vote.sync"): bits of the lanes, or one answer."""
        rows = np.broadcast_to(predicate, (self.threads,)).reshape(self.warps, 32)
        if mode == "ballot":
            bits = (rows.astype(U4) << np.arange(32, dtype=U4)).sum(1, dtype=U4)
            return np.repeat(bits, 32)
        if mode not in ("all", "any", "uni"):
            raise Fault(f"vote.{mode}")
        answers = {"all": rows.all(1), "any": rows.any(1), "uni": rows.all(1) | ~rows.any(1)}
        return np.repeat(answers[mode], 32)

    def _matrix_rows(self, addresses: Array, count: int) -> tuple[Array, Array]:
        """Offsets of the 8 rows of each of `count` 8 x 8 matrices a warp, and their warps."""
        rows = np.broadcast_to(addresses, (self.threads,)).astype(np.int64).reshape(self.warps, 32)[:, : 8 * count]
        return rows.ravel(), np.repeat(np.arange(self.warps), 8 * count)

    def load_matrix(self, addresses: Array, count: int, transposed: bool, at: Instruction) -> list[Array]:
        """Read 8 x 8 matrices of 16-bit values ("ldmatrix")."""
        offsets, warps = self._matrix_rows(addresses, count)
        data = self.shared.read(offsets, 16, warps, at)
        tiles = np.ascontiguousarray(data).view(np.uint16).reshape(self.warps, count, 8, 8)
        tiles = tiles.swapaxes(2, 3) if transposed else tiles
        words = np.ascontiguousarray(tiles).view(U4).reshape(self.warps, count, 32)
        return [np.ascontiguousarray(words[:, i]).reshape(-1) for i in range(count)]

    def store_matrix(self, addresses: Array, values: Sequence[Array], transposed: bool, at: Instruction) -> None:
        """Write 8 x 8 matrices of 16-bit values ("stmatrix")."""
        offsets, warps = self._matrix_rows(addresses, len(values))
        words = np.stack([np.broadcast_to(v, (self.threads,)).reshape(self.warps, 32) for v in values], 1)
        tiles = np.ascontiguousarray(words).view(np.uint16).reshape(self.warps, len(values), 8, 8)
        tiles = tiles.swapaxes(2, 3) if transposed else tiles
        self.shared.write(offsets, np.ascontiguousarray(tiles).view(np.uint8).reshape(-1, 16), warps, at)

    # ---- asynchronous products of warpgroups -------------------------------------------------------------------

    def wgmma(
        self,
        shape: str,
        kinds: Sequence[str],
        sums: Sequence[Array],
        a: Sequence[Array] | Array,
        b: Array,
        is_added: Array,
        signs: tuple[int, int],
        k_is_adjacent: tuple[bool, bool],
        at: Instruction,
    ) -> list[Array]:
        """Start a product ("wgmma.mma_async"); give accumulators that hold nothing until it is waited for."""
        if not self.is_wgmma_fenced:
            self.findings.add_at("wgmma with no wgmma.fence since its registers were written", at)
            self.is_wgmma_fenced = True
        _, n, k = matrix.shape_of(shape)
        _, kind, _ = kinds
        read: list[Array] = []
        fragment = None if isinstance(a, np.ndarray) else matrix.left_fragment(a, kind, 16, k, self.warps)
        before = [self._accumulator(r) for r in sums]
        after = [np.empty(self.threads, F4) for _ in sums]
        for group in range(self.warps // 4):
            first = 128 * group
            if fragment is not None:
                rows = fragment[4 * group : 4 * group + 4].reshape(64, k)  # (4 warps, 16, K) -> (64, K)
            else:
                rows = self._operand(np.asarray(a), first, 64, k, kind, k_is_adjacent[0], read, at)
            columns = self._operand(b, first, n, k, kind, k_is_adjacent[1], read, at)  # (N, K)
            product = (signs[0] * rows @ (signs[1] * columns).T).reshape(4, 16, n)
            for r, out in enumerate(after):
                i, j = matrix.sum_places(r)
                value = product[:, i, j].reshape(-1)
                if np.broadcast_to(is_added, (self.threads,))[first]:
                    value = value + before[r][first : first + 128]
                out[first : first + 128] = value
        numbers = []
        for out in after:
            self.n_products = self.n_products % 0x3FFFFF + 1
            numbers.append(self.n_products)
            self.products[self.n_products] = out.view(U4)
        self.open_products.append((numbers, read))
        return [np.full(self.threads, POISON | np.uint32(number), U4) for number in numbers]

    def _accumulator(self, register: Array) -> Array:
        """Values of an accumulator, of a product under way too: products of one shape follow each other unwaited."""
        register = np.broadcast_to(register, (self.threads,))
        return self.products.get(self._number(register), register).view(F4).astype(np.float64)

    @staticmethod
    def _number(register: Array) -> int:
        first = register.reshape(-1)[0]
        return int(first & ~POISON) if first & POISON == POISON else 0

    def _operand(
        self, descriptors: Array, first: int, rows: int, k: int, kind: str, k_is_adjacent: bool, read: list[Array],
        at: Instruction,
    ) -> NDArray[np.float64]:  # fmt: skip
        """An operand in shared memory: (rows, K). Its cells are read until the product is waited for."""
        size = 4 if kind == "tf32" else 2
        descriptor = int(np.broadcast_to(descriptors, (self.threads,))[first])
        offsets = matrix.shared_tile_offsets(descriptor, rows, k, size, k_is_adjacent)
        cells = self.shared.cells(offsets.ravel(), size, at)
        for warp in range(first // 32, first // 32 + 4):
            self.shared.note_read(cells, np.full(len(cells), warp), at)
        if self.shared.unfenced[cells].any():
            self.findings.add_at("wgmma reads what ordinary stores wrote, with no proxy fence between", at)
        read.append(np.unique(cells))
        self.shared.tensor_core_reads[read[-1]] += 1
        raw = gather(self.shared.bytes, offsets.ravel(), size)
        return matrix.from_shared(np.ascontiguousarray(raw), kind).reshape(rows, k)

    def fence_wgmma(self) -> None:
        self.is_wgmma_fenced = True

    def commit_wgmma(self) -> None:
        self.product_groups.append(self.open_products)
        self.open_products = []

    def wait_for_wgmma(self, pending: int) -> None:
        """Finish all groups but the newest `pending`; `settled` then gives their accumulators."""
        while len(self.product_groups) > pending:
            for numbers, read in self.product_groups.pop(0):
                for number in numbers:
                    self.finished[number] = self.products.pop(number)
                for cells in read:
                    self.shared.tensor_core_reads[cells] -= 1
                self.is_wgmma_fenced = False

    def settled(self, register: Array) -> Array:
        """A register after a wait: the product that it stands for, where that is finished."""
        return self.finished.get(self._number(register), register)

    def check_settled(self, register: Array, at: Instruction) -> None:
        """Tell of an accumulator that is read before its product was waited for."""
        if self._number(register) in self.products:
            self.findings.add_at("an accumulator is read while its wgmma is under way", at)


Code = Callable[[Block, dict[str, Any], tuple[int, int, int], tuple[int, int, int]], None]


def run(
    translated: Callable[[bool], tuple[Code, list[collections.Counter[str]], NDArray[np.int64]]],
    kernel: Kernel,
    warps: int,
    shared_bytes: int,
    cell: int,
    allocations: Sequence[Allocation],
    arguments: Sequence[int | float],
    grid: tuple[int, int, int],
    *,
    checks: bool,
    seed: int,
) -> tuple[Findings, collections.Counter[str], bool]:
    """Run all programs of a launch, in random order.

    Args:
        translated: gives the code of the kernel, for threads in step or, if True, with a program counter each; the
            instructions of each basic block by kind; and an array in which the code counts their runs, in warps.
        arguments: of the kernel, in order; pointers as addresses.

    Returns:
        What the checks saw, instructions by kind in warps, and whether threads branched apart.

    Raises:
        Fault: it could not go on.
    """
    parameters = {name: _bits(value, kind) for (name, kind), value in zip(kernel.parameters, arguments, strict=True)}
    order = list(itertools.product(range(grid[2]), range(grid[1]), range(grid[0])))
    np.random.default_rng(seed).shuffle(order)
    before = [a.bytes.copy() for a in allocations]
    for apart in (False, True):
        code, kinds, runs = translated(apart)
        runs[:] = 0
        findings = Findings()
        memory = GlobalMemory(allocations, findings, checks)
        block = Block(warps, memory, SharedMemory(shared_bytes, warps, cell, findings, checks), findings)
        try:
            with np.errstate(all="ignore"):
                for z, y, x in order:
                    memory.program = int(x) + grid[0] * (int(y) + grid[1] * int(z))
                    block.start()
                    code(block, parameters, (int(x), int(y), int(z)), grid)
        except Divergence:
            if apart:
                raise
            for allocation, content in zip(allocations, before, strict=True):
                allocation.bytes[:] = content
                allocation.forget_programs()
            continue
        counts: collections.Counter[str] = collections.Counter()
        for kind_counts, n in zip(kinds, runs.tolist(), strict=True):
            for kind, m in kind_counts.items():
                counts[kind] += n * m
        return findings, +counts, apart
    raise AssertionError("threads with a program counter each do not branch apart")


def _bits(value: int | float, kind: str) -> Any:
    """A parameter's bits, as an unsigned NumPy number of its size."""
    wanted = TYPES[kind]
    raw = np.dtype(f"u{wanted.itemsize}")
    if isinstance(value, float):
        return np.array([value], wanted).view(raw)[0]
    return np.array([value & (1 << 8 * wanted.itemsize) - 1], raw)[0]
