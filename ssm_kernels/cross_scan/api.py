"""Ops along several directions of a grid: the 2-D selective scan of VMamba (arXiv 2401.10166, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from .._core.dispatch import Backend, resolve_backend
from .._core.validation import check_divides, check_integer, check_no_nan, check_tensor
from ..causal_conv1d import numba as conv_numba
from ..causal_conv1d import triton as conv_triton
from ..causal_conv1d.api import check_activation
from ..selective_scan import numba as scan_numba
from ..selective_scan import triton as scan_triton
from ..ssd import numba as ssd_numba
from ..ssd import triton as ssd_triton
from ..ssd.api import canonical_skip, check_dt_limit
from . import addressed, permuted, pytorch, reference, triton
from .directions import CROSS, ScanDirection, check_directions

# Kernels that take directions, by backend.
_CONV_KERNELS = {"triton": conv_triton, "numba": conv_numba}
_SCAN_KERNELS = {"triton": scan_triton, "numba": scan_numba}
_SSD_KERNELS = {"triton": ssd_triton, "numba": ssd_numba}


def cross_scan(x: Tensor, directions: Sequence[ScanDirection] = CROSS, *, backend: Backend = "auto") -> Tensor:
    """Read a grid along several directions.

    Args:
        x: (B, height, width, D).
        directions: K names, at most 15.
        backend: see `ssm_kernels.use_backend`.

    Returns:
        (B, K, height * width, D).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_tensor("x", x, ("B", "height", "width", "D"))
    check_directions(directions)
    chosen = resolve_backend(backend, x.device, "cross_scan")
    scan = {"triton": triton.cross_scan, "torch": pytorch.cross_scan, "reference": reference.cross_scan}[chosen]
    return scan(x, tuple(directions))  # (B, K, height * width, D)


def cross_merge(
    y: Tensor, height: int, width: int, directions: Sequence[ScanDirection] = CROSS, *, backend: Backend = "auto"
) -> Tensor:
    """Add what was read along each direction in its position of the grid: the adjoint of `cross_scan`.

    Args:
        y: (B, K, height * width, D).
        height, width: of the grid.
        directions: the K names that `y` was read along.
        backend: see `ssm_kernels.use_backend`.

    Returns:
        (B, height, width, D), summed in float32 at least, in the dtype of `y`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_directions(directions)
    height, width = check_integer("height", height, 0), check_integer("width", width, 0)
    check_tensor("y", y, ("B", len(directions), height * width, "D"))
    chosen = resolve_backend(backend, y.device, "cross_merge")
    merge = {"triton": triton.cross_merge, "torch": pytorch.cross_merge, "reference": reference.cross_merge}[chosen]
    return merge(y, height, width, tuple(directions))  # (B, height, width, D)


def cross_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Literal["silu"] | None = None,
    directions: Sequence[ScanDirection] = CROSS,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Convolve a grid along several directions, as `causal_conv1d` does in time. No kernel makes a permuted copy.

    Args:
        x: (B, height, width, E).
        weight: (K, E, W) W taps of each direction and channel.
        bias: (K, E).
        activation: None or `"silu"`.
        directions: K names, at most 15.
        backend: see `ssm_kernels.use_backend`.

    Returns:
        (B, height, width, K, E) in the dtype of `x`: the result of direction k at each position.

    Raises:
        TypeError, ValueError, RuntimeError: as `causal_conv1d`.
    """
    check_tensor("x", x, ("B", "height", "width", "E"))
    check_directions(directions)
    k, dim = len(directions), x.shape[3]
    check_tensor("weight", weight, (k, dim, "W"), like=x)
    if bias is not None:
        check_tensor("bias", bias, (k, dim), like=x)
    check_activation(activation)
    # Chosen as for `causal_conv1d`: its kernels take directions, its other fast backend runs on permuted copies.
    chosen = resolve_backend(backend, x.device, "causal_conv1d")
    if chosen == "reference":
        return reference.cross_causal_conv1d(x, weight, bias, activation == "silu", tuple(directions))
    if chosen in _CONV_KERNELS:
        return addressed.cross_causal_conv1d(_CONV_KERNELS[chosen], x, weight, bias, activation == "silu", directions)
    return permuted.cross_causal_conv1d(x, weight, bias, activation, directions, chosen)


def cross_selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    directions: Sequence[ScanDirection] = CROSS,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Scan a grid along several directions, as `selective_scan` does in time, and add. No kernel makes a permuted copy.

    Args:
        u: (B, height, width, E) input of every direction.
        dt: (B, height, width, K, E).
        A: (K, E, N).
        B, C: (B, height, width, K, N).
        D, dt_bias: (K, E).
        dt_softplus: as in `selective_scan`.
        directions: K names, at most 15.
        backend: see `ssm_kernels.use_backend`.

    Returns:
        (B, height, width, E): the sum over directions at each position, in the dtype of `u`.

    Raises:
        TypeError, ValueError, RuntimeError: as `selective_scan`.
    """
    check_tensor("u", u, ("B", "height", "width", "E"))
    batch, height, width, dim = u.shape
    check_directions(directions)
    k = len(directions)
    check_tensor("dt", dt, (batch, height, width, k, dim), like=u)
    check_tensor("A", A, (k, dim, "N"), like=u)
    for name, m in (("B", B), ("C", C)):
        check_tensor(name, m, (batch, height, width, k, A.shape[2]), like=u)
    for name, m in (("D", D), ("dt_bias", dt_bias)):
        if m is not None:
            check_tensor(name, m, (k, dim), like=u)
    # NaN in dt would reach every later position of each direction.
    check_no_nan("dt", dt)
    chosen = resolve_backend(backend, u.device, "selective_scan")
    if chosen == "reference":
        return reference.cross_selective_scan(u, dt, A, B, C, D, dt_bias, dt_softplus, tuple(directions))
    # One scan over the K * E channels of all directions.
    A = A.flatten(0, 1)  # (K * E, N)
    D, dt_bias = (None if m is None else m.flatten() for m in (D, dt_bias))  # (K * E,)
    if chosen in _SCAN_KERNELS:
        return addressed.cross_selective_scan(
            _SCAN_KERNELS[chosen], u, dt, A, B, C, D, dt_bias, dt_softplus, directions
        )
    return permuted.cross_selective_scan(u, dt, A, B, C, D, dt_bias, dt_softplus, directions, chosen)


def cross_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    directions: Sequence[ScanDirection] = CROSS,
    *,
    chunk_size: int = 64,
    backend: Backend = "auto",
) -> Tensor:
    """Scan a grid along several directions, as `ssd` does in time. No kernel makes a permuted copy.

    Args:
        x: (B, height, width, K, H, P) input of each direction.
        dt: (B, height, width, K, H).
        A, dt_bias: (K, H).
        B, C: (B, height, width, K, G, N).
        D: (K, H) or (K, H, P).
        dt_softplus, dt_limit, chunk_size: as in `ssd`.
        directions: K names, at most 15.
        backend: see `ssm_kernels.use_backend`.

    Returns:
        (B, height, width, K, H, P) in the dtype of `x`: the result of direction k at each position.

    Raises:
        TypeError, ValueError, RuntimeError: as `ssd`.
    """
    check_directions(directions)
    k = len(directions)
    check_tensor("x", x, ("B", "height", "width", k, "H", "P"))
    batch, height, width, _, heads, headdim = x.shape
    check_tensor("dt", dt, (batch, height, width, k, heads), like=x)
    check_tensor("A", A, (k, heads), like=x)
    check_tensor("B", B, (batch, height, width, k, "G", "N"), like=x)
    check_divides("G, the fifth size of B,", B.shape[4], "H", heads)
    check_tensor("C", C, tuple(B.shape), like=x)
    if D is not None:
        check_tensor("D", D, (k, heads, headdim) if D.dim() == 3 else (k, heads), like=x)
    if dt_bias is not None:
        check_tensor("dt_bias", dt_bias, (k, heads), like=x)
    dt_limit = check_dt_limit(dt_limit)
    chunk_size = check_integer("chunk_size", chunk_size, 1)
    check_no_nan("dt", dt)
    chosen = resolve_backend(backend, x.device, "ssd")
    if chosen == "reference":
        return reference.cross_ssd(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, tuple(directions))
    # One scan over the K * H heads of all directions.
    A = A.flatten()  # (K * H,)
    D, dt_bias = (None if m is None else m.flatten(0, 1) for m in (D, dt_bias))  # (K * H,), D also (K * H, P)
    if chosen in _SSD_KERNELS:
        return addressed.cross_ssd(
            _SSD_KERNELS[chosen], x, dt, A, B, C, canonical_skip(D), dt_bias, dt_softplus, dt_limit, directions,
            chunk_size,
        )  # fmt: skip
    return permuted.cross_ssd(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, directions, chunk_size, chosen)
