"""Window of a resized image, equal to the pixel to the same window of Pillow's result.

Pillow computes the entire resized image in memory: 7 billion pixels for an image 1 pixel wide and 65,000 high that is
resized to a width of 336 for a center crop. Here only the rows and columns of the window are computed.

Both passes round to 8 bits, so their order shows. Pillow takes the vertical pass first for some images whose height
shrinks more than their width; here the horizontal one always comes first, as in Pillow where both are scaled alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

PRECISION_BITS = 22
"""Fractional bits of a weight, as in Pillow for 8-bit pixels."""


@dataclass(frozen=True)
class Placement:
    """Position of an image on a canvas, the size that the canvas is resized to, and the window cropped from it.

    Pairs are (x, y), in pixels.
    """

    canvas: tuple[int, int]
    offset: tuple[int, int]
    """Left and top of the image on the canvas."""
    target: tuple[int, int]
    """Size of the canvas after resizing."""
    window: tuple[int, int]
    """Left and top of the window in the resized canvas."""
    size: int
    """Side of the window."""


def resize_window(pixels: np.ndarray, placement: Placement, color: Sequence[int]) -> np.ndarray:
    """Resample a window: bicubic (Pillow's `BICUBIC`), horizontally and then vertically.

    Args:
        pixels: (H, W, 3) uint8.
        placement: canvas, resized size and window.
        color: of the canvas around the image, (3,).

    Returns:
        (size, size, 3) uint8.
    """
    p, border = placement, np.array([color], dtype=np.uint8)
    columns, rows = (list(_weights(p.canvas[i], p.target[i], p.window[i], p.size)) for i in (0, 1))
    # Rows of the canvas that the window's weights reach.
    first, last = rows[0][0], max(start + len(w) for start, w in rows)
    top, bottom = max(first - p.offset[1], 0), min(last - p.offset[1], len(pixels))
    resized = _resample(pixels[top:bottom].swapaxes(0, 1), p.offset[0], columns, border)  # (size, rows, 3)
    # Rows of the border are all alike.
    empty = _resample(np.empty((0, 1, 3), np.uint8), 0, columns, border)  # (size, 1, 3)
    canvas = np.concatenate(
        [
            empty.repeat(max(p.offset[1] - first, 0), axis=1),
            resized,
            empty.repeat(max(last - p.offset[1] - len(pixels), 0), axis=1),
        ],
        axis=1,
    )  # (size, last - first, 3)
    return _resample(canvas.swapaxes(0, 1), first, rows, border)


def _weights(source: int, target: int, start: int, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first pixel of the source and the weights from there, for each of `count` pixels of the target.

    Weights are computed in float64 in Pillow's order of operations and rounded as it rounds them.
    """
    scale = source / target
    stretch = max(scale, 1.0)
    for i in range(start, start + count):
        center = (i + 0.5) * scale
        low = max(int(center - 2.0 * stretch + 0.5), 0)
        high = min(int(center + 2.0 * stretch + 0.5), source)
        weights = _bicubic((np.arange(high - low) + low - center + 0.5) * (1.0 / stretch))
        weights /= weights.cumsum()[-1]  # sequential sum, as in Pillow
        yield low, np.trunc(weights * (1 << PRECISION_BITS) + np.copysign(0.5, weights))


def _bicubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Evaluate Keys' cubic convolution kernel (1981, eq. 15)."""
    x = np.abs(x)
    inner = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, inner, np.where(x < 2.0, outer, 0.0))


def _resample(
    lines: np.ndarray, offset: int, weights: Sequence[tuple[int, np.ndarray]], border: np.ndarray
) -> np.ndarray:
    """Compute weighted sums over the first axis: (n, m, 3) uint8 -> (len(weights), m, 3) uint8.

    Products and sums are integers below 2**53, so float64 holds them exactly, in any order.

    Args:
        lines: (n, m, 3) rows or columns of the image.
        offset: index on the canvas of the first of the lines.
        weights: for each line of the result, its first line on the canvas and the weights from there.
        border: (1, 3), the color of the canvas where there is no line.
    """
    out = np.empty((len(weights), *lines.shape[1:]), np.uint8)
    for i, (start, w) in enumerate(weights):
        low = min(max(offset - start, 0), len(w))
        high = max(min(offset + len(lines) - start, len(w)), low)
        inside = lines[start + low - offset : start + high - offset].astype(np.float64)  # (high - low, m, 3)
        total = np.tensordot(w[low:high], inside, axes=1)  # (m, 3)
        total += (w.sum() - w[low:high].sum()) * border
        out[i] = np.clip(np.floor((total + (1 << (PRECISION_BITS - 1))) / (1 << PRECISION_BITS)), 0, 255)
    return out
