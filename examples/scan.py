"""Both scans: forward, backward, a state that goes on, and decoding token by token.

python examples/scan.py
"""

from __future__ import annotations

import torch

from ssm_kernels import selective_scan, ssd, ssd_step


def mamba1(B: int = 2, L: int = 200, D: int = 8, N: int = 16) -> torch.Tensor:
    """Scan two halves, the second from the state of the first; return the largest difference from one scan."""
    u, dt = torch.randn(B, L, D, requires_grad=True), torch.randn(B, L, D)
    A, Bm, C = -torch.rand(D, N), torch.randn(B, L, N), torch.randn(B, L, N)
    whole = selective_scan(u, dt, A, Bm, C, dt_softplus=True)  # y (B, L, D), final_states (B, D, N)
    whole.y.square().mean().backward()
    assert u.grad is not None
    print("selective_scan", *(tuple(t.shape) for t in (whole.y, whole.final_states, u.grad)))

    a, b = slice(0, L // 2), slice(L // 2, L)
    first = selective_scan(u[:, a], dt[:, a], A, Bm[:, a], C[:, a], dt_softplus=True)
    second = selective_scan(
        u[:, b], dt[:, b], A, Bm[:, b], C[:, b], dt_softplus=True, initial_states=first.final_states
    )
    return (torch.cat([first.y, second.y], dim=1) - whole.y).abs().max()


def mamba2(L: int = 200, H: int = 4, P: int = 16, N: int = 32) -> torch.Tensor:
    """Scan a prompt, then decode the rest; return the largest difference from one scan."""
    x, dt, A = torch.randn(1, L, H, P), torch.rand(1, L, H), -torch.rand(H)
    Bm, C = torch.randn(1, L, 1, N), torch.randn(1, L, 1, N)  # one group: all heads share B and C
    whole = ssd(x, dt, A, Bm, C)  # y (1, L, H, P), final_states (1, H, P, N)
    print("ssd", *(tuple(t.shape) for t in whole))

    n = L - 5
    y, state = ssd(x[:, :n], dt[:, :n], A, Bm[:, :n], C[:, :n])
    tokens = [y]
    for t in range(n, L):
        now = slice(t, t + 1)
        tokens.append(ssd_step(state, x[:, now], dt[:, now], A, Bm[:, now], C[:, now]))  # updates `state`
    return (torch.cat(tokens, dim=1) - whole.y).abs().max()


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"two halves differ from the whole by {mamba1():.1e}")
    print(f"decoding differs from the whole by {mamba2():.1e}")
