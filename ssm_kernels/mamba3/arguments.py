"""Arguments and states of Mamba-3 in canonical form, which the API, the reference and the fast path share.

Letters: B batch, L length, R rank (1 for SISO), H heads, P head dimension, N state, G groups, K rotated pairs of a
state, S sequences in a pack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Mamba3States(NamedTuple):
    """State of a batch of sequences between two steps, of the shapes that `mamba_ssm` keeps."""

    angles: Tensor
    """(B, H, K) rotation up to the last step, in radians, from 0 to 2 pi."""
    ssm: Tensor
    """(B, H, P, N) state of the recurrence."""
    B: Tensor
    """(B, R, H, N) input matrices of the last step, with their bias, rotated."""
    x: Tensor
    """(B, H, P) input of the last step."""


class Mamba3Arguments(NamedTuple):
    """Arguments of `mamba3`."""

    x: Tensor
    """(B, L, H, P)"""
    dt: Tensor
    """(B, L, H)"""
    A: Tensor
    """(B, L, H)"""
    B: Tensor
    """(B, L, R, G, N)"""
    C: Tensor
    """(B, L, R, G, N)"""
    trap: Tensor
    """(B, L, H)"""
    angles: Tensor
    """(B, L, K)"""
    B_bias: Tensor | None
    """(H, R, N)"""
    C_bias: Tensor | None
    """(H, R, N)"""
    D: Tensor | None
    """(H,)"""
    z: Tensor | None
    """(B, L, H, P)"""
    mimo_x: Tensor | None
    """(H, R, P); None for SISO."""
    mimo_z: Tensor | None
    """(H, R, P)"""
    mimo_o: Tensor | None
    """(H, R, P); None leaves the ranks of y apart."""
    initial_states: Mamba3States | None
    cu_seqlens: Tensor | None
    """(S + 1,)"""
    seq_idx: Tensor | None
    """(B, L)"""

    def by_token(self) -> Mamba3Arguments:
        """Return the arguments of B L sequences of one step each, in place of B sequences of L steps."""
        return self._with_steps(lambda t: t.flatten(0, 1).unsqueeze(1))

    def rows(self, first: int, end: int) -> Mamba3Arguments:
        """Return the arguments of some rows of the batch."""
        return self._with_steps(lambda t: t[first:end])

    def _with_steps(self, function: Callable[[Tensor], Tensor]) -> Mamba3Arguments:
        steps = {name: getattr(self, name) for name in ("x", "dt", "A", "B", "C", "trap", "angles", "z")}
        return self._replace(**{name: None if t is None else function(t) for name, t in steps.items()})
