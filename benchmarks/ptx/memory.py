"""Global and shared memory of a launch, with checks of every access ("State Spaces", "Memory Consistency Model").

An access at which a device would stop is a `Fault`: one outside the tensors of the launch, or misaligned. An error that
a device would not report is a finding: races between programs or warps, asynchronous copies without a wait, reads of
shared memory that was never written, missing proxy fences.
"""

from __future__ import annotations

import bisect
import collections
import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .clocks import Clocks
from .parser import Instruction
from .values import Array, difference_in_ulps

NOBODY, SEVERAL = -1, -2


class Fault(Exception):
    """An access or an instruction at which a device would stop, or after which nothing is defined."""


class Findings(collections.Counter[str]):
    """Findings of the checks as text, each with its number of occurrences."""

    def add_at(self, what: str, at: Instruction) -> None:
        source = f", {at.source}" if at.source else ""
        self[f"{what} (PTX line {at.line}{source})"] += 1


@dataclass
class Allocation:
    """Memory of a tensor's storage."""

    name: str
    base: int
    bytes: NDArray[np.uint8]
    views: list[tuple[int, int]] = field(default_factory=list)
    """Address ranges that the launch's tensors span in it."""
    writer: Array | None = None
    """Last program that wrote each pair of bytes; allocated at the first access."""
    reader: Array | None = None
    """Program that read each pair of bytes, or SEVERAL."""

    @property
    def end(self) -> int:
        return self.base + len(self.bytes)

    def reset_programs(self) -> None:
        self.writer = self.reader = None

    def programs(self) -> tuple[Array, Array]:
        if self.writer is None or self.reader is None:
            n = (len(self.bytes) + 1) // 2
            self.writer, self.reader = (np.full(n, NOBODY, np.int32) for _ in range(2))
        return self.writer, self.reader


def allocations_of(tensors: Iterable[tuple[str, Tensor]]) -> list[Allocation]:
    """Storages of CPU tensors, each once, as memory that an emulated launch reads and writes."""
    found: dict[int, Allocation] = {}
    for name, tensor in tensors:
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            continue
        base = storage.data_ptr()
        if base not in found:
            memory = (ctypes.c_uint8 * storage.nbytes()).from_address(base)
            found[base] = Allocation(name, base, np.ctypeslib.as_array(memory))
        else:
            found[base].name += f"/{name}"
        extent = 0
        if tensor.numel():
            extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        found[base].views.append((tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()))
    return sorted(found.values(), key=lambda a: a.base)


def gather(memory: NDArray[np.uint8], offsets: Array, size: int) -> NDArray[np.uint8]:
    """Rows of `size` bytes at each offset: (offsets, size)."""
    if (offsets % size).any():  # the address of a storage may be odd
        return memory[offsets[:, None] + np.arange(size)]
    units = memory[: len(memory) // size * size].view(f"V{size}")
    return units[offsets // size].view(np.uint8).reshape(-1, size)


def scatter(memory: NDArray[np.uint8], offsets: Array, data: NDArray[np.uint8]) -> None:
    """Store rows of bytes at each offset."""
    size = data.shape[1]
    if (offsets % size).any():
        memory[offsets[:, None] + np.arange(size)] = data
    else:
        units = memory[: len(memory) // size * size].view(f"V{size}")
        units[offsets // size] = np.ascontiguousarray(data).view(f"V{size}").ravel()


class GlobalMemory:
    """The tensors of a launch."""

    def __init__(self, allocations: Sequence[Allocation], findings: Findings, checks: bool):
        self.allocations, self.findings, self.checks = list(allocations), findings, checks
        self.bases = [a.base for a in self.allocations]
        self.program = 0

    def locate(self, address: int, size: int, at: Instruction) -> Allocation:
        """The allocation that holds `size` bytes at an address.

        Raises:
            Fault: none does, or the bytes are outside the tensors that were passed, or misaligned.
        """
        i = bisect.bisect_right(self.bases, address) - 1
        allocation = self.allocations[i] if i >= 0 else None
        if allocation is None or address + size > allocation.end:
            near = "no tensor is there"
            if allocation is not None and address < allocation.end + len(allocation.bytes):
                near = f"{allocation.name} ends {address + size - allocation.end} bytes before"
            raise Fault(f"{at}: {size} bytes at {address:#x} are outside the tensors; {near}; program {self.program}")
        if not any(start <= address and address + size <= end for start, end in allocation.views):
            raise Fault(f"{at}: {size} bytes at {address:#x} are outside the views of {allocation.name}; "
                        f"program {self.program}")  # fmt: skip
        if address % size:
            raise Fault(f"{at}: {size} bytes at {address:#x} are misaligned")
        return allocation

    def split(self, addresses: Array, size: int, at: Instruction) -> list[tuple[Allocation, NDArray[np.intp]]]:
        """Allocations that threads access, each with the indices of its addresses."""
        lowest, highest = int(addresses.min()), int(addresses.max())
        allocation = self.locate(lowest, size, at)
        one_view = any(start <= lowest and highest + size <= end for start, end in allocation.views)
        if one_view and not (addresses % np.uint64(size)).any():
            return [(allocation, np.arange(len(addresses)))]
        indices: dict[int, list[int]] = collections.defaultdict(list)
        by_base = {a.base: a for a in self.allocations}
        for i, address in enumerate(addresses.tolist()):
            indices[self.locate(address, size, at).base].append(i)
        return [(by_base[base], np.array(found)) for base, found in indices.items()]

    def read(self, addresses: Array, size: int, at: Instruction) -> NDArray[np.uint8]:
        """Bytes at each address: (addresses, size)."""
        out = np.empty((len(addresses), size), np.uint8)  # (addresses, size)
        for allocation, indices in self.split(addresses, size, at):
            offsets = (addresses[indices] - np.uint64(allocation.base)).astype(np.int64)
            if self.checks:
                self._note_read(allocation, offsets, size, at)
            out[indices] = gather(allocation.bytes, offsets, size)
        return out

    def write(self, addresses: Array, data: NDArray[np.uint8], at: Instruction) -> None:
        """Store rows of bytes, one per address; of several at one address the last one wins."""
        size = data.shape[1]
        for allocation, indices in self.split(addresses, size, at):
            offsets = (addresses[indices] - np.uint64(allocation.base)).astype(np.int64)
            if self.checks:
                self._note_write(allocation, offsets, size, at)
            scatter(allocation.bytes, offsets, data[indices])
            if self.checks:
                stored = gather(allocation.bytes, offsets, size)
                _check_one_value(stored, data[indices], allocation.name, self.findings, at)

    def atomic(self, operation: str, kind: np.dtype, address: int, operand: Any, at: Instruction) -> Any:
        """Update one value atomically; return the old value."""
        allocation = self.locate(address, kind.itemsize, at)
        offset = address - allocation.base
        cell = allocation.bytes[offset : offset + kind.itemsize].view(kind)
        before = cell[0]
        cell[0] = ATOMICS[operation](before, operand)
        return before

    def _note_read(self, allocation: Allocation, offsets: Array, size: int, at: Instruction) -> None:
        writer, reader = allocation.programs()
        cells = _pairs(offsets, size)
        if ((writer[cells] != NOBODY) & (writer[cells] != self.program)).any():
            self.findings.add_at(f"{allocation.name}: written by one program and read by another", at)
        before = reader[cells]
        reader[cells] = np.where((before == NOBODY) | (before == self.program), self.program, SEVERAL)

    def _note_write(self, allocation: Allocation, offsets: Array, size: int, at: Instruction) -> None:
        writer, reader = allocation.programs()
        cells = _pairs(offsets, size)
        for who, what in ((writer, "written"), (reader, "read")):
            if ((who[cells] != NOBODY) & (who[cells] != self.program)).any():
                self.findings.add_at(f"{allocation.name}: {what} by one program and written by another", at)
        writer[cells] = self.program


ATOMICS = {
    "add": lambda old, x: old + x, "min": min, "max": max, "exch": lambda old, x: x, "and": lambda old, x: old & x,
    "or": lambda old, x: old | x, "xor": lambda old, x: old ^ x,
}  # fmt: skip
"""Operations of "Parallel Synchronization and Communication Instructions: atom"."""


def _pairs(offsets: Array, size: int) -> NDArray[np.int64]:
    """Indices of the pairs of bytes that accesses cover, the granularity of race detection between programs."""
    return ((offsets >> 1)[:, None] + np.arange(max(1, size // 2))).ravel()


def _check_one_value(stored: Array, wanted: Array, where: str, findings: Findings, at: Instruction) -> None:
    """Report threads of one store that write different values to one address: which one wins is not defined."""
    if (stored == wanted).all():
        return
    kind = np.dtype(f"u{min(stored.shape[1], 8)}")
    difference = difference_in_ulps(*(np.ascontiguousarray(x).view(kind).ravel() for x in (stored, wanted)))
    findings.add_at(f"{where}: threads of one store write different values to one address{difference}", at)


class SharedMemory:
    """Shared memory of a block, with race detection between its warps, and the engines that read it, by vector clocks.

    Args:
        size: bytes.
        cell: bytes of the kernel's smallest access, the granularity of race detection.
    """

    def __init__(self, size: int, clocks: Clocks, cell: int, findings: Findings, checks: bool):
        self.size, self.clocks, self.cell, self.findings, self.checks = size, clocks, cell, findings, checks
        self.bytes = np.zeros(-(-size // 16) * 16, np.uint8)
        n = len(self.bytes) // cell
        self.actors = clocks.warps * (2 if clocks.has_engines else 1)  # warps, and their engines MMA
        self.writer, self.write_clock = np.zeros(n, np.intp), np.zeros(n, np.int64)  # (cells,)
        self.read_clock = np.zeros((self.actors, n), np.int64)  # (actors, cells)
        self.is_written, self.is_mbarrier, self.in_flight, self.unfenced = (np.zeros(n, bool) for _ in range(4))
        self.tensor_core_reads = np.zeros(n, np.int32)  # (cells,)
        """Number of wgmma in flight that read a cell."""

    def start_program(self) -> None:
        """Clear the memory and the checks of the program before."""
        self.bytes[:] = 0xFF  # NaN in every floating-point type
        for flags in (self.is_written, self.is_mbarrier, self.in_flight, self.unfenced):
            flags[:] = False
        self.tensor_core_reads[:] = 0

    def fence(self, warps: Array) -> None:
        """Make the writes of these warps visible to the asynchronous proxy ("membar / fence": fence.proxy.async)."""
        self.unfenced &= ~np.isin(self.writer, warps)

    def cells(self, offsets: Array, size: int, at: Instruction) -> NDArray[np.int64]:
        """Indices of the cells of accesses: (accesses, cells per access).

        Raises:
            Fault: an access is outside of shared memory, or misaligned.
        """
        lowest, highest = int(offsets.min()), int(offsets.max()) + size
        if lowest < 0 or highest > self.size:
            raise Fault(f"{at}: bytes {lowest} to {highest} of shared memory, which has {self.size}")
        if (offsets % size).any():
            raise Fault(f"{at}: {size} bytes of shared memory are misaligned")
        return offsets[:, None] // self.cell + np.arange(-(-size // self.cell))

    def read(self, offsets: Array, size: int, warps: Array, at: Instruction) -> NDArray[np.uint8]:
        """Bytes at each offset, read by a thread of the warp in `warps`: (offsets, size)."""
        self.note_read(self.cells(offsets, size, at), warps, at)
        return gather(self.bytes, offsets, size)

    def write(self, offsets: Array, data: NDArray[np.uint8], warps: Array, at: Instruction) -> None:
        """Store rows of bytes, each by a thread of the warp in `warps`."""
        cells = self.cells(offsets, data.shape[1], at)
        self.note_write(cells, warps, at)
        self.unfenced[cells] = True
        scatter(self.bytes, offsets, data)
        if self.checks:
            _check_one_value(gather(self.bytes, offsets, data.shape[1]), data, "shared memory", self.findings, at)

    def note_read(self, cells: Array, actors: Array, at: Instruction) -> None:
        """Check an ordinary read of cells, (accesses, cells per access), by an actor per access."""
        if not self.checks:
            return
        self.order_read(cells, actors, at)
        if not self.is_written[cells].all():
            self.findings.add_at("shared memory is read that was never written", at)
        if self.is_mbarrier[cells].any():
            self.findings.add_at("an ordinary instruction reads an mbarrier", at)

    def note_write(self, cells: Array, actors: Array, at: Instruction) -> None:
        """Check an ordinary write of cells, (accesses, cells per access), by an actor per access."""
        if not self.checks:
            return
        self.order_write(cells, actors, at)
        if self.tensor_core_reads[cells].any():
            self.findings.add_at("shared memory is written while a wgmma that reads it is in flight", at)
        if self.is_mbarrier[cells].any():
            self.findings.add_at("an ordinary instruction writes to an mbarrier", at)
        self.is_written[cells] = True

    def order_read(self, cells: Array, actors: Array, at: Instruction) -> None:
        """Check that the last write of each cell is ordered before this read."""
        if not self.checks:
            return
        cells, actors = cells.ravel(), np.repeat(actors, cells.shape[1])
        self._check_writer(cells, actors, "read", at)
        self.read_clock[actors, cells] = self.clocks.epoch(actors)

    def order_write(self, cells: Array, actors: Array, at: Instruction) -> None:
        """Check that the last accesses of each cell are ordered before this write."""
        if not self.checks:
            return
        cells, actors = cells.ravel(), np.repeat(actors, cells.shape[1])
        self._check_writer(cells, actors, "written", at)
        # A race: a read of some actor is of a later epoch than this actor knows.
        races = self.read_clock[:, cells] > self.clocks.known[actors, : self.actors].T  # (actors, cells)
        if races[: self.clocks.warps].any():
            self.findings.add_at(
                "shared memory is read by one warp and written by another, with no barrier between", at
            )
        if races[self.clocks.warps :].any():
            self.findings.add_at("shared memory is written while a tcgen05.mma that reads it is in flight", at)
        self.writer[cells], self.write_clock[cells] = actors, self.clocks.epoch(actors)

    def _check_writer(self, cells: Array, actors: Array, how: str, at: Instruction) -> None:
        writer = self.writer[cells]  # (cells,)
        # A race: the last write is of a later epoch of the writer than this actor knows.
        if ((writer != actors) & (self.write_clock[cells] > self.clocks.known[actors, writer])).any():
            what = f"shared memory is written by one warp and {how} by another, with no barrier between"
            self.findings.add_at(what, at)
        if self.in_flight[cells].any():
            self.findings.add_at(f"shared memory is {how} while an asynchronous copy to it is in flight", at)

    def note_descriptor_read(self, cells: Array, actors: Sequence[int], by: str, at: Instruction) -> None:
        """Check that a product of some actors reads cells in the asynchronous proxy, (elements, cells per element)."""
        for actor in actors:
            self.note_read(cells, np.full(len(cells), actor), at)
        if self.checks and self.unfenced[cells].any():
            self.findings.add_at(f"{by} reads memory that generic-proxy stores wrote, with no proxy fence between", at)

    def deliver(self, offsets: Array, data: NDArray[np.uint8], warps: Array, at: Instruction) -> None:
        """Complete an asynchronous copy: its warp sees it from now on, and others after a barrier."""
        cells = self.cells(offsets, data.shape[1], at)
        scatter(self.bytes, offsets, data)
        self.in_flight[cells] = False
        self.unfenced[cells] = True
        self.writer[cells], self.write_clock[cells] = warps[:, None], self.clocks.epoch(warps)[:, None]
