"""Activations that are computed again in the backward rather than kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


@contextlib.contextmanager
def recompute_in_backward(*activations: tuple[Tensor, Callable[[], Tensor]]) -> Iterator[None]:
    """Inside, autograd keeps none of these tensors nor their views; the backward has each computed again, once.

    `torch.utils.checkpoint` would run what is inside again too. Where its hooks, or others, are at work already, and
    in a compiled graph, nothing is changed: what is kept is then their choice.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or _has_hooks():
        yield
        return
    forgotten = {_storage(out): RecomputedTensor(again) for out, again in activations}

    def pack(t: Tensor) -> SavedTensor | _Part:
        source = forgotten.get(_storage(t))
        return SavedTensor(t, t._version) if source is None else source.part(t)

    def unpack(kept: SavedTensor | _Part) -> Tensor:
        return kept.restore()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _has_hooks() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _storage(t: Tensor) -> int:
    # Of a fake or meta tensor, the address of the data would not tell one storage from another.
    return t.untyped_storage()._cdata


class SavedTensor(NamedTuple):
    """A tensor that is kept. Where there are hooks, autograd does not look whether it has been changed since."""

    tensor: Tensor
    version: int

    def restore(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the backward needs was changed in place"
            )
        return self.tensor


class _Part(NamedTuple):
    """A view of a tensor that is not there."""

    source: RecomputedTensor
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def restore(self) -> Tensor:
        return self.source.view(self)


class RecomputedTensor:
    """A tensor that is computed again for the first of its parts, and let go with the last."""

    def __init__(self, again: Callable[[], Tensor]):
        self.again, self.tensor = again, None
        self.parts = self.restored = 0

    def part(self, t: Tensor) -> _Part:
        self.parts += 1
        return _Part(self, t.size(), t.stride(), t.storage_offset())

    def view(self, part: _Part) -> Tensor:
        if self.tensor is None:
            with torch.no_grad():
                self.tensor = self.again()
        view = self.tensor.as_strided(part.size, part.stride, part.offset)
        self.restored += 1
        if self.restored % self.parts == 0:
            self.tensor = None
        return view
