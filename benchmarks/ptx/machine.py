"""Execution of one launch: the threads of a block run in lockstep, with registers as NumPy arrays over them.

Where the threads of a block diverge (`Divergence`), the launch is run again with a program counter per thread: the
threads that are furthest behind run first, and a barrier blocks its threads until all have arrived.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import matrix
from .clocks import MMA, Clocks
from .mbarrier import MemoryBarriers
from .memory import Allocation, Fault, Findings, GlobalMemory, SharedMemory, gather
from .parser import Instruction, Kernel
from .tcgen05 import TensorCore
from .values import F4, TYPES, U4, Array

Mask = NDArray[np.bool_] | None
"""Threads that execute an instruction; None means all."""
END = np.iinfo(np.int64).max
"""Program counter of a thread that has returned."""
POISON = np.uint32(0xFFC00000)
"""Bits of a NaN; with a number in the low 22 bits it stands for an accumulator of a wgmma in flight."""


class Divergence(Exception):
    """The threads of a block take different sides of a branch."""


class Block:
    """The threads of one program ("Cooperative Thread Arrays"); the translated code calls these methods."""

    def __init__(self, memory: GlobalMemory, shared: SharedMemory, findings: Findings):
        self.clocks = shared.clocks
        self.warps, self.threads = self.clocks.warps, 32 * self.clocks.warps
        self.memory, self.shared, self.findings = memory, shared, findings
        self.mbarriers = MemoryBarriers(shared)
        if self.clocks.has_engines:
            self.tensor_core = TensorCore(shared, findings)
        self.warp = np.repeat(np.arange(self.warps), 32)  # (threads,)
        self.all_threads = np.ones(self.threads, bool)  # (threads,)

    def start(self) -> None:
        """Start a program."""
        self.clocks.restart()
        self.shared.start_program()
        self.mbarriers.start_program()
        if self.clocks.has_engines:
            self.tensor_core.memory.start_program()
        self.counters = np.zeros(self.threads, np.int64)  # (threads,)
        self.is_blocked = np.zeros(self.threads, bool)  # (threads,)
        self.at_barrier: dict[int, NDArray[np.bool_]] = {}
        self.at_mbarrier: dict[int, NDArray[np.bool_]] = {}  # threads that wait, by address
        self.copies: list[list[tuple[Array, NDArray[np.uint8], Array, Instruction]]] = []
        self.open_copies: list[tuple[Array, NDArray[np.uint8], Array, Instruction]] = []
        self.products: dict[int, Array] = {}  # accumulators of wgmma in flight, by number
        self.finished: dict[int, Array] = {}
        self.product_groups: list[list[tuple[list[int], list[Array]]]] = []
        self.open_products: list[tuple[list[int], list[Array]]] = []
        self.n_products, self.is_wgmma_fenced = 0, False

    def finish(self) -> None:
        """Finish a program."""
        if self.clocks.has_engines:
            self.tensor_core.memory.finish_program()

    # ---- threads and warps that execute an instruction ---------------------------------------------------------

    def chosen_threads(self, active: Mask) -> NDArray[np.intp]:
        """Indices of the active threads."""
        # A predicate may be one constant for all threads.
        return np.flatnonzero(np.broadcast_to(True if active is None else active, (self.threads,)))

    def chosen_warps(self, active: Mask, at: Instruction) -> list[int]:
        """Indices of the warps that are active.

        Raises:
            Fault: some threads of a warp are active, and some are not.
        """
        rows = np.broadcast_to(True if active is None else active, (self.threads,)).reshape(self.warps, 32)
        if (rows.any(1) != rows.all(1)).any():
            raise Fault(f"{at}: a part of a warp")
        return np.flatnonzero(rows.all(1)).tolist()

    # ---- control flow ------------------------------------------------------------------------------------------

    def branches(self, predicate: Array, at: Instruction) -> bool:
        """Whether all threads take a branch.

        Raises:
            Divergence: some do, and some do not.
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
            Fault: deadlock: all threads that are left wait at barriers.
        """
        ready = ~self.is_blocked & (self.counters != END)
        if not ready.any():
            if self.is_blocked.any():
                where = f"barriers {sorted(self.at_barrier)}" if self.at_barrier else ""
                where += f"mbarriers at {sorted(self.at_mbarrier)}" if self.at_mbarrier else ""
                raise Fault(f"threads wait at {where} that the others never reach")
            return None
        counter = int(self.counters[ready].min())
        return counter, ready & (self.counters == counter)

    def barrier(self, number: int, count: int | None, active: Mask, at: Instruction) -> None:
        """Wait for the participating threads ("bar, barrier"): `count`, or all that have not returned."""
        active = self.all_threads if active is None else active
        arrived = self.at_barrier.pop(number, np.zeros(self.threads, bool)) | active
        wanted = int((self.counters != END).sum()) if count is None else count
        if arrived.sum() > wanted:
            raise Fault(f"{at}: {arrived.sum()} threads at a barrier for {wanted}")
        if arrived.sum() < wanted:
            if active.all():
                raise Fault(f"{at}: the block has {self.threads} threads, fewer than the {wanted} of the barrier")
            self.at_barrier[number] = arrived
            self.is_blocked |= active
            return
        self.is_blocked &= ~arrived
        self.clocks.meet(np.unique(self.warp[arrived]))

    def fence_proxy(self, active: Mask, at: Instruction) -> None:
        """Order earlier writes before accesses of the asynchronous proxy ("membar / fence")."""
        self.shared.fence(np.unique(self.warp[np.broadcast_to(True if active is None else active, (self.threads,))]))

    # ---- mbarriers ---------------------------------------------------------------------------------------------

    def initialize_mbarrier(self, address: Array, count: int, active: Mask, at: Instruction) -> None:
        """Make an mbarrier for each active thread ("mbarrier.init")."""
        for thread, place in self._places(address, active):
            self.mbarriers.initialize(place, count, thread // 32, at)

    def invalidate_mbarrier(self, address: Array, active: Mask, at: Instruction) -> None:
        """Free the memory of an mbarrier for each active thread ("mbarrier.inval")."""
        for thread, place in self._places(address, active):
            self.mbarriers.invalidate(place, thread // 32, at)

    def wait_at_mbarrier(self, address: Array, parity: Array, active: Mask, at: Instruction) -> NDArray[np.bool_]:
        """Test whether a phase is complete ("mbarrier.try_wait.parity"); threads for which it is not block.

        Raises:
            Fault: all threads wait for one that nobody completes.
        """
        done = np.zeros(self.threads, bool)
        address, parity = (np.broadcast_to(x, (self.threads,)) for x in (address, parity))
        chosen = self.chosen_threads(active).tolist()
        for warp, place, which in sorted({(t // 32, int(address[t]), int(parity[t])) for t in chosen}):
            same = [t for t in chosen if (t // 32, address[t], parity[t]) == (warp, place, which)]
            done[same] = self.mbarriers.is_complete(place, which, warp, at)
            if not done[same].all():
                self.at_mbarrier.setdefault(place, np.zeros(self.threads, bool))[same] = True
                self.is_blocked[same] = True
        if self.is_blocked.all():
            raise Fault(f"{at}: all threads wait at mbarriers {sorted(self.at_mbarrier)}")
        return done

    def arrive_at_mbarrier(self, address: Array, count: int, active: Mask, at: Instruction) -> None:
        """Arrive `count` times for each active thread ("mbarrier.arrive")."""
        for thread, place in self._places(address, active):
            self.mbarriers.arrive(place, thread // 32, count, at)
            self._wake(place)

    def commit_products(self, address: Array, active: Mask, at: Instruction) -> None:
        """Let an mbarrier track the products that each active thread issued ("tcgen05.commit")."""
        for thread, place in self._places(address, active):
            self.mbarriers.track(place, self.clocks.actor(MMA, thread // 32), at)
            self._wake(place)

    def wait_for_tensor_memory(self, engine: int, active: Mask, at: Instruction) -> None:
        """Wait for the loads or the stores of tensor memory that the active warps issued ("tcgen05.wait")."""
        for warp in self.chosen_warps(active, at):
            self.clocks.follow(warp, self.clocks.release(self.clocks.actor(engine, warp)))

    def _places(self, address: Array, active: Mask) -> list[tuple[int, int]]:
        """Active threads and their addresses, in pairs."""
        threads, addresses = self._chosen(address, active)
        return list(zip(threads.tolist(), addresses.tolist(), strict=True))

    def _wake(self, address: int) -> None:
        """Let the threads that wait at an mbarrier test it again."""
        self.is_blocked &= ~self.at_mbarrier.pop(address, np.zeros(self.threads, bool))

    # ---- memory ------------------------------------------------------------------------------------------------

    def _chosen(self, addresses: Array, active: Mask) -> tuple[NDArray[np.intp], Array]:
        """The active threads and their addresses."""
        chosen = self.chosen_threads(active)
        return chosen, np.broadcast_to(addresses, (self.threads,))[chosen]

    def load(self, space: str, addresses: Array, active: Mask, size: int, count: int, at: Instruction) -> list[Array]:
        """Load `count` values of `size` bytes at each thread's address ("ld"); inactive threads get 0."""
        chosen, addresses = self._chosen(addresses, active)
        out = np.zeros((count, self.threads), np.dtype(f"u{size}"))  # (count, threads)
        if len(chosen):
            if space == "global":
                data = self.memory.read(addresses, size * count, at)
            else:
                data = self.shared.read(addresses.astype(np.int64), size * count, self.warp[chosen], at)
            out[:, chosen] = np.ascontiguousarray(data).view(out.dtype).T  # (count, chosen)
        return list(out)

    def store(self, space: str, addresses: Array, active: Mask, values: Sequence[Array], at: Instruction) -> None:
        """Store consecutive values at each thread's address ("st")."""
        chosen, addresses = self._chosen(addresses, active)
        if not len(chosen):
            return
        rows = np.stack([np.broadcast_to(v, (self.threads,))[chosen] for v in values], 1)  # (chosen, values)
        data = np.ascontiguousarray(rows).view(np.uint8)  # (chosen, bytes)
        if space == "global":
            self.memory.write(addresses, data, at)
        else:
            self.shared.write(addresses.astype(np.int64), data, self.warp[chosen], at)

    def atomic(
        self, operation: str, kind: np.dtype, addresses: Array, active: Mask, operand: Array, at: Instruction
    ) -> Array:
        """Update memory at each thread's address, one thread after the other; return the old values ("atom")."""
        chosen, addresses = self._chosen(addresses, active)
        operand = np.broadcast_to(operand, (self.threads,))
        out = np.zeros(self.threads, kind)
        for thread, address in zip(chosen, addresses.tolist(), strict=True):
            out[thread] = self.memory.atomic(operation, kind, address, operand[thread], at)
        return out

    def copy_async(
        self, to: Array, source: Array, active: Mask, size: int, source_size: Array | None, at: Instruction
    ) -> None:
        """Start a copy from global to shared memory ("cp.async"); it completes when its group is waited for."""
        chosen, to = self._chosen(to, active)
        if not len(chosen):
            return
        source = np.broadcast_to(source, (self.threads,))[chosen]
        wanted = np.full(len(chosen), size)  # (chosen,)
        if source_size is not None:
            wanted = np.broadcast_to(source_size, (self.threads,))[chosen].astype(np.int64)
        data = np.zeros((len(chosen), size), np.uint8)  # bytes beyond the source's size are zero
        for n in np.unique(wanted[wanted > 0]).tolist():
            rows = wanted == n
            data[rows, :n] = self.memory.read(source[rows], n, at)
        to = to.astype(np.int64)
        cells = self.shared.cells(to, size, at)  # (chosen, cells)
        self.shared.note_write(cells, self.warp[chosen], at)
        self.shared.in_flight[cells] = True
        self.open_copies.append((to, data, self.warp[chosen], at))

    def commit_copies(self) -> None:
        """Make the open copies a group ("cp.async.commit_group")."""
        self.copies.append(self.open_copies)
        self.open_copies = []

    def wait_for_copies(self, pending: int, at: Instruction) -> None:
        """Complete all groups but the newest `pending` ("cp.async.wait_group")."""
        while len(self.copies) > pending:
            for copy in self.copies.pop(0):
                self.shared.deliver(*copy)

    # ---- warps -------------------------------------------------------------------------------------------------

    def shuffle(self, mode: str, value: Array, b: Array, c: Array) -> tuple[Array, Array]:
        """Exchange registers within warps ("shfl.sync"): values, and whether the source lane is in range."""
        rows = np.broadcast_to(value, (self.threads,)).reshape(self.warps, 32)  # (warps, 32)
        b, c = (np.broadcast_to(x, (self.threads,)).astype(np.int64).reshape(self.warps, 32) for x in (b, c))
        lane, b = matrix.LANE, b & 31
        segment_mask, clamp = c >> 8 & 31, c & 31
        max_lane = lane & segment_mask | clamp & ~segment_mask
        if mode == "up":
            source = lane - b
            in_range = source >= max_lane
        else:
            source = {"down": lane + b, "bfly": lane ^ b, "idx": lane & segment_mask | b & ~segment_mask}[mode]
            in_range = source <= max_lane
        source = np.where(in_range, source, lane)
        return np.take_along_axis(rows, source, 1).reshape(-1), in_range.reshape(-1)

    def vote(self, mode: str, predicate: Array) -> Array:
        """Reduce a predicate over each warp ("vote.sync"): the lanes' bits, or one predicate."""
        rows = np.broadcast_to(predicate, (self.threads,)).reshape(self.warps, 32)  # (warps, 32)
        if mode == "ballot":
            bits = (rows.astype(U4) << np.arange(32, dtype=U4)).sum(1, dtype=U4)
            return np.repeat(bits, 32)
        if mode not in ("all", "any", "uni"):
            raise Fault(f"vote.{mode}")
        answers = {"all": rows.all(1), "any": rows.any(1), "uni": rows.all(1) | ~rows.any(1)}
        return np.repeat(answers[mode], 32)

    def reduce(self, operation: np.ufunc, value: Array) -> Array:
        """Reduce values over each warp ("redux.sync"); all of its threads get the result."""
        rows = np.broadcast_to(value, (self.threads,)).reshape(self.warps, 32)  # (warps, 32)
        return np.repeat(operation.reduce(rows, 1, dtype=rows.dtype), 32)

    def _matrix_rows(self, addresses: Array, count: int) -> tuple[Array, Array]:
        """Offsets of the 8 rows of each of a warp's `count` 8 x 8 matrices, and their warps."""
        rows = np.broadcast_to(addresses, (self.threads,)).astype(np.int64).reshape(self.warps, 32)[:, : 8 * count]
        return rows.ravel(), np.repeat(np.arange(self.warps), 8 * count)

    def load_matrix(self, addresses: Array, count: int, transposed: bool, at: Instruction) -> list[Array]:
        """Read 8 x 8 matrices of 16-bit values ("ldmatrix")."""
        offsets, warps = self._matrix_rows(addresses, count)
        data = self.shared.read(offsets, 16, warps, at)  # (rows, 16)
        tiles = np.ascontiguousarray(data).view(np.uint16).reshape(self.warps, count, 8, 8)  # (warps, count, 8, 8)
        tiles = tiles.swapaxes(2, 3) if transposed else tiles
        words = np.ascontiguousarray(tiles).view(U4).reshape(self.warps, count, 32)  # (warps, count, 32)
        return [np.ascontiguousarray(words[:, i]).reshape(-1) for i in range(count)]

    def store_matrix(self, addresses: Array, values: Sequence[Array], transposed: bool, at: Instruction) -> None:
        """Write 8 x 8 matrices of 16-bit values ("stmatrix")."""
        offsets, warps = self._matrix_rows(addresses, len(values))
        words = np.stack([np.broadcast_to(v, (self.threads,)).reshape(self.warps, 32) for v in values], 1)
        tiles = np.ascontiguousarray(words).view(np.uint16).reshape(self.warps, len(values), 8, 8)
        tiles = tiles.swapaxes(2, 3) if transposed else tiles
        self.shared.write(offsets, np.ascontiguousarray(tiles).view(np.uint8).reshape(-1, 16), warps, at)

    # ---- asynchronous warpgroup level matrix instructions ------------------------------------------------------

    def wgmma(
        self,
        shape: str,
        kinds: Sequence[str],
        accumulators: Sequence[Array],
        a: Sequence[Array] | Array,
        b: Array,
        scale_d: Array,
        signs: tuple[int, int],
        k_major: tuple[bool, bool],
        at: Instruction,
    ) -> list[Array]:
        """Start a product ("wgmma.mma_async"); return poisoned accumulators, valid after a wait.

        Args:
            shape: `m64n128k16`.
            kinds: types of D, A and B.
            a: registers of the A fragment, or descriptors of A in shared memory.
            b: descriptors of B in shared memory.
            scale_d: whether the accumulators are added to the product.
            signs: factors of A and B, 1 or -1.
            k_major: whether A and B in shared memory are contiguous along K.
        """
        if not self.is_wgmma_fenced:
            self.findings.add_at("wgmma with no wgmma.fence since its registers were written", at)
            self.is_wgmma_fenced = True
        _, n, k = matrix.shape_of(shape)
        _, kind, _ = kinds
        read: list[Array] = []
        # A in registers: (warps, 16, K).
        fragment = None if isinstance(a, np.ndarray) else matrix.left_fragment(a, kind, 16, k, self.warps)
        before = [self._accumulator(r) for r in accumulators]
        after = [np.empty(self.threads, F4) for _ in accumulators]
        for group in range(self.warps // 4):
            first = 128 * group
            if fragment is not None:
                rows = fragment[4 * group : 4 * group + 4].reshape(64, k)  # (4 warps, 16, K) -> (64, K)
            else:
                rows = self._operand(np.asarray(a), first, 64, k, kind, k_major[0], read, at)
            columns = self._operand(b, first, n, k, kind, k_major[1], read, at)  # (N, K)
            product = (signs[0] * rows @ (signs[1] * columns).T).reshape(4, 16, n)  # (4 warps, 16, N)
            for r, out in enumerate(after):
                i, j = matrix.accumulator_elements(r)
                value = product[:, i, j].reshape(-1)
                if np.broadcast_to(scale_d, (self.threads,))[first]:
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
        """Values of an accumulator, also of a wgmma in flight: products of one shape may follow without a wait."""
        register = np.broadcast_to(register, (self.threads,))
        return self.products.get(self._number(register), register).view(F4).astype(np.float64)

    @staticmethod
    def _number(register: Array) -> int:
        """The number of a poisoned accumulator; 0 for another register."""
        first = register.reshape(-1)[0]
        return int(first & ~POISON) if first & POISON == POISON else 0

    def _operand(
        self, descriptors: Array, first: int, rows: int, k: int, kind: str, k_major: bool, read: list[Array],
        at: Instruction,
    ) -> NDArray[np.float64]:  # fmt: skip
        """An operand in shared memory, (rows, K). Its cells count as being read until the wgmma is waited for."""
        size = 4 if kind == "tf32" else 2
        descriptor = int(np.broadcast_to(descriptors, (self.threads,))[first])
        offsets = matrix.SharedTile.of_wgmma(descriptor).offsets(rows, k, size, k_major)
        cells = self.shared.cells(offsets.ravel(), size, at)  # (rows * K, cells)
        self.shared.note_descriptor_read(cells, range(first // 32, first // 32 + 4), "wgmma", at)
        read.append(np.unique(cells))
        self.shared.tensor_core_reads[read[-1]] += 1
        raw = gather(self.shared.bytes, offsets.ravel(), size)  # (rows * K, size)
        return matrix.from_shared(np.ascontiguousarray(raw), kind).reshape(rows, k)

    def fence_wgmma(self) -> None:
        """Order register accesses before the next wgmma ("wgmma.fence")."""
        self.is_wgmma_fenced = True

    def commit_wgmma(self) -> None:
        """Make the open products a group ("wgmma.commit_group")."""
        self.product_groups.append(self.open_products)
        self.open_products = []

    def wait_for_wgmma(self, pending: int, at: Instruction) -> None:
        """Complete all groups but the newest `pending` ("wgmma.wait_group"); `settled` returns their accumulators."""
        while len(self.product_groups) > pending:
            for numbers, read in self.product_groups.pop(0):
                for number in numbers:
                    self.finished[number] = self.products.pop(number)
                for cells in read:
                    self.shared.tensor_core_reads[cells] -= 1
                self.is_wgmma_fenced = False

    def settled(self, register: Array) -> Array:
        """A register after a wait: its product, if that is complete."""
        return self.finished.get(self._number(register), register)

    def check_settled(self, register: Array, at: Instruction) -> None:
        """Report an accumulator that is read before its wgmma was waited for."""
        if self._number(register) in self.products:
            self.findings.add_at("an accumulator is read while its wgmma is in flight", at)


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
        translated: returns the code of the kernel, for threads in lockstep or, if True, with a program counter per
            thread; the instructions of each basic block by kind; and the array in which the code counts the runs of
            each block, in warps.
        cell: bytes of the kernel's smallest access to shared memory.
        arguments: arguments of the kernel, in order; pointers as addresses.

    Returns:
        Findings of the checks, instructions by kind in warps, and whether threads diverged.

    Raises:
        Fault: the launch cannot continue.
    """
    parameters = {name: _bits(value, kind) for (name, kind), value in zip(kernel.parameters, arguments, strict=True)}
    order = list(itertools.product(range(grid[2]), range(grid[1]), range(grid[0])))
    np.random.default_rng(seed).shuffle(order)
    before = [a.bytes.copy() for a in allocations]
    for per_thread in (False, True):
        code, kinds, runs = translated(per_thread)
        runs[:] = 0
        findings = Findings()
        memory = GlobalMemory(allocations, findings, checks)
        clocks = Clocks(warps, has_engines=any(i.parts[0] == "tcgen05" for b in kernel.blocks for i in b))
        block = Block(memory, SharedMemory(shared_bytes, clocks, cell, findings, checks), findings)
        try:
            with np.errstate(all="ignore"):
                for z, y, x in order:
                    memory.program = int(x) + grid[0] * (int(y) + grid[1] * int(z))
                    block.start()
                    code(block, parameters, (int(x), int(y), int(z)), grid)
                    block.finish()
        except Divergence:
            if per_thread:
                raise
            for allocation, content in zip(allocations, before, strict=True):
                allocation.bytes[:] = content
                allocation.reset_programs()
            continue
        counts: collections.Counter[str] = collections.Counter()
        for kind_counts, n in zip(kinds, runs.tolist(), strict=True):
            for kind, m in kind_counts.items():
                counts[kind] += n * m
        return findings, +counts, per_thread
    raise AssertionError("threads with a program counter each do not diverge")


def _bits(value: int | float, kind: str) -> Any:
    """A parameter's bits, as an unsigned NumPy number of its size."""
    wanted = TYPES[kind]
    raw = np.dtype(f"u{wanted.itemsize}")
    if isinstance(value, float):
        return np.array([value], wanted).view(raw)[0]
    return np.array([value & (1 << 8 * wanted.itemsize) - 1], raw)[0]
