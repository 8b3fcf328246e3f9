"""Argument checks and layouts shared by the functions of this package."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from ..._core.validation import check_tensor, has_readable_values

INDICES = (torch.int32, torch.int64)
UNLIMITED = (0.0, float("inf"))


@overload
def time_before_channels(name: str, tensor: Tensor) -> Tensor: ...


@overload
def time_before_channels(name: str, tensor: Tensor | None) -> Tensor | None: ...


def time_before_channels(name: str, tensor: Tensor | None) -> Tensor | None:
    """Transpose (B, D, L) to (B, L, D), after a check; None stays None."""
    if tensor is None:
        return None
    check_tensor(name, tensor, ("B", "D", "L"))
    return tensor.transpose(1, 2)  # (B, L, D)


def time_before_state(matrix: Tensor) -> Tensor:
    """Move L of (B, N, L) or (B, G, N, L) behind B; (D, N) stays as it is."""
    if not isinstance(matrix, Tensor) or matrix.dim() < 3:
        return matrix
    return matrix.movedim(-1, 1)  # (B, L, N) or (B, L, G, N)


def check_activation(name: str | None) -> Literal["silu"] | None:
    """Return the name of the activation in `ssm_kernels.causal_conv1d`.

    Raises:
        NotImplementedError: the originals have no such activation either.
    """
    if name not in (None, "silu", "swish"):
        raise NotImplementedError(f"activation must be None, 'silu' or 'swish', got {name!r}")
    return None if name is None else "silu"


def _rows(name: str, indices: Tensor | None, state: Tensor, x: Tensor) -> int:
    """Check indices into a pool of states, and return the number of rows that the pool must have.

    An index that is too large is found on a CPU only: on a GPU, reading the indices would be a host-device
    synchronization. Negative ones are padding (`StateRows`).
    """
    if indices is None:
        return x.shape[0]
    check_tensor(name, indices, (x.shape[0],), like=x, dtypes=INDICES)
    if has_readable_values(indices) and (indices >= len(state)).any():
        raise ValueError(f"{name} must be rows of the state, of which there are {len(state)}, got {indices.tolist()}")
    return len(state)


def single(output: Tensor | tuple[Tensor | None, ...]) -> Tensor:
    """Return the output of a function that returns a tensor here, and with other arguments a tuple."""
    assert isinstance(output, Tensor)
    return output


def pair(output: Tensor | tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """Return the two outputs of a function that returns two here, and with other arguments one."""
    assert isinstance(output, tuple)
    first, second = output
    assert first is not None and second is not None
    return first, second


class StateRows(NamedTuple):
    """Rows of a pool of states that a batch reads and writes; a negative index is padding.

    Nothing is read on the host. A padded row duplicates a valid one: it reads that row's state and writes that row's
    result, so that both write the same values to the same row. Where all rows are padding, row 0 of the pool is
    rewritten unchanged.
    """

    rows: Tensor
    """(B,) rows of the pool, none of them negative."""
    donor: Tensor
    """(B,) for each row of the batch, the row of the batch whose state is written: itself, or a valid one."""
    valid: Tensor
    """(B,) false where padded."""

    @classmethod
    def of(cls, indices: Tensor) -> StateRows:
        """Return the rows that indices (B,) select."""
        valid = indices >= 0
        here = torch.arange(len(indices), device=indices.device)
        # `argmax` finds a valid row, and row 0 where there is none.
        donor = torch.where(valid, here, valid.int().argmax()) if len(indices) else here
        return cls(indices[donor].clamp(min=0).long(), donor, valid)

    def write(self, pool: Tensor, old: Tensor, new: Tensor) -> None:
        """Write `new` (B, ...) to the pool, whose rows held `old` (B, ...)."""
        pool[self.rows] = torch.where(self.valid.any(), new[self.donor], old)

    def blank(self, y: Tensor) -> Tensor:
        """Return y (B, ...) with zeros where padded."""
        return y.masked_fill(~self.valid.view(-1, *(1,) * (y.dim() - 1)), 0)
