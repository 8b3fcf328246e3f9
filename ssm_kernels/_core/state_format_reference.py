"""Rounding of stored states as `state_format` defines it. The ground truth of the backends."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return four random words of 32 bits: Philox-4x32-10 (Salmon et al., 2011, section 3.3).

    Args:
        counter, key: words of 32 bits.
    """
    c, (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = (high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0)
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def random_bits(seed: int, rows: int, n: int) -> np.ndarray:
    """Return the 16 bits of each element of a state, (rows, n) int64."""
    seed %= 2**64
    bits = np.zeros((rows, n), np.int64)
    for r in range(rows):
        for first in range(0, n, 8):
            words = philox((first // 8, r, 0, 0), (seed % 2**32, seed // 2**32))
            halves = [half for word in words for half in (word % 2**16, word // 2**16)]
            bits[r, first : first + 8] = halves[: n - first]
    return bits


def decode(state: Tensor, scale: Tensor | None) -> Tensor:
    """Return the numbers that a stored state stands for, float32 for a narrow one."""
    values = state if state.dtype == torch.float64 else state.float()
    return values if scale is None else values * scale[..., None]


def store(state: Tensor, scale: Tensor | None, values: Tensor, seed: int | None) -> None:
    """Write one state of numbers (..., N) to `state`, rounded to its format, and for int8 its scales to `scale`.

    Args:
        state: one stored state.
        scale: (...) its scales.
        values: (..., N) of the dtype that `decode` has.
        seed: of stochastic rounding; None for rounding to the nearest.
    """
    if state.dtype in (torch.float32, torch.float64):
        state.copy_(values)
        return
    x = values.double().reshape(-1, values.shape[-1]).numpy()  # (rows, N), exact
    noise = None if seed is None else random_bits(seed, *x.shape)
    if scale is not None:
        stored, scales = _int8(x.astype(np.float32), 32768 if noise is None else noise)
        state.copy_(torch.from_numpy(stored).view_as(values))
        scale.copy_(torch.from_numpy(scales).view_as(scale))
    elif noise is None:
        state.copy_(values)
    else:
        mantissa, least, bits = (7, -126, 16) if state.dtype == torch.bfloat16 else (10, -14, 13)
        with np.errstate(invalid="ignore"):
            rounded = _float(x, noise >> 16 - bits, mantissa, least, bits)
        state.copy_(torch.from_numpy(np.where(np.isfinite(x), rounded, x)).view_as(values).float())


def _float(x: np.ndarray, noise: np.ndarray, mantissa: int, least: int, bits: int) -> np.ndarray:
    """Round stochastically, with so many random bits, to the floats of a mantissa and a least exponent."""
    exponent = np.maximum(np.frexp(x)[1] - 1, least)
    unit = np.ldexp(1.0, exponent - mantissa)
    fine = np.rint(np.abs(x) / unit * 2**bits)  # an integer, but for numbers of fewer digits than the format has
    return np.copysign(np.floor((fine + noise) / 2**bits) * unit, x)


def _int8(x: np.ndarray, noise: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    largest = np.abs(x).max(-1, keepdims=True)
    is_zero = largest < np.float32(2.0**-100)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        per_unit = np.where(is_zero, np.float32(0), np.float32(127 * 65536) / largest)
        scale = np.where(is_zero, np.float32(0), largest * np.float32(1 / 127))
        units = np.nan_to_num(np.abs(x) * per_unit).astype(np.int64)
    magnitudes = units + noise >> 16
    return np.where(x < 0, -magnitudes, magnitudes).astype(np.int8), scale[..., 0]
