"""Activations that the backward recomputes, rather than autograd saving them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .transforms import is_transformed


@contextlib.contextmanager
def recompute_in_backward(*activations: tuple[Tensor, Callable[[], Tensor]], enabled: bool = True) -> Iterator[None]:
    """Make autograd save neither these tensors nor their views; the backward recomputes each, once.

    `torch.utils.checkpoint` would recompute everything inside too. Where its hooks, or others, are active already, and
    in a compiled graph, nothing is changed: they choose what is saved. Nor is anything under a transform of
    `torch.func`, which takes no hooks.

    Args:
        activations: tensors, each with the function that computes it again.
        enabled: False changes nothing.
    """
    if not enabled or torch.compiler.is_compiling() or is_transformed() or not torch.is_grad_enabled() or _has_hooks():
        yield
        return
    # By storage, so that views of an activation are recognized too.
    discarded = {_storage(out): RecomputedTensor(recompute) for out, recompute in activations}

    def pack(t: Tensor) -> SavedTensor | RecomputedView:
        source = discarded.get(_storage(t))
        return SavedTensor(t, t._version) if source is None else source.save_view(t)

    def unpack(saved: SavedTensor | RecomputedView) -> Tensor:
        return saved.restore()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _has_hooks() -> bool:
    autograd = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    return autograd._top_saved_tensors_default_hooks(False) is not None


def _storage(t: Tensor) -> int:
    # The data pointer would not do: fake and meta tensors have none.
    return t.untyped_storage()._cdata


class SavedTensor(NamedTuple):
    """A tensor that is saved. With hooks, autograd does not check whether it has been changed since."""

    tensor: Tensor
    version: int

    def restore(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the backward needs was changed in place"
            )
        return self.tensor


class RecomputedView(NamedTuple):
    """A view of a tensor that is recomputed."""

    source: RecomputedTensor
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    def restore(self) -> Tensor:
        return self.source.restore_view(self)


class RecomputedTensor:
    """A tensor that is recomputed for the first of its views in a backward, and released after the last."""

    def __init__(self, recompute: Callable[[], Tensor]):
        self.recompute = recompute
        self.tensor: Tensor | None = None
        self.n_views = self.n_restored = 0

    def save_view(self, t: Tensor) -> RecomputedView:
        self.n_views += 1
        return RecomputedView(self, t.size(), t.stride(), t.storage_offset())

    def restore_view(self, view: RecomputedView) -> Tensor:
        if self.tensor is None:
            # The gradient flows through the graph of the forward: this is only its value again.
            with torch.no_grad():
                self.tensor = self.recompute()
        restored = self.tensor.as_strided(view.size, view.stride, view.offset)
        self.n_restored += 1
        if self.n_restored % self.n_views == 0:  # a retained graph runs its backward again
            self.tensor = None
        return restored
