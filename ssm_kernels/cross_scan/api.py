"""Routes of a one-dimensional scan over an image: the cross scan of VMamba (arXiv 2401.10166, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from .._core.dispatch import Backend, resolve_backend
from .._core.sharding import local
from .._core.validation import check_divides, check_integer, check_no_nan, check_tensor
from ..causal_conv1d import triton as triton_conv
from ..causal_conv1d.api import causal_conv1d, check_activation
from ..selective_scan import selective_scan
from ..selective_scan import triton as triton_selective_scan
from ..ssd import triton as triton_ssd
from ..ssd.api import canonical_skip, check_dt_limit, ssd
from . import pytorch, reference, triton

ScanDirection = Literal["rows", "columns", "rows_reversed", "columns_reversed"]
"""`rows` reads the grid row by row, `columns` column by column; the other two read the same backwards."""

BIDIRECTIONAL: tuple[ScanDirection, ...] = ("rows", "rows_reversed")
CROSS: tuple[ScanDirection, ...] = ("rows", "columns", "rows_reversed", "columns_reversed")


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
    _check_directions(directions)
    chosen = resolve_backend(backend, x.device, "cross_scan")
    if chosen == "triton":
        return triton.scan(x, _codes(directions))
    return {"torch": pytorch.scan, "reference": reference.scan}[chosen](x, tuple(directions))


def cross_merge(
    y: Tensor, height: int, width: int, directions: Sequence[ScanDirection] = CROSS, *, backend: Backend = "auto"
) -> Tensor:
    """Put what was read along each direction back in its place and add: the adjoint of `cross_scan`.

    Args:
        y: (B, K, height * width, D).
        height, width: of the grid.
        directions: the K names that `y` was read along.
        backend: see `ssm_kernels.use_backend`.

    Returns:
        (B, height, width, D), added in float32 at least and given in the dtype of `y`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    _check_directions(directions)
    height, width = check_integer("height", height, 0), check_integer("width", width, 0)
    check_tensor("y", y, ("B", len(directions), height * width, "D"))
    chosen = resolve_backend(backend, y.device, "cross_merge")
    if chosen == "triton":
        return triton.merge(y, height, width, _codes(directions))
    return {"torch": pytorch.merge, "reference": reference.merge}[chosen](y, height, width, tuple(directions))


def cross_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Literal["silu"] | None = None,
    directions: Sequence[ScanDirection] = CROSS,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Convolve a grid along several directions, as `causal_conv1d` does in time. No permuted copy is made in Triton.

    Args:
        x: (B, height, width, E).
        weight: (K, E, W) the taps of each direction.
        bias: (K, E).
        activation: None or `"silu"`.
        directions: K names, at most 15.
        backend: see `ssm_kernels.use_backend`.

    Returns:
        (B, height, width, K, E) in the dtype of `x`: what direction k gives at each place.

    Raises:
        TypeError, ValueError, RuntimeError: as `causal_conv1d`.
    """
    check_tensor("x", x, ("B", "height", "width", "E"))
    height, width, dim = x.shape[1:]
    _check_directions(directions)
    k = len(directions)
    check_tensor("weight", weight, (k, dim, "W"), like=x)
    if bias is not None:
        check_tensor("bias", bias, (k, dim), like=x)
        bias = bias.flatten()
    check_activation(activation)
    chosen = resolve_backend(backend, x.device, "causal_conv1d")
    if chosen == "triton":
        shared = x.flatten(1, 2).unsqueeze(2).expand(-1, -1, k, -1)  # (B, L, K, E)
        y = triton_conv.grouped_causal_conv1d(
            shared, weight.flatten(0, 1), bias, activation == "silu", _codes(directions), height
        )
        return y.unflatten(1, (height, width))
    copies = "torch" if chosen == "numba" else chosen
    paths = cross_scan(x, directions, backend=copies).transpose(1, 2).flatten(2)  # (B, L, K * E)
    y, _ = local(causal_conv1d)(paths, weight.flatten(0, 1), bias, activation, backend=chosen)
    return _to_places(y.unflatten(2, (k, dim)), height, width, directions, copies)


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
    """Scan a grid along several directions, as `selective_scan` does in time, and add. No permuted copy in Triton.

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
        (B, height, width, E): the sum over directions at each place, in the dtype of `u`.

    Raises:
        TypeError, ValueError, RuntimeError: as `selective_scan`.
    """
    check_tensor("u", u, ("B", "height", "width", "E"))
    batch, height, width, dim = u.shape
    _check_directions(directions)
    k = len(directions)
    check_tensor("dt", dt, (batch, height, width, k, dim), like=u)
    check_tensor("A", A, (k, dim, "N"), like=u)
    for name, m in (("B", B), ("C", C)):
        check_tensor(name, m, (batch, height, width, k, A.shape[2]), like=u)
    for name, m in (("D", D), ("dt_bias", dt_bias)):
        if m is not None:
            check_tensor(name, m, (k, dim), like=u)
    check_no_nan("dt", dt)
    A, D, dt_bias = (m if m is None else m.flatten(0, 1) for m in (A, D, dt_bias))
    chosen = resolve_backend(backend, u.device, "selective_scan")
    if chosen == "triton":
        shared = u.flatten(1, 2).unsqueeze(2).expand(-1, -1, k, -1)  # (B, L, K, E)
        dt, B, C = (m.flatten(1, 2) for m in (dt, B, C))
        y, _ = triton_selective_scan.grouped_selective_scan(
            shared, dt, A, B, C, D, None, dt_bias, dt_softplus, None, None, None, _codes(directions), height
        )
        y = y.sum(2, dtype=torch.promote_types(u.dtype, torch.float32)).to(u.dtype)
        return y.unflatten(1, (height, width))
    copies = "torch" if chosen == "numba" else chosen
    paths = cross_scan(u, directions, backend=copies).transpose(1, 2).flatten(2)  # (B, L, K * E)
    dt, B, C = (_to_directions(m, directions, copies) for m in (dt, B, C))
    y, _ = local(selective_scan)(paths, dt.flatten(2), A, B, C, D, None, dt_bias, dt_softplus, backend=chosen)
    return cross_merge(y.unflatten(2, (k, dim)).transpose(1, 2), height, width, directions, backend=copies)


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
    """Scan a grid along several directions, as `ssd` does in time. No permuted copy is made in Triton.

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
        (B, height, width, K, H, P) in the dtype of `x`: what direction k gives at each place.

    Raises:
        TypeError, ValueError, RuntimeError: as `ssd`.
    """
    _check_directions(directions)
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
    A, D, dt_bias = (m if m is None else m.flatten(0, 1) for m in (A, D, dt_bias))
    chosen = resolve_backend(backend, x.device, "ssd")
    if chosen == "triton":
        x, dt, B, C = (m.flatten(1, 2).flatten(2, 3) for m in (x, dt, B, C))  # (B, L, K * H, P), ...
        y, _ = triton_ssd.ssd(
            x, dt, A, B, C, canonical_skip(D), None, dt_bias, dt_softplus, dt_limit, None, None, None, chunk_size,
            _codes(directions), height,
        )  # fmt: skip
        return y.unflatten(2, (k, heads)).unflatten(1, (height, width))
    x, dt, B, C = (_to_directions(m, directions, chosen).flatten(2, 3) for m in (x, dt, B, C))
    y, _ = local(ssd)(x, dt, A, B, C, D, None, dt_bias, dt_softplus, dt_limit, chunk_size=chunk_size, backend=chosen)
    return _to_places(y.unflatten(2, (k, heads)), height, width, directions, chosen)


def _to_directions(x: Tensor, directions: Sequence[ScanDirection], backend: Backend) -> Tensor:
    """(B, height, width, K, ...) -> (B, L, K, ...), each slice read along its own direction."""
    paths = [
        cross_scan(part.flatten(3), (direction,), backend=backend)[:, 0]
        for part, direction in zip(x.unbind(3), directions, strict=True)
    ]
    return torch.stack(paths, 2).unflatten(3, x.shape[4:])


def _to_places(y: Tensor, height: int, width: int, directions: Sequence[ScanDirection], backend: Backend) -> Tensor:
    """(B, L, K, ...) -> (B, height, width, K, ...), the inverse of `_to_directions`."""
    grids = [
        cross_merge(part.flatten(2).unsqueeze(1), height, width, (direction,), backend=backend)
        for part, direction in zip(y.unbind(2), directions, strict=True)
    ]
    return torch.stack(grids, 3).unflatten(4, y.shape[3:])


def _codes(directions: Sequence[ScanDirection]) -> list[int]:
    """As the kernels name directions: see `grid_offset`."""
    return [CROSS.index(direction) for direction in directions]


def _check_directions(directions: Sequence[ScanDirection]) -> None:
    known = get_args(ScanDirection)
    if isinstance(directions, str) or not directions or any(r not in known for r in directions):
        raise ValueError(f"directions must be a sequence of names among {', '.join(known)}; got {directions!r}")
