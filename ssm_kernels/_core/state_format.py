"""Formats of a stored state: float32, bfloat16, float16, and int8 with scales; rounding to the nearest, or stochastic.

The steps compute in float32. A state in a narrow format is read, advanced, and rounded again at every step: to the
nearest, an update smaller than half a unit is lost at every step, and a state that decays slowly stands still. Rounding
up with the probability that the remainder has keeps the mean.

The random bits are a function of a seed, a row and a column: those of element n of row r of a state, (D, N) or
(H P, N), are half n mod 8, low halves first, of the four words of Philox-4x32-10 (Salmon et al., 2011, "Parallel random
numbers: as easy as 1, 2, 3") with the counter (n // 8, r, 0, 0) and the seed as the key, low word first. With these 16
bits b, an element of magnitude a becomes

- bfloat16: the bits of a plus b, cut to the upper 16;
- float16: the bits of a plus b // 8, cut to all but 13; an a below 2^-14 is counted in units of 2^-37 instead;
- int8: floor((floor(65536 * 127 a / m) + b) / 65536), with m the largest magnitude of its row and m / 127 as the row's
  scale; b is 32768 without a seed. Rows of magnitudes below 2^-100 are zero, and a NaN or an infinity makes all its row
  NaN or infinite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .validation import check_tensor

STATE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8)
NARROW_DTYPES = (torch.bfloat16, torch.float16, torch.int8)
FORMAT_SCHEMA = "Tensor(b!)? state_scale, Tensor? seeds"
"""The arguments beside a state, in the language of `torch.library`; seeds are (M,), one a token."""
WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
BITS_PER_CALL = 8
"""Elements that share a call of Philox: two halves of each of its four words."""
INT8_MAX = 127
LEAST_ROW = 2.0**-100
"""A row of int8 whose largest magnitude is below is zero: the reciprocal of its scale would overflow."""


def compute_dtype(state: Tensor) -> torch.dtype:
    """Return the dtype that a step computes in: float32 for a narrow state, else that of the state."""
    return torch.float32 if state.dtype in NARROW_DTYPES else state.dtype


def check_format(state: Tensor, state_scale: Tensor | None, rand_seed: Tensor | None, sequences: int) -> None:
    """Check what comes beside a state of a dtype among `STATE_DTYPES`.

    Args:
        state: (rows, ..., N).
        state_scale: (rows, ...) float32 scales of int8.
        rand_seed: (S,) or (1,) int64.
        sequences: number of sequences S.

    Raises:
        TypeError, ValueError: a wrong type, shape or device, or an argument that the format does not have.
    """
    dtype = str(state.dtype).removeprefix("torch.")
    if (state_scale is None) == (state.dtype == torch.int8):
        need = "must be given with a state in int8" if state_scale is None else "is for a state in int8 alone"
        raise ValueError(f"state_scale {need}; the state is {dtype}")
    if state_scale is not None:
        check_tensor("state_scale", state_scale, tuple(state.shape[:-1]), like=state, dtypes=(torch.float32,))
    if rand_seed is not None:
        if state.dtype not in NARROW_DTYPES:
            raise ValueError(f"rand_seed is for a state in bfloat16, float16 or int8; the state is {dtype}")
        shape = (1,) if isinstance(rand_seed, Tensor) and rand_seed.shape == (1,) else (sequences,)
        check_tensor("rand_seed", rand_seed, shape, like=state, dtypes=(torch.int64,))


def random_bits(seeds: Tensor, rows: int, n: int) -> Tensor:
    """Return the random bits of states.

    Args:
        seeds: (B,) int64.
        rows: rows of a state, D or H P.
        n: state size N.

    Returns:
        (B, rows, N) int32, from 0 to 65535.
    """
    device = seeds.device
    calls = torch.arange(-(-n // BITS_PER_CALL), device=device)  # (calls,)
    row = torch.arange(rows, device=device).unsqueeze(1)  # (rows, 1)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    c0, c1, c2, c3 = calls, row, zero, zero
    keys = [(seeds & WORD)[:, None, None], (seeds >> 32 & WORD)[:, None, None]]  # (B, 1, 1) each
    for _ in range(ROUNDS):
        # Products of 32 bits wrap around in int64, whose upper half is right all the same.
        first, second = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c2 = (second >> 32 & WORD) ^ c1 ^ keys[0], (first >> 32 & WORD) ^ c3 ^ keys[1]
        c1, c3 = second & WORD, first & WORD
        keys = [key + increment & WORD for key, increment in zip(keys, KEY_INCREMENTS, strict=True)]
    words = torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)  # (B, rows, calls, 4)
    halves = torch.stack([words & 0xFFFF, words >> 16], -1)  # (B, rows, calls, 4, 2)
    return halves.flatten(2)[..., :n].int()


def decode_state(state: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return the numbers that a stored state stands for.

    Args:
        state: (B, ..., N) in the format of a step op's state.
        scale: (B, ...) float32 for int8.

    Returns:
        float32, or the state itself where it is float32 or float64.
    """
    values = state.to(compute_dtype(state))
    return values if scale is None else values * scale.unsqueeze(-1)


def encode_state(values: Tensor, dtype: torch.dtype, rand_seed: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Round states to a narrow format, as a step op does: those after a prompt, for the pool of a server.

    Args:
        values: (B, ..., N) states.
        dtype: bfloat16, float16 or int8.
        rand_seed: (B,) or (1,) int64 for stochastic rounding; None for rounding to the nearest.

    Returns:
        the stored states, and the float32 scales (B, ...) of int8, else None.

    Raises:
        TypeError: another dtype.
    """
    if dtype not in NARROW_DTYPES:
        raise TypeError(f"dtype must be bfloat16, float16 or int8, got {str(dtype).removeprefix('torch.')}")
    values, noise = values.float(), None
    if rand_seed is not None:
        size = values.shape
        noise = random_bits(rand_seed.expand(size[0]), size[1:-1].numel(), size[-1]).view(size)
    if dtype == torch.int8:
        return _to_int8(values, noise)
    if noise is None:
        return values.to(dtype), None
    rounded = _to_bfloat16(values, noise) if dtype == torch.bfloat16 else _to_float16(values, noise)
    return torch.where(values.isnan(), values, rounded).to(dtype), None


def _to_bfloat16(values: Tensor, noise: Tensor) -> Tensor:
    """Cut the bits of values, with the noise added, to those of bfloat16; in float32."""
    return (values.view(torch.int32) + noise & ~0xFFFF).view(torch.float32)


def _to_float16(values: Tensor, noise: Tensor) -> Tensor:
    """Cut the bits of values, with the noise added, to those of float16; in float32."""
    size = values.abs()
    is_small = size < 2.0**-14
    # Added to a power of two, a magnitude below it has units that are the same for all: 13 bits below float16's.
    shifted = torch.where(is_small, size + 2.0**-14, size)
    cut = (shifted.view(torch.int32) + (noise >> 3) & ~0x1FFF).view(torch.float32)
    return torch.where(is_small, cut - 2.0**-14, cut).copysign(values)


def _to_int8(values: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    size = values.abs()
    largest = size.amax(-1)  # (B, ...); NaN where the row has one
    is_zero = largest < LEAST_ROW
    # In float32: a Python number would be divided by as a float64 on some devices.
    per_unit = torch.where(is_zero, 0.0, torch.full_like(largest, INT8_MAX * 65536.0) / largest)
    scale = torch.where(is_zero, 0.0, largest * torch.full_like(largest, 1 / INT8_MAX))
    units = (size * per_unit.unsqueeze(-1)).to(torch.int32)
    stored = units + (32768 if noise is None else noise) >> 16
    return torch.where(values < 0, -stored, stored).to(torch.int8), scale


def write_states(
    state: Tensor, scale: Tensor | None, rows: Tensor | slice, values: Tensor, seeds: Tensor | None
) -> Tensor:
    """Write states (B, ..., N) in the dtype of the computation to rows of a pool.

    Args:
        state: the pool.
        scale: its scales, for int8.
        rows: (B,) rows of the pool, or a slice.
        values: the states.
        seeds: (B,), or None.

    Returns:
        the states as they are stored, in the dtype of the computation.
    """
    if state.dtype not in NARROW_DTYPES:
        state[rows] = values
        return values
    stored, scales = encode_state(values, state.dtype, seeds)
    state[rows] = stored
    if scale is not None and scales is not None:
        scale[rows] = scales
    return decode_state(stored, scales)
