"""Routes of a one-dimensional scan over an image: the cross scan of VMamba (arXiv 2401.10166, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from .._backend import Backend, resolve_backend
from .._checks import check_tensor
from . import chunked, reference

Route = Literal["rows", "columns", "rows_reversed", "columns_reversed"]
"""`rows` reads the grid row by row, `columns` column by column; the other two read the same backwards."""

BIDIRECTIONAL: tuple[Route, ...] = ("rows", "rows_reversed")
CROSS: tuple[Route, ...] = ("rows", "columns", "rows_reversed", "columns_reversed")


def cross_scan(x: Tensor, routes: Sequence[Route] = CROSS, *, backend: Backend = "auto") -> Tensor:
    """Read a grid along several routes.

    Args:
        x: (B, height, width, D).
        routes: K names.
        backend: see `ssm_kernels.use_backend`.

    Returns:
        (B, K, height * width, D).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_tensor("x", x, ("B", "height", "width", "D"))
    _check_routes(routes)
    scan = {"torch": chunked.scan, "reference": reference.scan}[resolve_backend(backend, x.device, "cross_scan")]
    return scan(x, tuple(routes))


def cross_merge(
    y: Tensor, height: int, width: int, routes: Sequence[Route] = CROSS, *, backend: Backend = "auto"
) -> Tensor:
    """Put what was read along each route back in its place and add: the adjoint of `cross_scan`.

    Args:
        y: (B, K, height * width, D).
        height, width: of the grid.
        routes: the K names that `y` was read along.
        backend: see `ssm_kernels.use_backend`.

    Returns:
        (B, height, width, D), added in float32 at least and given in the dtype of `y`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    _check_routes(routes)
    check_tensor("y", y, ("B", len(routes), height * width, "D"))
    merge = {"torch": chunked.merge, "reference": reference.merge}[resolve_backend(backend, y.device, "cross_scan")]
    return merge(y, height, width, tuple(routes))


def _check_routes(routes: Sequence[Route]) -> None:
    known = get_args(Route)
    if isinstance(routes, str) or not routes or any(r not in known for r in routes):
        raise ValueError(f"routes must be a sequence of names among {', '.join(known)}; got {routes!r}")
