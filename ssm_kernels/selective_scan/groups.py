"""Groups of channels that share a row of B and C."""

from __future__ import annotations

from torch import Tensor


def repeat_groups(m: Tensor, groups: int) -> Tensor:
    """Repeat each group for its neighbors: (B, L, g, N) -> (B, L, G, N). A view for one group, or as many as there are.

    Args:
        m: (B, L, g, N), with g dividing `groups`.
        groups: number of groups G.
    """
    repeated = m.unsqueeze(3).expand(-1, -1, -1, groups // m.shape[2], -1)  # (B, L, g, G / g, N)
    return repeated.flatten(2, 3)  # (B, L, G, N)
