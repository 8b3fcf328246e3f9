"""Tiles of channels and their states, for the kernels that scan time.

There is no parallel scan: a thread owns a channel, or some of its states, and loops over time. The N states of a
channel are a Triton tuple of K tensors (BLOCK_E, LANES), which stay in registers: state `lane * K + k` of channel e is
element [e, lane] of tensor k. A program works on BLOCK_E channels of one group. Programs are numbered along one axis,
and neighbors have neighboring channels, since they read the same B and C.

Decays are powers of two, `exp(dt A) = exp2(dt A LOG2E)`, since the hardware computes exp2.

Letters: B batch, L length, G groups, E channels of a group, N states, M segments, S sequences.
"""

# The stubs know neither launches nor what jit functions return.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import copy
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import capability, pack_directions, with_contiguous_last_dim
from ..._triton.primitives import and_scalar, compute_type, grid_offset, softplus
from ..arguments import ScanArguments

REGISTERS = 128
"""Registers of a thread, on NVIDIA, in the kernels that scan once: 16 warps on an SM, more than most calls have."""
CUT_REGISTERS = 160
"""The same in the second pass over cut sequences, where B and C are in float32: 6 programs on an SM, as many as such
calls have where they pack none. With 128 or 144, NVIDIA's compiler spills on one architecture or another."""


def jit_with_opaque_strides(kernel):
    """Compile a kernel that knows nothing of the values of its parameters `stride_*`.

    Where a channel stride is known to be 1, the compiler lays each load out on its own and converts between layouts:
    60 % more shuffles in the backward. Triton specializes members of tuples in any case, so these are parameters.
    """
    parameters = kernel.__code__.co_varnames[: kernel.__code__.co_argcount]
    return triton.jit(kernel, do_not_specialize=[name for name in parameters if name.startswith("stride_")])


# --- launches -------------------------------------------------------------------------------------------------------


class ScanInputs:
    """Tensors of one call in the layouts that the kernels read, its sizes, and compile-time options of its kernels."""

    def __init__(self, arguments: ScanArguments):
        u, B, C = arguments.u, arguments.B, arguments.C
        self.batch, self.length, self.groups, self.group_channels = u.shape
        self.dim, self.d_state = arguments.A.shape
        self.u, self.dt = with_close_steps(u), with_close_steps(arguments.dt)
        self.z = None if arguments.z is None else with_close_steps(arguments.z)
        self.A = arguments.A.contiguous()
        self.B, self.C = _matrix(B), _matrix(C)
        self.D = None if arguments.D is None else arguments.D.contiguous()
        self.dt_bias = None if arguments.dt_bias is None else arguments.dt_bias.contiguous()
        self.initial_states = None if arguments.initial_states is None else arguments.initial_states.contiguous()
        self.cu_seqlens, self.seq_idx = arguments.cu_seqlens, arguments.seq_idx
        self.is_packed = self.cu_seqlens is not None or self.seq_idx is not None
        self.num_state_rows = self.batch if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        self.device = u.device
        self.state_dtype = torch.promote_types(u.dtype, torch.float32)
        self.has_directions = bool(arguments.directions)
        self.sizes = (
            self.length, arguments.height, pack_directions(arguments.directions), self.groups, self.group_channels
        )  # fmt: skip
        """(length, height, directions, num_groups, group_channels), as kernels take them."""
        self.constants: dict[str, Any] = {
            "N": self.d_state,
            "CONSTANT_B": B.dim() == 2,
            "CONSTANT_C": C.dim() == 2,
            "HAS_D": arguments.D is not None,
            "HAS_Z": arguments.z is not None,
            "HAS_DT_BIAS": arguments.dt_bias is not None,
            "DT_SOFTPLUS": arguments.dt_softplus,
            "NUM_DIRECTIONS": len(arguments.directions),
            "COMPUTE": compute_type(u.dtype),
        }

    def with_rows(self, B: Tensor | None, C: Tensor | None) -> ScanInputs:
        """Return these inputs with copies of B and C (B, L, G, N) in their place, where there are such."""
        inputs = copy.copy(self)
        inputs.B, inputs.C = self.B if B is None else B, self.C if C is None else C
        return inputs

    def options(self, tile: dict[str, int]) -> dict[str, Any]:
        """Compile-time options of a kernel with this tile."""
        return tile | self.constants | {"B_WORD": _word(self.B, tile), "C_WORD": _word(self.C, tile)}


def forward_tile(n: int, device: Any) -> dict[str, int]:
    """Choose the tile of the kernels that scan once: 64 threads, of at most 16 states each."""
    return fill_tile(n, 16) | {"num_warps": 1 if capability(device)[0] == "hip" else 2}


def fill_tile(n: int, states: int) -> dict[str, int]:
    """Return a tile of 64 elements of at most `states` states each."""
    lanes = triton.next_power_of_2(triton.cdiv(n, states))
    return {"LANES": lanes, "K": triton.cdiv(n, lanes), "BLOCK_E": max(1, 64 // lanes)}


def unroll(inputs: ScanInputs) -> int:
    """Choose how many steps are computed together, so that loads need not wait for stores.

    It divides CHECKPOINT_INTERVAL. Fewer along directions, where the position of each step takes registers, and where
    NVIDIA's compiler would spill: with B or C in registers for all steps, before Hopper, and on consumer Blackwell.
    """
    vendor, version = capability(inputs.device)
    if inputs.has_directions:
        return 1
    is_constant = inputs.constants["CONSTANT_B"] or inputs.constants["CONSTANT_C"]
    return 2 if vendor == "cuda" and (is_constant or not 90 <= int(version) < 120) else 4


def strides(x: Tensor | None) -> tuple[Any, ...] | None:
    """Strides of batch, time and group; None for no tensor, or for a matrix that is constant in time.

    The stride of time is compiled in: a step of a block is then a constant away from the first, where it would take an
    address of its own, 9 % of the forward's instructions. It is 1 or a number of channels, so that few kernels are
    compiled; where it may depend on the batch, as in (L, B, D), it is left at run time.
    """
    if x is None or x.dim() == 2:
        return None
    batch, time, group = x.stride()[:3]
    return batch, tl.constexpr(time) if time <= batch else time, group


def channel_stride(x: Tensor | None) -> int | None:
    """Stride of the channels of x (B, L, G, E)."""
    return None if x is None else x.stride(3)


def with_close_steps(x: Tensor) -> Tensor:
    """Return x (B, L, ...), or a copy where its steps are so far apart that offsets in a block would pass 32 bits."""
    return x.contiguous() if x.stride(1) >= 1 << 28 else x


def _matrix(m: Tensor) -> Tensor:
    """B or C with a contiguous last dimension."""
    return m.contiguous() if m.dim() == 2 else with_close_steps(with_contiguous_last_dim(m))


def _word(m: Tensor, tile: dict[str, int]) -> int:
    """Count the values of B or C in one load of 64 bits: 1 unless all loads are aligned to 64 bits."""
    size = m.element_size()
    per_word = 8 // size
    is_filled = tile["K"] % per_word == 0 and tile["K"] * tile["LANES"] == m.shape[-1]
    is_aligned = m.data_ptr() % 8 == 0 and all(s * size % 8 == 0 for s in m.stride()[:-1])
    return per_word if m.dim() == 4 and is_filled and is_aligned else 1


# --- programs and steps ---------------------------------------------------------------------------------------------


@triton.jit
def split_program(num_groups, group_channels, BLOCK_E: tl.constexpr, LANES: tl.constexpr):
    """Locate a program: its segment and group, its channels in the group and their lanes, (BLOCK_E, LANES)."""
    tiles = tl.cdiv(group_channels, BLOCK_E)
    program = tl.program_id(0)
    e = tile_channels(program % tiles, BLOCK_E, LANES)
    segment_and_group = (program // tiles).to(tl.int64)
    return segment_and_group // num_groups, segment_and_group % num_groups, e, tile_lanes(BLOCK_E, LANES)


@triton.jit
def tile_channels(tile, BLOCK_E: tl.constexpr, LANES: tl.constexpr):
    """Channel in the group of each element of a tile, (BLOCK_E, LANES), int64."""
    return (tile * BLOCK_E + tl.arange(0, BLOCK_E)[:, None] + tl.zeros((1, LANES), tl.int32)).to(tl.int64)


@triton.jit
def tile_lanes(BLOCK_E: tl.constexpr, LANES: tl.constexpr):
    """Lane of each element of a tile, (BLOCK_E, LANES)."""
    return tl.arange(0, LANES)[None, :] + tl.zeros((BLOCK_E, 1), tl.int32)


@triton.jit
def step_ptr(ptr, t0, i: tl.constexpr, stride, grid):
    """Pointer to step t0 + i; `grid` is (direction, length, height) where steps follow a scan direction, or None.

    In time, blocks of steps that begin at t0 need one 64-bit product, and the rest is a constant of each load.
    """
    if grid is None:
        offset = tl.cast(t0, tl.int64) * stride + i * stride
    else:
        offset = grid_offset(t0 + i, grid[0], grid[1], grid[2]).to(tl.int64) * stride
    return ptr + offset


@triton.jit
def load_steps(ptr, t0, stride, grid, mask, COUNT: tl.constexpr):
    """Load COUNT steps from t0 on, each (BLOCK_E, LANES), in the dtype of memory."""
    values = ()
    for i in tl.static_range(COUNT):
        values = values + (tl.load(step_ptr(ptr, t0, i, stride, grid), mask),)
    return values


@triton.jit
def step_size(dt, dt_bias, DT_SOFTPLUS: tl.constexpr):
    """Return the step size: `dt + dt_bias`, or the softplus of that."""
    dt += dt_bias
    if DT_SOFTPLUS:
        dt = softplus(dt)
    return dt


@triton.jit
def load_channels(ptr, mask, COMPUTE: tl.constexpr):
    """Load a value of each channel, zero outside the mask; all of them where it is None."""
    if mask is None:
        value = tl.load(ptr)
    else:
        value = tl.load(ptr, mask, other=0.0)
    return value.to(COMPUTE)


@triton.jit
def load_vector(ptr, mask, COMPUTE: tl.constexpr):
    """Load D or dt_bias of each channel."""
    return tl.load(ptr, mask, other=0.0).to(COMPUTE)


# --- states: tuples of K tensors (BLOCK_E, LANES) -------------------------------------------------------------------


@triton.jit
def zero_states(BLOCK_E: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr, COMPUTE: tl.constexpr):
    values = ()
    for _ in tl.static_range(K):
        values = values + (tl.zeros((BLOCK_E, LANES), COMPUTE),)
    return values


@triton.jit
def load_states(ptr, mask, lane, N: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr, COMPUTE: tl.constexpr):
    """Load a row of N values of each channel, times SCALE; zero beyond N. ptr (BLOCK_E, LANES): start of the row."""
    values = ()
    for k in tl.static_range(K):
        n = lane * K + k
        values = values + (tl.load(ptr + n, mask & (n < N), other=0.0).to(COMPUTE) * SCALE,)
    return values


@triton.jit
def store_states(ptr, values, mask, lane, N: tl.constexpr, K: tl.constexpr):
    """Store a row of N values of each channel. ptr (BLOCK_E, LANES): start of the row."""
    for k in tl.static_range(K):
        n = lane * K + k
        tl.store(ptr + n, values[k].to(ptr.dtype.element_ty), mask & (n < N))


@triton.jit
def load_row(
    row_ptr, lanes, is_step,
    N: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, WORD: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Load one step of B or C, K values (1, LANES) for all channels, WORD values in a load.

    Args:
        row_ptr: (1, LANES)
        is_step: None, or whether there is such a step; zeros where there is none.
    """
    values = ()
    if WORD == 1:
        for k in tl.static_range(K):
            if is_step is not None:
                value = tl.load(row_ptr + k, and_scalar(lanes * K + k < N, is_step), other=0.0)
            elif K * LANES > N:
                value = tl.load(row_ptr + k, lanes * K + k < N, other=0.0)
            else:
                value = tl.load(row_ptr + k)
            values = values + (value.to(COMPUTE),)
    else:
        word_ptr = row_ptr.to(tl.pointer_type(tl.int64), bitcast=True)
        for i in tl.static_range(K // WORD):
            if is_step is None:
                word = tl.load(word_ptr + i)
            else:
                word = tl.load(word_ptr + i, and_scalar(lanes >= 0, is_step), other=0)
            for j in tl.static_range(WORD):
                values = values + (_unpack(word, j, WORD, row_ptr.dtype.element_ty).to(COMPUTE),)
    return values


@triton.jit
def _unpack(word, j: tl.constexpr, WORD: tl.constexpr, dtype: tl.constexpr):
    """Return value j of the WORD values in a 64-bit word."""
    half = (word >> (64 // WORD * j // 32 * 32)).to(tl.int32)
    if WORD == 2:
        value = half.to(dtype, bitcast=True)
    elif dtype == tl.float16:
        value = (half >> (16 * (j % 2))).to(tl.int16).to(tl.float16, bitcast=True)
    else:  # bfloat16 is the upper half of float32
        value = (half & -65536 if j % 2 else half << 16).to(tl.float32, bitcast=True)
    return value


@triton.jit
def advance_states(h, a, b, dt, dtu, K: tl.constexpr):
    """Return the states after a step: `exp(dt A) h + dt u B` (equation 2a), with a = A LOG2E and dtu = dt u."""
    after = ()
    for k in tl.static_range(K):
        after = after + (tl.exp2(dt * a[k]) * h[k] + dtu * b[k],)
    return after


@triton.jit
def add_scaled(x, scale, y, K: tl.constexpr):
    """Return `x + scale * y` of states."""
    total = ()
    for k in tl.static_range(K):
        total = total + (x[k] + scale * y[k],)
    return total


@triton.jit
def scale_states(x, scale, K: tl.constexpr):
    """Return `scale * x` of states."""
    scaled = ()
    for k in tl.static_range(K):
        scaled = scaled + (scale * x[k],)
    return scaled


@triton.jit
def dot_states(x, y, K: tl.constexpr, LANES: tl.constexpr):
    """Return the product over all states of each channel, (BLOCK_E, LANES or 1)."""
    total = x[0] * y[0]
    for k in tl.static_range(1, K):
        total += x[k] * y[k]
    return total if LANES == 1 else tl.sum(total, axis=1, keep_dims=True)
