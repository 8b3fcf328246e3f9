"""Objects in shared memory at which threads and asynchronous operations arrive, and threads wait ("mbarrier").

A phase completes when its expected arrivals are there. An arrival by `tcgen05.commit` happens at the last moment: when
a thread waits for it. So what is done without waiting is done too early.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .memory import Fault, SharedMemory
from .parser import Instruction
from .values import Array

MAX_COUNT = 2**20 - 1
"""Most arrivals of a phase ("Contents of the mbarrier object")."""
SIZE = 8


@dataclass
class _Object:
    """State of one object."""

    count: int
    """Arrivals that complete a phase."""
    pending: int
    """Arrivals that the current phase still expects."""
    arriving: Array
    """Clock of the arrivals in the current phase: (actors,)."""
    completed: Array
    """Clock of the arrivals in all completed phases: (actors,)."""
    phase: int = 0
    """Number of the current phase."""
    tracked: list[Array] = field(default_factory=list)
    """Clocks of the asynchronous operations whose arrival is due, in order."""

    def arrive(self, count: int, clock: Array, at: Instruction) -> None:
        """Count arrivals; the last one of a phase starts the next phase.

        Raises:
            Fault: the phase expects fewer.
        """
        if count > self.pending:
            raise Fault(f"{at}: {count} arrivals at an mbarrier that expects {self.pending}")
        self.arriving = np.maximum(self.arriving, clock)
        self.pending -= count
        if not self.pending:
            self.completed = np.maximum(self.completed, self.arriving)
            self.arriving = np.zeros_like(clock)
            self.pending, self.phase = self.count, self.phase + 1


class MemoryBarriers:
    """The mbarrier objects of a block. Addresses are offsets in shared memory."""

    def __init__(self, shared: SharedMemory):
        self.shared, self.clocks = shared, shared.clocks
        self.objects: dict[int, _Object] = {}

    def start_program(self) -> None:
        self.objects.clear()

    def initialize(self, address: int, count: int, warp: int, at: Instruction) -> None:
        """Make an object ("mbarrier.init").

        Raises:
            Fault: one is there, or the count is out of range.
        """
        if not 1 <= count <= MAX_COUNT:
            raise Fault(f"{at}: an mbarrier of {count} arrivals")
        if address in self.objects:
            raise Fault(f"{at}: an mbarrier is at {address} already; mbarrier.inval comes first")
        cells = self._cells(address, at)
        self.shared.note_write(cells, np.array([warp]), at)
        self.shared.is_mbarrier[cells] = True
        never = np.zeros(len(self.clocks.known), np.int64)
        self.objects[address] = _Object(count, count, never, never)

    def invalidate(self, address: int, warp: int, at: Instruction) -> None:
        """Free the memory of an object for other use ("mbarrier.inval")."""
        self._object(address, at)
        cells = self._cells(address, at)
        self.shared.is_mbarrier[cells] = False
        self.shared.note_write(cells, np.array([warp]), at)
        self.shared.is_written[cells] = False
        del self.objects[address]

    def arrive(self, address: int, warp: int, count: int, at: Instruction) -> None:
        """Arrive `count` times for a thread of a warp ("mbarrier.arrive")."""
        self._use(address, warp, at).arrive(count, self.clocks.release(warp), at)

    def track(self, address: int, engine: int, at: Instruction) -> None:
        """Arrive once when all that an engine was given so far is complete ("tcgen05.commit")."""
        self._use(address, engine, at).tracked.append(self.clocks.release(engine))

    def is_complete(self, address: int, parity: int, warp: int, at: Instruction) -> bool:
        """Whether the phase of that parity has completed ("mbarrier.try_wait.parity").

        If it has, all that arrived in it is ordered before the later accesses of the warp.
        """
        found = self._use(address, warp, at)
        while found.phase % 2 == parity and found.tracked:
            found.arrive(1, found.tracked.pop(0), at)
        if found.phase % 2 == parity:
            return False
        self.clocks.follow(warp, found.completed)
        return True

    def _use(self, address: int, actor: int, at: Instruction) -> _Object:
        """The object, for an operation that has to come after its initialization and before its invalidation."""
        found = self._object(address, at)
        self.shared.order_read(self._cells(address, at), np.array([actor]), at)
        return found

    def _object(self, address: int, at: Instruction) -> _Object:
        if address not in self.objects:
            raise Fault(f"{at}: no mbarrier is at {address}")
        return self.objects[address]

    def _cells(self, address: int, at: Instruction) -> Array:
        return self.shared.cells(np.array([address]), SIZE, at)
