"""Argument checks and layouts that the functions of this package have in common."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..._core.validation import check_tensor, has_readable_values

INDICES = (torch.int32, torch.int64)
UNLIMITED = (0.0, float("inf"))


def time_before_channels(name: str, tensor: Tensor | None) -> Tensor | None:
    """(B, D, L) -> (B, L, D)."""
    if tensor is None:
        return None
    check_tensor(name, tensor, ("B", "D", "L"))
    return tensor.transpose(1, 2)


def time_before_state(matrix: Tensor) -> Tensor:
    """(B, N, L) or (B, G, N, L) with L after B; (D, N) as it is."""
    if not isinstance(matrix, Tensor) or matrix.dim() < 3:
        return matrix
    return matrix.movedim(-1, 1)


def check_activation(name: str | None) -> Literal["silu"] | None:
    """Give the name that `ssm_kernels.causal_conv1d` knows the activation by.

    Raises:
        NotImplementedError: the originals have no such activation either.
    """
    if name not in (None, "silu", "swish"):
        raise NotImplementedError(f"activation must be None, 'silu' or 'swish', got {name!r}")
    return None if name is None else "silu"


def _rows(name: str, indices: Tensor | None, state: Tensor, x: Tensor) -> int:
    """Check indices into a pool of states, and give the number of rows that the pool must have.

    Too large an index is found on a CPU only: on a GPU, reading the indices would be a host-device synchronization.
    What negative ones mean (`StateRows`) does not depend on this check.
    """
    if indices is None:
        return x.shape[0]
    check_tensor(name, indices, (x.shape[0],), like=x, dtypes=INDICES)
    if has_readable_values(indices) and (indices >= len(state)).any():
        raise ValueError(f"{name} must be rows of the state, of which there are {len(state)}, got {indices.tolist()}")
    return len(state)


class StateRows(NamedTuple):
    """The rows of a pool of states that a batch reads and writes; a negative index is padding.

    No value is read on the host. A padded row stands in for a valid one: it reads that row's state and writes that
    row's result, so that both write the same to the same place. Where all rows are padding, row 0 of the pool is
    written as it was.
    """

    rows: Tensor
    """(B,) rows of the pool, none of them negative."""
    donor: Tensor
    """(B,) for each row of the batch, the row of the batch whose state is written: itself, or a valid one."""
    valid: Tensor
    """(B,) false where padded."""

    @classmethod
    def of(cls, indices: Tensor) -> StateRows:
        """Rows from (B,) indices."""
        valid = indices >= 0
        here = torch.arange(len(indices), device=indices.device)
        donor = torch.where(valid, here, valid.int().argmax()) if len(indices) else here
        return cls(indices[donor].clamp(min=0).long(), donor, valid)

    def write(self, pool: Tensor, old: Tensor, new: Tensor) -> None:
        """Put `new` (B, ...) into the pool, whose rows held `old` (B, ...)."""
        pool[self.rows] = torch.where(self.valid.any(), new[self.donor], old)

    def blank(self, y: Tensor) -> Tensor:
        """Output (B, ...) with zeros where padded."""
        return y.masked_fill(~self.valid.view(-1, *(1,) * (y.dim() - 1)), 0)
