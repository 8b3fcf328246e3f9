"""Tiles of channels and their states: what the kernels that walk time share.

A thread owns a channel, or a part of its states, and walks time: there is no parallel scan. The N states of a channel
are a Triton tuple of K tensors (BLOCK_E, LANES), so that they stay in registers: state lane * K + k of channel e is
element [e, lane] of tensor k. A program works on BLOCK_E channels of one group. Programs are numbered along one axis,
neighbors in number being neighbors in channels, since they read the same B and C.

Decays are powers of two, `exp2(dt A log2(e))`, the exponential that the hardware has. Channels' strides are not
specialized: where one is known to be 1, the compiler gives each load a layout of its own and converts between them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import capability
from ..._triton.primitives import and_scalar, compute_type, grid_offset, softplus

# A thread of the other kernels that walk time: 16 warps a processor, more than most calls give it.
REGISTERS = 128
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

_STRIDES = [f"{x}_{i}" for x in ("u", "dt", "z", "y", "dy", "du", "ddt", "dz") for i in range(4)]
_STRIDES += [f"{x}_{i}" for x in "BC" for i in range(3)] + ["scratch_0", "scratch_1"]


def jit_unspecialized(kernel):
    """Compile a kernel whose strides are not specialised."""
    return triton.jit(kernel, do_not_specialize=[s for s in _STRIDES if s in kernel.__code__.co_varnames])


@triton.jit
def place_program(G, E, BLOCK_E: tl.constexpr, LANES: tl.constexpr):
    """Piece and group of this program, (BLOCK_E, LANES) channels in the group, and lanes. All int64."""
    tiles = tl.cdiv(E, BLOCK_E)
    program = tl.program_id(0)
    e = program % tiles * BLOCK_E + tl.arange(0, BLOCK_E)[:, None] + tl.zeros((1, LANES), tl.int32)
    lane = tl.arange(0, LANES)[None, :] + tl.zeros((BLOCK_E, 1), tl.int32)
    unit = (program // tiles).to(tl.int64)
    return unit // G, unit % G, e.to(tl.int64), lane


@triton.jit
def near_offset(t0, i: tl.constexpr, end, way):
    """Where step t0 + i lies, or the last step if that is before; `way`: None, or a direction, the grid's size and height.

    Counted from t0 where there is no direction: a small number, so that a block of steps needs one 64-bit product, `far`.
    """
    if way is None:
        near = tl.minimum(i, end - 1 - t0)
    else:
        near = grid_offset(tl.minimum(t0 + i, end - 1), way[0], way[1], way[2]).to(tl.int64)
    return near


@triton.jit
def zero_states(BLOCK_E: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr, COMPUTE: tl.constexpr):
    values = ()
    for _ in tl.static_range(K):
        values = values + (tl.zeros((BLOCK_E, LANES), COMPUTE),)
    return values


@triton.jit
def load_states(pointer, mask, lane, N: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr, COMPUTE: tl.constexpr):
    """The states of a channel, times SCALE, as a tuple; zero for those beyond N. pointer (BLOCK_E, LANES)."""
    values = ()
    for k in tl.static_range(K):
        n = lane * K + k
        values = values + (tl.load(pointer + n, mask & (n < N), other=0.0).to(COMPUTE) * SCALE,)
    return values


@triton.jit
def store_states(pointer, values, mask, lane, N: tl.constexpr, K: tl.constexpr):
    for k in tl.static_range(K):
        n = lane * K + k
        tl.store(pointer + n, values[k].to(pointer.dtype.element_ty), mask & (n < N))


@triton.jit
def load_matrix(
    pointer, lanes, inside, N: tl.constexpr, K: tl.constexpr, WORD: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """K values (1, LANES) of a row of B or C for all channels, the first at `pointer`; WORD values a load.

    Zero where the step is not `inside`: an infinity of the row that stands for it would meet a step size of zero.
    """
    values = ()
    if WORD == 1:
        for k in tl.static_range(K):
            values = values + (tl.load(pointer + k, and_scalar(lanes * K + k < N, inside), other=0.0).to(COMPUTE),)
    else:
        words = pointer.to(tl.pointer_type(tl.int64), bitcast=True)
        for i in tl.static_range(K // WORD):
            word = tl.load(words + i, and_scalar(lanes >= 0, inside), other=0)
            for j in tl.static_range(WORD):
                values = values + (_unpack(word, j, WORD, pointer.dtype.element_ty).to(COMPUTE),)
    return values


@triton.jit
def _unpack(word, j: tl.constexpr, WORD: tl.constexpr, dtype: tl.constexpr):
    """Value j of the WORD values in a 64-bit word."""
    half = (word >> (64 // WORD * j // 32 * 32)).to(tl.int32)
    if WORD == 2:
        value = half.to(dtype, bitcast=True)
    elif dtype == tl.float16:
        value = (half >> (16 * (j % 2))).to(tl.int16).to(tl.float16, bitcast=True)
    else:  # bfloat16 is the upper half of float32
        value = (half & -65536 if j % 2 else half << 16).to(tl.float32, bitcast=True)
    return value


@triton.jit
def load(pointer, mask, COMPUTE: tl.constexpr):
    return tl.load(pointer, mask, other=0.0).to(COMPUTE)


@triton.jit
def load_delta(pointer, mask, bias, SOFTPLUS: tl.constexpr, COMPUTE: tl.constexpr):
    """The step size; zero, which leaves the state as it is, outside of the mask."""
    delta = load(pointer, mask, COMPUTE) + bias
    if SOFTPLUS:
        delta = softplus(delta)
    return tl.where(mask, delta, 0.0)


@triton.jit
def advance(h, a, b, delta, dx, K: tl.constexpr):
    """The states after a step."""
    after = ()
    for k in tl.static_range(K):
        after = after + (tl.exp2(delta * a[k]) * h[k] + dx * b[k],)
    return after


@triton.jit
def dot(x, y, K: tl.constexpr):
    total = x[0] * y[0]
    for k in tl.static_range(1, K):
        total += x[k] * y[k]
    return total


@triton.jit
def sum_over_lanes(x, LANES: tl.constexpr):
    """(BLOCK_E, LANES) -> sums over the lanes (BLOCK_E, 1)."""
    if LANES == 1:
        return x
    else:
        return tl.sum(x, axis=1, keep_dims=True)


def compile_options(tile, u, dt_softplus, A, B, C, D, z, dt_bias, directions) -> dict[str, object]:
    """What the kernels that walk time are compiled for."""
    return tile | {
        "N": A.shape[1],
        "B_WORD": _word(B, tile),
        "C_WORD": _word(C, tile),
        "CONSTANT_B": B.dim() == 2,
        "CONSTANT_C": C.dim() == 2,
        "HAS_D": D is not None,
        "HAS_Z": z is not None,
        "HAS_BIAS": dt_bias is not None,
        "SOFTPLUS": dt_softplus,
        "ROUTED": bool(directions),
        "COMPUTE": compute_type(u.dtype),
    }


def unroll(directions, device: torch.device) -> int:
    """Steps that are computed together, so that loads need not wait for stores; it divides CHECKPOINT_INTERVAL.

    Fewer on a direction, where each step's place takes registers, and where NVIDIA's compiler would spill: before Hopper,
    and on consumer Blackwell.
    """
    vendor, version = capability(device)
    return 1 if directions else 2 if vendor == "cuda" and not 90 <= version < 120 else 4


def forward_tile(n: int, device: torch.device) -> dict[str, int]:
    """For the forward: 64 threads, of at most 16 states each."""
    return fill_tile(n, 16) | {"num_warps": 1 if capability(device)[0] == "hip" else 2}


def fill_tile(n: int, states: int) -> dict[str, int]:
    """A tile of 64 elements of `states` states."""
    lanes = triton.next_power_of_2(triton.cdiv(n, states))
    return {"LANES": lanes, "K": triton.cdiv(n, lanes), "BLOCK_E": max(1, 64 // lanes)}


def _word(matrix: Tensor, tile: dict[str, int]) -> int:
    """How many values of B or C one load of 64 bits takes: one by one unless all loads lie at multiples of it."""
    size = matrix.element_size()
    per_word = 8 // size
    is_whole = tile["K"] % per_word == 0 and tile["K"] * tile["LANES"] == matrix.shape[-1]
    is_aligned = matrix.data_ptr() % 8 == 0 and all(s * size % 8 == 0 for s in matrix.stride()[:-1])
    return per_word if matrix.dim() == 4 and is_whole and is_aligned else 1


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def with_near_steps(x: Tensor | None) -> Tensor | None:
    """The tensor itself unless its steps are so far apart that offsets within a block of them pass 32 bits."""
    return x.contiguous() if x is not None and x.dim() == 4 and x.stride(1) >= 1 << 28 else x


def strides_of(x: Tensor | None, count: int) -> tuple[int, ...]:
    """The first strides of a tensor; zeros where it is None or constant in time."""
    return (0,) * count if x is None or x.dim() == 2 else x.stride()[:count]
