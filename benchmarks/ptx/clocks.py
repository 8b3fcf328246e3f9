"""Vector clocks of a block: which accesses are ordered before which ("Memory Consistency Model").

An actor executes accesses one after the other: a warp, or one of the engines that execute the asynchronous instructions
of a warp. Each actor counts its epochs, and knows up to which epoch the others are ordered before it: an access of
actor a in epoch e comes before the next access of actor b if `known[b, a] >= e`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .values import Array

MMA, LOAD, STORE = 1, 2, 3
"""Engines of a warp: products of tensor memory, and loads and stores of it. Warps themselves are engine 0."""
ENGINES = 4


class Clocks:
    """Clocks of the warps of a block and of their engines.

    Args:
        warps: warps of the block.
        has_engines: whether warps issue asynchronous instructions that access memory by themselves (`tcgen05`).
    """

    def __init__(self, warps: int, has_engines: bool):
        self.warps, self.has_engines = warps, has_engines
        actors = warps * (ENGINES if has_engines else 1)
        self.known: NDArray[np.int64] = np.ones((actors, actors), np.int64)  # (actors, actors)

    def actor(self, engine: int, warp: int) -> int:
        """The index of an engine of a warp."""
        return engine * self.warps + warp

    def engine(self, actor: int) -> int:
        """The engine that an actor is; 0 for a warp."""
        return actor // self.warps

    def epoch(self, actors: Array) -> Array:
        """The current epoch of each actor."""
        return self.known[actors, actors]

    def meet(self, actors: Array) -> None:
        """Order all earlier accesses of these actors before all later ones: a barrier."""
        self.known[actors] = self.known[actors].max(0)
        self.known[actors, actors] += 1

    def restart(self) -> None:
        """Order everything before everything later: the start of a program."""
        self.meet(np.arange(len(self.known)))

    def issue(self, warp: int, engine: int) -> int:
        """Order what a warp knows before the next accesses of its engine; return the engine's index."""
        actor = self.actor(engine, warp)
        self.follow(actor, self.known[warp])
        return actor

    def follow(self, actors: Array | int, clock: Array) -> None:
        """Order what a clock knows before the next accesses of actors."""
        self.known[actors] = np.maximum(self.known[actors], clock)

    def release(self, actor: int) -> Array:
        """End an actor's epoch: a clock that knows what a warp knows, or of an engine its own accesses alone."""
        clock = self.known[actor].copy()
        if actor >= self.warps:
            clock[:] = 0
            clock[actor] = self.known[actor, actor]
        self.known[actor, actor] += 1
        return clock
